#!/usr/bin/env bash
# Retrofit throughput beside PyTorch: SmolLM2-135M, sequences of 1024, BATCH of them a step, distillation from the original,
# all weights trained, DMC as the paper has it (fold at once, a window of 12, log masses, a decision head). kvfold and PyTorch with
# bf16 operands; on machines that have no instructions for those PyTorch with f32 ones, too. In turn, on an otherwise idle
# machine; the medians are in results/throughput.json.
#
# Usage: runs/throughput.sh [PYTHON] [ROUNDS] [STEPS] [BATCH]     default: python3 3 8 2
#        PYTHON has torch, safetensors, tokenizers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${1:-python3}"
rounds="${2:-3}"
steps="${3:-8}"
batch="${4:-2}"
gguf=models/SmolLM2-135M-Instruct.Q4_1.gguf
model=models/smollm2-135m-instruct-f32
text=data/tinystories_heldout.txt
runs/fetch-smollm2.sh >&2
cargo build --release
# PyTorch's baseline reads f32.
[ -d "$model" ] || target/release/kvfold import "$gguf" "$model" --dtype f32 >&2
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# torch DTYPE
torch() {
  MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=12000000000 MALLOC_ARENA_MAX=1 \
    "$python" oracle/torch_retrofit.py --model "$model" --text "$text" --method dmc --log-mass --ratio 2 \
    --steps "$steps" --seq 1024 --batch "$batch" --dtype "$1" | tee /dev/stderr | tail -n 1 | sed 's/.*tokens\/s //'
}

kvfold() {
  rm -rf "$scratch/model"
  target/release/kvfold retrofit --model "$model" --out "$scratch/model" --method dmc --ratio 2 --text "$text" --no-reset \
    --delay 0 --sinks 0 --calibrate 0 --pool-window 12 --log-mass --precision bf16 --steps "$steps" --length 1024 --batch "$batch" --json |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["training"]["tokens_per_second"])'
}

for round in $(seq "$rounds"); do
  echo "round $round" >&2
  torch bfloat16 >>"$scratch/torch_bf16"
  kvfold >>"$scratch/kvfold"
  if ! grep -q -w -e avx512_bf16 -e amx_bf16 /proc/cpuinfo; then
    torch float32 >>"$scratch/torch_f32"
  fi
done

python3 - "$scratch" "$0 PYTHON $rounds $steps $batch" "$(git rev-parse --short HEAD)" \
  "$steps" "$batch" <<'PYTHON'
import datetime, json, os, platform, statistics, sys
scratch, command, commit, steps, batch = sys.argv[1:]
read = lambda name: [float(line) for line in open(os.path.join(scratch, name))]
measured = [name for name in ("bf16", "f32") if os.path.exists(os.path.join(scratch, f"torch_{name}"))]
with open("/proc/cpuinfo") as info:
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
kvfold = read("kvfold")
torch = {name: read(f"torch_{name}") for name in measured}
result = {
    "schema": "kvfold.throughput/2",
    "command": command,
    "commit": commit,
    "date": str(datetime.date.today()),
    "machine": f"{cpu}, {os.cpu_count()} cores",
    "what": f"tokens/s of {steps} steps of {batch} x 1024 tokens, the first one included, checkpoints not",
    "torch": torch,
    "kvfold": kvfold,
    "ratio_of_medians": {
        name: round(statistics.median(kvfold) / statistics.median(rates), 3) for name, rates in torch.items()
    },
}
with open("results/throughput.json", "w") as file:
    json.dump(result, file, indent=1)
    file.write("\n")
print(json.dumps(result, indent=1))
PYTHON
