#!/usr/bin/env bash
# How many long texts a server runs at once in the same cache memory, with the full cache and with the compressed one: one
# server, one model, requests with `kvfold.enabled` false and then true, counted by its own metrics. Prompts are pieces of TEXT,
# which should not be what the model was fitted or trained on. BYTES should be a little more than a whole number of full caches, window
# and states included, or the full cache has less than its due. Takes some 15 minutes on two cores. Writes results/capacity.json.
#
# Usage: runs/capacity.sh MODEL TEXT [BYTES] [TOKENS]     default: 760MiB 8192, four full caches of SmolLM2-135M;
#        TOKENS of a sequence, prompt and answer
set -euo pipefail
if [ $# -lt 2 ]; then
  grep '^# Usage' "$0" | cut -c3- >&2
  exit 2
fi
model="$(realpath "$1")"
text="$(realpath "$2")"
bytes="${3:-760MiB}"
tokens="${4:-8192}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cargo build --release >&2
python3 runs/capacity.py "$model" "$text" "$bytes" "$tokens" "$0 $(basename "$model") $(basename "$text") $bytes $tokens"
