"""Goldens of DMC and DMS training and evaluation: a small random Llama, nine cases, float64.

    python oracle/golden_dmc.py --out crates/kvfold-model/tests/goldens

A plain PyTorch implementation: one sequence and one KV head at a time, masks and loops instead of scans, autograd for
the gradients. It shares no code with kvfold. DMS is written as its authors do: training by a window's mask, decoding by
a ring of (slot, evict?) whose slots are used again, while kvfold sees in it a DMC that keeps the newest token of a slot.
Each dmc_<case>.safetensors holds, all F64 unless said,

    weights under Hugging Face names (+ model.layers.{i}.self_attn.decide_proj.weight [2G, C] for decision "head", [G, C] in DMS;
                                    + model.layers.{i}.self_attn.decide_proj.ahead [G, C] where decisions look back)
    grad.<weight name>              d total / d weight, training mode
    tokens I64 [N], lengths I64 [2] two sequences, one after the other
    noise [L, N, G]                 logistic noise of the decisions
    teacher_logits [N, V]           random
    logits [N, V]                   training mode
    ce, kl_forward, kl_reverse, hinge, total   [1] each
    stat [L, 2, G]                  fold rate of each sequence and head, training mode
    eval_logits [N, V]              hard decisions, no noise
    eval_decisions [L, N, G]        0 or 1
    eval_slots I64 [L, 2, G]        slots after the last token, the delay's ring included

and in the metadata "case", the settings as JSON (`case` below); the shapes are those of MODEL. Before a case is written, the
evaluation is repeated token by token with explicit lists of slots, and the gradients are compared with differences.

Names: N tokens of the batch, T of one sequence, L layers, H query heads, G KV heads, D head dim, C width, V vocabulary.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

MODEL = {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn": 24, "vocab": 32,
         "rope_theta": 10000.0, "rms_norm_eps": 1e-5}  # fmt: skip
L, C, H, G, D, FFN, V = (MODEL[k] for k in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab"))
THETA, EPS = MODEL["rope_theta"], MODEL["rms_norm_eps"]
LENGTHS = [19, 31]
N = sum(LENGTHS)
OMEGA_MIN = 2.0**-7


def case(source, scale, offset, delay, pool_window, log_mass, share, loss, scope, over, ratio, weight=1.0, method="dmc", ahead=False):
    return {
        "method": method,
        "decision": {"source": source, "scale": scale, "offset": offset} | ({"ahead": True} if ahead else {}),
        "delay": delay,
        "pool_window": pool_window,
        "log_mass": log_mass,
        "share": share,
        "tau": 0.1,
        "loss": loss,
        "hinge": {"scope": scope, "over": over, "weight": weight, "ratio": ratio},
    }


# name: (seed, case). The seeds are chosen so that `interesting` holds.
CASES = {
    # source, scale, offset, delay, pool_window, log_mass, share, loss, hinge: scope, over, ratio, weight
    "borrowed": (1, case("borrowed", 1.0, 0.5, 0, None, False, "head", "ce", "global", "sequence", 4.0)),
    "borrowed_window": (2, case("borrowed", 3.0, -1.5, 0, 12, True, "head", "kl_forward", "layer", "batch", 8.0)),
    "head_delay": (3, case("head", 1.0, 0.5, 5, None, True, "head", "kl_forward", "global", "sequence", 3.0)),
    "head_layer": (4, case("head", 2.0, 0.5, 0, 3, False, "layer", "kl_reverse", "head", "sequence", 1.6, 0.5)),
    "dms_head": (6, case("head", 2.0, 0.5, 5, None, False, "head", "kl_forward", "global", "batch", 3.0, method="dms")),
    "dms_borrowed": (7, case("borrowed", 3.0, 0.5, 0, None, False, "head", "kl_reverse", "layer", "sequence", 4.0, method="dms")),
    "head_ahead": (8, case("head", 1.5, 0.5, 4, None, True, "layer", "kl_forward", "layer", "batch", 3.0, ahead=True)),
    "dms_ahead": (9, case("head", 2.0, 0.5, 3, None, False, "head", "kl_forward", "head", "sequence", 3.0, method="dms", ahead=True)),
    "head_delay_window": (5, case("head", 1.0, -1.5, 8, 12, False, "head", "ce", "global", "batch", 1.25)),
}


def random_weights(rng, s):
    def matrix(rows, cols, gain=1.0):
        return torch.from_numpy(rng.normal(size=(rows, cols)) * gain / cols**0.5)

    def norm():
        return torch.from_numpy(1 + 0.1 * rng.normal(size=C))

    w = {"model.embed_tokens.weight": matrix(V, C, C**0.5)}
    for i in range(L):
        p = f"model.layers.{i}."
        w[p + "input_layernorm.weight"] = norm()
        w[p + "self_attn.q_proj.weight"] = matrix(H * D, C)
        w[p + "self_attn.k_proj.weight"] = matrix(G * D, C)
        w[p + "self_attn.v_proj.weight"] = matrix(G * D, C)
        w[p + "self_attn.o_proj.weight"] = matrix(C, H * D)
        if s["decision"]["source"] == "head":
            w[p + "self_attn.decide_proj.weight"] = matrix(2 * G if s["method"] == "dmc" else G, C, 1.5)
        if s["decision"].get("ahead"):
            w[p + "self_attn.decide_proj.ahead"] = matrix(G, C, 1.5)
        w[p + "post_attention_layernorm.weight"] = norm()
        w[p + "mlp.gate_proj.weight"] = matrix(FFN, C)
        w[p + "mlp.up_proj.weight"] = matrix(FFN, C)
        w[p + "mlp.down_proj.weight"] = matrix(C, FFN)
    w["model.norm.weight"] = norm()
    w["lm_head.weight"] = matrix(V, C)
    return w


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def rope(x, pos):
    """x: [T, D], pos: [T]; channel i turns with channel i + D/2."""
    angle = pos[:, None] * THETA ** (-torch.arange(D // 2) * 2 / D)
    lo, hi = x[:, : D // 2], x[:, D // 2 :]
    return torch.cat([lo * angle.cos() - hi * angle.sin(), hi * angle.cos() + lo * angle.sin()], 1)


def mlp(w, p, x):
    y = rms_norm(x, w[p + "post_attention_layernorm.weight"])
    gate, up = y @ w[p + "mlp.gate_proj.weight"].T, y @ w[p + "mlp.up_proj.weight"].T
    return (F.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T


def project(w, p, x, s):
    """The attention block up to RoPE. x: [T, C] -> q [T, H, D], k, v [T, G, D], a, ahead, omega [T, G], keep.

    keep: the channels that attention may use, of queries [H, D] and of keys [D]. ahead: what each token adds to the logit of
    the next one of its sequence, which is not in a yet."""
    y = rms_norm(x, w[p + "input_layernorm.weight"])
    q = (y @ w[p + "self_attn.q_proj.weight"].T).view(-1, H, D)
    k = (y @ w[p + "self_attn.k_proj.weight"].T).view(-1, G, D)
    v = (y @ w[p + "self_attn.v_proj.weight"].T).view(-1, G, D)
    keep_q, keep_k = torch.ones(H, D), torch.ones(D)
    source, scale, offset = (s["decision"][name] for name in ("source", "scale", "offset"))
    ahead = torch.zeros(len(x), G)
    if s["decision"].get("ahead"):
        ahead = scale * (y @ w[p + "self_attn.decide_proj.ahead"].T)
    if s["method"] == "dms":
        omega = torch.ones(len(x), G)
        if source == "borrowed":
            a = scale * q.view(-1, G, H // G, D)[:, :, 0, D - 1] - offset
            keep_q[:: H // G, D - 1] = 0.0
        else:
            a = scale * (y @ w[p + "self_attn.decide_proj.weight"].T) - offset
    elif source == "borrowed":
        a = scale * k[:, :, D - 1] - offset
        u = q[:, :, D - 1].view(-1, G, H // G).mean(2)
        omega = torch.sigmoid(u + offset) + OMEGA_MIN
        keep_q[:, D - 1] = keep_k[D - 1] = 0.0
    else:
        r = scale * (y @ w[p + "self_attn.decide_proj.weight"].T)
        a = r[:, :G] - offset
        omega = OMEGA_MIN + (2 - 2 * OMEGA_MIN) * torch.sigmoid(r[:, G:])
    if s["share"] == "layer":
        a, ahead = (each.mean(1, keepdim=True).expand(-1, G) for each in (a, ahead))
    return q * keep_q, k * keep_k, v, a, ahead, omega, (keep_q, keep_k)


def pool(x, alpha, omega, window):
    """x: [T, 2D] keys and values -> weighted means [T, 2D] and their weights Z [T]."""
    means, masses = [], []
    total, mass = torch.zeros(2 * D), torch.zeros(())
    for i in range(len(x)):
        if window is None:
            total = alpha[i] * total + omega[i] * x[i]
            mass = alpha[i] * mass + omega[i]
        else:
            total, mass, coef = torch.zeros(2 * D), torch.zeros(()), torch.ones(())
            for j in range(i, max(i - window, -1), -1):
                total = total + coef * omega[j] * x[j]
                mass = mass + coef * omega[j]
                coef = coef * alpha[j]
        means.append(total / mass)
        masses.append(mass)
    return torch.stack(means), torch.stack(masses)


def attend(q, k, v, alpha, close, omega, keep, s):
    """One query head of one sequence. q, k, v: [T, D]; alpha, close, omega: [T] -> [T, D]."""
    T, W = len(q), s["delay"]
    pos = torch.arange(T)
    i, j = pos[:, None], pos[None, :]
    keep_q, keep_k = keep
    if s["method"] == "dms":
        score = (rope(q, pos) * keep_q) @ (rope(k, pos) * keep_k).T / D**0.5
        score = torch.where(i - j > W, score + close, score)
        return score.masked_fill(j > i, float("-inf")).softmax(1) @ v
    mean, z = pool(torch.cat([k, v], 1), alpha, omega, s["pool_window"])
    pk, pv = mean[:, :D], mean[:, D:]
    q, k, pk = rope(q, pos) * keep_q, rope(k, pos) * keep_k, rope(pk, pos) * keep_k
    raw, pooled = q @ k.T / D**0.5, q @ pk.T / D**0.5  # [T, T]
    if s["log_mass"]:
        raw, pooled = raw + omega.log(), pooled + z.log()
    pooled = torch.where(j < i - W, pooled + close, pooled)
    raw = raw.masked_fill(~((i - W < j) & (j <= i)), float("-inf"))
    pooled = pooled.masked_fill(~(j <= i - W), float("-inf"))
    return torch.cat([raw, pooled], 1).softmax(1) @ torch.cat([v, pv])


def forward(w, s, tokens, noise=None, soft=False):
    """noise [L, N, G]: training; None: hard decisions. -> logits [N, V], d [L, N, G], stat [L, 2, G], a [L, N, G].

    soft: the fold rate counts alpha itself, so that its differences can be taken."""
    x = w["model.embed_tokens.weight"][tokens]
    all_d, all_stat, all_a = [], [], []
    for layer in range(L):
        p = f"model.layers.{layer}."
        q, k, v, a, ahead, omega, keep = project(w, p, x, s)
        a = a + torch.cat([torch.cat([torch.zeros(1, G), said[:-1]]) for said in ahead.split(LENGTHS)])
        out, ds, stat, at = [], [], [], 0
        for T in LENGTHS:
            r = slice(at, at + T)
            at += T
            heads, rates = [], []
            for h in range(H):
                g = h // (H // G)
                if noise is None:
                    alpha = (a[r, g] > 0).double()
                    close = torch.where(alpha == 1, float("-inf"), 0.0)  # of the token before
                else:
                    logit = (a[r, g] + noise[layer, r, 0 if s["share"] == "layer" else g]) / s["tau"]
                    alpha, close = torch.sigmoid(logit), F.logsigmoid(-logit)
                alpha = torch.cat([torch.zeros(1), alpha[1:]])  # the first token appends
                close = torch.cat([close[1:], torch.zeros(1)])
                heads.append(attend(q[r, h], k[r, g], v[r, g], alpha, close, omega[r, g], (keep[0][h], keep[1]), s))
                if h % (H // G) == 0:
                    d = alpha if soft else (alpha > 0.5).double() - alpha.detach() + alpha
                    ds.append((r, g, d))
                    rates.append(d[1 : T - s["delay"]].sum() / T)
            out.append(torch.cat(heads, 1))
            stat.append(torch.stack(rates))
        x = x + torch.cat(out) @ w[p + "self_attn.o_proj.weight"].T
        x = x + mlp(w, p, x)
        d = torch.zeros(N, G)
        for r, g, value in ds:
            d[r, g] = value.detach()
        all_d.append(d)
        all_stat.append(torch.stack(stat))
        all_a.append(a.detach())
    logits = rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
    return logits, torch.stack(all_d), torch.stack(all_stat), torch.stack(all_a)


def hinge_gaps(stat, s):
    """target - fold rate of every unit. stat: [L, 2, G]"""
    h = s["hinge"]
    r = stat.transpose(0, 1)  # [2, L, G]
    if h["over"] == "batch":
        r = (r * torch.tensor(LENGTHS)[:, None, None]).sum(0, keepdim=True) / N
    if h["scope"] == "global":
        r = r.mean((1, 2))
    elif h["scope"] == "layer":
        r = r.mean(2)
    return (1 - 1 / h["ratio"]) - r.flatten()


def losses(logits, teacher, tokens, stat, s):
    student, teacher = logits.log_softmax(1), teacher.log_softmax(1)
    nll, at = 0.0, 0
    for T in LENGTHS:
        for t in range(at, at + T - 1):
            nll = nll - student[t, tokens[t + 1]]
        at += T
    out = {
        "ce": nll / (N - len(LENGTHS)),
        "kl_forward": (teacher.exp() * (teacher - student)).sum(1).mean(),
        "kl_reverse": (student.exp() * (student - teacher)).sum(1).mean(),
        "hinge": hinge_gaps(stat, s).clamp(min=0).mean(),
    }
    out["total"] = out[s["loss"]] + s["hinge"]["weight"] * out["hinge"]
    return out


def stream(w, s, tokens):
    """Evaluation as inference does it: token by token, slots in lists. -> logits [N, V], slots [L, 2, G], longest."""
    logits, counts, longest = [], torch.zeros(L, len(LENGTHS), G, dtype=torch.int64), 0
    W, P, at = s["delay"], s["pool_window"] or N, 0
    for b, T in enumerate(LENGTHS):
        # a slot is the list of the tokens folded into it; a token is (position, k, v, omega, fold?)
        slots = [[[] for _ in range(G)] for _ in range(L)]
        ring = [[[] for _ in range(G)] for _ in range(L)]
        windows = [[Window(W) for _ in range(G)] for _ in range(L)]
        said = [torch.zeros(1, G) for _ in range(L)]
        for t in range(T):
            x = w["model.embed_tokens.weight"][tokens[at + t]][None]
            pos = torch.tensor([t])
            for layer in range(L):
                p = f"model.layers.{layer}."
                q, k, v, a, ahead, omega, (keep_q, keep_k) = project(w, p, x, s)
                a, said[layer] = a + said[layer], ahead
                out = []
                for g in range(G):
                    mine, late = slots[layer][g], ring[layer][g]
                    late.append((t, k[0, g], v[0, g], omega[0, g], t > 0 and a[0, g] > 0))
                    if len(late) > W:  # the oldest leaves the ring: fold or append
                        token = late.pop(0)
                        mine[-1].append(token) if token[4] else mine.append([token])
                    entries = [entry(members[-P:], keep_k) for members in mine + [[token] for token in late]]
                    if s["method"] == "dms":
                        pair = (rope(k[:, g], pos)[0] * keep_k, v[0, g], None)
                        entries = windows[layer][g].take(pair, bool(a[0, g] > 0))
                    for h in range(g * H // G, (g + 1) * H // G):
                        query = rope(q[:, h], pos)[0] * keep_q[h]
                        score = torch.stack([query @ key / D**0.5 for key, _, _ in entries])
                        if s["log_mass"]:
                            score = score + torch.stack([mass for _, _, mass in entries]).log()
                        out.append(score.softmax(0) @ torch.stack([value for _, value, _ in entries]))
                    counts[layer, b, g] = len(entries)
                    longest = max(longest, max((len(members) for members in mine), default=0))
                x = x + torch.cat(out)[None] @ w[p + "self_attn.o_proj.weight"].T
                x = x + mlp(w, p, x)
            logits.append(rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T)
        at += T
    return torch.cat(logits), counts, longest


class Window:
    """The cache of one head in DMS: slots that are used again W + 1 tokens after what they hold, if that is evicted."""

    def __init__(self, window):
        self.slots, self.ring, self.tokens = [], [(0, False)] * (window + 1), 0

    def take(self, pair, decision):
        """A new token, whose decision is about the token before it. -> the slots."""
        ring, r = self.ring, self.tokens % len(self.ring)
        if self.tokens > 0:
            ring[r - 1] = (ring[r - 1][0], decision)
        slot, evicted = ring[r]
        if evicted:
            self.slots[slot] = pair
        else:
            slot = len(self.slots)
            self.slots.append(pair)
        ring[r] = (slot, False)
        self.tokens += 1
        return self.slots


def entry(members, keep):
    """The tokens of one slot -> its key, rotated at the newest position, its value and its mass."""
    mass = sum(m[3] for m in members)
    key = sum(m[3] * m[1] for m in members) / mass
    value = sum(m[3] * m[2] for m in members) / mass
    return rope(key[None], torch.tensor([members[-1][0]]))[0] * keep, value, mass


def check_gradients(w, s, tokens, noise, teacher, rng):
    """Two entries of every weight against central differences, the fold rate being soft. -> worst error."""

    def total():
        logits, _, stat, _ = forward(w, s, tokens, noise, soft=True)
        return losses(logits, teacher, tokens, stat, s)["total"]

    grads = torch.autograd.grad(total(), list(w.values()))
    worst, step = 0.0, 1e-6
    with torch.no_grad():
        for x, grad in zip(w.values(), grads):
            flat, grad = x.view(-1), grad.reshape(-1)
            for n in [grad.abs().argmax().item(), rng.integers(len(flat))]:
                keep = flat[n].item()
                flat[n] = keep + step
                up = total()
                flat[n] = keep - step
                down = total()
                flat[n] = keep
                slope = (up - down) / (2 * step)
                worst = max(worst, ((slope - grad[n]).abs() / (1 + grad[n].abs())).item())
    return worst


def make(name, seed, s, out):
    rng = np.random.default_rng(seed)
    w = {k: v.requires_grad_() for k, v in random_weights(rng, s).items()}
    tokens = torch.from_numpy(rng.integers(0, V, size=N))
    noise = torch.from_numpy(rng.logistic(size=(L, N, G)))
    teacher = torch.from_numpy(1.5 * rng.normal(size=(N, V)))

    logits, d, stat, a = forward(w, s, tokens, noise)
    loss = losses(logits, teacher, tokens, stat, s)
    grads = dict(zip(w, torch.autograd.grad(loss["total"], list(w.values()))))
    with torch.no_grad():
        eval_logits, eval_d, eval_stat, eval_a = forward(w, s, tokens)
        stream_logits, slots, longest = stream(w, s, tokens)
    gaps = hinge_gaps(stat.detach(), s)

    # no decision and no hinge near its edge, so that every implementation falls on the same side
    l = a + (noise[:, :, :1] if s["share"] == "layer" else noise)
    assert min(a.abs().min(), eval_a.abs().min(), l.abs().min()) > 1e-6 and gaps.abs().min() > 1e-3
    # parallel == streaming
    stream_error = (eval_logits - stream_logits).abs().max().item()
    assert stream_error < 1e-10
    T = torch.tensor(LENGTHS)[None, :, None]
    assert torch.equal(slots, torch.round(T - T * eval_stat).long())
    # gradients == differences
    grad_error = check_gradients(w, s, tokens, noise, teacher, rng)
    assert grad_error < 1e-6
    # interesting: every head folds and appends, a window is outgrown, the hinge is as the case says
    assert (slots.sum(1) > len(LENGTHS) * (s["delay"] + 1)).all() and (slots.sum(1) < N).all()
    assert s["pool_window"] is None or longest > s["pool_window"]
    assert (gaps > 0).any() == (name != "head_delay_window")
    print(
        f"{name}: fold rate {stat.mean():.2f} train, {eval_stat.mean():.2f} eval, longest segment {longest}, "
        f"{s['loss']} {loss[s['loss']]:.4f}, hinge {loss['hinge']:.4f} ({(gaps > 0).sum()} of {len(gaps)} active), "
        f"streaming {stream_error:.0e}, gradient {grad_error:.0e}"
    )

    tensors = {**w, **{"grad." + k: g for k, g in grads.items()}, **{k: x.view(1) for k, x in loss.items()}}
    tensors |= {"tokens": tokens, "lengths": torch.tensor(LENGTHS), "noise": noise, "teacher_logits": teacher}
    tensors |= {"logits": logits, "stat": stat}
    tensors |= {"eval_logits": eval_logits, "eval_decisions": eval_d, "eval_slots": slots}
    tensors = {k: x.detach().contiguous() for k, x in tensors.items()}
    save_file(tensors, out / f"dmc_{name}.safetensors", {"case": json.dumps(s)})


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--out", type=Path, required=True)
    args = args.parse_args()
    for name, (seed, s) in CASES.items():
        make(name, seed, s, args.out)


if __name__ == "__main__":
    main()
