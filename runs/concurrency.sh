#!/usr/bin/env bash
# Throughput over concurrency in the same cache memory: one server, one model, requests with the full cache and with the
# compressed one in turn, by 1, 2, 4 and more clients at once. Each has a prompt of 256 tokens of TEXT, which should not be what
# the model was fitted or trained on, and an answer of 512. BYTES are few enough that the full cache is soon full: what then
# waits is what a smaller cache is for. Writes results/concurrency.json; runs/plot_concurrency.py draws it.
#
# Usage: runs/concurrency.sh MODEL TEXT [BYTES] [ROUNDS]     default: 80MiB 3, four full caches of SmolLM2-135M in bf16
set -euo pipefail
if [ $# -lt 2 ]; then
  grep '^# Usage' "$0" | cut -c3- >&2
  exit 2
fi
model="$(realpath "$1")"
text="$(realpath "$2")"
bytes="${3:-80MiB}"
rounds="${4:-3}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cargo build --release >&2
python3 runs/concurrency.py "$model" "$text" "$bytes" "$rounds" "$0 $(basename "$model") $(basename "$text") $bytes $rounds"
