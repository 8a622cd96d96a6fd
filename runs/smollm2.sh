#!/usr/bin/env bash
# SmolLM2-135M-Instruct with a smaller cache, on your texts: DMC and DMS at 2x and 4x with decisions that are fitted and nothing
# that is trained (NAME dmc-2x-fit and so on), and, unless STEPS is 0, trained for STEPS steps from there (dmc-2x), DMC for as many
# more from 2x to 4x (dmc-4x-from-2x), beside GQA to one of three KV heads after as many (gqa-3x). All are measured on the same held-out windows. Attention's weights train, so each
# result is also a small delta. Writes for each NAME models/smollm2-NAME (the model), models/smollm2-NAME.safetensors (a delta
# over the original: f32 where only decision heads differ, else int8) and results/smollm2-NAME.json.
#
# What is there is kept, and an interrupted run goes on, when this is called again with the same arguments. A fit takes minutes,
# training hours: `kvfold retrofit --plan` says how many on your machine.
#
# Usage: runs/smollm2.sh STEPS PATH...     steps of 1,024 tokens; files or folders of text, 100,000 tokens at least
set -euo pipefail
if [ $# -lt 2 ]; then
  grep '^# Usage' "$0" | cut -c3- >&2
  exit 2
fi
steps="$1"
shift
root="$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")"
texts=()
for path in "$@"; do
  texts+=("$(realpath --relative-to="$root" "$path")")
done
cd "$root"

base=models/smollm2-135m-instruct
runs/fetch-smollm2.sh
cargo build --release
receipt="$(mktemp)"
trap 'rm -f "$receipt"' EXIT
# As much text for every run, so that what is held out is the same.
tokens=$((steps > 88 ? steps * 1138 : 100000))

# teach NAME STEPS DTYPE ARGUMENT...
teach() {
  local name="$1" steps="$2" dtype="$3" out="models/smollm2-$1" resume=()
  shift 3
  if ! [ -d "$out" ]; then
    if [ -d "$out.kvfold-run" ]; then
      resume=(--resume)
    fi
    target/release/kvfold retrofit --model "$base" --out "$out" --text "${texts[@]}" --max-tokens "$tokens" --steps "$steps" \
      --length 1024 --batch 1 --train attention --checkpoint-every 8 --json "$@" "${resume[@]}" >"$receipt"
    cp "$receipt" "results/smollm2-$name.json"
  fi
  if ! [ -f "$out.safetensors" ]; then
    target/release/kvfold export --delta "$out" "$out.safetensors" --dtype "$dtype"
  fi
}

for ratio in 2 4; do
  for method in dmc dms; do
    teach "$method-${ratio}x-fit" 0 f32 --method "$method" --ratio "$ratio"
  done
done
if [ "$steps" -gt 0 ]; then
  for method in dmc dms; do
    for ratio in 2 4; do
      teach "$method-${ratio}x" "$steps" int8 --method "$method" --ratio "$ratio" --lr 5e-5 --pull both
    done
  done
  # One training through both ratios.
  teach dmc-4x-from-2x "$steps" int8 --from models/smollm2-dmc-2x --ratio 4 --lr 5e-5 --pull both
  teach gqa-3x "$steps" int8 --method gqa --kv-heads 1
fi
