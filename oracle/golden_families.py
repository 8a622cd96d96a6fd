"""Small random models of every family, as transformers saves them, and the logits that transformers computes.

    python oracle/golden_families.py --out crates/kvfold-model/tests/families

Writes for each case a model directory NAME/ and its golden NAME.safetensors: `tokens` [T], `logits` [T, V]. The cases go
over families, dtypes, shards, tied embeddings, biases, RoPE scalings, and both layouts of RoPE in config.json. T is beyond
the length that a scaling starts from. Weights are drawn so that attention is far from uniform and every bias and gain
counts; they are rounded to the dtype that they are stored in before anything is computed. transformers computes norms and
angles in float32 whatever the dtype of the model, so its logits are good to about 1e-6.
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

VOCAB, LENGTH = 32, 48
SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def rope(kind, theta=10000.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


LLAMA3 = rope("llama3", 100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=16)
YARN_SET = rope(
    "yarn", 50.0, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5, attention_factor=0.8,
    truncate=False,
)  # fmt: skip
# Name: class, fields, dtype, bytes of a shard, whether config.json has the older RoPE layout.
CASES = {
    "llama2": (LlamaConfig, dict(num_key_value_heads=4), torch.float32, 6000, False),
    "llama3": (LlamaConfig, dict(head_dim=8, tie_word_embeddings=True, **LLAMA3), torch.bfloat16, None, True),
    "llama_bias_linear": (LlamaConfig, dict(attention_bias=True, **rope("linear", factor=4.0)), torch.float16, None, True),
    "mistral": (MistralConfig, dict(head_dim=6, sliding_window=None), torch.float16, None, False),
    "qwen2": (Qwen2Config, dict(tie_word_embeddings=True), torch.bfloat16, None, False),
    "qwen2_yarn": (Qwen2Config, YARN, torch.bfloat16, None, True),
    "qwen3": (Qwen3Config, dict(head_dim=8), torch.float16, None, False),
    "qwen3_yarn": (Qwen3Config, dict(head_dim=8, attention_bias=True, **YARN_SET), torch.float16, None, False),
}  # fmt: skip


def draw(model, dtype, generator):
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if name.endswith("bias"):
            value = 0.3 * noise
        elif weight.dim() == 1:
            value = 1 + 0.3 * noise
        else:
            value = noise * (1.5 if "embed" in name or "q_proj" in name else 1) / weight.shape[1] ** 0.5
        weight.data.copy_(value.to(dtype))


def older_layout(path):
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    path.write_text(json.dumps(config, indent=2) + "\n")


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--out", type=Path, required=True)
    args = args.parse_args()
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{f"t{i}": i for i in range(1, VOCAB)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    generator = torch.Generator().manual_seed(0)
    for name, (make, fields, dtype, shard, older) in CASES.items():
        model = AutoModelForCausalLM.from_config(make(**{**SIZES, **fields}), attn_implementation="eager").double()
        draw(model, dtype, generator)
        tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        shutil.rmtree(args.out / name, ignore_errors=True)
        model.to(dtype).save_pretrained(args.out / name, max_shard_size=shard or "1GB")
        tokenizer.save(str(args.out / name / "tokenizer.json"), pretty=False)
        (args.out / name / "generation_config.json").unlink()
        if older:
            older_layout(args.out / name / "config.json")
        save_file({"tokens": tokens, "logits": logits.float().contiguous()}, args.out / f"{name}.safetensors")
        print(name, sum(p.numel() for p in model.parameters()), logits.abs().max().item())


if __name__ == "__main__":
    main()
