"""A kvfold server as a child process, and what tests ask of it. Standard library only, so that scripts can use it alone."""

import json
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The embedded model's files: the same tokenizer for clients that want one, and a base for a model that can chat.
STORIES = ROOT / "crates/kvfold-model/models/stories260k"
HELD_OUT = ROOT / "data/tinystories_heldout.txt"

# A plain template, with the tools where there are any, short enough for a context of 512 tokens.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_model(folder):
    """The embedded model with a chat template, as a model directory."""
    model = Path(folder) / "stories-chat"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        # The copy has none of the original's permissions.
        shutil.copyfile(STORIES / name, model / name)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = CHAT_TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    return model


class Client:
    """Plain requests to a server that may be anybody's child."""

    def __init__(self, url, key=None):
        self.url = url.rstrip("/")
        self.key = key
        address = urllib.parse.urlsplit(self.url)
        self.host, self.port = address.hostname, address.port or 80

    def ask(self, path, body=None, key=..., headers=()):
        """(status, headers, body) of a request; no status is an exception."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, dict(headers))
        if data is not None:
            request.add_header("content-type", "application/json")
        key = self.key if key is ... else key
        if key:
            request.add_header("authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as answer:
            return answer.code, answer.headers, answer.read()

    def json(self, path, body=None):
        status, _, text = self.ask(path, body)
        assert status == 200, f"{path}: {status} {text[:500]}"
        return json.loads(text)

    def complete(self, **fields):
        return self.json("/v1/completions", fields)

    def model(self):
        return self.json("/v1/models")["data"][0]["id"]

    def metrics(self):
        """Series by name and labels, as they stand in the text."""
        status, _, text = self.ask("/metrics")
        assert status == 200, f"/metrics: {status}"
        lines = (line.rsplit(" ", 1) for line in text.decode().splitlines() if line and not line.startswith("#"))
        return {series: float(value) for series, value in lines}

    def idle(self, seconds=30):
        """Waits until no request runs or waits, and returns the metrics then."""
        until = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            if not metrics["kvfold_requests_running"] and not metrics["kvfold_requests_waiting"]:
                return metrics
            assert time.monotonic() < until, f"requests still run {seconds} s after the last client left"
            time.sleep(0.05)


class Server(Client):
    """`kvfold serve`, from its first line to its exit code."""

    def __init__(self, kvfold, model, *arguments, key_file=None):
        key = Path(key_file).read_text().strip() if key_file else None
        command = [str(kvfold), "serve", str(model), "--port", "0", *arguments]
        if key_file:
            command += ["--api-key-file", str(key_file)]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
        self.said = []
        self.listening = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if not self.listening.wait(60) or self.child.poll() is not None:
            self.child.kill()
            raise RuntimeError(f"{' '.join(command)} did not listen:\n{''.join(self.said)}")
        super().__init__(self.url, key)
        until = time.monotonic() + 60
        while self.ask("/ready")[0] != 200:
            assert time.monotonic() < until, "/ready is not 200 after a minute"
            time.sleep(0.05)

    def _read(self):
        for line in self.child.stderr:
            self.said.append(line)
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                self.url = found[1]
                self.listening.set()
        # The end without that line, too, is what somebody waits for.
        self.listening.set()

    def files_open(self):
        return len(list(Path(f"/proc/{self.child.pid}/fd").iterdir()))

    def stop(self, seconds=60):
        """SIGTERM, as a supervisor would; raises if what follows is not a clean end."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        try:
            code = self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.child.kill()
            raise AssertionError(f"the server still ran {seconds} s after SIGTERM") from None
        self.reader.join(5)
        said = "".join(self.said)
        assert "panicked" not in said, said
        assert code == 0, f"exit code {code}:\n{said}"

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.stop()
        else:
            self.child.kill()
            self.child.wait()
