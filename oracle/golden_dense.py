"""Goldens of the dense stories260K: logits, a greedy story, a perplexity.

    python oracle/golden_dense.py --model crates/kvfold-model/models/stories260k \
        --text data/tinystories_heldout.txt --out crates/kvfold-model/tests/goldens

Writes stories260k_dense.safetensors
    tokens  I64 [T]       BOS + the encoding of PROMPT
    logits  F64 [T, 512]
and stories260k_greedy.json: the same prompt, 200 greedy tokens after it (no stop at BOS or EOS), the decoded text of
prompt and continuation together, and the perplexity of the first 16 windows of 256 tokens of the text (no BOS; in each
window the first token is given and 255 are predicted).

The forward is the plain float64 one below. transformers' LlamaForCausalLM (eager) must agree with it: even in float64
it computes RoPE angles, RMS norms and softmax in float32, so it is the witness and not the golden.
"""
import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

PROMPT = (
    "Once upon a time, there was a little girl named Lily. She had a big red ball and a small brown dog. "
    "One day, Lily and her dog went to the park"
)
GREEDY, WINDOW, WINDOWS = 200, 256, 16


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x, theta):
    """x: [H, T, D]; channel i turns with channel i + D/2, position t by t * theta^(-2i/D)."""
    T, D = x.shape[-2:]
    angle = torch.arange(T).double()[:, None] * theta ** (-torch.arange(D // 2).double() * 2 / D)  # [T, D/2]
    lo, hi = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([lo * angle.cos() - hi * angle.sin(), hi * angle.cos() + lo * angle.sin()], -1)


def forward(w, config, tokens):
    """[T] -> [T, V], float64."""
    H, G, D = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta, T = config["rms_norm_eps"], config["rope_theta"], len(tokens)
    x = w["model.embed_tokens.weight"][tokens]  # [T, C]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = rms_norm(x, w[p + "input_layernorm.weight"], eps)
        q = (y @ w[p + "self_attn.q_proj.weight"].T).view(T, H, D).transpose(0, 1)  # [H, T, D]
        k = (y @ w[p + "self_attn.k_proj.weight"].T).view(T, G, D).transpose(0, 1)  # [G, T, D]
        v = (y @ w[p + "self_attn.v_proj.weight"].T).view(T, G, D).transpose(0, 1)
        q, k, v = rope(q, theta), rope(k, theta).repeat_interleave(H // G, 0), v.repeat_interleave(H // G, 0)
        scores = q @ k.transpose(1, 2) / D**0.5  # [H, T, T]
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, H * D)
        x = x + out @ w[p + "self_attn.o_proj.weight"].T
        y = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = y @ w[p + "mlp.gate_proj.weight"].T, y @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"], eps) @ w["model.embed_tokens.weight"].T  # tied


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--model", type=Path, required=True)
    args.add_argument("--text", type=Path, required=True)
    args.add_argument("--out", type=Path, required=True)
    args = args.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    w = {k: v.double() for k, v in load_file(args.model / "model.safetensors").items()}
    tok = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    witness = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float64, attn_implementation="eager")

    with torch.no_grad():
        prompt = tok.encode(PROMPT).ids
        assert prompt[0] == 1
        logits = forward(w, config, torch.tensor(prompt))
        off = (logits - witness(torch.tensor([prompt])).logits[0]).abs().max().item()
        print(f"{len(prompt)} prompt tokens, logits within {off:.1e} of transformers")
        assert off < 1e-4
        tensors = {"tokens": torch.tensor(prompt), "logits": logits.contiguous()}
        save_file(tensors, args.out / "stories260k_dense.safetensors")

        tokens, gap = list(prompt), float("inf")
        for _ in range(GREEDY):
            top = forward(w, config, torch.tensor(tokens))[-1].topk(2)
            gap = min(gap, (top.values[0] - top.values[1]).item())
            tokens.append(top.indices[0].item())
        print(f"greedy: the closest call between first and second is {gap:.1e}")

        held = torch.tensor(tok.encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False).ids)
        windows = held[: len(held) // WINDOW * WINDOW].view(-1, WINDOW)[:WINDOWS]
        assert len(windows) == WINDOWS
        nll = [torch.nn.functional.cross_entropy(forward(w, config, r)[:-1], r[1:]) for r in windows]
        value = torch.stack(nll).mean().exp().item()  # every window predicts as many tokens
        other = torch.stack([witness(r[None], labels=r[None]).loss for r in windows]).mean().exp().item()
        print(f"perplexity {value:.6f}, transformers {other:.6f}")
        assert abs(value - other) < 1e-4

    golden = {
        "prompt": PROMPT,
        "prompt_tokens": prompt,
        "tokens": tokens[len(prompt) :],
        "text": tok.decode(tokens),
        "perplexity": {"window": WINDOW, "windows": WINDOWS, "value": value},
    }
    (args.out / "stories260k_greedy.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")
    print(golden["text"])


if __name__ == "__main__":
    main()
