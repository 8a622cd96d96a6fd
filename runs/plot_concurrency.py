"""Draws results/concurrency.json. Needs matplotlib.

Usage: plot_concurrency.py [JSON] [SVG]     default: results/concurrency.json results/concurrency.svg
"""

import json
import sys

import matplotlib

matplotlib.use("svg")
# The same bytes from the same numbers.
matplotlib.rcParams["svg.hashsalt"] = "kvfold"
from matplotlib import pyplot as plt  # noqa: E402

source, target = (sys.argv[1:] + ["results/concurrency.json", "results/concurrency.svg"][len(sys.argv) - 1 :])[:2]
with open(source) as file:
    result = json.load(file)
rows = result["rows"]
clients = [row["clients"] for row in rows]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, colour in (("full", "#888888"), ("compressed", "#c2410c")):
    axes[0].plot(clients, [row[name]["tokens_per_second"] for row in rows], "o-", color=colour, label=f"{name} cache")
    axes[1].plot(clients, [row[name]["first_token_seconds"] for row in rows], "o-", color=colour)
for ax, what in zip(axes, ("new tokens/s of all clients", "seconds to the first token, median")):
    ax.set_xscale("log", base=2)
    ax.set_xticks(clients, [str(count) for count in clients])
    ax.set_xlabel("clients at once")
    ax.set_title(what, fontsize=10)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
axes[0].legend(frameon=False)
mebibytes = result["kv_bytes_limit"] / 2**20
figure.suptitle(
    f"{result['model']}: {mebibytes:.0f} MiB of cache, prompts of {result['prompt_tokens']} tokens, answers of "
    f"{result['new_tokens']}; {result['machine']}",
    fontsize=9,
)
figure.savefig(target, metadata={"Date": None})
