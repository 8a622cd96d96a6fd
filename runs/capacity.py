"""Asks a server for more long answers than fit, with the full cache and with the compressed one, and watches its metrics.

Usage: capacity.py ADDRESS TEXT TOKENS COMMAND COMMIT
"""

import concurrent.futures
import datetime
import json
import os
import sys
import threading
import time
import urllib.request

#: New tokens of an answer: long enough that all texts that fit are there at the same time.
NEW = 96
#: More than fit.
ASKED = {False: 6, True: 24}


def get(path):
    with urllib.request.urlopen(address + path) as answer:
        return answer.read().decode()


def post(path, body):
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=3600) as answer:
        return json.load(answer)


def metrics():
    lines = (line.rsplit(" ", 1) for line in get("/metrics").splitlines() if line.startswith("kvfold_"))
    return {name: float(value) for name, value in lines}


def prompts(count, length):
    """Pieces of the text, each beginning somewhere else, so that no two begin alike."""
    with open(text) as file:
        ids = post("/tokenize", {"prompt": file.read()[: 24 * length], "add_special_tokens": False})["tokens"]
    step = max(1, len(ids) // count)
    return [(ids[n * step :] + ids * (length // len(ids) + 1))[:length] for n in range(count)]


def measure(enabled):
    """The most texts that ran at once, and what they held then."""
    before = metrics()
    best = {}
    done = threading.Event()

    def watch():
        while not done.is_set():
            now = metrics()
            # All of them, and as long as they get: what counts is held, not promised.
            if (now["kvfold_requests_running"], now["kvfold_kv_bytes_dense"]) >= (
                best.get("kvfold_requests_running", 0),
                best.get("kvfold_kv_bytes_dense", 0),
            ):
                best.update(now)
            time.sleep(0.5)

    def ask(prompt):
        body = {"prompt": prompt, "max_tokens": NEW, "ignore_eos": True, "temperature": 0, "kvfold": {"enabled": enabled}}
        return post("/v1/completions", body)["usage"]["kvfold"]

    watcher = threading.Thread(target=watch)
    watcher.start()
    count = ASKED[enabled]
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        held = list(pool.map(ask, prompts(count, tokens - NEW)))
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    assert all(each["engaged"] == enabled for each in held)
    return {
        "asked": count,
        "running_at_most": int(best["kvfold_requests_running"]),
        "then": {name: best[f"kvfold_{name}"] for name in ("kv_bytes_held", "kv_bytes_dense", "logical_ratio", "physical_ratio")},
        "preemptions": int(metrics()["kvfold_preemptions_total"] - before["kvfold_preemptions_total"]),
        "bytes_of_each_at_its_end": [each["kv_bytes"] for each in held],
        "seconds": seconds,
        "tokens_per_second": count * tokens / seconds,
    }


address, text, tokens, command, commit = sys.argv[1:]
tokens = int(tokens)
full = measure(False)
compressed = measure(True)
with open("/proc/cpuinfo") as info:
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "unknown")
result = {
    "schema": "kvfold.capacity/1",
    "command": command,
    "commit": commit,
    "date": str(datetime.date.today()),
    "machine": f"{cpu}, {os.cpu_count()} cores",
    "model": json.loads(get("/v1/models"))["data"][0]["id"],
    "kv_bytes_limit": metrics()["kvfold_kv_bytes_limit"],
    "tokens_of_a_sequence": tokens,
    "full": full,
    "compressed": compressed,
    "ratio": compressed["running_at_most"] / full["running_at_most"],
}
with open("results/capacity.json", "w") as file:
    json.dump(result, file, indent=2)
    file.write("\n")
print(f"{full['running_at_most']} texts of {tokens} tokens with the full cache, {compressed['running_at_most']} compressed: {result['ratio']:.2f}x")
