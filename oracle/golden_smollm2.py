"""Goldens of an imported model: SmolLM2-135M-Instruct from its Q4_1 GGUF file.

    python oracle/golden_smollm2.py --gguf models/SmolLM2-135M-Instruct.Q4_1.gguf \
        --text data/tinystories_heldout.txt --out crates/kvfold/tests/goldens

Writes smollm2.json:
    encodings   texts and their ids, special tokens spelled out in a text being those tokens
    greedy      prompts, the ids of each, 32 greedy tokens after it, the smallest lead of a first over a second logit
    logits      of the first prompt's last position: the ten largest, [id, value]
    perplexity  of windows of 256 tokens of the first 4096 bytes of the text (no BOS; 255 predicted in each window)

The numbers are transformers' float32 ones, which reads the GGUF file by itself. It ignores `tokenizer.ggml.pre`, though,
so the ids are those of the byte-level BPE below, plain Python, which `--vectors` holds to llama.cpp's own test vectors
(NAME.gguf beside NAME.gguf.inp and NAME.gguf.out).
"""
import argparse
import json
from pathlib import Path

import regex
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

TEXTS = [
    "", " ", "  ", "\n", "\n\n", "\t", " \n\t ", "Hello", " Hello", "Hello, world!", "  leading and trailing  ",
    "It's we'll I'd DON'T they're", "3.14159 and 1234567890 and 2nd", "½ ² Ⅷ ٣٤", "🙂 👩‍👩‍👧 🏳️‍🌈", "日本語のテキスト", "Ünïcödé naïve café",
    "e\u0301 combining", "\u00a0nbsp\u2003em", "def f(x):\n    return x**2  # square\n\n\nprint(f(3))\n",
    "fn main() {\r\n\tprintln!(\"{:?}\", 0x1F);\r\n}", "<|im_start|>user\nHi<|im_end|>\n", "< |im_start| >", "a" * 40, "=====-----",
    "https://example.org/a?b=c&d=%20", "\u0001\u007f\ufeff", "Привет, мир! مرحبا 안녕",
]  # fmt: skip
PROMPTS = [
    "Once upon a time, there was a little girl named Lily. She",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "In 1969, 600 million people watched as Neil Armstrong",
    "The three states of matter are",
]
# A message, and the words that the model's chat template puts around it.
CHAT = "Name three colours of the rainbow."
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_PROMPT = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{CHAT}<|im_end|>\n<|im_start|>assistant\n"
)
LONG = 1500  # bytes of the text as a prompt that is longer than a chunk
GREEDY, WINDOW, BYTES = 32, 256, 4096
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CONTROL = 3


def byte_names():
    """GPT-2's printable name of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


class Encoder:
    def __init__(self, path):
        fields = GGUFReader(path).fields
        get = lambda key: fields[f"tokenizer.ggml.{key}"].contents()
        self.ids = {token: i for i, token in enumerate(get("tokens"))}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(get("merges"))}
        self.special = [t for t, kind in zip(get("tokens"), get("token_type")) if kind == CONTROL]
        self.digits = get("pre") in ("smollm", "starcoder", "refact")
        self.names = byte_names()

    def word(self, word):
        parts = [self.names[b] for b in word.encode("utf-8")]
        while len(parts) > 1:
            rank, at = min((self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts if part in self.ids]

    def plain(self, text):
        chunks = regex.findall(r"\p{N}|\P{N}+", text) if self.digits else [text]
        return [i for chunk in chunks for word in regex.findall(GPT2, chunk) for i in self.word(word)]

    def encode(self, text, special=True):
        if not special or not self.special:
            return self.plain(text)
        pattern = "(" + "|".join(regex.escape(t) for t in sorted(self.special, key=len, reverse=True)) + ")"
        ids = []
        for part in regex.split(pattern, text):
            ids += [self.ids[part]] if part in self.special else self.plain(part)
        return ids


def check_vectors(path):
    encoder = Encoder(path)
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    wants = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().split("\n")]
    good = sum(encoder.encode(text, special=False) == want for text, want in zip(texts, wants))
    print(f"{Path(path).name}: {good} of {len(texts)} of llama.cpp's vectors")
    assert good == len(texts)


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--gguf", type=Path, required=True)
    args.add_argument("--text", type=Path, required=True)
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--vectors", type=Path, nargs="*", default=[])
    args = args.parse_args()
    for path in args.vectors:
        check_vectors(path)
    encoder = Encoder(args.gguf)
    model = AutoModelForCausalLM.from_pretrained(
        args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    golden = {"encodings": [[text, encoder.encode(text)] for text in TEXTS], "greedy": [], "chat": CHAT}
    text = args.text.read_bytes()[:BYTES].decode("utf-8", errors="ignore")
    with torch.no_grad():
        for prompt in [*PROMPTS, text.encode()[:LONG].decode("utf-8", errors="ignore"), CHAT_PROMPT]:
            ids, tokens, lead, cache = encoder.encode(prompt), [], float("inf"), None
            for _ in range(GREEDY):
                out = model(torch.tensor([tokens[-1:] or ids]), past_key_values=cache, use_cache=True)
                top, cache = out.logits[0, -1].topk(10), out.past_key_values
                if not tokens and "logits" not in golden:
                    golden["logits"] = [[i, round(x, 6)] for i, x in zip(top.indices.tolist(), top.values.tolist())]
                lead = min(lead, (top.values[0] - top.values[1]).item())
                tokens.append(top.indices[0].item())
            golden["greedy"].append({"prompt": prompt, "ids": ids, "tokens": tokens, "lead": lead})
            print(lead, tokens)
        ids = torch.tensor(encoder.encode(text))
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        value = torch.stack([model(w[None], labels=w[None]).loss for w in windows]).double().mean().exp().item()
        golden["perplexity"] = {"bytes": BYTES, "window": WINDOW, "windows": len(windows), "value": value}
        print(len(ids), golden["perplexity"])
    (args.out / "smollm2.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
