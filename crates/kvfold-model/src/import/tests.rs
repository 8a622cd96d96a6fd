use std::io::Write;
use std::path::PathBuf;

use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

use super::*;

/// Every text of llama.cpp's test vectors has llama.cpp's ids.
#[test]
fn texts_have_llama_cpp_s_ids() {
    for name in ["gpt-2", "refact", "starcoder", "llama-spm", "llama-bpe", "qwen2"] {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vocabs");
        let file = dir.join(format!("ggml-vocab-{name}.gguf"));
        let Ok(source) = Gguf::open(&file) else {
            // Not `eprintln!`, which a test that passes keeps to itself.
            writeln!(std::io::stderr(), "\nSKIPPED: {} is absent, see README.md there", file.display()).unwrap();
            continue;
        };
        let metadata = Metadata { file: name, map: source.metadata() };
        let json = tokenizer::Vocabulary::read(&metadata).unwrap().tokenizer_json(&metadata).unwrap();
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), name).unwrap();
        let read = |end: &str| std::fs::read_to_string(format!("{}.{end}", file.display())).unwrap();
        let (texts, ids) = (read("inp"), read("out"));
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        let wants = ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<u32>>());
        let mut count = 0;
        for (text, want) in texts.iter().zip(wants) {
            assert_eq!(tokenizer.encode(text, false).unwrap(), want, "{name}: {text:?}");
            count += 1;
        }
        assert_eq!(count, 46, "{name}");
        eprintln!("{name}: {count} texts");
    }
}

/// The same texts, cut into words by another engine of regular expressions (`oracle/golden_words.py`).
#[test]
fn texts_are_cut_into_llama_cpp_s_words() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vocabs");
    let golden: Value = serde_json::from_slice(&std::fs::read(dir.join("words.json")).unwrap()).unwrap();
    let texts = std::fs::read_to_string(dir.join("ggml-vocab-gpt-2.gguf.inp")).unwrap();
    for name in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        let map = BTreeMap::from([("tokenizer.ggml.pre".to_string(), kvfold_tensor::gguf::Value::String(name.into()))]);
        let words = tokenizer::pre_tokenizer(&Metadata { file: name, map: &map }).unwrap();
        let words: PreTokenizerWrapper = serde_json::from_value(words).unwrap();
        let mut count = 0;
        for (text, want) in texts.split("\n__ggml_vocab_test__\n").zip(golden[name].as_array().unwrap()) {
            let mut cut = PreTokenizedString::from(text);
            words.pre_tokenize(&mut cut).unwrap();
            let pieces = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let got: Vec<&str> = pieces.iter().map(|(_, (start, end), _)| &text[*start..*end]).collect();
            let want: Vec<&str> = want.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
            assert_eq!(got, want, "{name}: {text:?}");
            count += 1;
        }
        assert_eq!(count, 47, "{name}"); // the last one is empty
    }
}

#[test]
fn the_dtype_is_the_stored_one_and_bf16_for_quantised_weights() {
    assert_eq!(natural([Kind::F32, Kind::F32].into_iter()), DType::F32);
    assert_eq!(natural([Kind::F16].into_iter()), DType::F16);
    assert_eq!(natural([Kind::BF16].into_iter()), DType::BF16);
    assert_eq!(natural([Kind::F16, Kind::BF16].into_iter()), DType::F32);
    assert_eq!(natural([Kind::F32, Kind::Q4_1].into_iter()), DType::BF16);
}

#[test]
fn rows_go_from_pairs_to_halves() {
    let pairs = HostTensor::from_f32([8, 1], &[0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]);
    assert_eq!(half_rotation(&pairs, 4).to_f32(), [0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0]);
}
