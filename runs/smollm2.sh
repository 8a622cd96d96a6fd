#!/usr/bin/env bash
# SmolLM2-135M-Instruct taught to compress its cache, on your texts, by three methods at the same tokens: DMC and DMS to 2x
# and, going on from there, to 4x; and GQA to one of three KV heads. Attention's weights train, so each result is also a small
# delta. Writes, for each NAME of dmc-2x, dmc-4x, dms-2x, dms-4x and gqa-3x, models/smollm2-NAME (the model),
# models/smollm2-NAME.safetensors (an int8 delta over the original) and results/smollm2-NAME.json.
#
# What is there is kept, and an interrupted run goes on, when this is called again with the same arguments. Takes hours:
# `kvfold retrofit --plan` says how many on your machine.
#
# Usage: runs/smollm2.sh STEPS PATH...     steps of 2 x 1024 tokens per result (GQA: twice as many); files or folders of text
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '10p' "$0" | cut -c3- >&2
  exit 2
fi
steps="$1"
shift
texts=()
for path in "$@"; do
  texts+=("$(realpath "$path")")
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=models/smollm2-135m-instruct
runs/fetch-smollm2.sh
cargo build --release
receipt="$(mktemp)"
trap 'rm -f "$receipt"' EXIT

# teach NAME STEPS ARGUMENT...
teach() {
  local name="$1" steps="$2" out="models/smollm2-$1" resume=()
  shift 2
  if ! [ -d "$out" ]; then
    if [ -d "$out.kvfold-run" ]; then
      resume=(--resume)
    fi
    target/release/kvfold retrofit --model "$base" --out "$out" --text "${texts[@]}" --steps "$steps" --length 1024 \
      --batch 2 --train attention --checkpoint-every 20 --json "$@" "${resume[@]}" >"$receipt"
    cp "$receipt" "results/smollm2-$name.json"
  fi
  if ! [ -f "$out.safetensors" ]; then
    target/release/kvfold export --delta "$out" "$out.safetensors" --dtype int8
  fi
}

for method in dmc dms; do
  teach "$method-2x" "$steps" --method "$method" --ratio 2
  teach "$method-4x" "$steps" --from "models/smollm2-$method-2x" --ratio 4 --seed 1
done
teach gqa-3x $((2 * steps)) --method gqa --kv-heads 1
