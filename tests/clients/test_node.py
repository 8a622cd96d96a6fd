"""The openai package of npm, by node's own test runner. `npm ci` in this folder installs it."""

import os
import subprocess
from pathlib import Path


def test_openai_of_npm(chat):
    environment = os.environ | {"KVFOLD_URL": chat.url, "KVFOLD_KEY": chat.key}
    command = ["node", "--test", "openai.test.mjs"]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
