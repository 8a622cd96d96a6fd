#!/usr/bin/env bash
# The demo of the README, its receipt kept: results/demo.json.
#
# Usage: runs/demo.sh [SEED...]     more than one seed also writes results/demo-SEED.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo build --release
for seed in "${@:-0}"; do
  out=results/demo.json
  [ "$seed" = 0 ] || out="results/demo-$seed.json"
  target/release/kvfold demo --seed "$seed" --json "$out"
done
