#!/usr/bin/env bash
# A retrofit of the embedded model that is killed 20 times at random moments (SIGKILL) and resumed ends with the bytes of
# one that nobody disturbed: results/kill-proof.json. A few minutes on two cores.
#
# Usage: runs/kill-proof.sh [SEED]     the seed of the moments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo build --release
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python3 - "$scratch" "${1:-$RANDOM}" <<'PYTHON'
import datetime, hashlib, json, os, pathlib, platform, random, shutil, subprocess, sys, time

KILLS = 20
scratch, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
STEPS = 160
command = ["target/release/kvfold", "retrofit", "--model", "stories260k", "--method", "dmc", "--ratio", "4",
           "--steps", str(STEPS),
           "--batch", "4", "--length", "256", "--text", "data/tinystories_heldout.txt", "--checkpoint-every", "2",
           "--out"]


def digests(out):
    """SHA-256 of what must be the same: the whole model, and the curve without its timings."""
    files = {}
    for name in ["model.safetensors", "config.json", "tokenizer.json"]:
        files[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    curve = json.loads((out / "training_curve.json").read_text())
    for point in curve["points"]:
        del point["tokens_per_second"]
    files["training_curve.json"] = hashlib.sha256(json.dumps(curve).encode()).hexdigest()
    return files


undisturbed = scratch / "undisturbed"
started = time.monotonic()
subprocess.run(command + [str(undisturbed)], check=True, stdout=subprocess.DEVNULL)
seconds = time.monotonic() - started

draw = random.Random(seed)
# Moments such that the 20 fall into one run and reach past its middle; drawn anew when they do not.
longest = 2.2 * seconds / KILLS
for attempt in range(1, 11):
    out, kills = scratch / f"killed-{attempt}", []
    run = out.with_name(out.name + ".kvfold-run")
    while len(kills) < KILLS and not out.exists():
        resume = ["--resume"] if (run / "run.json").exists() else []
        child = subprocess.Popen(command + [str(out)] + resume, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = draw.uniform(0.02, longest)
        time.sleep(after)
        if child.poll() is not None:
            assert child.returncode == 0, child.returncode
            break
        child.kill()
        child.wait()
        steps = sorted(int(path.name[5:13]) for path in run.glob("step-*.safetensors")) if run.exists() else []
        left = sorted(path.name for path in run.iterdir()) if run.exists() else []
        kills.append({"after_seconds": round(after, 3), "checkpoints": steps,
                      "unfinished_files": sum(name.startswith(".") or name == "model" for name in left)})
        print(f"kill {len(kills)} after {after:.2f} s, checkpoints {steps}", flush=True)
    reached = max((step for kill in kills for step in kill["checkpoints"]), default=0)
    over = len(kills) < KILLS or out.exists()
    if not over and 2 * reached > STEPS:
        break
    print(f"{len(kills)} kills reached step {reached}{', and the run was over' if over else ''}; again", flush=True)
    longest *= 0.8 if over else 1.4
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(run, ignore_errors=True)
else:
    sys.exit("20 kills do not fall into one run: the machine is too busy, or the run too short")

resume = ["--resume"] if (run / "run.json").exists() else []
subprocess.run(command + [str(out)] + resume, check=True, stdout=subprocess.DEVNULL)
expected, found = digests(undisturbed), digests(out)
with open("/proc/cpuinfo") as info:
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
result = {
    "schema": "kvfold.kill-proof/1",
    "command": " ".join(["kvfold"] + command[1:] + ["OUT"]),
    "commit": commit,
    "date": str(datetime.date.today()),
    "machine": f"{cpu}, {os.cpu_count()} cores",
    "seed": seed,
    "kills": kills,
    "undisturbed_seconds": round(seconds, 1),
    "undisturbed": expected,
    "killed": found,
    "identical": expected == found,
}
assert result["identical"], json.dumps(result, indent=1)
pathlib.Path("results/kill-proof.json").write_text(json.dumps(result, indent=1) + "\n")
print(f"{KILLS} kills, and the same bytes: {expected['model.safetensors']}")
PYTHON
