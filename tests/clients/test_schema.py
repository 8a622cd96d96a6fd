"""schemathesis reads /openapi.json and asks what it finds there: no answer may be a 5xx."""

import subprocess
import sys
from pathlib import Path


def test_schemathesis(chat, tmp_path):
    # Asked with what the schema allows and with what it does not. One worker: two would parse Python at the same time, for
    # which Python 3.11's parser raises SystemError.
    command = [
        Path(sys.executable).parent / "schemathesis", "run", chat.url + "/openapi.json",
        "--header", f"Authorization:Bearer {chat.key}", "--checks", "not_a_server_error,content_type_conformance",
        "--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "1", "--workers", "1",
        "--suppress-health-check", "all", "--request-timeout", "30", "--continue-on-failure", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert chat.ask("/health")[0] == 200
