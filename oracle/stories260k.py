"""Make the embedded model: karpathy's stories260K as a Hugging Face directory.

    python oracle/stories260k.py --bin stories260K.bin --tok tok512.bin --out crates/kvfold-model/models/stories260k

From the two llama2.c files (https://huggingface.co/karpathy/tinyllamas, stories260K/) this writes
config.json, model.safetensors, tokenizer.json, tokenizer_config.json, LICENSE and README.md.

- The "legacy" llama2.c file is a header of 7 int32 and then f32 tensors in a fixed order (`read_model`).
- llama2.c rotates neighbouring channels (2i, 2i+1); Hugging Face rotates channel i with i + D/2.
  The rows of q_proj and k_proj are therefore permuted (`half_rotation`); nothing else changes.
- The vocabulary comes with scores, not merges. Every way of cutting a token into two other tokens becomes a
  merge, the best score first, which is the order in which llama2.c merges. `check_tokenizer.py` compares the two.
"""
import argparse
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

BIN_SHA256 = "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696"
UNK, BOS, EOS, FIRST_PIECE = 0, 1, 2, 259  # ids 3..258 are the 256 bytes


def read_model(raw):
    """llama2.c "legacy" bytes -> (header, tensors under Hugging Face names)."""
    dim, hidden, layers, heads, kv_heads, vocab, seq = struct.unpack("<7i", raw[:28])
    assert vocab > 0, "a negative vocabulary means a separate lm_head; this model shares it"
    head_dim, kv_dim = dim // heads, kv_heads * (dim // heads)
    floats, at = np.frombuffer(raw, "<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        n = int(np.prod(shape))
        at += n
        return floats[at - n : at].reshape(shape)

    embed = take(vocab, dim)
    per_layer = {  # in file order, all layers of one kind together
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": half_rotation(take(layers, dim, dim), heads),
        "self_attn.k_proj": half_rotation(take(layers, kv_dim, dim), kv_heads),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),  # w1
        "mlp.down_proj": take(layers, dim, hidden),  # w2
        "mlp.up_proj": take(layers, hidden, dim),  # w3
    }
    norm = take(dim)
    take(2, seq, head_dim // 2)  # cos and sin tables, not needed
    assert at == len(floats), f"{len(floats) - at} floats left over"

    tensors = {"model.embed_tokens.weight": embed, "model.norm.weight": norm}
    for name, stack in per_layer.items():
        for i in range(layers):
            tensors[f"model.layers.{i}.{name}.weight"] = stack[i]
    return (dim, hidden, layers, heads, kv_heads, vocab, seq), tensors


def half_rotation(w, heads):
    """Rows of each head from pairs (2i, 2i+1) to halves (i, i + D/2). w: [L, heads*D, C]"""
    layers, rows, dim = w.shape
    return w.reshape(layers, heads, rows // heads // 2, 2, dim).swapaxes(2, 3).reshape(w.shape)


def read_vocab(raw):
    """tok512.bin -> [(score, bytes)]: int32 longest piece, then per piece f32 score, int32 length, bytes."""
    pieces, at = [], 4
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        pieces.append((score, raw[at + 8 : at + 8 + length]))
        at += 8 + length
    return pieces


def make_tokenizer(pieces):
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    names += [text.decode("utf-8").replace(" ", "▁") for _, text in pieces[FIRST_PIECE:]]
    vocab = {name: i for i, name in enumerate(names)}
    assert len(vocab) == len(pieces), "two pieces with one name"

    words = set(names[FIRST_PIECE:])
    merges = []
    for i in sorted(range(FIRST_PIECE, len(names)), key=lambda i: -pieces[i][0]):
        cuts = [(names[i][:n], names[i][n:]) for n in range(1, len(names[i]))]
        merges += [(a, b) for a, b in cuts if a in words and b in words]

    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<unk>", "<s>", "</s>")])
    return tok


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--bin", type=Path, required=True)
    args.add_argument("--tok", type=Path, required=True)
    args.add_argument("--out", type=Path, required=True)
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tok = args.bin.read_bytes(), args.tok.read_bytes()
    assert hashlib.sha256(model).hexdigest() == BIN_SHA256, "not the stories260K.bin this was written for"

    (dim, hidden, layers, heads, kv_heads, vocab, seq), tensors = read_model(model)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim // heads,
        "vocab_size": vocab,
        "max_position_embeddings": seq,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": seq,
        "clean_up_tokenization_spaces": False,
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    tensors = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in tensors.items()}
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(read_vocab(tok)).save(str(args.out / "tokenizer.json"))
    (args.out / "LICENSE").write_text(LICENSE)
    (args.out / "README.md").write_text(
        README.format(bin=BIN_SHA256, tok=hashlib.sha256(tok).hexdigest(), n=sum(v.size for v in tensors.values()))
    )


README = """\
# stories260K

A Llama of {n:,} parameters trained by Andrej Karpathy on TinyStories, small enough to be embedded: five layers,
8 query heads, 4 KV heads, head dimension 8, vocabulary 512, context 512. It tells simple children's stories.

- Source: https://huggingface.co/karpathy/tinyllamas, folder `stories260K`; licence MIT (`LICENSE`).
- `stories260K.bin`: sha256 {bin}
- `tok512.bin`: sha256 {tok}
- Made by `oracle/stories260k.py` (see there), which changes the container and the names, and permutes the rows of
  q_proj and k_proj from llama2.c's interleaved RoPE pairs to Hugging Face's half rotation. The numbers are the
  original f32; the embedding is also the output head, so there is no `lm_head.weight`.
- `tokenizer.json` encodes like llama2.c's `encode`, compared by `oracle/check_tokenizer.py`. Two differences are
  meant, both as in every Llama tokenizer.json: the strings `<unk>`, `<s>`, `</s>` in a text are special tokens,
  and the character U+2581 stands for a space.
"""

LICENSE = """\
MIT License

Copyright (c) 2023 Andrej

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

if __name__ == "__main__":
    main()
