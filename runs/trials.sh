#!/usr/bin/env bash
# The trials that the README speaks of, on the embedded model: one line of JSON each in results/trials.jsonl.
# Same text, same budget (60 steps of 8 x 512 tokens); what differs is named. About a minute each on two cores.
#
# Usage: runs/trials.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo build --release
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
lines="$scratch/trials.jsonl"

trial() {
  local name="$1"
  shift
  rm -rf "$scratch/model"
  target/release/kvfold retrofit --model stories260k --out "$scratch/model" --method dmc --ratio 4 --sinks 0 --calibrate 0 --steps 60 \
    --samples 256 --json "$@" |
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
print("%-36s ppl %.3f -> %.3f  KL %.4f  logical %.2f  physical %.2f"
      % (r["trial"], p["dense"], p["compressed"], kl, r["logical_ratio"], r["physical_ratio"]))'
}

# Without sinks and with heads that begin at zero, as in the paper: only what a trial names differs.
trial "head, delay 32"
trial "delay 0 (the paper)" --delay 0
trial "borrowed channel" --decision borrowed
mv "$lines" results/trials.jsonl
