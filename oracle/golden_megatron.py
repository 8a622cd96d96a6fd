"""Goldens of PyTorch files: tensors of every layout, and a small DMC model as a Megatron-LM checkpoint.

    python oracle/golden_megatron.py --tensors crates/kvfold-tensor/tests/goldens --model crates/kvfold-model/tests/goldens

torch_tensors.pt            what torch.save makes of views, dtypes, parameters, shared storages and inert objects
torch_tensors.safetensors   the same tensors, contiguous, in their dtypes

megatron/                   a checkpoint of two tensor-parallel ranks in Megatron-core's layout (bf16, grouped queries,
                            the extra states, random states and arguments that real ones have), of the shapes of
                            golden_dmc.py but with 512 tokens, so that the embedded model's tokenizer serves
megatron.safetensors        tokens I64 [N], logits F32 [N, V] (hard decisions, float64 until written), slots I64 [L, G]

The model is run by golden_dmc.py's code with the settings of the released DMC models (borrowed channel, scale 1, offset 5,
pool window 12, no delay), on the unfused weights; this script fuses and divides them. It shares no code with kvfold.
"""
import argparse
import io
import random
import sys
import types
from collections import OrderedDict
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import golden_dmc as dmc

RANKS, VOCAB, LENGTH = 2, 512, 40


def tensors(out):
    base = torch.arange(24, dtype=torch.float32).view(4, 6) / 7
    values = OrderedDict(
        plain=base,
        transposed=base.T,
        column=base[:, 2],
        inner=base[1:3, 1:5],
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        double=base[0].double(),
        half=base[1].half(),
        bfloat=base[2].bfloat16(),
        parameter=torch.nn.Parameter(base[:2].clone()),
    )
    saved = {"model": values, "integers": torch.arange(5), "when": 3, "nothing": None, "names": ["a", ("b", 1.5, True)]}
    torch.save(saved, out / "torch_tensors.pt")
    save_file({k: v.detach().clone().contiguous() for k, v in values.items()}, out / "torch_tensors.safetensors")


def model_type():
    """An enumeration of a module that only Megatron has."""
    module = types.ModuleType("megatron.core.enums")
    kind = Enum("ModelType", {"encoder_or_decoder": 1}, module=module.__name__)
    module.ModelType = kind
    sys.modules |= {"megatron": types.ModuleType("megatron"), "megatron.core": types.ModuleType("megatron.core")}
    sys.modules["megatron.core.enums"] = module
    return kind.encoder_or_decoder


def arguments(enum):
    return argparse.Namespace(
        num_layers=dmc.L, hidden_size=dmc.C, ffn_hidden_size=dmc.FFN, num_attention_heads=dmc.H, kv_channels=dmc.D,
        group_query_attention=True, num_query_groups=dmc.G, max_position_embeddings=64, seq_length=64,
        position_embedding_type="rope", rotary_base=int(dmc.THETA), rotary_percent=1.0, rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=None, normalization="RMSNorm", norm_epsilon=dmc.EPS, swiglu=True,
        add_bias_linear=False, add_qkv_bias=False, apply_layernorm_1p=False, num_experts=None,
        untie_embeddings_and_output_weights=True, tensor_model_parallel_size=RANKS, pipeline_model_parallel_size=1,
        params_dtype=torch.bfloat16, model_type=enum, dmc_cr=4.0, dmc_init_val=5.0, dmc_window_size=12, dmc_temp=0.1,
        dmc_finetune=True, dmc_is_stage_one=False, data_path=None, betas=(0.9, 0.95),
    )  # fmt: skip


def rank_weights(w, rank):
    """A rank's part of the weights in Megatron-core's names and orders."""

    def rows(x):
        return x.chunk(RANKS)[rank].clone()

    def columns(x):
        return x.chunk(RANKS, 1)[rank].clone()

    state = OrderedDict({"embedding.word_embeddings.weight": rows(w["model.embed_tokens.weight"])})
    for i in range(dmc.L):
        hf, mcore = f"model.layers.{i}.", f"decoder.layers.{i}."
        q, k, v = (w[hf + f"self_attn.{x}_proj.weight"].view(dmc.G, -1, dmc.D, dmc.C) for x in "qkv")
        qkv = torch.cat([q, k, v], 1).view(-1, dmc.C)  # by group: its queries, its key, its value
        gate, up = rows(w[hf + "mlp.gate_proj.weight"]), rows(w[hf + "mlp.up_proj.weight"])
        state[mcore + "self_attention.linear_proj.weight"] = columns(w[hf + "self_attn.o_proj.weight"])
        state[mcore + "self_attention.linear_proj._extra_state"] = None
        state[mcore + "self_attention.linear_qkv.layer_norm_weight"] = w[hf + "input_layernorm.weight"]
        state[mcore + "self_attention.linear_qkv.weight"] = rows(qkv)
        state[mcore + "self_attention.linear_qkv._extra_state"] = io.BytesIO(b"fp8")
        state[mcore + "mlp.linear_fc1.layer_norm_weight"] = w[hf + "post_attention_layernorm.weight"]
        state[mcore + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        state[mcore + "mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
        state[mcore + "mlp.linear_fc2.weight"] = columns(w[hf + "mlp.down_proj.weight"])
    state["decoder.final_layernorm.weight"] = w["model.norm.weight"]
    state["output_layer.weight"] = rows(w["lm_head.weight"])
    return OrderedDict((k, v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v) for k, v in state.items())


def megatron(out):
    dmc.V, dmc.LENGTHS, dmc.N = VOCAB, [LENGTH], LENGTH
    s = dmc.case("borrowed", 1.0, 5.0, 0, 12, False, "head", "ce", "global", "sequence", 4.0)
    rng = np.random.default_rng(1)
    w = dmc.random_weights(rng, s)
    for name, x in w.items():
        if name.endswith("k_proj.weight"):  # so that the logit reaches beyond the offset
            x.view(dmc.G, dmc.D, dmc.C)[:, dmc.D - 1] *= 8
        x.copy_(x.bfloat16())
    tokens = torch.from_numpy(rng.integers(0, VOCAB, size=LENGTH))
    logits, decisions, stat, a = dmc.forward(w, s, tokens)
    streamed, slots, longest = dmc.stream(w, s, tokens)
    assert (logits - streamed).abs().max() < 1e-10 and a.abs().min() > 1e-3
    assert (slots < LENGTH).all() and (slots > 1).all()
    print(f"megatron: fold rate {stat.mean():.2f}, longest segment {longest}, closest logit {a.abs().min():.3f}")

    enum = model_type()
    for rank in range(RANKS):
        folder = out / "megatron" / "iter_0000100" / f"mp_rank_{rank:02}"
        folder.mkdir(parents=True, exist_ok=True)
        randoms = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
                   "torch_rng_state": torch.zeros(16, dtype=torch.uint8)}  # fmt: skip
        saved = {"args": arguments(enum), "checkpoint_version": 3.0, "iteration": 100, "model": rank_weights(w, rank),
                 "rng_state": [randoms], "num_floating_point_operations_so_far": 10**25}  # fmt: skip
        torch.save(saved, folder / "model_optim_rng.pt")
    (out / "megatron" / "latest_checkpointed_iteration.txt").write_text("100\n")
    golden = {"tokens": tokens, "logits": logits.float(), "slots": slots[:, 0]}
    save_file({k: v.contiguous() for k, v in golden.items()}, out / "megatron.safetensors")


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--tensors", type=Path, required=True)
    args.add_argument("--model", type=Path, required=True)
    args = args.parse_args()
    tensors(args.tensors)
    megatron(args.model)


if __name__ == "__main__":
    main()
