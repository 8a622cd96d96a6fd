#!/usr/bin/env python3
"""Plain PyTorch retrofit of a Llama-family checkpoint with DMC or DMS: the baseline that kvfold's training speed is
measured against (runs/throughput.sh). Readable, not tuned beyond bf16 matmuls (--dtype float32 where a machine has no bf16 instructions), SDPA where no bias is needed, and a malloc
that keeps its memory.

    pip install torch safetensors tokenizers
    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=12000000000 MALLOC_ARENA_MAX=1 \
    python oracle/torch_retrofit.py --model DIR --text train.txt --method dmc --ratio 2 --steps 8 --seq 1024 --batch 2

DIR is a Hugging Face Llama directory (config.json, model.safetensors in f32, tokenizer.json; tied embeddings).
Shapes: B batch, T time, H query heads, G KV heads, D head dim, C model dim.
"""
import argparse, json, math, time
import torch, torch.nn.functional as F
from torch import nn
from safetensors.torch import load_file
from tokenizers import Tokenizer

arg = argparse.ArgumentParser()
for name, default in dict(model="smol", text="", method="dmc", decision="head", ratio=2.0, steps=120, zero_steps=0,
                          seq=512, batch=2, lr=2e-4, offset=3.0, scale=1.0, hinge=2.0, window=32, tau=0.1, tail=0.25, dtype="bfloat16", out="").items():
    arg.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
arg.add_argument("--log-mass", action="store_true", help="add log z (mass of a slot) to its attention score")
a = arg.parse_args()
TYPE = getattr(torch, a.dtype)  # of activations and products; trained weights and moments are f32
cfg, weights = json.load(open(a.model + "/config.json")), load_file(a.model + "/model.safetensors")
L, H, G, C = (cfg[k] for k in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"))
D = cfg.get("head_dim") or C // H
theta = cfg.get("rope_theta") or cfg["rope_parameters"]["rope_theta"]
tokenizer = Tokenizer.from_file(a.model + "/tokenizer.json")
angle = torch.arange(8192).float()[:, None] * theta ** (-torch.arange(0, D, 2).float() / D)
COS, SIN = angle.cos().to(TYPE), angle.sin().to(TYPE)
POOL = 12  # tokens averaged into a slot at most


def rms(x, w): return F.rms_norm(x, (x.size(-1),), w.to(TYPE), cfg["rms_norm_eps"])
def linear(x, w): return F.linear(x, w.to(TYPE))
def rope(x, T):  # half-rotation layout
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * COS[:T] - x2 * SIN[:T], x2 * COS[:T] + x1 * SIN[:T]], -1)


class Layer(nn.Module):
    def __init__(self, i):
        super().__init__()
        for short, name in dict(n1="input_layernorm", n2="post_attention_layernorm", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
                                o="self_attn.o_proj", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj").items():
            setattr(self, short, nn.Parameter(weights[f"model.layers.{i}.{name}.weight"].clone()))
        self.decide = nn.Parameter(torch.zeros(2 * G, C))  # used when --decision head


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = (nn.Parameter(weights[f"model.{n}.weight"].clone()) for n in ("embed_tokens", "norm"))
        self.layers = nn.ModuleList(Layer(i) for i in range(L))

    def forward(self, ids, method="none", keep=1.0, train=True):
        """ids [B,T] -> logits [B,T,V], straight-through mean decision per layer. keep: factor on the borrowed channel."""
        B, T = ids.shape
        x, decisions = F.embedding(ids, self.embed).to(TYPE), []
        causal = torch.full((T, T), float("-inf")).triu(1)
        for layer in self.layers:
            y = rms(x, layer.n1)
            q, k, v = (linear(y, w).view(B, T, n, D).transpose(1, 2) for w, n in ((layer.q, H), (layer.k, G), (layer.v, G)))
            channel = torch.ones(D).to(TYPE)
            if method != "none" and a.decision == "borrowed": channel[-1] = keep
            if method in ("dmc", "dms"):
                if a.decision == "head":
                    r = linear(y, layer.decide).float().transpose(1, 2) * 4.0
                    logit, mass = r[:, :G] - a.offset, 2 * torch.sigmoid(r[:, G:]) + 1e-3
                else:
                    logit = k[..., -1].float() * a.scale - a.offset
                    mass = torch.sigmoid(q[..., -1].float().view(B, G, H // G, T).mean(2) + a.offset) + 2.0 ** -7
                if train:
                    u = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
                    logit = (logit + torch.log(u) - torch.log1p(-u)) / a.tau
                    soft, closed = torch.sigmoid(logit), F.logsigmoid(-logit)
                else:
                    soft = (logit > 0).float(); closed = soft * -50000.0
                hard = (soft > 0.5).float()
                decisions.append((hard - soft.detach() + soft)[..., 1:].mean())
            q, k = q * channel, k * channel
            if method == "dmc":
                alpha = torch.cat([torch.zeros_like(soft[..., :1]), soft[..., 1:]], -1)
                kv = torch.cat([k, v], -1).float() * mass[..., None]
                num, den, coef = kv, mass, torch.ones_like(mass)
                for j in range(1, POOL):
                    coef = coef * F.pad(alpha, (j - 1, 0))[..., :T]
                    num = num + coef[..., None] * F.pad(kv, (0, 0, j, 0))[..., :T, :]
                    den = den + coef * F.pad(mass, (j, 0))[..., :T]
                k, v = (num / den[..., None]).to(TYPE).split(D, -1)
                bias = F.pad(closed, (-1, 1))[..., None, :].expand(B, G, T, T).masked_fill(torch.eye(T, dtype=torch.bool), 0.0)
                if a.log_mass: bias = bias + den.log()[..., None, :]
            elif method == "dms":
                far = torch.arange(T)[:, None] - torch.arange(T)[None] > a.window
                bias = torch.where(far, F.pad(closed, (-1, 1))[..., None, :], torch.zeros(()))
            q, k = rope(q, T) * channel, rope(k, T) * channel
            k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
            if method in ("dmc", "dms"):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=(bias + causal).repeat_interleave(H // G, 1).to(TYPE))
            else:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(out.transpose(1, 2).reshape(B, T, H * D), layer.o)
            y = rms(x, layer.n2)
            x = x + linear(F.silu(linear(y, layer.gate)) * linear(y, layer.up), layer.down)
        return linear(rms(x, self.norm), self.embed), decisions


def tokens(path): return torch.tensor(tokenizer.encode(open(path, errors="ignore").read(), add_special_tokens=False).ids)


def main():
    torch.manual_seed(0)
    train = tokens(a.text)
    model, teacher = Model(), Model().requires_grad_(False)
    gates = [p for n, p in model.named_parameters() if n.endswith("decide")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("decide")]
    opt = torch.optim.AdamW([dict(params=rest, k=1.0), dict(params=gates, k=10.0)], lr=a.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    total, ramp, start = a.zero_steps + a.steps, max(1, int(a.steps * (1 - a.tail))), time.time()
    for step in range(total):
        ids = torch.stack([train[i:i + a.seq] for i in torch.randint(0, len(train) - a.seq - 1, (a.batch,)).tolist()])
        with torch.no_grad(): original = teacher(ids)[0].float().log_softmax(-1)
        zeroing = step < a.zero_steps
        logits, dec = model(ids, "zero" if zeroing else a.method, max(0.0, 1 - step / (0.8 * a.zero_steps)) if zeroing else 0.0)
        kl = F.kl_div(logits.float().log_softmax(-1).flatten(0, 1), original.flatten(0, 1), log_target=True, reduction="batchmean")
        hinge = torch.zeros(()); ratio = 1.0
        if not zeroing:
            target = 1 + (a.ratio - 1) * min(1.0, (step - a.zero_steps + 1) / ramp)
            mean = torch.stack(dec).mean(); ratio = 1 / (1 - mean.item())
            hinge = (1 - 1 / target - mean).clamp(min=0)
        (kl + a.hinge * hinge).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = a.lr * min(1, (step + 1) / 10) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))
        for group in opt.param_groups: group["lr"] = rate * group["k"]
        opt.step(); opt.zero_grad()
        if step == a.zero_steps - 1 and a.decision == "borrowed":
            with torch.no_grad():
                for l in model.layers: l.k.view(G, D, C)[:, -1] = 0; l.q.view(H, D, C)[:, -1] = 0
        print(f"step {step} kl {kl.item():.4f} hinge {hinge.item():.4f} ratio {ratio:.2f} tokens/s {(step + 1) * a.seq * a.batch / (time.time() - start):.0f}", flush=True)
    if a.out: torch.save(model.state_dict(), a.out)


if __name__ == "__main__": main()
