#!/usr/bin/env python3
"""Hundreds of requests that no client should send. None may get a 5xx, end the server, or cost it memory.

Usage: malformed.py KVFOLD|URL [--patience SECONDS]

A path of a kvfold binary is started with a tiny model that can chat; a URL is a server without a key that runs already. Cases come
from the tables of malformed_cases.py. Every answer in 4xx to a request that is HTTP has OpenAI's error envelope.
"""

import argparse
import contextlib
import json
import socket
import sys
import tempfile
import threading
import time

from malformed_cases import every_case
from serving import Client, Server, chat_model

# What the server may grow by: pages at first use, the largest body it takes some times over, and what an allocator keeps.
GROWTH = 192 << 20
ALIVE_EVERY = 50
# Python's own client gives up at 64 KiB a line, node's at 16 KiB in all.
MAX_HEAD = 12 << 10


def parse(raw):
    """(status, headers, body) of the first answer in raw bytes, or None if they hold none."""
    head, separator, rest = raw.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        head, separator, rest = rest.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    version, _, status = lines[0].partition(" ")
    if not separator or not version.startswith("HTTP/") or not status[:3].isdigit():
        return None
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            if not size.strip() or int(size.split(b";")[0], 16) == 0:
                break
            length = int(size.split(b";")[0], 16)
            body, rest = body + rest[:length], rest[length + 2 :]
    else:
        body = rest[: int(headers.get("content-length", len(rest)))]
    return int(status[:3]), headers, body


def exchange(server, case):
    """Sends a case's bytes and reads until the server closes, falls silent, or has answered in full."""
    received = b""
    with contextlib.suppress(ConnectionError, TimeoutError), socket.create_connection((server.host, server.port), 10) as connection:
        connection.settimeout(20)
        # The server may have closed already; ENOTCONN of a shutdown is no ConnectionError.
        with contextlib.suppress(OSError):
            for part in case.parts():
                connection.sendall(part)
            if case.shut:
                connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(1 << 16):
            received += piece
            if case.answered(received):
                break
    return received


def judge(case, received):
    """What is wrong with an answer, or None."""
    answer = parse(received)
    if answer is None:
        # Closing without a word is an answer to what is no HTTP, or broke off.
        return None if case.silence else f"no answer, but {received[:80]!r}"
    status, headers, body = answer
    if status >= 500:
        return f"{status} {body[:200]!r}"
    if status not in case.expected:
        return f"{status}, not one of {sorted(case.expected)}: {body[:200]!r}"
    if status >= 400 and case.http:
        try:
            error = json.loads(body)["error"]
            assert isinstance(error["message"], str) and error["message"]
            assert isinstance(error["type"], str) and {"param", "code"} <= error.keys()
        except (ValueError, KeyError, TypeError, AssertionError):
            return f"{status} without OpenAI's envelope: {body[:200]!r}"
    if case.answers > 1 and received.count(b"HTTP/1.1 200") != case.answers:
        return f"{received.count(b'HTTP/1.1 200')} answers instead of {case.answers}"
    if b"root:" in body:
        return "a file of the machine"
    if "set-cookie" in headers:
        return "a header that the request made up"
    if sum(len(name) + len(value) for name, value in headers.items()) > MAX_HEAD:
        return "headers that clients will not read"
    return None


class Slow(threading.Thread):
    """A client that sends a byte each half second until the server has enough of it."""

    def __init__(self, server, start, patience):
        super().__init__(daemon=True)
        self.server, self.start_with, self.patience = server, start, patience
        self.ended, self.status = False, None

    def run(self):
        until = time.monotonic() + self.patience
        received = b""
        with contextlib.suppress(ConnectionError), socket.create_connection((self.server.host, self.server.port), 10) as connection:
            connection.sendall(self.start_with)
            connection.settimeout(0.5)
            while time.monotonic() < until:
                with contextlib.suppress(TimeoutError):
                    received = connection.recv(4096)
                    break
                connection.sendall(b" ")
            else:
                return
        self.ended = True
        answer = parse(received)
        self.status = answer and answer[0]


def slow_clients(server, patience):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    body = head + b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{"
    chunks = head + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n{"
    header = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow:"
    clients = [Slow(server, start, patience) for start in (body, chunks, header) for _ in range(16)]
    for client in clients:
        client.start()
    return clients


def memory(server):
    return server.metrics()["process_resident_memory_bytes"]


def run(server, patience):
    """All cases against a server; (cases, failures)."""
    greedy = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}
    before_text = server.complete(**greedy)["choices"][0]["text"]
    before = peak = memory(server)
    slow = slow_clients(server, patience)

    failures = []
    cases = list(every_case())
    for number, case in enumerate(cases):
        wrong = judge(case, exchange(server, case))
        if wrong:
            failures.append(f"{case.name}: {wrong}")
        if number % ALIVE_EVERY == 0:
            if server.ask("/health")[0] != 200:
                failures.append(f"{case.name}: /health is not 200 after it")
            peak = max(peak, memory(server))

    for client in slow:
        client.join(patience + 20)
        if not client.ended:
            failures.append(f"a slow client was still served after {patience} s: ...{client.start_with[-50:]!r}")
        elif client.status is not None and client.status not in (400, 408):
            failures.append(f"a slow client was answered with {client.status}")

    metrics = server.idle()
    peak = max(peak, metrics["process_resident_memory_bytes"])
    if peak - before > GROWTH:
        failures.append(f"resident memory grew from {before:.0f} to {peak:.0f} bytes")
    if server.complete(**greedy)["choices"][0]["text"] != before_text:
        failures.append("the same request has another answer now")
    return len(cases) + len(slow), failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", metavar="KVFOLD|URL")
    parser.add_argument("--patience", type=float, default=90, help="seconds after which a slow client should be gone [90]")
    arguments = parser.parse_args()
    if arguments.server.startswith("http://"):
        count, failures = run(Client(arguments.server), arguments.patience)
    else:
        with tempfile.TemporaryDirectory() as folder, Server(arguments.server, chat_model(folder)) as server:
            count, failures = run(server, arguments.patience)
    for failure in failures:
        print("FAILED:", failure)
    print(f"{count - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
