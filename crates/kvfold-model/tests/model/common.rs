//! A model directory for tests: the embedded model's files, to be spoilt one at a time.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_model::{Checkpoint, Compression, Config};
use kvfold_tensor::HostTensor;
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const CONFIG: &str = include_str!("../../models/stories260k/config.json");
pub(crate) const TOKENIZER: &str = include_str!("../../models/stories260k/tokenizer.json");

/// The parts of a model directory, before they are written.
pub(crate) struct Fixture {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, HostTensor>,
    pub(crate) tokenizer: Value,
    pub(crate) dir: TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let tensors = Checkpoint::open("stories260k").unwrap().tensors;
        Fixture {
            config: serde_json::from_str(CONFIG).unwrap(),
            tensors,
            tokenizer: serde_json::from_str(TOKENIZER).unwrap(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    /// Writes the directory.
    pub(crate) fn write(&self) -> String {
        let path = self.path();
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("config.json"), self.config.to_string()).unwrap();
        fs::write(path.join("tokenizer.json"), self.tokenizer.to_string()).unwrap();
        kvfold_tensor::write(&path.join("model.safetensors"), &self.tensors, &BTreeMap::new()).unwrap();
        path.display().to_string()
    }

    /// Writes the directory and opens it, which must fail; returns the message.
    pub(crate) fn refused(&self) -> String {
        refused(&self.write())
    }
}

/// The message for a model that must not open.
pub(crate) fn refused(model: &str) -> String {
    Checkpoint::open(model).expect_err("a bad model was opened").to_string()
}

/// Asserts that `message` contains each of `parts`.
#[track_caller]
pub(crate) fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

/// Settings of a retrofitted model whose decisions come from `decision`.
pub(crate) fn compression(decision: Decision) -> Compression {
    let dmc = Dmc {
        method: Method::Dmc,
        decision,
        delay: 16,
        sinks: 0,
        pool_window: Some(12),
        log_mass: true,
        share: Share::Head,
    };
    Compression { dmc, ratio: 4.0, trained_length: 512, base_model: "stories260k".into() }
}

pub(crate) const BORROWED: Decision = Decision::Borrowed { scale: 1.0, offset: 5.0 };
pub(crate) const HEAD: Decision = Decision::Head { scale: 100.0, offset: 5.0, bias: false, ahead: false };

/// A section as it stands in `config.json`.
pub(crate) fn section() -> Value {
    json!({
        "version": 2,
        "cache": {
            "method": "dmc",
            "decision": { "source": "borrowed", "scale": 1.0, "offset": 5.0 },
            "delay": 16, "pool_window": 12, "log_mass": true, "share": "head"
        },
        "ratio": 4.0,
        "trained_length": 512,
        "base_model": "stories260k"
    })
}

/// The embedded model's configuration.
pub(crate) fn valid() -> Value {
    serde_json::from_str(CONFIG).unwrap()
}

/// The same with a `kvfold` section.
pub(crate) fn retrofitted() -> Value {
    let mut config = valid();
    config["architectures"] = json!(["KvfoldLlamaForCausalLM"]);
    config["model_type"] = json!("kvfold_llama");
    config["kvfold"] = section();
    config
}

pub(crate) fn parse(config: &Value) -> kvfold_model::Result<Config> {
    Config::parse(config.to_string().as_bytes(), "x/config.json")
}

/// Sets the field at `path` (with dots), or removes it.
pub(crate) fn set(config: &mut Value, path: &str, value: Option<Value>) {
    let (parent, field) = match path.rsplit_once('.') {
        Some((parent, field)) => (config.pointer_mut(&format!("/{}", parent.replace('.', "/"))).unwrap(), field),
        None => (config, path),
    };
    let map = parent.as_object_mut().unwrap();
    match value {
        Some(value) => map.insert(field.into(), value),
        None => map.shift_remove(field),
    };
}

/// The message for a configuration with this one change; it must name the file and the field.
#[track_caller]
pub(crate) fn refused_in(mut config: Value, field: &str, value: impl Into<Option<Value>>) -> String {
    let value = value.into();
    set(&mut config, field, value.clone());
    let message = match parse(&config) {
        Ok(_) => panic!("`{field}` = {value:?} was accepted"),
        Err(error) => error.to_string(),
    };
    says(&message, &["x/config.json: "]);
    message
}
