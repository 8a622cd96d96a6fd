"""The models of `golden_families.py` as GGUF files, for `kvfold import`.

    python oracle/golden_gguf_models.py --families crates/kvfold-model/tests/families --out crates/kvfold/tests/gguf

Writes NAME.gguf for those families that have an architecture there, by the `gguf` package and llama.cpp's rules: matrices
in the dtype they have, vectors in F32, a Llama's rows of queries and keys from halves to pairs, Llama 3.1's scaling as a
tensor of factors. transformers loads `qwen2` and must answer as its directory does; of the others it does not read the
head dimension, the biases or the scaling.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CASES = {"llama_bias_linear": MODEL_ARCH.LLAMA, "llama3": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA,
         "qwen2": MODEL_ARCH.QWEN2, "qwen2_yarn": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}  # fmt: skip
NAMES = {MODEL_ARCH.LLAMA: "llama", MODEL_ARCH.QWEN2: "qwen2", MODEL_ARCH.QWEN3: "qwen3"}
KINDS = {torch.float16: GGMLQuantizationType.F16, torch.bfloat16: GGMLQuantizationType.BF16}


def pairs(weight, heads):
    """llama.cpp's permutation: within a head, row i of the first half beside row i of the second."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def llama3_factors(scaling, theta, dim):
    factors = []
    for i in range(dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / dim)
        original, low, high = (scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write(directory, path, arch):
    config = json.loads((directory / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    theta = config.get("rope_theta") or rope["rope_theta"]
    writer = GGUFWriter(path, NAMES[arch])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(theta)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_vocab_size(config["vocab_size"])
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_factor(rope["factor"])  # without a type, as older files
    if kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, theta, dim))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if arch == MODEL_ARCH.LLAMA else "qwen2")
    writer.add_token_list([chr(ord("a") + i) for i in range(26)] + ["ab", "abc", "Ġ", "Ġa", "<s>", "</s>"])
    writer.add_token_types([1] * 30 + [3, 3])
    writer.add_token_merges(["a b", "ab c", "Ġ a"])
    writer.add_bos_token_id(30)
    writer.add_eos_token_id(31)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, weight in load_file(directory / "model.safetensors").items():
        if arch == MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
            weight = pairs(weight, heads if "q_proj" in name else kv)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if weight.dim() == 1:
            writer.add_tensor(theirs, weight.float().numpy())
        elif weight.dtype == torch.bfloat16:
            data = weight.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(theirs, data, raw_dtype=KINDS[weight.dtype])
        else:
            writer.add_tensor(theirs, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kind


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--families", type=Path, required=True)
    args.add_argument("--out", type=Path, required=True)
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, arch in CASES.items():
        kind = write(args.families / name, args.out / f"{name}.gguf", arch)
        if name == "qwen2":
            golden = load_file(args.families / f"{name}.safetensors")
            model = AutoModelForCausalLM.from_pretrained(args.out, gguf_file=f"{name}.gguf", dtype=torch.float32)
            with torch.no_grad():
                off = (model(golden["tokens"][None]).logits[0] - golden["logits"]).abs().max().item()
            print(name, f"transformers is {off:.1e} off")
            assert off < 1e-4
        else:
            print(name, kind)


if __name__ == "__main__":
    main()
