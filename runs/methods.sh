#!/usr/bin/env bash
# The methods side by side on the embedded model, at equal tokens and at 2x and 4x: one line of JSON each in
# results/methods.jsonl. Same text (per seed), same budget (60 steps of 8 x 512 tokens), the same loss; GQA's bytes are
# what the ratio says, the others learn theirs. About half a minute each on two idle cores.
#
# Usage: runs/methods.sh [SEED...]     default: 0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo build --release
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
lines="$scratch/methods.jsonl"

trial() {
  local name="$1"
  shift
  rm -rf "$scratch/model"
  target/release/kvfold retrofit --model stories260k --out "$scratch/model" --steps 60 --samples 256 --json "$@" |
    python3 -c '
import datetime, json, os, platform, sys
with open("/proc/cpuinfo") as info:
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
about = {"trial": sys.argv[1], "date": str(datetime.date.today()), "machine": "%s, %d cores" % (cpu, os.cpu_count())}
print(json.dumps({**about, **json.load(sys.stdin)}))' "$name" >>"$lines"
  tail -n 1 "$lines" | python3 -c '
import json, sys
r = json.load(sys.stdin)
p, kl = r["perplexity"], r["kl"]["mean"]
print("%-30s ppl %.3f -> %.3f (%+.1f %%)  KL %.4f  logical %.2f  physical %.2f  %.0f tokens/s"
      % (r["trial"], p["dense"], p["compressed"], 100 * (p["compressed"] / p["dense"] - 1), kl, r["logical_ratio"],
         r["physical_ratio"], r["training"]["tokens_per_second"]))'
}

for seed in "${@:-0}"; do
  for ratio in 2 4; do
    trial "DMC delay 32, ${ratio}x, seed $seed" --method dmc --sinks 0 --calibrate 0 --delay 32 --ratio "$ratio" --seed "$seed"
    trial "DMS window 32, ${ratio}x, seed $seed" --method dms --sinks 0 --calibrate 0 --delay 32 --ratio "$ratio" --seed "$seed"
    trial "DMC delay 0, ${ratio}x, seed $seed" --method dmc --sinks 0 --calibrate 0 --delay 0 --ratio "$ratio" --seed "$seed"
    trial "GQA, ${ratio}x, seed $seed" --method gqa --kv-heads $((4 / ratio)) --seed "$seed"
  done
done
mv "$lines" results/methods.jsonl
