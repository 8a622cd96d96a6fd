"""Times prefill and decode rows with OpenVINO GenAI's continuous batching, prefix caching off; prints one JSON document.

A step of its scheduler gives every running sequence a token, so decoding is timed step by step once all prompts are in:
as kvfold does it, from the depth of the row.

Usage: openvino_rows.py MODEL.gguf --threads N --tokens N [--kv-precision TYPE] [--prefill SxN ...] [--decode SxN ...]
"""

import argparse
import json
import random
import sys
import time

import numpy
import openvino
import openvino_genai as genai

VOCABULARY = 49152
# What the cache may take, in GB: more than any row needs.
CACHE = 6
# Tokens of a scheduler's step.
STEP = 1024


def batch(text: str) -> tuple[int, int]:
    sequences, tokens = text.split("x")
    return int(sequences), int(tokens)


class Pipeline:
    def __init__(self, args: argparse.Namespace):
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = CACHE
        scheduler.max_num_batched_tokens = args.step
        properties = {
            "INFERENCE_PRECISION_HINT": args.precision,
            "INFERENCE_NUM_THREADS": args.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if args.kv_precision:
            properties["KV_CACHE_PRECISION"] = args.kv_precision
        self.pipe = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)
        self.step = args.step
        self.requests = 0
        self.random = random.Random(0)

    def add(self, sequences: int, tokens: int, new: int) -> list:
        config = genai.GenerationConfig()
        config.max_new_tokens = new
        config.min_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        handles = []
        for _ in range(sequences):
            prompt = [[self.random.randrange(100, VOCABULARY) for _ in range(tokens)]]
            ids = openvino.Tensor(numpy.array(prompt, dtype=numpy.int64))
            handles.append(self.pipe.add_request(self.requests, ids, config))
            self.requests += 1
        return handles

    def drain(self) -> None:
        while self.pipe.has_non_finished_requests():
            self.pipe.step()

    def prefill(self, sequences: int, tokens: int) -> float:
        handles = self.add(sequences, tokens, 1)
        started = time.perf_counter()
        self.drain()
        seconds = time.perf_counter() - started
        if not all(handle.can_read() for handle in handles):
            sys.exit("a prompt was not read")
        return sequences * tokens / seconds

    def decode(self, sequences: int, depth: int, new: int) -> float:
        # A prompt has a token at least, and sequences whose prompts are in decode while others' still come.
        waiting = sequences * max(depth, 1) // self.step + sequences
        handles = self.add(sequences, max(depth, 1), waiting + new + 1)
        ready = [False] * sequences
        while not all(ready):
            self.pipe.step()
            ready = [was or handle.can_read() for was, handle in zip(ready, handles)]
        started = time.perf_counter()
        for _ in range(new):
            self.pipe.step()
        seconds = time.perf_counter() - started
        for handle in handles:
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                sys.exit("a sequence ended before its row did")
            handle.cancel()
        self.drain()
        return sequences * new / seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--kv-precision", default="")
    parser.add_argument("--step", type=int, default=STEP)
    parser.add_argument("--prefill", type=batch, nargs="*", default=[])
    parser.add_argument("--decode", type=batch, nargs="*", default=[])
    args = parser.parse_args()
    pipeline = Pipeline(args)
    pipeline.prefill(1, 64)
    prefill = {f"{s}x{n}": pipeline.prefill(s, n) for s, n in args.prefill}
    decode = {f"{s}x{n}": pipeline.decode(s, n, args.tokens) for s, n in args.decode}
    # A hint for bf16 is honoured where the processor has its products; elsewhere the plugin computes in f32.
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = {
        "asked_for": args.precision,
        "computed_in": "f32" if args.precision == "bf16" and "BF16" not in capabilities else args.precision,
        "cpu_plugin_capabilities": capabilities,
    }
    print(json.dumps({"version": genai.__version__, "precision": precision, "prefill": prefill, "decode": decode}))


if __name__ == "__main__":
    main()
