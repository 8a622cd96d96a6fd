//! A model in one piece: opened with everything checked, saved whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use kvfold_kernels::ops::Precision;
use kvfold_tensor::{DType, HostTensor, TensorFile, atomic, safetensors};
use serde_json::Value;

use crate::error::{ModelError, Result};
use crate::files::Files;
use crate::shape::Shape;
use crate::weights::Weights;
use crate::{Config, Tokenizer, delta, embedded, names};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
const GENERATION: &str = "generation_config.json";

/// Files that belong to a model and are handed on byte for byte.
const COMPANIONS: [&str; 6] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
    "LICENSE",
];

/// A model: configuration, weights, tokenizer.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The model's shape, and how it compresses if it does.
    pub config: Config,
    /// The weights of [`Weights::expected`], by name, in the dtypes they are stored in.
    pub tensors: BTreeMap<String, HostTensor>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Other files of the model, by name, which [`save`](Self::save) hands on: a chat template, a licence.
    pub companions: BTreeMap<String, Vec<u8>>,
    /// Tensors that were in the weight files and have no place in the architecture, such as `rotary_emb.inv_freq`, whatever
    /// their dtype. They are not loaded.
    pub ignored: Vec<String>,
    /// What [`open`](Self::open) was asked for.
    pub source: String,
}

impl Checkpoint {
    /// Opens the model called `model`: the name of an [embedded] one, a Hugging Face directory, or a [`delta`], file or
    /// directory, whose base is where the delta says.
    ///
    /// The name wins over a directory of the same name; `./stories260k`, which has a separator, is the directory.
    pub fn open(model: &str) -> Result<Checkpoint> {
        let path = Path::new(model);
        let is_delta = path.is_file() || path.join(delta::FILE).is_file() && !path.join(CONFIG).exists();
        match is_delta && !embedded::NAMES.contains(&model) {
            true => delta::open(path, None),
            false => Self::open_whole(model),
        }
    }

    /// Opens the model that a delta makes of the model called `base`.
    pub fn open_delta(base: &str, delta: &Path) -> Result<Checkpoint> {
        delta::open(delta, Some(&Self::open_whole(base)?))
    }

    /// [`Checkpoint::open`] of a model that is no delta.
    pub(crate) fn open_whole(model: &str) -> Result<Checkpoint> {
        let files = Files::find(model)?;
        let config = files.need(CONFIG, "a model is a directory in the Hugging Face layout")?;
        let config = Config::parse(&config, &files.label(CONFIG))?;

        let file = files.label(TOKENIZER);
        let json = files.need(TOKENIZER, "save the tokenizer in its fast form with `AutoTokenizer.save_pretrained`")?;
        let tokenizer = Tokenizer::from_json(&json, &file)?;
        tokenizer.check_vocabulary(config.vocab_size, &file)?;

        let mut companions = BTreeMap::new();
        for name in COMPANIONS {
            if let Some(bytes) = files.read(name)? {
                companions.insert(name.to_string(), bytes.into_owned());
            }
        }
        let Found { tensors, ignored } = Found::read(&files, &config)?;
        let checkpoint = Checkpoint { config, tensors, tokenizer, companions, ignored, source: model.into() };
        checkpoint.end_token_ids()?;
        Ok(checkpoint)
    }

    /// The tokens that end a text: those of `config.json`, then those that only `generation_config.json` names, as models
    /// for chats do for the end of a turn.
    pub fn end_token_ids(&self) -> Result<Vec<u32>> {
        let mut ids = self.config.eos_token_ids.clone();
        if let Some(json) = self.companions.get(GENERATION) {
            let file = format!("{}: {GENERATION}", self.source);
            let more = crate::config::generation_end_token_ids(json, self.config.vocab_size, &file)?;
            ids.extend(more.into_iter().filter(|id| !self.config.eos_token_ids.contains(id)));
        }
        Ok(ids)
    }

    /// The tokens that end a text when one is written: [`end_token_ids`](Self::end_token_ids), and the one that starts the
    /// next text.
    pub fn stop_token_ids(&self) -> Result<Vec<u32>> {
        Ok(self.end_token_ids()?.into_iter().chain(self.config.bos_token_id).collect())
    }

    /// The precision that does its weights justice: bf16 for weights stored in 16 bits.
    pub fn precision(&self) -> Precision {
        match self.tensors[names::EMBED].dtype() {
            DType::BF16 | DType::F16 => Precision::Bf16,
            _ => Precision::F32,
        }
    }

    /// Writes the model into the new directory `dir`, with `extra_files` (name and content) beside it.
    ///
    /// The model is checked as if it were being opened, so what is saved can be opened. It is written to a hidden directory
    /// beside `dir` and renamed when all of it is on the disk: whoever sees `dir` sees a whole model. On an error nothing is
    /// left behind.
    pub fn save(&self, dir: &Path, extra_files: &[(&str, &[u8])]) -> Result<()> {
        ensure_absent(dir)?;
        let label = |name: &str| dir.join(name).display().to_string();
        let config = self.config.to_json();
        let files = self.side_files(&config, extra_files)?;
        self.tokenizer.check_vocabulary(self.config.vocab_size, &label(TOKENIZER))?;
        self.check(&label(WEIGHTS))?;

        let failed = |path: &Path, source| ModelError::Io { file: path.display().to_string(), action: "write", source };
        let parent = atomic::parent(dir);
        let temporary = temporary_beside(dir)?;
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]); // Hugging Face's loader insists on it
        safetensors::write(&temporary.path().join(WEIGHTS), &self.tensors, &metadata)?;
        for (name, bytes) in files {
            atomic::write(&temporary.path().join(name), |w: &mut dyn Write| w.write_all(bytes))
                .map_err(|source| failed(&dir.join(name), source))?;
        }
        match fs::rename(temporary.path(), dir) {
            Ok(()) => {}
            // Somebody was faster.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory
                ) =>
            {
                return Err(ModelError::Exists { dir: dir.display().to_string() });
            }
            Err(error) => return Err(failed(dir, error)),
        }
        // It bears its final name now: there is nothing to clean up.
        let _ = temporary.keep();
        atomic::sync_dir(parent).map_err(|source| failed(parent, source))
    }

    /// The files of a saved model that are not its weights. No name leads out of the directory or is taken twice.
    fn side_files<'a>(
        &'a self,
        config: &'a str,
        extra_files: &[(&'a str, &'a [u8])],
    ) -> Result<BTreeMap<&'a str, &'a [u8]>> {
        let mut files = BTreeMap::from([(CONFIG, config.as_bytes()), (TOKENIZER, self.tokenizer.json())]);
        let companions = self.companions.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
        for (name, bytes) in companions.chain(extra_files.iter().copied()) {
            let invalid = |reason| Err(ModelError::Name { name: name.into(), reason });
            if !is_plain(name) {
                return invalid("is no plain file name");
            }
            if [WEIGHTS, INDEX].contains(&name) || files.insert(name, bytes).is_some() {
                return invalid("is a file of the model itself");
            }
        }
        Ok(files)
    }

    /// Checks that the tensors are the configuration's, all of them and no others.
    pub(crate) fn check(&self, file: &str) -> Result<()> {
        let expected: BTreeMap<_, _> = Weights::<()>::expected(&Shape::of(&self.config)).into_iter().collect();
        if let Some(name) = self.tensors.keys().find(|name| !expected.contains_key(*name)) {
            return Err(ModelError::UnknownTensor { file: file.into(), tensor: name.clone() });
        }
        for (name, shape) in expected {
            match self.tensors.get(&name) {
                Some(tensor) => check(tensor, &name, &shape, file)?,
                None => {
                    return Err(ModelError::MissingTensor { file: file.into(), tensor: name, expected: shape });
                }
            }
        }
        Ok(())
    }
}

/// Checks that a model may be saved as `dir`, before any work is done for it: that nothing is there, that its parent is a
/// directory, and that it is not taken for an embedded model's name when it is opened.
pub fn ensure_absent(dir: &Path) -> Result<()> {
    let name = |reason| Err(ModelError::Name { name: dir.display().to_string(), reason });
    // `symlink_metadata` also sees a link that leads nowhere, which a rename would replace.
    if fs::symlink_metadata(dir).is_ok() {
        return Err(ModelError::Exists { dir: dir.display().to_string() });
    }
    if dir.file_name().is_none() {
        return name("does not name a new directory");
    }
    if embedded::NAMES.iter().any(|embedded| dir.as_os_str() == *embedded) {
        return name("is the name of an embedded model, which would be opened in its place; put ./ before it");
    }
    if !atomic::parent(dir).is_dir() {
        return name("lies in a directory that does not exist; create that first");
    }
    Ok(())
}

/// A hidden directory from which `dir` can be reached by a rename. It is removed when the value is dropped.
fn temporary_beside(dir: &Path) -> Result<tempfile::TempDir> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let prefix = format!(".{name}.tmp-");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    // The user's umask decides who may read the model, not the caution that a temporary directory calls for.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(atomic::parent(dir)).map_err(|source| ModelError::Io {
        file: dir.display().to_string(),
        action: "create",
        source,
    })
}

/// The weights of a model, from however many files.
struct Found {
    tensors: BTreeMap<String, HostTensor>,
    ignored: Vec<String>,
}

impl Found {
    fn read(files: &Files, config: &Config) -> Result<Found> {
        let expected: BTreeMap<_, _> = Weights::<()>::expected(&Shape::of(config)).into_iter().collect();
        let Shards { names, index } = shards(files)?;
        let mut weights = Found { tensors: BTreeMap::new(), ignored: Vec::new() };
        for shard in &names {
            let file = files.label(shard);
            let TensorFile { tensors, skipped, .. } = files.tensors(shard)?;
            let held = tensors.into_iter().map(|(name, tensor)| (name, Ok(tensor)));
            let skipped = skipped.into_iter().map(|(name, dtype)| (name, Err(dtype)));
            for (name, stored) in held.chain(skipped) {
                // The index says which file counts, should two hold tensors of one name.
                if index.as_ref().is_some_and(|index| index.get(&name).is_some_and(|holder| holder != shard)) {
                    continue;
                }
                match (expected.get(&name), stored) {
                    (Some(shape), Ok(tensor)) => {
                        check(&tensor, &name, shape, &file)?;
                        weights.tensors.insert(name, tensor);
                    }
                    (Some(_), Err(dtype)) => {
                        return Err(ModelError::UnsupportedDType { file, tensor: name, dtype });
                    }
                    (None, _) if name.ends_with(".bias") || name.ends_with("_norm.weight") => {
                        return Err(ModelError::NoPlace { file, tensor: name });
                    }
                    (None, _) => weights.ignored.push(name),
                }
            }
        }
        for (name, shape) in expected {
            if !weights.tensors.contains_key(&name) {
                let holder = index.as_ref().map(|index| index.get(&name).map_or(INDEX, String::as_str));
                let file = files.label(holder.unwrap_or(WEIGHTS));
                return Err(ModelError::MissingTensor { file, tensor: name, expected: shape });
            }
        }
        weights.ignored.sort();
        Ok(weights)
    }
}

/// The weight files of a model.
struct Shards {
    names: BTreeSet<String>,
    /// Which file holds which tensor, if there is more than one.
    index: Option<BTreeMap<String, String>>,
}

fn shards(files: &Files) -> Result<Shards> {
    if files.has(WEIGHTS) {
        let names = BTreeSet::from([WEIGHTS.to_string()]);
        return Ok(Shards { names, index: None });
    }
    let hint = match files.has("pytorch_model.bin") || files.has("pytorch_model.bin.index.json") {
        true => {
            "pytorch_model.bin is a pickle, which can run any program and is not read: convert the model with \
             `AutoModelForCausalLM.save_pretrained`"
        }
        false => "nor a model.safetensors.index.json for a model in several files",
    };
    let Some(json) = files.read(INDEX)? else {
        return Err(ModelError::MissingFile { file: files.label(WEIGHTS), hint: hint.into() });
    };

    let file = files.label(INDEX);
    let index: Value = serde_json::from_slice(&json)
        .map_err(|error| ModelError::Json { file: file.clone(), reason: error.to_string() })?;
    let invalid = |reason| Err(ModelError::Index { file: file.clone(), reason });
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        return invalid("has no `weight_map` from tensors to files".into());
    };
    let mut holders = BTreeMap::new();
    for (tensor, shard) in map {
        let Some(shard) = shard.as_str().filter(|shard| is_plain(shard)) else {
            return invalid(format!("tensor `{tensor}` should be in {shard}, which is no plain file name"));
        };
        if !files.has(shard) {
            return invalid(format!(
                "tensor `{tensor}` should be in {shard}, which does not exist; the download is incomplete"
            ));
        }
        holders.insert(tensor.clone(), shard.to_string());
    }
    Ok(Shards { names: holders.values().cloned().collect(), index: Some(holders) })
}

/// Checks one tensor: its shape, and that every weight is a number.
pub(crate) fn check(tensor: &HostTensor, name: &str, shape: &[usize], file: &str) -> Result<()> {
    if tensor.shape() != shape {
        return Err(ModelError::Shape {
            file: file.into(),
            tensor: name.into(),
            found: tensor.shape().into(),
            expected: shape.into(),
        });
    }
    match tensor.first_non_finite() {
        None => Ok(()),
        Some((index, value)) => {
            Err(ModelError::NonFinite { file: file.into(), tensor: name.into(), shape: shape.into(), index, value })
        }
    }
}

/// Whether `name` is that of a file in the model's own directory and nowhere else.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}
