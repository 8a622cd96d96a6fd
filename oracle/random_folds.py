"""What folding costs before anything is learned, and how much of it is the attention sink's: a numpy forward pass of a plain
Llama in which every KV head folds tokens at random, with and without first tokens that nothing is folded into.

    python oracle/random_folds.py --model models/smollm2-135m-instruct --text a.txt b.txt --out results/random-folds.json

For every text: its first T tokens, hard folds with probability `fold` for each layer, KV head and token, plain means, after
a delay of W tokens (spec 2.5); KL(original || folded) in nats per token. The same draws serve all numbers of sinks.
"""
import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def load_file(path):
    """Tensors of a safetensors file as float32; numpy has no bf16, so its words are widened."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        low, high = (start + at for at in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            x = (np.frombuffer(data[low:high], "<u2").astype("<u4") << 16).view("<f4")
        else:
            x = np.frombuffer(data[low:high], {"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype("<f4")
        tensors[name] = x.reshape(entry["shape"])
    return tensors


class Model:
    def __init__(self, folder, length):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.heads, self.kv = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.layers, self.dim = self.config["num_hidden_layers"], self.config["hidden_size"] // self.heads
        theta = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        angles = np.arange(length)[:, None] * theta ** (-np.arange(0, self.dim, 2) / self.dim)
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.weights[name]

    def rope(self, x):
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)

    def log_probabilities(self, ids, folds=None, delay=0, masses=False, evict=False, watch=None):
        """[T, V]; `folds` [L, G, T] says which tokens fold into the slot before them, `delay` tokens later; with `masses` the
        log of a slot's tokens is added to its scores, with `evict` a slot is its newest token. `watch` sees every layer:
        its number, residual stream [T, C], rotated and scaled queries [H, T, D], rotated keys and values [G, T, D]."""
        w, length = self.weights, len(ids)
        x = w["model.embed_tokens.weight"][ids]
        age = np.arange(length)[:, None] - np.arange(length)[None]
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            y = self.norm(x, p + "input_layernorm.weight")
            q, k, v = (
                (y @ w[f"{p}self_attn.{name}_proj.weight"].T).reshape(length, -1, self.dim).swapaxes(0, 1)
                for name in "qkv"
            )
            q, exact = self.rope(q) / np.sqrt(self.dim), self.rope(k)
            if watch:
                watch(layer, x, q, exact, v)
            out = np.empty((self.heads, length, self.dim), np.float32)
            for h in range(self.heads):
                g = h * self.kv // self.heads
                scores = np.where(age >= 0, q[h] @ exact[g].T, -np.inf)
                if folds is None:
                    out[h] = softmax(scores) @ v[g]
                    continue
                fold = folds[layer, g]
                if evict:
                    pooled_k, pooled_v, mass = exact[g], v[g], 0
                else:
                    pooled_k, pooled_v = self.rope(running_means(k[g], fold)), running_means(v[g], fold)
                    mass = np.log(counts(fold)) if masses else 0
                superseded = np.append(fold[1:], False)
                gone = age >= delay
                seen = gone & (~superseded[None] | (age == delay))
                scores = np.where(gone, np.where(seen, q[h] @ pooled_k.T + mass, -np.inf), scores)
                shares = softmax(scores)
                out[h] = np.where(gone, 0, shares) @ v[g] + np.where(gone, shares, 0) @ pooled_v
            x = x + out.swapaxes(0, 1).reshape(length, -1) @ w[p + "self_attn.o_proj.weight"].T
            y = self.norm(x, p + "post_attention_layernorm.weight")
            gate = y @ w[p + "mlp.gate_proj.weight"].T
            up = y @ w[p + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
        logits = self.norm(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def running_means(x, fold):
    """[T, D]: of every token, the mean of its slot once the token is in it."""
    means, total, count = np.empty_like(x), x[0], 1
    for t in range(len(x)):
        total, count = (total + x[t], count + 1) if fold[t] and t > 0 else (x[t], 1)
        means[t] = total / count
    return means


def counts(fold):
    """[T]: of every token, the tokens of its slot once it is in it."""
    count = np.ones(len(fold))
    for t in range(1, len(fold)):
        count[t] = count[t - 1] + 1 if fold[t] else 1
    return count


def arguments(description):
    """What every script takes that compresses texts with this model."""
    parse = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--model", type=Path, required=True)
    parse.add_argument("--text", type=Path, nargs="+", required=True)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--tokens", type=int, default=512)
    parse.add_argument("--delay", type=int, default=32)
    return parse


def texts(args):
    """Every text's path and its first tokens."""
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    tokenizer.no_truncation()
    for text in args.text:
        ids = tokenizer.encode(text.read_text(errors="replace")).ids[: args.tokens]
        assert len(ids) == args.tokens, f"{text} has {len(ids)} tokens, {args.tokens} are needed"
        yield text, ids


def divergence(original, other):
    """KL(original || other) of log probabilities [T, V], nats per token."""
    return float((np.exp(original) * (original - other)).sum(-1).mean())


def write(args, schema, rows, **more):
    """The rows, and what they were made with."""
    settings = dict(model=args.model.name, tokens=args.tokens, delay=args.delay, **more)
    args.out.write_text(json.dumps(dict(schema=schema, **settings, rows=rows), indent=2) + "\n")


def main():
    parse = arguments(__doc__)
    parse.add_argument("--seed", type=int, default=0)
    args = parse.parse_args()
    model, draw = Model(args.model, args.tokens), np.random.default_rng(args.seed)
    rows = []
    for text, ids in texts(args):
        original = model.log_probabilities(ids)
        for fold in (0.05, 0.5):
            folds = draw.random((model.layers, model.kv, args.tokens)) < fold
            kl = {}
            for sinks in (0, 1, 4):
                kept = folds.copy()
                kept[:, :, : sinks + 1] = False
                folded = model.log_probabilities(ids, kept, args.delay)
                kl[sinks] = round(divergence(original, folded), 4)
            rows.append(dict(text=text.name, fold=fold, kl_by_sinks=kl))
            print(json.dumps(rows[-1]), flush=True)
    write(args, "kvfold.random_folds/1", rows, seed=args.seed)


if __name__ == "__main__":
    main()
