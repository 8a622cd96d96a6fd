"""Asks a server for more long answers than fit, with the full cache and with the compressed one, and watches its metrics.

Usage: capacity.py MODEL TEXT BYTES TOKENS COMMAND
"""

import concurrent.futures
import sys
import threading
import time

from served import Served, write

#: New tokens of an answer. A step reads some 512 tokens of prompts and makes a token of every answer, so the first answers must
#: last for all prompts' steps: only then are all texts that fit there at the same time.
NEW = 384
#: More than fit.
ASKED = {False: 5, True: 18}


def measure(enabled):
    """The most texts that ran at once, and what they held then."""
    before = server.metrics()
    best = {}
    done = threading.Event()

    def watch():
        while not done.is_set():
            now = server.metrics()
            # All of them, and as long as they get: what counts is held, not promised.
            if (now["kvfold_requests_running"], now["kvfold_kv_bytes_dense"]) >= (
                best.get("kvfold_requests_running", 0),
                best.get("kvfold_kv_bytes_dense", 0),
            ):
                best.update(now)
            time.sleep(0.5)

    def ask(prompt):
        body = {"prompt": prompt, "max_tokens": NEW, "ignore_eos": True, "temperature": 0, "kvfold": {"enabled": enabled}}
        return server.post("/v1/completions", body)["usage"]["kvfold"]

    watcher = threading.Thread(target=watch)
    watcher.start()
    count = ASKED[enabled]
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        held = list(pool.map(ask, server.prompts(text, count, tokens - NEW)))
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    assert all(each["engaged"] == enabled for each in held)
    if best["kvfold_requests_running"] >= count:
        sys.exit(f"all {count} texts ran at once, so nothing says how many fit; give fewer BYTES, or more TOKENS")
    return {
        "asked": count,
        "running_at_most": int(best["kvfold_requests_running"]),
        "then": {name: best[f"kvfold_{name}"] for name in ("kv_bytes_held", "kv_bytes_dense", "logical_ratio", "physical_ratio")},
        "preemptions": int(server.metrics()["kvfold_preemptions_total"] - before["kvfold_preemptions_total"]),
        "bytes_of_each_at_its_end": [each["kv_bytes"] for each in held],
        "seconds": seconds,
        "tokens_per_second": count * tokens / seconds,
    }


model, text, size, tokens, command = sys.argv[1:]
tokens = int(tokens)
with Served(model, "--kv-memory", size, "--max-running", "256") as server:
    full = measure(False)
    compressed = measure(True)
    ratio = compressed["running_at_most"] / full["running_at_most"]
    what = {"tokens_of_a_sequence": tokens, "full": full, "compressed": compressed, "ratio": ratio}
    write("results/capacity.json", server.about("kvfold.capacity/1", command) | what)
print(f"{full['running_at_most']} texts of {tokens} tokens with the full cache, {compressed['running_at_most']} compressed: {ratio:.2f}x")
