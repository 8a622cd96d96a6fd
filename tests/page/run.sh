#!/usr/bin/env bash
# The page in headless Chromium: the cases that any server of a compressed model can pass against kvfold with MODEL, the others
# against the mock of this folder.
#
# Usage: tests/page/run.sh KVFOLD MODEL
#
#   tests/page/run.sh target/release/kvfold deltas/smollm2-135m-instruct-dms-4x.safetensors
#
# Needs Python 3.11 or newer with venv, and Chromium, which root on Debian gets installed here. KVFOLD_PAGE_VENV names another
# place for the environment than .venv in this folder.
set -euo pipefail

if [ $# -ne 2 ] || ! [ -x "$1" ]; then
  echo "usage: tests/page/run.sh KVFOLD MODEL, with the path of the kvfold binary" >&2
  exit 2
fi
kvfold="$1"
model="$2"
here="$(dirname "${BASH_SOURCE[0]}")"

if ! command -v chromium >/dev/null; then
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "chromium was not found; install it (on Debian: apt-get install chromium)" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null
fi
venv="${KVFOLD_PAGE_VENV:-$here/.venv}"
[ -d "$venv" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"

echo "== the mock"
"$venv/bin/python" "$here/test_page.py" --own

echo "== kvfold with $(basename "$model")"
log="$(mktemp)"
"$kvfold" serve "$model" --port 0 --kv-memory 256MiB 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT
until grep -q '^listening on ' "$log"; do
  kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
  sleep 0.2
done
"$venv/bin/python" "$here/test_page.py" "$(sed -n 's/^listening on //p' "$log")"
