"""Rates of a server by how many clients ask at once, with the full cache and with the compressed one in turn.

Usage: concurrency.py MODEL TEXT BYTES ROUNDS COMMAND
"""

import concurrent.futures
import json
import statistics
import sys
import time

from served import Served, write

CLIENTS = [1, 2, 4, 8, 16]
PROMPT, NEW = 256, 512
NAMES = {False: "full", True: "compressed"}


def ask(prompt, enabled):
    """When the tokens of an answer came, and what its cache held."""
    body = {
        "prompt": prompt, "max_tokens": NEW, "ignore_eos": True, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, "kvfold": {"enabled": enabled},
    }  # fmt: skip
    began, times, usage = time.monotonic(), [], None
    with server.open("/v1/completions", body) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                if event["choices"]:
                    times.append(time.monotonic() - began)
    assert usage["completion_tokens"] == NEW and usage["kvfold"]["engaged"] == enabled, usage
    return {"first": times[0], "whole": times[-1], "kv_bytes": usage["kvfold"]["kv_bytes"]}


def measure(prompts, enabled):
    """One round of as many clients as there are prompts."""
    before, began = server.metrics(), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(prompt, enabled), prompts))
    seconds = time.monotonic() - began
    preempted = server.metrics()["kvfold_preemptions_total"] - before["kvfold_preemptions_total"]
    return {
        "tokens_per_second": len(prompts) * NEW / seconds,
        "first_token_seconds": statistics.median(answer["first"] for answer in answers),
        "answer_seconds": statistics.median(answer["whole"] for answer in answers),
        "kv_bytes": statistics.mean(answer["kv_bytes"] for answer in answers),
        "preemptions": preempted,
    }


model, text, size, rounds, command = sys.argv[1:]
rounds, cells = int(rounds), []
with Served(model, "--kv-memory", size, "--max-running", "32") as server:
    # Every round of every kind reads its own, so that nothing is found that was kept.
    prompts = iter(server.prompts(text, 2 * rounds * sum(CLIENTS) + 2, PROMPT))
    for enabled in NAMES:
        measure([next(prompts)], enabled)
    for clients in CLIENTS:
        measured = {enabled: [] for enabled in NAMES}
        for _ in range(rounds):
            for enabled in NAMES:
                measured[enabled].append(measure([next(prompts) for _ in range(clients)], enabled))
                print(f"{clients} clients, {NAMES[enabled]}: {measured[enabled][-1]['tokens_per_second']:.1f} tokens/s", file=sys.stderr, flush=True)
        median = lambda enabled, name: statistics.median(each[name] for each in measured[enabled])
        cell = {NAMES[enabled]: {name: median(enabled, name) for name in measured[enabled][0]} for enabled in NAMES}
        for enabled in NAMES:
            cell[NAMES[enabled]]["rounds"] = [each["tokens_per_second"] for each in measured[enabled]]
        ratio = median(True, "tokens_per_second") / median(False, "tokens_per_second")
        cells.append({"clients": clients} | cell | {"compressed_over_full": round(ratio, 3)})
        what = {"prompt_tokens": PROMPT, "new_tokens": NEW, "medians_of": rounds, "rows": cells}
        write("results/concurrency.json", server.about("kvfold.concurrency/1", command) | what)
for cell in cells:
    rates = [cell[name]["tokens_per_second"] for name in NAMES.values()]
    print(f"{cell['clients']:>3} clients: {rates[0]:7.1f} full, {rates[1]:7.1f} compressed, {cell['compressed_over_full']:.2f}x")
