#!/usr/bin/env bash
# Real clients against kvfold: installs them, pinned, and runs all checks of this folder.
#
# Usage: tests/clients/run.sh KVFOLD [PYTEST ARGUMENT...]
#
#   cargo build --release && tests/clients/run.sh target/release/kvfold
#   tests/clients/run.sh target/release/kvfold -k openai          only some
#   tests/clients/run.sh target/release/kvfold --soak-minutes 10  the long form of the soak
#
# Needs Python 3.11 or newer with venv, and node 20 or newer with npm. KVFOLD_CLIENTS_VENV names another place for the
# environment than .venv in this folder.
set -euo pipefail

if [ $# -lt 1 ] || ! [ -x "$1" ]; then
  echo "usage: tests/clients/run.sh KVFOLD [PYTEST ARGUMENT...], with the path of the kvfold binary" >&2
  exit 2
fi
kvfold="$(realpath "$1")"
shift
cd "$(dirname "${BASH_SOURCE[0]}")"

venv="${KVFOLD_CLIENTS_VENV:-.venv}"
# What is installed is what the lock files say; a stamp of them saves asking pip and npm each time.
stamp="$(cat requirements.txt package-lock.json | sha256sum | cut -d ' ' -f 1)"
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ] || ! [ -d node_modules ]; then
  [ -d "$venv" ] || python3 -m venv "$venv"
  # The lock has everything, so nothing is to be resolved; most of it is never imported, so nothing is compiled. uv takes
  # seconds where pip takes minutes, but knows less of how this machine reaches its index.
  "$venv/bin/python" -m pip install --quiet uv==0.13.9
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --requirement requirements.txt ||
    "$venv/bin/python" -m pip install --quiet --no-deps --no-compile --requirement requirements.txt
  npm ci --ignore-scripts --no-audit --no-fund --loglevel error
  echo "$stamp" >"$venv/stamp"
fi

# Some of the clients bring plugins for pytest, which are no part of this.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
exec "$venv/bin/python" -m pytest --kvfold="$kvfold" "$@"
