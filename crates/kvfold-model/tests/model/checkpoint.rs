//! Models opened, refused and saved.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::common::{BORROWED, Fixture, HEAD, compression, refused, says};
use kvfold_model::{Checkpoint, ModelError, ensure_absent, names};
use kvfold_tensor::{DType, HostTensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

const Q: &str = "model.layers.2.self_attn.q_proj.weight";

/// The tensors of a configuration.
fn expected(config: &kvfold_model::Config) -> Vec<(String, Vec<usize>)> {
    kvfold_model::weights::Weights::<()>::expected(&kvfold_model::shape::Shape::of(config))
}

/// The names in a directory, hidden ones included.
fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_embedded_model_opens() {
    let model = Checkpoint::open("stories260k").unwrap();
    assert_eq!(model.tensors.len(), expected(&model.config).len());
    assert_eq!(model.tensors.values().map(HostTensor::numel).sum::<usize>(), 260_032);
    assert_eq!(model.source, "stories260k");
    assert!(model.ignored.is_empty());
    assert!(model.companions.contains_key("LICENSE"));
}

#[test]
fn a_saved_model_opens_and_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("copy");
    let model = Checkpoint::open("stories260k").unwrap();
    model.save(&path, &[("kvfold-retrofit.json", b"{}")]).unwrap();

    let files = entries(&path);
    let expected = [
        "LICENSE",
        "config.json",
        "kvfold-retrofit.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(files, expected);
    assert_eq!(entries(dir.path()), ["copy"], "something was left behind");

    let back = Checkpoint::open(path.to_str().unwrap()).unwrap();
    assert_eq!(back.tensors, model.tensors);
    assert_eq!(back.config, model.config);
    assert_eq!(back.companions, model.companions);
    assert_eq!(back.tokenizer.json(), model.tokenizer.json());
    let weights = kvfold_tensor::read(&path.join("model.safetensors")).unwrap();
    assert_eq!(weights.metadata["format"], "pt", "Hugging Face's loader insists on it");
}

#[cfg(unix)]
#[test]
fn a_saved_model_may_be_read_by_others() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("copy");
    Checkpoint::open("stories260k").unwrap().save(&path, &[]).unwrap();
    fs::create_dir(dir.path().join("plain")).unwrap();
    let mode = |name| fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
    assert_eq!(mode("copy"), mode("plain"));
}

#[test]
fn a_retrofitted_model_survives_and_keeps_its_dtypes() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Checkpoint::open("stories260k").unwrap();
    model.config = model.config.with_compression(compression(HEAD)).unwrap();
    for layer in 0..5 {
        model.tensors.insert(names::layer(layer, names::DECIDE_PROJ), HostTensor::zeros(DType::F32, [8, 64]));
    }
    let q = model.tensors[Q].to_dtype(DType::BF16);
    model.tensors.insert(Q.into(), q);
    model.save(&dir.path().join("folded"), &[]).unwrap();
    let back = Checkpoint::open(dir.path().join("folded").to_str().unwrap()).unwrap();
    assert_eq!(back.tensors, model.tensors);
    assert_eq!(back.config.compression, Some(compression(HEAD)));
}

#[test]
fn decisions_with_a_head_need_its_weights() {
    let mut fixture = Fixture::new();
    let config = Checkpoint::open("stories260k").unwrap().config;
    let json = config.with_compression(compression(HEAD)).unwrap().to_json();
    fixture.config = serde_json::from_str(&json).unwrap();
    says(&fixture.refused(), &["`model.layers.0.self_attn.decide_proj.weight` is missing", "[8, 64]"]);

    let json = config.with_compression(compression(BORROWED)).unwrap().to_json();
    fixture.config = serde_json::from_str(&json).unwrap();
    Checkpoint::open(&fixture.write()).unwrap();
}

#[test]
fn a_name_wins_over_a_directory_unless_it_has_a_separator() {
    says(&refused("stories9000"), &["stories9000: no such model", "directory", "stories260k"]);
    says(&refused("./stories260k"), &["./stories260k: no such model"]);
    let error = ensure_absent(Path::new("stories260k")).unwrap_err().to_string();
    says(&error, &["\"stories260k\" is the name of an embedded model"]);
}

#[test]
fn files_that_are_missing_are_named() {
    let fixture = Fixture::new();
    for (name, hint) in [
        ("config.json", "Hugging Face layout"),
        ("tokenizer.json", "save_pretrained"),
        ("model.safetensors", "model.safetensors.index.json"),
    ] {
        let model = fixture.write();
        fs::remove_file(fixture.path().join(name)).unwrap();
        says(&refused(&model), &[&format!("model/{name}: no such file; "), hint]);
    }
    fs::write(fixture.path().join("pytorch_model.bin"), b"\x80\x02").unwrap();
    says(&refused(fixture.path().to_str().unwrap()), &["pickle", "not read", "convert"]);
}

#[test]
fn a_file_that_is_no_delta_is_no_model() {
    let fixture = Fixture::new();
    fixture.write();
    let file = fixture.path().join("config.json");
    says(&refused(file.to_str().unwrap()), &["config.json: is no delta that can be read"]);
}

#[test]
fn a_truncated_weight_file_is_named() {
    let fixture = Fixture::new();
    let model = fixture.write();
    let weights = fixture.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    says(&refused(&model), &["model/model.safetensors: truncated", "fetch the file again"]);
}

#[test]
fn a_missing_tensor_is_named_with_its_shape() {
    let mut fixture = Fixture::new();
    fixture.tensors.remove(Q);
    says(&fixture.refused(), &["model/model.safetensors: tensor `", Q, "is missing", "[64, 64]"]);
}

#[test]
fn an_untied_model_needs_its_output_head() {
    let mut fixture = Fixture::new();
    fixture.config["tie_word_embeddings"] = json!(false);
    says(&fixture.refused(), &["tensor `lm_head.weight` is missing", "[512, 64]"]);
    fixture.tensors.insert(names::LM_HEAD.into(), HostTensor::zeros(DType::F32, [512, 64]));
    Checkpoint::open(&fixture.write()).unwrap();
}

#[test]
fn a_wrong_shape_is_shown_beside_the_right_one() {
    let mut fixture = Fixture::new();
    fixture.tensors.insert(Q.into(), HostTensor::zeros(DType::F32, [32, 64]));
    says(&fixture.refused(), &["model.safetensors: tensor `", Q, "has shape [32, 64]", "calls for [64, 64]"]);
}

#[test]
fn a_weight_that_is_no_number_is_found() {
    let mut fixture = Fixture::new();
    let mut values = fixture.tensors[Q].to_f32();
    values[77] = f32::NAN;
    fixture.tensors.insert(Q.into(), HostTensor::from_f32([64, 64], &values));
    says(&fixture.refused(), &["model.safetensors: tensor `", Q, "is NaN, element 77", "diverged"]);
    values[77] = f32::NEG_INFINITY;
    fixture.tensors.insert(Q.into(), HostTensor::from_f32([64, 64], &values));
    says(&fixture.refused(), &["is -inf, element 77"]);
}

#[test]
fn tensors_without_a_place_are_left_out_but_a_bias_is_not() {
    let mut fixture = Fixture::new();
    let inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq";
    fixture.tensors.insert(inv_freq.into(), HostTensor::zeros(DType::F32, [4]));
    fixture.tensors.insert(names::LM_HEAD.into(), HostTensor::zeros(DType::F32, [512, 64]));
    let model = Checkpoint::open(&fixture.write()).unwrap();
    assert_eq!(model.ignored, ["lm_head.weight", inv_freq]);
    assert!(!model.tensors.contains_key(inv_freq));

    let bias = "model.layers.0.self_attn.q_proj.bias";
    fixture.tensors.insert(bias.into(), HostTensor::zeros(DType::F32, [64]));
    says(&fixture.refused(), &[bias, "has no place in a model of this configuration", "`attention_bias`"]);
}

/// Writes the fixture with one more tensor, or another in its place, of two elements of a dtype that kvfold does not hold.
fn write_with(fixture: &Fixture, name: &str, dtype: Dtype) -> String {
    let model = fixture.write();
    let path = fixture.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut views: BTreeMap<_, _> = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().collect();
    let data = vec![1; 2 * dtype.bitsize() / 8];
    views.insert(name.into(), TensorView::new(dtype, vec![2], &data).unwrap());
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    model
}

#[test]
fn a_tensor_of_another_dtype_matters_only_where_it_is_needed() {
    let mut fixture = Fixture::new();
    fixture.tensors.insert("z".into(), HostTensor::zeros(DType::F32, [4]));
    let ids = "model.embed_tokens.position_ids";
    let model = Checkpoint::open(&write_with(&fixture, ids, Dtype::I64)).unwrap();
    assert_eq!(model.ignored, [ids, "z"]);
    assert_eq!(model.tensors, Checkpoint::open("stories260k").unwrap().tensors);

    for (dtype, name) in [(Dtype::I8, "I8"), (Dtype::F8_E4M3, "F8_E4M3")] {
        let message = refused(&write_with(&fixture, Q, dtype));
        let stored = format!("is stored as {name};");
        says(&message, &["model/model.safetensors: tensor `", Q, &stored, "F16 and BF16", "unquantized checkpoint"]);
    }
    says(&refused(&write_with(&fixture, "model.norm.bias", Dtype::I8)), &["`model.norm.bias` has no place"]);
}

/// Splits the fixture's weights into two files and returns the index.
fn shard(fixture: &Fixture) -> Value {
    fixture.write();
    fs::remove_file(fixture.path().join("model.safetensors")).unwrap();
    let mut shards = [BTreeMap::new(), BTreeMap::new()];
    let mut weight_map = BTreeMap::new();
    for (i, (name, tensor)) in fixture.tensors.iter().enumerate() {
        shards[i % 2].insert(name.clone(), tensor.clone());
        weight_map.insert(name, format!("model-{}.safetensors", i % 2));
    }
    for (i, shard) in shards.iter().enumerate() {
        let path = fixture.path().join(format!("model-{i}.safetensors"));
        kvfold_tensor::write(&path, shard, &BTreeMap::new()).unwrap();
    }
    json!({ "metadata": { "total_size": 1 }, "weight_map": weight_map })
}

fn write_index(fixture: &Fixture, index: &Value) -> String {
    fs::write(fixture.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    fixture.path().display().to_string()
}

#[test]
fn a_model_in_several_files_opens() {
    let fixture = Fixture::new();
    let index = shard(&fixture);
    let model = Checkpoint::open(&write_index(&fixture, &index)).unwrap();
    assert_eq!(model.tensors, fixture.tensors);
}

#[test]
fn an_index_that_cannot_be_followed_says_why() {
    let fixture = Fixture::new();
    let index = shard(&fixture);
    let with = |shard: &str| {
        let mut index = index.clone();
        index["weight_map"][Q] = json!(shard);
        refused(&write_index(&fixture, &index))
    };
    let file = "model/model.safetensors.index.json: ";
    says(&with("../model-0.safetensors"), &[file, Q, "../model-0.safetensors", "no plain file name"]);
    says(&with("/etc/passwd"), &[file, Q, "no plain file name"]);
    says(&with("model-2.safetensors"), &[file, Q, "model-2.safetensors, which does not exist"]);

    // The other file does not hold it, and the one that does is not the one that counts.
    let holder = index["weight_map"][Q].as_str().unwrap();
    let other = if holder == "model-0.safetensors" { "model-1.safetensors" } else { "model-0.safetensors" };
    says(&with(other), &[&format!("model/{other}: tensor `{Q}` is missing")]);

    says(&refused(&write_index(&fixture, &json!({}))), &[file, "no `weight_map`"]);
    fs::write(fixture.path().join("model.safetensors.index.json"), "{").unwrap();
    says(&refused(fixture.path().to_str().unwrap()), &[file, "invalid JSON"]);
}

#[test]
fn a_directory_that_exists_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let model = Checkpoint::open("stories260k").unwrap();
    for make in [|p: &Path| fs::create_dir(p).unwrap(), |p: &Path| fs::write(p, b"precious").unwrap()] {
        let path = dir.path().join("taken");
        make(&path);
        let error = model.save(&path, &[]).unwrap_err();
        assert!(matches!(error, ModelError::Exists { .. }), "{error}");
        says(&error.to_string(), &["taken: already exists", "another name"]);
        assert_eq!(entries(dir.path()), ["taken"]);
        let _ = fs::remove_dir(&path).or_else(|_| fs::remove_file(&path));
    }
    says(&ensure_absent(&dir.path().join("no/model")).unwrap_err().to_string(), &["does not exist; create that first"]);
    says(&ensure_absent(Path::new("/")).unwrap_err().to_string(), &["/: already exists"]);
}

/// Saves a spoilt model, which must fail and leave nothing behind; returns the message.
fn not_saved(spoil: impl Fn(&mut Checkpoint), extra: &[(&str, &[u8])]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Checkpoint::open("stories260k").unwrap();
    spoil(&mut model);
    let error = model.save(&dir.path().join("out"), extra).expect_err("a bad model was saved").to_string();
    assert!(entries(dir.path()).is_empty(), "left behind: {:?}", entries(dir.path()));
    error
}

#[test]
fn a_model_that_could_not_be_opened_is_not_saved() {
    let weights = "out/model.safetensors: tensor `";
    let missing = not_saved(|model| drop(model.tensors.remove(Q)), &[]);
    says(&missing, &[weights, Q, "is missing"]);
    let shape = not_saved(|model| drop(model.tensors.insert(Q.into(), HostTensor::zeros(DType::F32, [1]))), &[]);
    says(&shape, &[weights, Q, "has shape [1]"]);
    let nan = not_saved(
        |model| drop(model.tensors.insert(names::NORM.into(), HostTensor::from_f32([64], &[f32::NAN; 64]))),
        &[],
    );
    says(&nan, &[weights, "model.norm.weight", "NaN", "diverged"]);
    let extra = HostTensor::zeros(DType::F32, [8, 64]);
    let name = names::layer(0, names::DECIDE_PROJ);
    let unknown = not_saved(|model| drop(model.tensors.insert(name.clone(), extra.clone())), &[]);
    says(&unknown, &[weights, &name, "no place"]);
}

#[test]
fn extra_files_stay_in_the_directory_and_replace_nothing() {
    for name in ["../evil", "a/b", "..", ""] {
        says(&not_saved(|_| {}, &[(name, b"x")]), &["is no plain file name"]);
    }
    for name in ["config.json", "model.safetensors", "tokenizer.json", "LICENSE"] {
        says(&not_saved(|_| {}, &[(name, b"x")]), &[name, "is a file of the model itself"]);
    }
}

#[test]
fn a_failure_halfway_leaves_nothing_behind() {
    // A name longer than any file system allows fails when the weights are on the disk already.
    let name = "x".repeat(300);
    says(&not_saved(|_| {}, &[(&name, b"x")]), &["cannot write"]);
}

#[test]
fn the_generation_config_may_name_more_end_tokens() {
    let fixture = Fixture::new();
    let model = fixture.write();
    let ends = |generation: Value| {
        fs::write(fixture.path().join("generation_config.json"), generation.to_string()).unwrap();
        Checkpoint::open(&model).and_then(|checkpoint| checkpoint.end_token_ids())
    };
    assert_eq!(Checkpoint::open(&model).unwrap().end_token_ids().unwrap(), [2]);
    assert_eq!(ends(json!({ "eos_token_id": [2, 9, 4] })).unwrap(), [2, 9, 4]);
    assert_eq!(ends(json!({ "eos_token_id": 7, "temperature": 0.6 })).unwrap(), [2, 7]);
    assert_eq!(ends(json!({})).unwrap(), [2]);
    let message = ends(json!({ "eos_token_id": [2, 512] })).unwrap_err().to_string();
    says(&message, &["generation_config.json: `eos_token_id` is [2,512]", "below `vocab_size`, 512"]);
    says(&ends(json!([])).unwrap_err().to_string(), &["generation_config.json: invalid JSON"]);
}
