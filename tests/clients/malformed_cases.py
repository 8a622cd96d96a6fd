"""The tables that malformed.py sends: fields of every wrong type, bodies that are no JSON, and bytes that are no HTTP."""

import json
from dataclasses import dataclass

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
# Refused for what the request says. Never 422, which no client of OpenAI's knows.
REFUSED = frozenset({400, 404, 405, 408, 411, 413, 414, 415, 417, 431})
EITHER = REFUSED | {200}
FORBIDDEN = frozenset({400, 403})


@dataclass
class Case:
    """Bytes to send and statuses that are right."""

    name: str
    data: object
    expected: frozenset = REFUSED
    # Whether it is HTTP, so that an error has the envelope.
    http: bool = True
    # Whether closing the connection without an answer is right as well.
    silence: bool = False
    # Whether the client says that it sends no more.
    shut: bool = False
    # Of several requests at once, how many are answered with 200.
    answers: int = 1

    def parts(self):
        """What to send, in pieces; a function makes what is too large to keep."""
        return self.data() if callable(self.data) else [self.data]

    def answered(self, received):
        """Whether all has come of an answer that says its length; otherwise the end is the server's to make."""
        head, separator, rest = received.partition(b"\r\n\r\n")
        if not separator or self.answers > 1:
            return False
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return len(rest) >= int(line.split(b":")[1])
        return False


def request(path, body=b"", method="POST", headers=(), host="localhost", content_type="application/json", length=None):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body) if length is None else length}")
        if content_type:
            lines.append(f"Content-Type: {content_type}")
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


def base(path):
    fields = {"max_tokens": 1}
    if path == COMPLETIONS:
        return fields | {"prompt": "Once"}
    return fields | {"messages": [{"role": "user", "content": "Once"}]}


# Values of a wrong type, for fields of each kind.
NOT_A_NUMBER = ["0.5", True, [], {}, [1], {"a": 1}]
NOT_AN_INTEGER = ["1", 1.5, True, [], {}, 1e300, -(2**70), 2**70]
NOT_A_BOOLEAN = ["true", 1, 0, [], {}, 0.5]
NOT_A_STRING = [1, 1.5, True, [], {}]
NOT_AN_OBJECT = ["a", 1, True, [], [1]]
NOT_A_LIST = [1, "a", True, {}, 0.5]

BOTH_FIELDS = {
    "model": NOT_A_STRING,
    "max_tokens": [*NOT_AN_INTEGER, -1],
    "temperature": [*NOT_A_NUMBER, -1, 1e300],
    "top_p": [*NOT_A_NUMBER, -0.1, 1.1],
    "top_k": [*NOT_AN_INTEGER, -2],
    "min_p": [*NOT_A_NUMBER, -0.1, 1.1],
    "presence_penalty": [*NOT_A_NUMBER, 1e300],
    "frequency_penalty": [*NOT_A_NUMBER, 1e300],
    "repetition_penalty": [*NOT_A_NUMBER, 0, -1],
    "logit_bias": [*NOT_AN_OBJECT, {"a": 1}, {"-1": 1}, {"99999": 1}, {"1": "x"}, {"1": None}, {"1": [1]}, {"1": 1e300}],
    "seed": ["1", 1.5, True, [], {}, 1e300],
    "stop": [1, True, {}, [1], [None], [[]], ["a"] * 17, [["a"]]],
    "n": [*NOT_AN_INTEGER, 0, -1, 17, 10**9],
    "stream": NOT_A_BOOLEAN,
    "stream_options": [*NOT_AN_OBJECT, {"include_usage": "yes"}, {"include_usage": 1}],
    "ignore_eos": NOT_A_BOOLEAN,
    "min_tokens": [*NOT_AN_INTEGER, -1],
    "kvfold": [*NOT_AN_OBJECT, {"enabled": 1}, {"live": "a"}, {"trace": []}],
}
COMPLETION_FIELDS = {
    "prompt": [1, 1.5, True, {}, [], [[]], [1.5], [-1], [99999], [2**70], [None], ["a", 1], [1, "a"], [[1], "a"], [["a"]], [[[1]]], [5] * 600],
    "echo": NOT_A_BOOLEAN,
    "logprobs": ["1", 1.5, [], {}, -1, 21, 10**9],
    "best_of": [*NOT_AN_INTEGER, 0, 2],
    "suffix": ["The end"],
}  # fmt: skip
CHAT_FIELDS = {
    "messages": [*NOT_A_LIST, [], [1], ["a"], [None], [[]], [{}]],
    "max_completion_tokens": [*NOT_AN_INTEGER, -1],
    "logprobs": NOT_A_BOOLEAN,
    "top_logprobs": [*NOT_AN_INTEGER, -1, 21],
    "response_format": [*NOT_AN_OBJECT, {}, {"type": 1}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": 5}],
    "tools": [*NOT_A_LIST, [1], [{}], [{"type": "function"}], [{"type": "function", "function": 1}]],
    "tool_choice": [1, True, [], "sometimes", {"type": 1}],
    "chat_template_kwargs": NOT_AN_OBJECT,
    "audio": [{"voice": "alloy"}],
    "functions": [[{"name": "f"}]],
}  # fmt: skip
MESSAGES = [
    {"role": "king", "content": "a"},
    {"role": 1, "content": "a"},
    {"role": None, "content": "a"},
    {"content": "a"},
    {"role": "user"},
    {"role": "user", "content": 1},
    {"role": "user", "content": {}},
    {"role": "user", "content": [1]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": 1}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
    {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
]


def fields():
    """Every field of both routes with every value it cannot have."""
    for path, table in ((COMPLETIONS, BOTH_FIELDS | COMPLETION_FIELDS), (CHAT, BOTH_FIELDS | CHAT_FIELDS)):
        for name, values in table.items():
            for value in values:
                body = json.dumps(base(path) | {name: value}).encode()
                yield Case(f"{path} {name}={json.dumps(value)[:40]}", request(path, body))
    for message in MESSAGES:
        body = json.dumps({"messages": [message], "max_tokens": 1}).encode()
        yield Case(f"message {json.dumps(message)[:60]}", request(CHAT, body))
    for path, wrong in (
        ("/tokenize", [{}, {"prompt": 1}, {"prompt": []}, {"prompt": "a", "add_special_tokens": 1}, {"messages": 1}]),
        ("/detokenize", [{}, {"tokens": 1}, {"tokens": "a"}, {"tokens": [-1]}, {"tokens": [99999]}, {"tokens": [1.5]}, {"tokens": [None]}]),
    ):  # fmt: skip
        for body in wrong:
            yield Case(f"{path} {json.dumps(body)}", request(path, json.dumps(body).encode()))


def deep(opening, closing, depth):
    return b'{"prompt":"a","max_tokens":1,"x":' + opening * depth + closing * depth + b"}"


def with_value(text):
    """A body whose temperature is a piece of text that json.dumps would not write."""
    return b'{"prompt":"Once","max_tokens":1,"temperature":' + text + b"}"


# Bodies as bytes; behind a bar, the status that is right beside a refusal.
BODIES = {
    "empty": b"",
    "blank": b" \r\n\t ",
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "a string": b'"prompt"',
    "true": b"true",
    "an empty object": b"{}",
    "unterminated": b'{"prompt":"Once"',
    "unterminated string": b'{"prompt":"Once',
    "trailing comma": b'{"prompt":"Once",}',
    "trailing garbage": b'{"prompt":"Once","max_tokens":1} x',
    "two documents": b'{"prompt":"a"}{"prompt":"b"}',
    "a comment": b'{"prompt":"Once"/* hello */}',
    "single quotes": b"{'prompt':'Once'}",
    "bare words": b"{prompt:Once}",
    "a tab in a string": b'{"prompt":"a\tb"}',
    "a NUL in a string": b'{"prompt":"a\x00b"}',
    "a bad escape": b'{"prompt":"\\q"}',
    "a short escape": b'{"prompt":"\\u12"}',
    "half a surrogate pair": b'{"prompt":"\\ud800","max_tokens":1}',
    "a byte order mark": b'\xef\xbb\xbf{"prompt":"Once"}',
    "UTF-16": '{"prompt":"Once"}'.encode("utf-16"),
    "Latin-1": b'{"prompt":"caf\xe9","max_tokens":1}',
    "overlong UTF-8": b'{"prompt":"\xc0\xaf","max_tokens":1}',
    "a surrogate in UTF-8": b'{"prompt":"\xed\xa0\x80","max_tokens":1}',
    "past Unicode's end": b'{"prompt":"\xf4\x90\x80\x80","max_tokens":1}',
    "bytes of no text": bytes(range(256)),
    "NaN": with_value(b"NaN"),
    "Infinity": with_value(b"Infinity"),
    "-Infinity": with_value(b"-Infinity"),
    "1e999": with_value(b"1e999"),
    "-1e999": with_value(b"-1e999"),
    "a leading zero": with_value(b"00.5"),
    "hexadecimal": with_value(b"0x1"),
    "a plus": with_value(b"+1"),
    "a lone minus": with_value(b"-"),
    "a thousand digits": with_value(b"9" * 1000),
    "a form": b"prompt=Once&max_tokens=1",
    "a key twice|200": b'{"prompt":"a","prompt":"b","max_tokens":1}',
    "an escaped NUL|200": b'{"prompt":"a\\u0000b","max_tokens":1}',
    "a thousand digits of a fraction|200": with_value(b"0." + b"1" * 1000),
    "1e-999|200": with_value(b"1e-999"),
    "lists 100 deep|200": deep(b"[", b"]", 100),
    "lists 10000 deep": deep(b"[", b"]", 10_000),
    "lists 200000 deep": deep(b"[", b"]", 200_000),
    "objects 50000 deep": deep(b'{"a":', b"1" + b"}", 1)[:-2] + b'{"a":' * 50_000 + b"1" + b"}" * 50_001 + b"}",
    "open lists without an end": b"[" * 500_000,
    "a string of 900 KB": json.dumps({"prompt": "a" * 900_000}).encode(),
    "900 KB without a space": json.dumps({"prompt": "\u00e9" * 150_000}).encode(),
    "100000 token ids": json.dumps({"prompt": [5] * 100_000}).encode(),
    "100000 prompts|429": json.dumps({"prompt": ["a"] * 100_000, "max_tokens": 1}).encode(),
    "100000 empty prompts": json.dumps({"prompt": [[]] * 100_000}).encode(),
    "100000 stop strings": json.dumps({"prompt": "a", "stop": ["a"] * 100_000}).encode(),
    "a stop string of 500 KB|200": json.dumps({"prompt": "a", "max_tokens": 1, "stop": "a" * 500_000}).encode(),
    "50000 biases": json.dumps({"prompt": "a", "logit_bias": {str(number): 1 for number in range(50_000)}}).encode(),
    "50000 unknown fields|200": json.dumps({"prompt": "a", "max_tokens": 1} | {f"x{number}": 1 for number in range(50_000)}).encode(),
    "an unknown field with a line break|200": json.dumps({"prompt": "a", "max_tokens": 1, "x\r\nset-cookie: a=b": 1, "\u00fc\u0000": 2}).encode(),
    "a name of 500 KB|200": json.dumps({"prompt": "a", "max_tokens": 1, "x" * 500_000: 1}).encode(),
    "a pattern to choke on|200": json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"pattern": "(a+)+" * 1000}}}}).encode(),
    "a schema that holds itself|200": json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}}).encode(),
}  # fmt: skip


def bodies():
    for name, body in BODIES.items():
        title, _, status = name.partition("|")
        path = CHAT if b'"messages"' in body else COMPLETIONS
        yield Case(f"body: {title}", request(path, body), REFUSED | {int(status)} if status else REFUSED)
    good = json.dumps(base(COMPLETIONS)).encode()
    for kind in ("text/plain", "application/xml", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "json", ";", None):
        yield Case(f"content type {kind}", request(COMPLETIONS, good, content_type=kind), frozenset({400, 415}))
    for coding in ("gzip", "br", "deflate", "nonsense"):
        yield Case(f"coding {coding}", request(COMPLETIONS, b"\x1f\x8b\x08" + good, headers=[f"Content-Encoding: {coding}"]))


ROUTES = {
    "/": "GET", "/health": "GET", "/ready": "GET", "/metrics": "GET", "/version": "GET", "/openapi.json": "GET", "/v1/models": "GET",
    COMPLETIONS: "POST", CHAT: "POST", "/tokenize": "POST", "/detokenize": "POST",
}  # fmt: skip
PATHS = [
    "/../../../../etc/passwd", "/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2f..%2fetc%2fpasswd", "/..\\..\\windows\\win.ini",
    "/v1/models/..%2f..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/" + "a" * 5000, "//etc/passwd",
    "/v1//completions", "/v1/completions/", "/v1/completions/x", "/V1/COMPLETIONS", "/v1", "/v2/completions", "/.git/config", "/%", "/%zz",
    "/%00", "/favicon.ico.php", "/v1/models/stories260k/..", "/?" + "a=b&" * 1000 + "/nothing", "/v1/engines/davinci/completions",
]  # fmt: skip


def routes():
    for path, method in ROUTES.items():
        for other in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUERY", "FROBNICATE"):
            if other != method:
                yield Case(f"{other} {path}", request(path, method=other), frozenset({400, 404, 405}))
    for path in PATHS:
        # A query is no part of a path: the page may come.
        allowed = EITHER if path.startswith("/?") else REFUSED
        yield Case(f"GET {path[:50]}", request(path, method="GET"), allowed)
    good = json.dumps(base(COMPLETIONS)).encode()
    for host in ("evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "169.254.169.254", "", "a b"):
        yield Case(f"host {host!r}", request(COMPLETIONS, good, host=host), FORBIDDEN, http=host not in ("", "a b"))
    for origin in ("http://evil.example", "https://localhost.evil.example", "null", "file://", "x"):
        yield Case(f"origin {origin}", request(COMPLETIONS, good, headers=[f"Origin: {origin}"]), FORBIDDEN)


def raw():
    """Bytes that are hardly HTTP, by name. Most parsers close or answer 400 without a word of their own."""
    good = json.dumps(base(COMPLETIONS)).encode()
    post = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n".encode()
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    chunked = post + b"Transfer-Encoding: chunked\r\n\r\n"
    whole = b"%x\r\n%s\r\n" % (len(good), good)
    once = {
        "nothing": b"",
        "line ends": b"\r\n" * 100,
        "NULs": bytes(4096),
        "all bytes": bytes(range(256)) * 16,
        "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "HTTP/0.9": b"GET /\r\n",
        "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
        "HTTP/9.9": get.replace(b"HTTP/1.1", b"HTTP/9.9") + b"\r\n",
        "no version": b"GET /health\r\nHost: localhost\r\n\r\n",
        "no path": b"GET HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "spaces in a path": get.replace(b"/health", b"/hea lth") + b"\r\n",
        "a method of 64 KB": b"G" * 65536 + b" / HTTP/1.1\r\n\r\n",
        "a path of 100 KB": get.replace(b"/health", b"/" + b"a" * 100_000) + b"\r\n",
        "a header without a colon": get + b"hello\r\n\r\n",
        "a header without a name": get + b": hello\r\n\r\n",
        "a space before the colon": get + b"X-A : b\r\n\r\n",
        "a NUL in a header": get + b"X-A: b\x00c\r\n\r\n",
        "a folded header": get + b"X-A: b\r\n c\r\n\r\n",
        "10000 headers": get + b"".join(b"X-%d: a\r\n" % number for number in range(10_000)) + b"\r\n",
        "a header of 1 MB": get + b"X-A: " + b"a" * (1 << 20) + b"\r\n\r\n",
        "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n",
        "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        "another site's URL": b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        "two hosts": get + b"Host: evil.example\r\n\r\n",
        "a length below zero": post + b"Content-Length: -5\r\n\r\n" + good,
        "a length that is no number": post + b"Content-Length: many\r\n\r\n" + good,
        "a length with a sign": post + b"Content-Length: +20\r\n\r\n" + good,
        "two lengths": post + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\n" + good,
        "a list of lengths": post + b"Content-Length: 5, 50\r\n\r\n" + good,
        "a length of 2^63": post + b"Content-Length: 9223372036854775808\r\n\r\n" + good,
        "a length of 10^40": post + b"Content-Length: 1" + b"0" * 40 + b"\r\n\r\n" + good,
        "a length and chunks": post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + whole + b"0\r\n\r\n",
        "gzip and chunks": post + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + whole + b"0\r\n\r\n",
        "an unknown transfer": post + b"Transfer-Encoding: nonsense\r\n\r\n" + good,
        "chunked twice": post + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + whole + b"0\r\n\r\n",
        "a chunk's size that is no number": chunked + b"zz\r\n" + good,
        "a chunk's size below zero": chunked + b"-5\r\n" + good,
        "a chunk of 2^64": chunked + b"10000000000000000\r\n" + good,
        "a chunk of 2^63": chunked + b"7fffffffffffffff\r\n" + good,
        "a chunk longer than it says": chunked + b"2\r\n" + good + b"\r\n0\r\n\r\n",
        "a chunk without its line end": chunked + b"%x\r\n%sXX0\r\n\r\n" % (len(good), good),
        "a chunk with 1 MB of extension": chunked + b"5;" + b"a" * (1 << 20) + b"\r\n",
        "100 KB of trailers": chunked + whole + b"0\r\n" + b"X-A: a\r\n" * 12_500 + b"\r\n",
    }  # fmt: skip
    for name, data in once.items():
        yield Case(f"raw: {name}", data, EITHER | {403, 426}, http=False, silence=True, shut=True)

    for cut in (1, 10, len(post) // 2, len(post), len(post) + 20):
        whole_post = post + b"Content-Length: %d\r\n\r\n" % len(good) + good
        yield Case(f"raw: cut at {cut}", whole_post[:cut], REFUSED, http=False, silence=True, shut=True)
    yield Case("raw: a body shorter than its length", request(COMPLETIONS, good, length=5000), REFUSED, http=False, silence=True, shut=True)
    yield Case("raw: chunks without an end", chunked + whole, REFUSED, http=False, silence=True, shut=True)

    # Fifty requests in one write: all answered in order, or the connection closed behind the first.
    several = get.replace(b"Connection: close\r\n", b"") + b"\r\n"
    yield Case("pipelined: 50 at once", several * 49 + get + b"\r\n", frozenset({200}), answers=50)
    bad_first = request(COMPLETIONS, b"{").replace(b"Connection: close\r\n", b"")
    yield Case("pipelined: a good one behind a bad one", bad_first + get + b"\r\n")
    smuggled = post + b"Content-Length: 4\r\n\r\n{}  GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield Case("pipelined: a request within a body", smuggled, http=False, silence=True, shut=True)

    # Bodies that are larger than any server should keep: said only, said and sent, and in chunks without an end.
    for size in (10**8, 10**11):
        yield Case(f"giant: {size} bytes, not sent", request(COMPLETIONS, b"{", length=size), frozenset({400, 413}), silence=True, shut=True)
    expecting = request(COMPLETIONS, b"", headers=["Expect: 100-continue"], length=10**9)
    yield Case("giant: 1 GB, asked for first", expecting, frozenset({400, 413, 417}), http=False, silence=True, shut=True)
    unknown = request(COMPLETIONS, b"", headers=["Expect: 500-error"], length=2) + b"{}"
    yield Case("raw: an expectation that nobody knows", unknown, http=False, silence=True, shut=True)

    def sent():
        yield request(COMPLETIONS, b"[", length=64 << 20)
        for _ in range(64):
            yield b" " * (1 << 20)

    def sent_in_chunks():
        yield chunked
        for _ in range(64):
            yield b"100000\r\n" + b" " * (1 << 20) + b"\r\n"

    # The answer comes before all is sent, and closing on a client that still sends may take it away.
    yield Case("giant: 64 MB, sent", sent, frozenset({400, 413}), silence=True)
    yield Case("giant: 64 MB in chunks", sent_in_chunks, frozenset({400, 413}), silence=True)


def every_case():
    yield from fields()
    yield from bodies()
    yield from routes()
    yield from raw()
