"""What measurements ask of a server that runs."""

import datetime
import json
import os
import platform
import urllib.request


class Served:
    def __init__(self, address):
        self.address = address

    def get(self, path):
        with urllib.request.urlopen(self.address + path) as answer:
            return answer.read().decode()

    def open(self, path, body):
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=3600)

    def post(self, path, body):
        with self.open(path, body) as answer:
            return json.load(answer)

    def metrics(self):
        lines = (line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if line.startswith("kvfold_"))
        return {name: float(value) for name, value in lines}

    def prompts(self, text, count, length):
        """Pieces of a text, each beginning somewhere else, so that no two begin alike."""
        with open(text) as file:
            ids = self.post("/tokenize", {"prompt": file.read()[: 24 * length * count], "add_special_tokens": False})["tokens"]
        step = max(1, len(ids) // count)
        return [(ids[n * step :] + ids * (length // len(ids) + 1))[:length] for n in range(count)]

    def about(self, schema, command, commit):
        """What a result begins with."""
        with open("/proc/cpuinfo") as info:
            cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
        return {
            "schema": schema,
            "command": command,
            "commit": commit,
            "date": str(datetime.date.today()),
            "machine": f"{cpu}, {os.cpu_count()} cores",
            "model": json.loads(self.get("/v1/models"))["data"][0]["id"],
            "kv_bytes_limit": self.metrics()["kvfold_kv_bytes_limit"],
        }


def write(path, result):
    """A result in place of the one before."""
    with open(f"{path}.new", "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.replace(f"{path}.new", path)
