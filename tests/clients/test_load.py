"""aiperf, unmodified: a short run of streams, chat and completions, without an error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

AIPERF = shutil.which("aiperf", path=str(Path(sys.executable).parent))
REQUESTS = 96


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_no_errors(request, chat_dir, tmp_path, endpoint):
    server = request.getfixturevalue("stories" if endpoint == "completions" else "chat")
    names = ("Tom", "Lily", "Sue", "Ben", "Max", "Mia", "Sam", "Anna")
    prompts = [f"{names[number % 8]} had {number} red apples and" for number in range(REQUESTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
    command = [
        AIPERF, "profile", "--model", server.model(), "--url", server.url, "--endpoint-type", endpoint, "--streaming",
        "--tokenizer", chat_dir, "--use-server-token-count", "--concurrency", "16", "--request-count", REQUESTS,
        "--input-file", tmp_path / "prompts.jsonl", "--custom-dataset-type", "single_turn", "--output-tokens-mean", "40",
        "--extra-inputs", "ignore_eos:true", "--artifact-dir", tmp_path, "--ui", "none", "--no-gpu-telemetry",
    ]  # fmt: skip
    if server.key:
        command += ["--api-key", server.key]
    # Told to stay off the hub, it takes a folder's path for the hub's name of a model.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert not report.get("error_summary"), report["error_summary"]
    assert report["output_sequence_length"]["avg"] == 40
