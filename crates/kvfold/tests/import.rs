//! `kvfold import` on a GGUF file written here: the embedded model in another container comes back as it was.

use assert_cmd::Command;
use kvfold_model::shape::Shape;
use kvfold_model::{Checkpoint, Family};
use kvfold_tensor::DType;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

const F32: u32 = 0;
const Q8_0: u32 = 8;

/// A GGUF file of the embedded model.
struct File {
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn typed(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], bytes].concat()
}

fn list(kind: u32, items: Vec<Vec<u8>>) -> Vec<u8> {
    typed(9, &[&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes(), &items.concat()].concat())
}

impl File {
    /// `quantise` stores the matrices whose rows are long enough as `Q8_0`.
    fn new(quantise: bool) -> File {
        let model = Checkpoint::open("stories260k").unwrap();
        let json: serde_json::Value = serde_json::from_slice(model.tokenizer.json()).unwrap();
        let vocab = json["model"]["vocab"].as_object().unwrap();
        let mut tokens = vec![String::new(); vocab.len()];
        vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
        // The earlier a token is merged, the higher its score.
        let mut scores: HashMap<String, f32> = HashMap::new();
        for (rank, merge) in json["model"]["merges"].as_array().unwrap().iter().enumerate() {
            let merged = format!("{}{}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap());
            scores.entry(merged).or_insert(-(rank as f32));
        }
        let kind = |id: usize| {
            if id == 0 {
                2
            } else if id < 3 {
                3
            } else if id < 259 {
                6
            } else {
                1_i32
            }
        };
        let u32 = |n: u32| typed(4, &n.to_le_bytes());
        let f32 = |x: f32| typed(6, &x.to_le_bytes());
        let keys = [
            ("general.architecture", typed(8, &text("llama"))),
            ("general.name", typed(8, &text("Stories"))),
            ("llama.block_count", u32(5)),
            ("llama.context_length", u32(512)),
            ("llama.embedding_length", u32(64)),
            ("llama.feed_forward_length", u32(172)),
            ("llama.attention.head_count", u32(8)),
            ("llama.attention.head_count_kv", u32(4)),
            ("llama.rope.dimension_count", u32(8)),
            ("llama.attention.layer_norm_rms_epsilon", f32(1e-5)),
            ("tokenizer.ggml.model", typed(8, &text("llama"))),
            ("tokenizer.ggml.tokens", list(8, tokens.iter().map(|token| text(token)).collect())),
            ("tokenizer.ggml.token_type", list(5, (0..512).map(|id| kind(id).to_le_bytes().to_vec()).collect())),
            (
                "tokenizer.ggml.scores",
                list(
                    6,
                    tokens
                        .iter()
                        .map(|token| scores.get(token).copied().unwrap_or(-1e6).to_le_bytes().to_vec())
                        .collect(),
                ),
            ),
            ("tokenizer.ggml.bos_token_id", u32(1)),
            ("tokenizer.ggml.eos_token_id", u32(2)),
            ("tokenizer.ggml.unknown_token_id", u32(0)),
            ("tokenizer.chat_template", typed(8, &text("{{ messages }}"))),
        ];
        let tensors = model.tensors.iter().map(|(name, tensor)| {
            let theirs = theirs(name);
            let mut values = tensor.to_f32();
            if theirs.contains("attn_q") || theirs.contains("attn_k") {
                values = pairs(&values, 8 * 64);
            }
            let shape = tensor.shape().to_vec();
            match quantise && shape.len() == 2 && shape[1] % 32 == 0 {
                true => (theirs, shape, Q8_0, q8_0(&values)),
                false => (theirs, shape, F32, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
            }
        });
        let keys = keys.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        File { keys, tensors: tensors.collect() }
    }

    fn set(mut self, key: &str, value: Vec<u8>) -> File {
        self.keys.retain(|(name, _)| name != key);
        self.keys.push((key.into(), value));
        self
    }

    fn write(&self, dir: &Path) -> PathBuf {
        let mut bytes = [&b"GGUF"[..], &3_u32.to_le_bytes()].concat();
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            bytes.extend(text(key));
            bytes.extend(value);
        }
        let mut offset = 0;
        for (name, shape, kind, data) in &self.tensors {
            bytes.extend(text(name));
            bytes.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&dim| bytes.extend((dim as u64).to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
            offset += data.len().next_multiple_of(32);
        }
        for (_, _, _, data) in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(data);
        }
        let path = dir.join("stories.gguf");
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn theirs(name: &str) -> String {
    let parts = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    parts.iter().fold(name.to_string(), |name, (ours, theirs)| name.replace(ours, theirs))
}

/// Rows of 64 from halves to pairs, head by head.
fn pairs(values: &[f32], head: usize) -> Vec<f32> {
    let row = |head: &[f32], i: usize| head[(i / 2 + i % 2 * 4) * 64..][..64].to_vec();
    values.chunks(head).flat_map(|head| (0..8).flat_map(move |i| row(head, i))).collect()
}

fn q8_0(values: &[f32]) -> Vec<u8> {
    let block = |block: &[f32]| {
        // A power of two, which half precision holds.
        let d = (block.iter().fold(1e-4_f32, |max, x| max.max(x.abs())) / 127.0).log2().ceil().exp2();
        let exponent = (d.log2() as i32 + 15) as u16;
        let q = block.iter().map(|x| (x / d).round() as i8 as u8);
        (exponent << 10).to_le_bytes().into_iter().chain(q).collect::<Vec<u8>>()
    };
    values.chunks(32).flat_map(block).collect()
}

fn import(file: &Path, out: &Path, more: &[&str]) -> assert_cmd::assert::Assert {
    Command::cargo_bin("kvfold").unwrap().arg("import").arg(file).arg(out).args(more).assert()
}

#[test]
fn the_embedded_model_comes_back_bit_by_bit() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    import(&File::new(false).write(dir.path()), &out, &[]).success();
    let (got, want) = (Checkpoint::open(out.to_str().unwrap()).unwrap(), Checkpoint::open("stories260k").unwrap());
    assert_eq!(got.tensors, want.tensors); // the same weights give the same logits
    assert_eq!(got.config.rms_norm_eps, 1e-5);
    assert_eq!((got.config.rope.theta, got.config.eos_token_ids.as_slice()), (10000.0, &[2][..]));
    let held = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/tinystories_heldout.txt"));
    for text in held.unwrap().split("\n\n").take(200).chain(["", " ", "naïve 🙂", "<s> a"]) {
        assert_eq!(got.tokenizer.encode(text, true).unwrap(), want.tokenizer.encode(text, true).unwrap(), "{text:?}");
    }
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("`stories.gguf`") && card.contains("sha256"), "{card}");
    assert!(String::from_utf8_lossy(&got.companions["tokenizer_config.json"]).contains("{{ messages }}"));
}

#[test]
fn quantised_weights_are_within_their_error() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    import(&File::new(true).write(dir.path()), &out, &[]).success();
    let (got, want) = (Checkpoint::open(out.to_str().unwrap()).unwrap(), Checkpoint::open("stories260k").unwrap());
    for (name, want) in &want.tensors {
        let (got, want) = (&got.tensors[name], want.to_f32());
        assert_eq!(got.dtype(), DType::BF16);
        let largest = want.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        // Half a step of at most 2/127 of the block's largest, and bf16's rounding.
        let error = got.to_f32().iter().zip(&want).fold(0.0_f32, |max, (g, w)| max.max((g - w).abs()));
        assert!(error <= largest * (1.0 / 127.0 + 1.0 / 256.0), "{name}: {error}");
    }
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let string = |value: &str| typed(8, &text(value));
    for (key, value) in [
        ("general.architecture", string("gemma")),
        ("tokenizer.ggml.model", string("t5")),
        ("llama.rope.scaling.type", string("longrope")),
        ("llama.expert_count", typed(4, &8_u32.to_le_bytes())),
        ("llama.block_count", typed(4, &6_u32.to_le_bytes())),
        ("llama.context_length", string("long")),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let failed = import(&File::new(false).set(key, value).write(dir.path()), &out, &[]).failure().code(3);
        let message = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
        let named = if key == "llama.block_count" { "blk.5." } else { key };
        assert!(message.contains(named) && message.contains("stories.gguf"), "{message}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something was left behind");
    }
}

#[test]
fn rotary_factors_that_follow_from_no_known_scaling_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (factors, known) in [([1.0_f32, 1.0, 1.0, 1.0], true), ([1.0, 3.0, 2.0, 8.0], false), ([2.0; 4], false)] {
        let mut file = File::new(false);
        let data = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
        file.tensors.push(("rope_freqs.weight".into(), vec![4], F32, data));
        let out = dir.path().join(format!("{factors:?}"));
        let done = import(&file.write(dir.path()), &out, &[]);
        let message = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        match known {
            true => drop(done.success()),
            false => assert!(message.contains("rope_freqs.weight") && message.contains("Llama 3.1"), "{message}"),
        }
    }
}

/// GGUF files of the small random models of every family (`oracle/golden_gguf_models.py`), whose directories are held
/// against an independent implementation.
#[test]
fn every_family_comes_out_as_its_directory() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama_bias_linear", "llama3", "mistral", "qwen2", "qwen2_yarn", "qwen3"] {
        let out = dir.path().join(name);
        import(&here.join(format!("tests/gguf/{name}.gguf")), &out, &[]).success();
        let got = Checkpoint::open(out.to_str().unwrap()).unwrap();
        let want = here.join("../kvfold-model/tests/families").join(name);
        let want = Checkpoint::open(want.to_str().unwrap()).unwrap();
        assert_eq!(got.tensors.keys().collect::<Vec<_>>(), want.tensors.keys().collect::<Vec<_>>(), "{name}");
        for (tensor, value) in &got.tensors {
            assert_eq!(value, &want.tensors[tensor], "{name}: {tensor}");
        }
        assert_eq!(Shape::of(&got.config), Shape::of(&want.config), "{name}");
        // Mistral's architecture is Llama's there. Llama 3 starts a text with a token, which Qwen does not.
        let qwen = name.starts_with("qwen");
        assert_eq!(got.config.family, if qwen { want.config.family } else { Family::Llama });
        let ids = got.tokenizer.encode("abc a", true).unwrap();
        assert_eq!(ids, if qwen { vec![27, 29] } else { vec![30, 27, 29] }, "{name}");
    }
}

#[test]
fn a_file_that_is_absent_or_a_directory_that_is_there_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    import(&dir.path().join("none.gguf"), &dir.path().join("out"), &[]).failure().code(3);
    let file = File::new(false).write(dir.path());
    import(&file, dir.path(), &[]).failure().code(3);
}

/// A DMC model of two tensor-parallel ranks (`oracle/golden_megatron.py`) becomes a model that folds and generates.
#[test]
fn a_megatron_checkpoint_becomes_a_model_directory() {
    let kvfold_model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kvfold-model");
    let (checkpoint, tokenizer) =
        (kvfold_model.join("tests/goldens/megatron"), kvfold_model.join("models/stories260k"));
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_kvfold")).current_dir(dir.path()).args(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (checkpoint, tokenizer) = (checkpoint.to_str().unwrap(), tokenizer.to_str().unwrap());
    let (code, _, err) = run(&["import", checkpoint, "out"]);
    assert!(code == Some(3) && err.contains("--tokenizer"), "{err}");

    let (code, out, err) = run(&["import", checkpoint, "out", "--tokenizer", tokenizer, "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&json["format"], &json["dtype"]), (&"Megatron checkpoint".into(), &"BF16".into()));
    let card = std::fs::read_to_string(dir.path().join("out/README.md")).unwrap();
    assert!(card.contains("from a Megatron checkpoint") && card.contains("tensor-parallel ranks"), "{card}");
    let config = std::fs::read_to_string(dir.path().join("out/config.json")).unwrap();
    assert!(config.contains("KvfoldLlamaForCausalLM") && config.contains("\"pool_window\": 12"), "{config}");
    let (code, out, err) =
        run(&["generate", "--model", "out", "--prompt", "Once upon", "--max-new-tokens", "40", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(json["logical_ratio"].as_f64().unwrap() > 1.0, "{json}");

    // A file that wants to run something is refused and leaves nothing behind.
    std::fs::write(dir.path().join("evil.pt"), b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.").unwrap();
    let (code, _, err) = run(&["import", "evil.pt", "evil", "--tokenizer", tokenizer]);
    assert!(code == Some(3) && err.contains("evil.pt") && !dir.path().join("evil").exists(), "{err}");
}
