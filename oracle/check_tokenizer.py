"""Compare the embedded tokenizer.json with llama2.c's own encoder, written here a second time.

    python oracle/check_tokenizer.py --tok tok512.bin --dir crates/kvfold-model/models/stories260k --text stories.txt

Every paragraph of the text, then every eight paragraphs together, then odd strings and random ones. Prints counts;
exits 1 at the first difference.
"""
import argparse
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer

from stories260k import read_vocab

ODD = [
    "", " ", "  ", "   a", "a   ", "\n", "\n\n", "\t", " \n ", "a\r\nb", "Once upon a time", " Once", "once  upon",
    "é", "naïve café", "“quoted” – it’s…", "日本語", "🙂", "a🙂b", "👩‍👩‍👧 family", "\u00a0nbsp\u00a0", "\u200a\u200b",
    "e\u0301 combining", "<0x0A>", "< s >", "<|endoftext|>", "0123456789", "ＦＵＬＬ", "\ufeffBOM", "ß ẞ ı İ",
    "mmmmmmmm", "hehehehe", "aaaaaaaaaaaaaaaaaaaaa", "the the the", "\U0010ffff", "\u0001\u007f", "Zürich\tZ", "  \u3000  ",
]  # fmt: skip


def encode(text, pieces, ids):
    """llama2.c `encode`, no BOS: a dummy space, one token a character or its bytes, then the best merge until none."""
    tokens = [ids[b" "]] if text else []
    for char in text:
        raw = char.encode("utf-8")
        tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        best_score, best_at, best_id = -1e10, None, None
        for i in range(len(tokens) - 1):
            merged = ids.get(pieces[tokens[i]][1] + pieces[tokens[i + 1]][1])
            if merged is not None and pieces[merged][0] > best_score:  # the leftmost of equals
                best_score, best_at, best_id = pieces[merged][0], i, merged
        if best_at is None:
            return tokens
        tokens[best_at : best_at + 2] = [best_id]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--tok", type=Path, required=True)
    args.add_argument("--dir", type=Path, required=True)
    args.add_argument("--text", type=Path, required=True)
    args = args.parse_args()
    pieces = read_vocab(args.tok.read_bytes())
    ids = {text: i for i, (_, text) in enumerate(pieces)}
    tok = Tokenizer.from_file(str(args.dir / "tokenizer.json"))

    paragraphs = args.text.read_bytes().decode("utf-8").split("\n\n")
    longer = ["\n\n".join(paragraphs[i : i + 8]) for i in range(0, len(paragraphs), 8)]
    rng = random.Random(0)
    alphabet = "".join(sorted({c for p in paragraphs for c in p})) + "  hetands🙂é日\n"
    scrambled = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(40))) for _ in range(5000)]
    glued = ["".join(pieces[rng.randrange(259, 512)][1].decode() for _ in range(8)) for _ in range(5000)]

    for name, texts in dict(paragraphs=paragraphs, longer=longer, odd=ODD, scrambled=scrambled, glued=glued).items():
        total = 0
        for text in texts:
            want, got = encode(text, pieces, ids), tok.encode(text, add_special_tokens=False).ids
            total += len(want)
            if want != got:
                sys.exit(f"{name}: {text!r}\n llama2.c {want}\n here     {got}")
            if tok.decode(got) != text:
                sys.exit(f"{name}: {text!r} decodes to {tok.decode(got)!r}")
            assert tok.encode(text).ids == [1] + want
        print(f"{name}: {len(texts)} strings, {total} tokens, all equal")


if __name__ == "__main__":
    main()
