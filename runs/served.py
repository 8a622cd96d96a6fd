"""What measurements ask of a server: the one of tests/clients/serving.py, with requests that may take an hour."""

import datetime
import json
import os
import platform
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/clients"))
from serving import Server  # noqa: E402


class Served(Server):
    """A server of this build, for as long as the `with` lasts."""

    def __init__(self, model, *arguments):
        super().__init__(ROOT / "target/release/kvfold", model, *arguments)

    def open(self, path, body):
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=3600)

    def post(self, path, body):
        with self.open(path, body) as answer:
            return json.load(answer)

    def prompts(self, text, count, length):
        """Pieces of a text, each beginning somewhere else, so that no two begin alike."""
        with open(text) as file:
            ids = self.post("/tokenize", {"prompt": file.read()[: 24 * length * count], "add_special_tokens": False})["tokens"]
        step = max(1, len(ids) // count)
        return [(ids[n * step :] + ids * (length // len(ids) + 1))[:length] for n in range(count)]

    def about(self, schema, command):
        """What a result begins with."""
        with open("/proc/cpuinfo") as info:
            cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
        return {
            "schema": schema,
            "command": command,
            "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
            "date": str(datetime.date.today()),
            "machine": f"{cpu}, {os.cpu_count()} cores",
            "model": self.model(),
            "kv_bytes_limit": self.metrics()["kvfold_kv_bytes_limit"],
        }


def write(path, result):
    """A result in place of the one before."""
    with open(f"{path}.new", "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.replace(f"{path}.new", path)
