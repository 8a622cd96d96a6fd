"""Goldens of dequantisation: blocks of every quantised GGUF type that kvfold reads, and the values they stand for.

    python oracle/golden_gguf.py --out crates/kvfold-tensor/tests/goldens

Writes gguf_blocks.json: for each type the blocks as hexadecimal bytes (random ones, so that every bit counts; only the
scales are ordinary numbers) and the float32 values as hexadecimal little-endian bytes, by the dequantisers of the `gguf`
package, which are numpy and share no code with kvfold.
"""
import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

# Type: where its block has float16 scales.
TYPES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--out", type=Path, required=True)
    args = args.parse_args()
    rng = np.random.default_rng(0)
    golden = {}
    for name, scales in TYPES.items():
        kind = GGMLQuantizationType[name]
        values, size = GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (96 // values + 2, size), dtype=np.uint8)
        for at in scales:
            blocks[:, at : at + 2] = rng.normal(0, 0.01, (len(blocks), 1)).astype("<f2").view(np.uint8)
        out = dequantize(blocks, kind).astype("<f4")
        assert out.size == len(blocks) * values and np.isfinite(out).all()
        golden[name] = {"number": int(kind), "blocks": blocks.tobytes().hex(), "values": out.tobytes().hex()}
        print(name, out.size)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gguf_blocks.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
