//! Models that cannot be used: every command says which file and what in it, and leaves nothing behind.

use crate::common::{Dir, HELD_OUT};
use serde_json::{Value, json};
use std::path::Path;

/// Damages a copy of the embedded model, and expects every command to say all of `phrases`.
#[track_caller]
fn refused(damage: impl Fn(&Path), phrases: &[&str]) {
    let dir = Dir::new();
    damage(&dir.model());
    for command in [
        &["generate", "--model", "model", "--prompt", "Once"][..],
        &["generate", "--model", "model", "--prompt", "Once", "--json"],
        &["eval", "ppl", "--model", "model", "--text", HELD_OUT],
        &["retrofit", "--model", "model", "--out", "out", "--ratio", "2", "--steps", "1"],
    ] {
        dir.run(command).fails(3, phrases);
        assert_eq!(dir.list("."), ["model"], "{command:?}");
    }
}

fn edit_json(path: &Path, edit: impl Fn(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON");
    edit(&mut value);
    std::fs::write(path, value.to_string()).expect("writable");
}

fn config(field: &'static str, value: Value) -> impl Fn(&Path) {
    move |model| edit_json(&model.join("config.json"), |config| config[field] = value.clone())
}

fn without(field: &'static str) -> impl Fn(&Path) {
    move |model| {
        edit_json(&model.join("config.json"), |config| {
            config.as_object_mut().expect("an object").remove(field);
        });
    }
}

fn edit_bytes(name: &'static str, edit: impl Fn(&mut Vec<u8>)) -> impl Fn(&Path) {
    move |model| {
        let path = model.join(name);
        let mut bytes = std::fs::read(&path).expect("a file");
        edit(&mut bytes);
        std::fs::write(path, bytes).expect("writable");
    }
}

fn removed(name: &'static str) -> impl Fn(&Path) {
    move |model| std::fs::remove_file(model.join(name)).expect("removed")
}

#[test]
fn no_model_at_all() {
    let dir = Dir::new();
    dir.write("file", "no directory");
    for name in ["no-such-model", ""] {
        dir.run(&["generate", "--model", name, "--prompt", "x"]).fails(3, &["no such model", "stories260k"]);
    }
    dir.run(&["generate", "--model", "file", "--prompt", "x"]).fails(3, &["file: is no delta that can be read"]);
}

#[test]
fn missing_files() {
    refused(removed("config.json"), &["model/config.json", "no such file"]);
    refused(removed("model.safetensors"), &["model/model.safetensors", "no such file"]);
    refused(removed("tokenizer.json"), &["model/tokenizer.json", "no such file", "AutoTokenizer"]);
}

#[test]
fn directories_in_the_place_of_files() {
    let replaced = |name: &'static str| {
        move |model: &Path| {
            std::fs::remove_file(model.join(name)).expect("removed");
            std::fs::create_dir(model.join(name)).expect("a directory");
        }
    };
    refused(replaced("config.json"), &["model/config.json", "cannot read"]);
    refused(replaced("model.safetensors"), &["model/model.safetensors"]);
}

#[test]
fn truncated_and_damaged_weights() {
    let file = "model.safetensors";
    refused(edit_bytes(file, |bytes| bytes.truncate(bytes.len() / 2)), &["model/model.safetensors", "truncated"]);
    refused(edit_bytes(file, |bytes| bytes.truncate(100)), &["model/model.safetensors", "truncated: the header"]);
    refused(edit_bytes(file, Vec::clear), &["model/model.safetensors", "truncated: the header length"]);
    refused(edit_bytes(file, |bytes| bytes[7] = 0x7f), &["model/model.safetensors", "a header of"]);
    refused(edit_bytes(file, |bytes| bytes[8] = b'!'), &["model/model.safetensors", "invalid safetensors header"]);
    refused(edit_bytes(file, |bytes| bytes.push(0)), &["model/model.safetensors", "follow the last tensor"]);
    let pointer = b"version https://git-lfs.github.com/spec/v1\n".to_vec();
    refused(edit_bytes(file, move |bytes| *bytes = pointer.clone()), &["model/model.safetensors", "git-lfs"]);
}

#[test]
fn weights_that_are_no_numbers() {
    let poison = |value: f32| {
        edit_bytes("model.safetensors", move |bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
            let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
            let start = header["model.norm.weight"]["data_offsets"][0].as_u64().expect("an offset") as usize;
            bytes[8 + length + start + 12..][..4].copy_from_slice(&value.to_le_bytes());
        })
    };
    let file = "model/model.safetensors";
    refused(poison(f32::NAN), &[file, "model.norm.weight", "NaN", "element 3"]);
    refused(poison(f32::INFINITY), &[file, "model.norm.weight", "inf"]);
}

#[test]
fn configurations_that_lack_a_field() {
    for field in ["architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"] {
        refused(without(field), &["model/config.json", &format!("`{field}` is missing")]);
    }
}

#[test]
fn configurations_with_impossible_numbers() {
    let file = "model/config.json";
    refused(config("hidden_size", json!(0)), &[file, "`hidden_size` is 0"]);
    refused(config("hidden_size", json!(-64)), &[file, "`hidden_size` is -64"]);
    refused(config("hidden_size", json!(1e300)), &[file, "`hidden_size`"]);
    refused(config("num_hidden_layers", json!(u64::MAX)), &[file, "`num_hidden_layers`"]);
    refused(config("num_key_value_heads", json!(3)), &[file, "`num_key_value_heads` is 3", "divisor"]);
    refused(config("rms_norm_eps", json!(-1)), &[file, "`rms_norm_eps`"]);
    refused(config("vocab_size", json!("many")), &[file, "`vocab_size` is \"many\""]);
    refused(config("max_position_embeddings", json!(0)), &[file, "`max_position_embeddings` is 0"]);
    refused(edit_bytes("config.json", |bytes| bytes.truncate(40)), &[file, "invalid JSON"]);
}

#[test]
fn weights_of_another_shape_than_the_configuration() {
    let file = "model/model.safetensors";
    refused(config("intermediate_size", json!(176)), &[file, "has shape", "172", "176"]);
    refused(config("num_hidden_layers", json!(6)), &[file, "tensor `model.layers.5.", "is missing"]);
}

#[test]
fn architectures_that_are_unknown() {
    let file = "model/config.json";
    refused(config("architectures", json!(["GPT2LMHeadModel"])), &[file, "GPT2LMHeadModel", "LlamaForCausalLM"]);
    refused(config("rope_scaling", json!({"rope_type": "longrope"})), &[file, "`rope_scaling.rope_type`", "longrope"]);
    refused(config("rope_scaling", json!({"rope_type": "yarn"})), &[file, "`rope_scaling.factor` is missing"]);
    refused(config("attention_bias", json!(true)), &["model/model.safetensors", ".k_proj.bias` is missing"]);
    // A retrofitted model that lost its section, and a plain one that has one.
    let retrofitted = |model: &Path| {
        config("architectures", json!(["KvfoldLlamaForCausalLM"]))(model);
        config("model_type", json!("kvfold_llama"))(model);
    };
    refused(retrofitted, &[file, "`kvfold` is missing"]);
    refused(config("kvfold", json!({"version": 1})), &[file, "`kvfold`"]);
}

#[test]
fn tokenizers_that_do_not_fit() {
    let file = "model/tokenizer.json";
    let enlarged = |model: &Path| {
        edit_json(&model.join("tokenizer.json"), |tokenizer| {
            let extra = json!({"id": 512, "content": "<extra>", "single_word": false, "lstrip": false, "rstrip": false,
                               "normalized": false, "special": true});
            tokenizer["added_tokens"].as_array_mut().expect("a list").push(extra);
        });
    };
    refused(enlarged, &[file, "`<extra>` has id 512", "`vocab_size`", "512"]);
    refused(edit_bytes("tokenizer.json", |bytes| bytes.truncate(99)), &[file, "invalid tokenizer"]);
}

#[test]
fn a_retrofitted_model_of_another_version_is_refused() {
    let dir = Dir::new();
    dir.run_with(crate::retrofit::TINY, &["--steps", "1"]).ok();
    edit_json(&dir.path("out/config.json"), |config| config["kvfold"]["version"] = json!(3));
    let generate = ["generate", "--model", "out", "--prompt", "x"];
    dir.run(&generate).fails(3, &["out/config.json", "`kvfold.version` is 3", "this build reads versions 1 to 2"]);
}
