"""Goldens of pre-tokenizers: llama.cpp's test texts (and an empty one) cut into words by its own regular expressions.

    python oracle/golden_words.py --dir crates/kvfold-model/tests/vocabs [--llama3 tokenizer.model] [--qwen qwen.tiktoken]

Writes words.json: for each `tokenizer.ggml.pre` the words of the texts. The engine is the `regex` package.

With the ranks of a tiktoken vocabulary (Llama 3's `tokenizer.model`, Qwen's `qwen.tiktoken`; they keep their models' terms
and are not committed) it also writes the vocabulary as ggml-vocab-NAME.gguf, which kvfold's test then encodes with, and
checks with a byte-level BPE in plain Python that the words lead to llama.cpp's ids.
"""
import argparse
import base64
import json
import unicodedata
from pathlib import Path

import regex
from gguf import GGUFWriter

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEAD = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
# One expression after another, each cutting what the one before has left.
CUTS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}|\P{N}+", GPT2],
    "llama-bpe": [HEAD + r"\p{N}{1,3}" + TAIL],
    "qwen2": [HEAD + r"\p{N}" + TAIL],
}
SEPARATOR = "\n__ggml_vocab_test__\n"


def cut(text, expressions):
    words = [text] if text else []
    for expression in expressions:
        words = [word for piece in words for word in regex.findall(expression, piece)]
    return words


def letters():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def parts(ranks, token, below):
    """The tokens that merges of a rank below `below` make of the bytes of `token`."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 1:
        rank, at = min((ranks.get(a + b, below), i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])))
        if rank >= below:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def vocabulary(path, name, directory, compose):
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    texts = (directory / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split(SEPARATOR)
    wants = [[int(i) for i in line.split()] for line in (directory / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")]
    for text, want in zip(texts, wants):
        words = cut(unicodedata.normalize("NFC", text) if compose else text, CUTS[name])
        ids = []
        for word in (word.encode() for word in words):
            whole = [word] if word in ranks else parts(ranks, word, len(ranks))
            ids += [ranks[piece] for piece in whole]
        assert ids == want, (name, text, ids, want)
    spell = letters()
    spelled = lambda token: "".join(spell[b] for b in token)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pair = parts(ranks, token, rank) if len(token) > 1 else []
        if len(pair) == 2:
            merges.append(" ".join(spelled(piece) for piece in pair))
    writer = GGUFWriter(directory / f"ggml-vocab-{name}.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([spelled(token) for token, _ in sorted(ranks.items(), key=lambda item: item[1])])
    writer.add_token_merges(merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    print(name, len(ranks), "tokens", len(merges), "merges, all of", len(wants), "vectors")


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--dir", type=Path, required=True)
    args.add_argument("--llama3", type=Path)
    args.add_argument("--qwen", type=Path)
    args = args.parse_args()
    texts = (args.dir / "ggml-vocab-gpt-2.gguf.inp").read_bytes().decode().split(SEPARATOR)
    words = {name: [cut(text, expressions) for text in texts] for name, expressions in CUTS.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(of, ensure_ascii=False)}" for name, of in words.items())
    (args.dir / "words.json").write_text("{" + lines + "}\n")
    if args.llama3:
        vocabulary(args.llama3, "llama-bpe", args.dir, compose=False)
    if args.qwen:
        vocabulary(args.qwen, "qwen2", args.dir, compose=True)


if __name__ == "__main__":
    main()
