#!/usr/bin/env bash
# kvfold beside llama.cpp and OpenVINO GenAI on this machine: SmolLM2-135M, two threads, prefill and decode, each row in
# turn, medians. Everything that the engines need comes from PyPI and is built under target/engines, once. Writes
# results/engines.json, rows that kvfold loses included.
#
# Usage: runs/engines.sh [--compressed MODEL] [--rounds N] [--rows ROW...] [--engines NAME...] [--out FILE]
#        ROW is prefill:SxN or decode:SxN; runs/engines/measure.py --help says what else there is
#        DRY=1 builds everything and measures nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

home="$PWD/target/engines"
bin="$home/venv/bin"
gguf=models/SmolLM2-135M-Instruct.Q4_1.gguf
runs/fetch-smollm2.sh >&2
cargo build --release

mkdir -p "$home"
if ! [ -x "$bin/cmake" ]; then
  python3 -m venv "$home/venv"
  grep -v '^llama-cpp-python' runs/engines/requirements.txt | "$bin/pip" install --quiet -r /dev/stdin
fi

# llama.cpp, from the sources in a Python package.
package="$(sed -n 's/^\(llama-cpp-python==[0-9.]*\).*/\1/p' runs/engines/requirements.txt)"
sources="$home/llama_cpp_python-${package#*==}/vendor/llama.cpp"
if ! [ -d "$sources" ]; then
  "$bin/pip" download --quiet --no-deps --no-binary "${package%%=*}" --dest "$home" "$package"
  tar -xzf "$home/llama_cpp_python-${package#*==}.tar.gz" -C "$home"
fi

# Builds the three programs that are needed, with more arguments for cmake.
build_llama() {
  "$bin/cmake" -S "$sources" -B "$sources/build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DGGML_CCACHE=OFF "$@" >&2
  "$bin/ninja" -C "$sources/build" llama-bench llama-batched-bench llama-quantize >&2
}

# The instruction sets that this machine names, one by one and without AMX: some virtual machines promise what they then
# refuse, and a build for "this machine" dies of it.
named_sets() {
  local flag options=(-DGGML_NATIVE=OFF -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF)
  local -A sets=([avx]=AVX [avx2]=AVX2 [fma]=FMA [f16c]=F16C [bmi2]=BMI2 [avx512f]=AVX512 [avx512_bf16]=AVX512_BF16
    [avx512_vnni]=AVX512_VNNI [avx512_vbmi]=AVX512_VBMI [avx_vnni]=AVX_VNNI)
  for flag in "${!sets[@]}"; do
    if grep -qw "$flag" /proc/cpuinfo; then
      options+=("-DGGML_${sets[$flag]}=ON")
    else
      options+=("-DGGML_${sets[$flag]}=OFF")
    fi
  done
  printf '%s\n' "${options[@]}"
}

for type in bf16 f16; do
  if ! [ -f "$home/smollm2-$type.gguf" ]; then
    "$bin/python" runs/engines/dequantize.py "$gguf" "$home/smollm2-$type.gguf" "$type"
  fi
done

runs_here() {
  "$sources/build/bin/llama-bench" -m "$home/smollm2-bf16.gguf" -t 2 -p 16 -n 1 -r 1 >/dev/null 2>&1
}

if ! [ -x "$sources/build/bin/llama-quantize" ]; then
  build_llama -DGGML_NATIVE=ON
  if ! runs_here; then
    echo "llama.cpp built for this machine does not run on it; building it with its instruction sets named" >&2
    mapfile -t sets < <(named_sets)
    build_llama "${sets[@]}"
    runs_here
  fi
fi
if ! [ -f "$home/smollm2-q8_0.gguf" ]; then
  "$sources/build/bin/llama-quantize" "$home/smollm2-bf16.gguf" "$home/smollm2-q8_0.gguf" Q8_0 >&2
fi

if [ -n "${DRY:-}" ]; then
  exit 0
fi
command="runs/engines.sh $*"
exec "$bin/python" runs/engines/measure.py --home "$home" --llama "$sources/build/bin" --command "${command% }" "$@"
