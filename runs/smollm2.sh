#!/usr/bin/env bash
# SmolLM2-135M-Instruct taught to fold, on your texts: attention's weights train, so the result is also a small delta.
# An interrupted run goes on when this is called again with the same arguments. About 40 minutes on two idle AVX512-BF16
# cores. Writes models/smollm2-RATIOx (the model), models/smollm2-RATIOx.safetensors (an int8 delta over the original) and
# results/smollm2-RATIOx.json.
#
# Usage: runs/smollm2.sh RATIO PATH...     files or folders of text: .txt, .md, .jsonl, .parquet, each also .zst
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '7p' "$0" | cut -c3- >&2
  exit 2
fi
ratio="$1"
shift
texts=()
for path in "$@"; do
  texts+=("$(realpath "$path")")
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=models/smollm2-135m-instruct
out="models/smollm2-${ratio}x"
runs/fetch-smollm2.sh
cargo build --release
resume=()
if [ -d "$out.kvfold-run" ]; then
  resume=(--resume)
fi
receipt="$(mktemp)"
trap 'rm -f "$receipt"' EXIT
target/release/kvfold retrofit --model "$base" --out "$out" --ratio "$ratio" --text "${texts[@]}" --steps 220 \
  --length 1024 --batch 2 --train attention --checkpoint-every 20 --json "${resume[@]}" >"$receipt"
cp "$receipt" "results/smollm2-${ratio}x.json"
target/release/kvfold export --delta "$out" "$out.safetensors" --dtype int8
