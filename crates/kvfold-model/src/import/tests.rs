use std::path::PathBuf;

use super::*;

/// Every text of llama.cpp's test vectors has llama.cpp's ids.
#[test]
fn texts_have_llama_cpp_s_ids() {
    for name in ["gpt-2", "refact", "starcoder", "llama-spm"] {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vocabs");
        let file = dir.join(format!("ggml-vocab-{name}.gguf"));
        let Ok(source) = Gguf::open(&file) else {
            eprintln!("SKIPPED: {} is absent, see README.md there", file.display());
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
