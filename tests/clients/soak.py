#!/usr/bin/env python3
"""Hundreds of streams at once, half of them left by their clients at random. Nothing may go wrong, and nothing may stay.

Usage: soak.py KVFOLD|URL [--minutes 10] [--streams 256] [--drift PERCENT]

No stream may fail or end without [DONE]; greedy ones must have the text that they have alone; when all have gone, pages and
open files are as many as before, and resident memory is what it was after the warm-up, the first quarter of the time.
"""

import argparse
import asyncio
import collections
import json
import random
import statistics
import sys
import time

from serving import HELD_OUT, Client, Server

# Prompts whose greedy answers are asked for alone first.
KNOWN = 24


class Soak:
    def __init__(self, server, seconds, streams):
        self.server, self.seconds, self.streams = server, seconds, streams
        self.counts = collections.Counter()
        self.errors = []
        self.memory = []
        words = HELD_OUT.read_text().split()
        self.prompts = [" ".join(words[start : start + 20 + start % 60]) for start in range(0, len(words) - 100, 97)]
        self.alone = {}

    def body(self, prompt, limit, greedy):
        return {"prompt": prompt, "max_tokens": limit, "temperature": 0 if greedy else 1}

    def ask_alone(self):
        for prompt in self.prompts[:KNOWN]:
            self.alone[prompt] = self.server.complete(**self.body(prompt, 96, True))["choices"][0]["text"]

    async def stream(self, dice):
        """One request: to its end, or until the client has had enough of it."""
        greedy = dice.random() < 0.5
        prompt = dice.choice(self.prompts[:KNOWN] if greedy else self.prompts)
        body = self.body(prompt, 96 if greedy else dice.randint(16, 160), greedy) | {"stream": True}
        # Before the answer begins, or after some chunks.
        leave_after = dice.choice([0, dice.randint(1, 40)]) if dice.random() < 0.5 else None
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.server.host}:{self.server.port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        )
        if self.server.key:
            head += f"Authorization: Bearer {self.server.key}\r\n"
        reader, writer = await asyncio.open_connection(self.server.host, self.server.port)
        try:
            writer.write(head.encode() + b"\r\n" + data)
            await writer.drain()
            if leave_after == 0:
                await asyncio.sleep(dice.random() * 0.05)
                self.counts["left before a word"] += 1
                return
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(f"{status!r} {(await reader.read(2000))[-300:]!r}")
            text, chunks, finished = "", 0, None
            while line := await reader.readline():
                # Lines of chunked transfer and of headers are none of an event's.
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"error in a stream: {event}")
                for choice in event["choices"]:
                    text += choice["text"]
                    finished = choice["finish_reason"] or finished
                chunks += 1
                if leave_after is not None and chunks >= leave_after:
                    self.counts["left in the middle"] += 1
                    return
            else:
                raise RuntimeError(f"a stream ended without [DONE] after {chunks} chunks")
            if finished not in ("stop", "length"):
                raise RuntimeError(f"a stream ended with finish_reason {finished}")
            if greedy and text != self.alone[prompt]:
                raise RuntimeError(f"another answer than alone: {text[:80]!r}, alone {self.alone[prompt][:80]!r}")
            self.counts["answered"] += 1
        finally:
            # Aborted, so that the server learns of it as it would of a client that died.
            writer.transport.abort()

    async def client(self, number, until):
        dice = random.Random(number)
        while time.monotonic() < until and len(self.errors) < 20:
            try:
                await self.stream(dice)
            except (RuntimeError, OSError, ValueError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")

    async def watch(self, until):
        while time.monotonic() < until:
            metrics = await asyncio.to_thread(self.server.metrics)
            self.memory.append(metrics["process_resident_memory_bytes"])
            await asyncio.sleep(min(1, self.seconds / 100))

    async def load(self):
        until = time.monotonic() + self.seconds
        await asyncio.gather(self.watch(until), *(self.client(number, until) for number in range(self.streams)))

    def run(self, drift):
        """What went wrong."""
        server = self.server
        self.ask_alone()
        before = server.idle()
        files = server.files_open() if isinstance(server, Server) else None
        asyncio.run(self.load())
        try:
            after = server.idle(60)
        except AssertionError as error:
            return [*self.errors, str(error)]
        wrong = list(self.errors)
        if self.counts["answered"] == 0 or self.counts["left in the middle"] == 0:
            wrong.append(f"too little was asked: {dict(self.counts)}")
        if after["kvfold_kv_pages_held"] != before["kvfold_kv_pages_held"]:
            wrong.append(f"{after['kvfold_kv_pages_held']:.0f} pages are held, {before['kvfold_kv_pages_held']:.0f} were before")
        if files is not None:
            # Closed connections may need a moment, and so may the connection of this very question.
            time.sleep(1)
            if abs(server.files_open() - files) > 2:
                wrong.append(f"{server.files_open()} files are open, {files} were before")
        warm = self.memory[len(self.memory) // 4 :]
        third = max(1, len(warm) // 3)
        early, late = statistics.median(warm[:third]), statistics.median(warm[-third:])
        grown = 100 * (late - early) / early
        print(f"{dict(self.counts)}; resident memory {early / 1e6:.1f} to {late / 1e6:.1f} MB, {grown:+.2f} %")
        if grown > drift:
            wrong.append(f"resident memory grew by {grown:.2f} %")
        return wrong


def run(server, minutes, streams=256, drift=1.0):
    return Soak(server, minutes * 60, streams).run(drift)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", metavar="KVFOLD|URL")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--drift", type=float, default=1, help="by how many percent resident memory may grow [1]")
    arguments = parser.parse_args()
    settings = (arguments.minutes, arguments.streams, arguments.drift)
    if arguments.server.startswith("http://"):
        wrong = run(Client(arguments.server), *settings)
    else:
        with Server(arguments.server, "stories260k", "--max-queue", str(2 * arguments.streams)) as server:
            wrong = run(server, *settings)
    for line in wrong:
        print("FAILED:", line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
