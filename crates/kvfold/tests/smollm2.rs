//! A real model through `kvfold import`, against an independent implementation (`oracle/golden_smollm2.py`).
//!
//! Needs the GGUF file that `runs/fetch-smollm2.sh` fetches, and says so where it is absent. `.ci/run` fetches it first and
//! fails if it cannot.

use assert_cmd::Command;
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn json(args: &[&str]) -> Value {
    let output = Command::cargo_bin("kvfold").unwrap().args(args).arg("--json").assert().success().get_output().clone();
    serde_json::from_slice(&output.stdout).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn the_imported_model_is_the_original() {
    let gguf = PathBuf::from(ROOT).join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !gguf.is_file() {
        // Not `eprintln!`, which a test that passes keeps to itself.
        let notice = "\nSKIPPED: models/SmolLM2-135M-Instruct.Q4_1.gguf is absent; run runs/fetch-smollm2.sh\n";
        std::io::stderr().write_all(notice.as_bytes()).unwrap();
        return;
    }
    let golden: Value = serde_json::from_str(include_str!("goldens/smollm2.json")).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("model");
    let dir = dir.to_str().unwrap();
    let imported = json(&["import", gguf.to_str().unwrap(), dir, "--dtype", "f32"]);
    assert_eq!(imported["parameters"], 134_515_008);

    let tokenizer = std::fs::read(Path::new(dir).join("tokenizer.json")).unwrap();
    let tokenizer = kvfold_model::Tokenizer::from_json(&tokenizer, "tokenizer.json").unwrap();
    for case in golden["encodings"].as_array().unwrap() {
        let text = case[0].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case[1]), "{text:?}");
    }

    let greedy = golden["greedy"].as_array().unwrap();
    let continues = |case: &Value, prompt: &[&str]| {
        let continued = json(&[&["generate", "--model", dir, "--max-new-tokens", "32"], prompt].concat());
        assert_eq!(continued["prompt_tokens"], case["ids"].as_array().unwrap().len());
        // The command stops where the model ends its turn; the golden goes on.
        let tokens: Vec<u32> = ids(&case["tokens"]).into_iter().take_while(|&id| id != 2).collect();
        assert_eq!(continued["new_tokens"], tokens.len(), "{prompt:?}");
        assert_eq!(continued["text"], tokenizer.decode(&tokens, true).unwrap(), "{prompt:?}");
    };
    for case in greedy {
        continues(case, &["--prompt", case["prompt"].as_str().unwrap()]);
    }
    // The last prompt is this message in the words of the model's template.
    continues(greedy.last().unwrap(), &["--chat", "--prompt", golden["chat"].as_str().unwrap()]);

    let want = &golden["perplexity"];
    let text = std::fs::read(PathBuf::from(ROOT).join("data/tinystories_heldout.txt")).unwrap();
    let file = scratch.path().join("text.txt");
    std::fs::write(&file, &text[..want["bytes"].as_u64().unwrap() as usize]).unwrap();
    let window = want["window"].to_string();
    let measured = json(&["eval", "ppl", "--model", dir, "--text", file.to_str().unwrap(), "--window", &window]);
    assert_eq!(measured["windows"], want["windows"]);
    let (got, want) = (measured["perplexity"].as_f64().unwrap(), want["value"].as_f64().unwrap());
    // Both compute in float32, in different orders: 1e-5 apart here.
    assert!((got / want - 1.0).abs() < 1e-4, "perplexity {got}, expected {want}");
}
