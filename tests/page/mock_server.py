"""A server that speaks the contract of docs/server.md as far as the page uses it, without a model, for work on the page
and its tests. It serves crates/kvfold-serve/page under the Content-Security-Policy that the page has to live with.

    python tests/page/mock_server.py [--port 8090] [--method dmc|dms|none] [--layers 6] [--heads 4] [--no-chat]

Words in a prompt ask for more than an answer: `slow` (half a second a token), `refuse` (a 400), `break` (an error in the
middle of the stream), `wide` (a word that no column can hold), `long` (as many tokens as max_tokens allows).
"""
import argparse
import base64
import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "crates/kvfold-serve/page"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STORY = """Once upon a time there was a little girl named Lily. She loved to play in the garden behind her house, where a \
tall old tree stood. One day she saw a small red bird with a hurt wing. "Do not be afraid," said Lily. She made a nest \
of leaves in a box and gave the bird some water.

Every morning she looked into the box, and every morning the bird was a little stronger. At last it hopped out, sang a \
song, and flew up into the tall old tree. Lily was sad for a moment, and then she was happy."""
OTHERWISE = "glad, because she knew that it would come back. And so it did, with three small birds of its own."
PARTED = "happy."
WINDOW = 16
CHANNELS = 16


def pieces(text):
    """Something like a tokenizer's tokens: short words whole, long ones in parts, line ends alone."""
    return re.findall(r"\n|<\|\w+\|>| ?[^\s<]{1,5}| ?<| ", text)


class Cache:
    """Folds drawn at random, each head and each token with a rate of its own; first token and newest window spared."""

    def __init__(self, settings, enabled, seed):
        self.method = settings.method if enabled else None
        self.layers, self.heads = settings.layers, settings.heads
        self.random = random.Random(seed)
        rates = random.Random(1)
        self.rates = [[rates.uniform(0.25, 0.95) for _ in range(self.heads)] for _ in range(self.layers)]
        self.tokens = []
        self.folds = [[[] for _ in range(self.heads)] for _ in range(self.layers)]

    def take(self, token):
        self.tokens.append(token)
        decided = len(self.tokens) - 1 - WINDOW
        easy = self.random.random() ** 0.4
        for rates, layer in zip(self.rates, self.folds):
            for rate, head in zip(rates, layer):
                head.append(0)
                if decided > 0 and self.method:
                    head[decided] = int(self.random.random() < rate * easy)

    def slots(self):
        return [[len(head) - sum(head) for head in layer] for layer in self.folds]

    def bytes_of(self, slots):
        pages = sum(-(-held // 16) for layer in slots for held in layer)
        return pages * 16 * CHANNELS * 2 * 2

    def counters(self):
        seen, slots = len(self.tokens), self.slots()
        held = sum(map(sum, slots)) / (self.layers * self.heads)
        dense = self.bytes_of([[seen] * self.heads] * self.layers)
        return {"tokens_seen": seen, "slots_held": held, "kv_bytes": self.bytes_of(slots), "dense_kv_bytes": dense}

    def usage(self):
        counters = self.counters()
        return counters | {
            "engaged": self.method is not None,
            "logical_ratio": counters["tokens_seen"] / counters["slots_held"],
            "physical_ratio": counters["dense_kv_bytes"] / counters["kv_bytes"],
        }

    def trace(self):
        def packed(bits):
            number = sum(bit << place for place, bit in enumerate(bits))
            return base64.b64encode(number.to_bytes(-(-len(bits) // 8), "little")).decode()

        folds = [[packed(head) for head in layer] for layer in self.folds]
        return {"delay": WINDOW, "method": self.method, "tokens": self.tokens, "folds": folds}


def answer_of(prompt, enabled, most):
    """The tokens of an answer. The full cache's differs from the other in its last words."""
    text = STORY if enabled else STORY.replace(PARTED, OTHERWISE)
    if "wide" in prompt:
        text = "Donaudampfschifffahrtsgesellschaft" * 12 + " " + text
    tokens = pieces(text)
    if "long" in prompt:
        tokens = tokens * (most // len(tokens) + 1)
    return tokens[:most]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def settings(self):
        return self.server.settings

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/":
            self.file(PAGE / "index.html")
        elif path.startswith("/page/") and (PAGE / path[6:]).is_file() and "/" not in path[6:]:
            self.file(PAGE / path[6:])
        elif path == "/v1/models":
            about = {"method": self.settings.method, "chat": not self.settings.no_chat}
            model = {"id": self.settings.model, "object": "model", "owned_by": "kvfold", "kvfold": about}
            self.json(200, {"object": "list", "data": [model]})
        elif path == "/version":
            self.json(200, {"version": "0.0.0-mock"})
        else:
            self.error(404, f"There is no {path}.")

    def do_POST(self):
        if self.headers["origin"] not in (None, f"http://{self.headers['host']}"):
            self.close_connection = True
            return self.error(403, "Another site's page may not ask.")
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/chat/completions":
            self.chat(body)
        elif self.path == "/v1/completions":
            self.stream(body, body["prompt"], pieces(body["prompt"]), chat=False)
        else:
            self.error(404, f"There is no {self.path}.")

    def chat(self, body):
        if self.settings.no_chat:
            return self.no_template()
        tokens = []
        for message in body["messages"]:
            tokens += ["<|im_start|>", message["role"], "\n", *pieces(message["content"]), "<|im_end|>", "\n"]
        tokens += ["<|im_start|>", "assistant", "\n"]
        self.stream(body, body["messages"][-1]["content"], tokens, chat=True)

    def no_template(self):
        self.error(400, "stories260k has no chat template; use /v1/completions", "messages", "no_chat_template")

    def stream(self, body, prompt, taken, chat):
        if "refuse" in prompt:
            return self.error(400, "The prompt has 9000 tokens, and the context 2048.", "messages" if chat else "prompt")
        wish = body["kvfold"]
        cache = Cache(self.settings, wish["enabled"], body["seed"])
        for token in taken:
            cache.take(token)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        tokens = answer_of(prompt, wish["enabled"], body["max_tokens"])
        pause = 0.5 if "slow" in prompt else self.settings.pause
        for at, token in enumerate(tokens):
            time.sleep(pause)
            if "break" in prompt and at == 20:
                return self.event({"error": {"message": "No page is left for this request.", "type": "server_error"}})
            choice = {"index": 0, "finish_reason": None} | ({"delta": {"content": token}} if chat else {"text": token})
            live = {"kvfold": cache.counters() | {"heads": cache.slots()}} if wish["live"] else {}
            self.event({"choices": [choice], **live})
            if at + 1 < len(tokens):
                cache.take(token)
        reason = "length" if len(tokens) == body["max_tokens"] else "stop"
        self.event({"choices": [{"index": 0, "finish_reason": reason} | ({"delta": {}} if chat else {"text": ""})]})
        counts = {"prompt_tokens": len(taken), "completion_tokens": len(tokens), "total_tokens": len(taken) + len(tokens)}
        last = {"kvfold": {"trace": cache.trace()}} if wish["trace"] else {}
        self.event({"choices": [], "usage": counts | {"kvfold": cache.usage()}, **last})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk):
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def file(self, path):
        self.whole(200, TYPES[path.suffix], path.read_bytes())

    def json(self, status, value):
        self.whole(status, "application/json", json.dumps(value).encode())

    def error(self, status, message, param=None, code=None):
        self.json(status, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}})

    def whole(self, status, kind, body):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("content-security-policy", POLICY)
        self.send_header("x-content-type-options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that went away is how an answer is cancelled."""


def start(**settings):
    """A server on a free port, in a thread of its own, and its address."""
    defaults = {"method": "dmc", "layers": 6, "heads": 4, "no_chat": False, "pause": 0.015, "port": 0, "model": "mock-135m-dmc-4x"}
    server = Server(("127.0.0.1", settings.get("port", 0)), Handler)
    server.settings = argparse.Namespace(**(defaults | settings))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}/"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--method", choices=["dmc", "dms", "none"], default="dmc")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.015, help="seconds a token")
    parser.add_argument("--model", default="mock-135m-dmc-4x")
    parser.add_argument("--no-chat", action="store_true", help="the model has no chat template")
    settings = vars(parser.parse_args())
    settings["method"] = None if settings["method"] == "none" else settings["method"]
    _, address = start(**settings)
    print(address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
