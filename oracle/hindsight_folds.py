"""Which cost says best what to fold: a numpy forward pass of a plain Llama that folds the tokens with the lowest cost, in
hindsight, since costs are read off the whole text.

    python oracle/hindsight_folds.py --model models/smollm2-135m-instruct --text a.txt b.txt --out results/hindsight-folds.json

Costs, with p and p' the shares that queries at least `delay` tokens later give a token and the one before it, in every head:

    reads    (sqrt(mean p^2) + sqrt(mean p'^2))^2 |O (v - v')|^2
    unlike   mean (p - p')^2 |O (v - v') / 2|^2 + mean (p + p' - 2 sqrt(p p'))^2 |O ((v + v') / 2 - mean v)|^2
    evict    mean p'^2 |O (v' - mean v)|^2, of evicting the one before

`unlike` and `evict` are what `kvfold-retrofit/src/calibrate/costs.rs` fits decisions to. A share of all tokens of all heads
and layers together is folded, with log masses, or evicted; KL(original || compressed) in nats per token.
"""
import json

import numpy as np
from random_folds import Model, arguments, divergence, softmax, texts, write

READERS = 32  # queries that a mean is taken over at least


def before(x):
    """Every row's predecessor."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def costs(model, ids, delay):
    """By name, [L, G, T]."""
    length = len(ids)
    found = {name: np.zeros((model.layers, model.kv, length)) for name in ("reads", "unlike", "evict")}
    age = np.arange(length)[:, None] - np.arange(length)[None]
    readers = np.maximum(length - delay - np.arange(length), READERS)

    def watch(layer, x, q, k, v):
        output = model.weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
        stream = np.linalg.norm(x, axis=1).mean() ** 2
        for h in range(model.heads):
            g = h * model.kv // model.heads
            shares = softmax(np.where(age >= 0, q[h] @ k[g].T, -np.inf))
            new, old = (np.where(age >= delay, p, 0) for p in (shares, before(shares.T).T))
            seen = lambda moved: ((moved @ output[:, h * model.dim :][:, : model.dim].T) ** 2).sum(1)
            late = lambda p: p.sum(0) / readers
            value, last, mean = v[g], before(v[g]), v[g].mean(0)
            roots = np.sqrt(late(new**2)) + np.sqrt(late(old**2))
            found["reads"][layer, g] += roots**2 * seen(value - last) / stream
            unlike = late((new - old) ** 2) * seen((value - last) / 2)
            lost = late((np.sqrt(new) - np.sqrt(old)) ** 4) * seen((value + last) / 2 - mean)
            found["unlike"][layer, g] += (unlike + lost) / stream
            found["evict"][layer, g] += late(old**2) * seen(last - mean) / stream

    original = model.log_probabilities(ids, watch=watch)
    return original, found


def main():
    args = arguments(__doc__).parse_args()
    model = Model(args.model, args.tokens)
    rows = []
    for text, ids in texts(args):
        original, found = costs(model, ids, args.delay)
        for share in (0.5, 0.78):
            kl = {}
            for name, cost in found.items():
                # The first token keeps its slot, and what is never `delay` tokens old stays exact.
                cost[:, :, :2], cost[:, :, args.tokens - args.delay :] = np.inf, np.inf
                folds = cost < np.quantile(cost[np.isfinite(cost)], share)
                compressed = model.log_probabilities(ids, folds, args.delay, masses=True, evict=name == "evict")
                kl[name] = round(divergence(original, compressed), 5)
            rows.append(dict(text=text.name, share=share, kl_by_cost=kl))
            print(json.dumps(rows[-1]), flush=True)
    write(args, "kvfold.hindsight_folds/1", rows)


if __name__ == "__main__":
    main()
