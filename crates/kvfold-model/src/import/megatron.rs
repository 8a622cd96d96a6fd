//! Megatron-LM's checkpoints of GPT models, those of DMC among them (spec 0.2, key M).
//!
//! A checkpoint is a directory `mp_rank_XX` per tensor-parallel rank with a `model_optim_rng.pt`, which holds the training
//! arguments and the rank's part of the weights. Parts are put together again: columns of the projections back to the
//! residual stream, rows of all others. The rows of a fused query-key-value projection stand group by group, the group's
//! queries, its key, its value; the two halves of the MLP's first projection are gate and input. Rotary pairs are halves,
//! as Hugging Face has them, so no row is moved within a head.
//!
//! Both spellings of the names are read: Megatron-core's `decoder.layers.N.self_attention.linear_qkv` and the older
//! `language_model.encoder.layers.N.self_attention.query_key_value`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_tensor::torch::{TensorInfo, Value};
use kvfold_tensor::{DType, HostTensor, TorchFile};
use serde_json::{Value as Json, json};

use super::Imported;
use crate::error::{ModelError, Result};
use crate::family::Family;
use crate::shape::Shape;
use crate::weights::Weights;
use crate::{Checkpoint, Compression, Config, Tokenizer, names};

const WEIGHTS: &str = "model_optim_rng.pt";
const EMBED: &str = "embedding.word_embeddings.weight";
const LATEST: &str = "latest_checkpointed_iteration.txt";

/// One rank's file and its tensors by name.
struct Rank {
    source: TorchFile,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Reads a checkpoint: a `.pt` file, the directory of an iteration, or the one above with the newest iteration's name. The
/// tokenizer comes from a directory with a `tokenizer.json`, since Megatron keeps it elsewhere.
pub fn megatron(path: &Path, tokenizer: &Path, dtype: Option<DType>) -> Result<Imported> {
    let files = rank_files(path)?;
    let ranks = files.iter().map(|file| Rank::open(file)).collect::<Result<Vec<_>>>()?;
    let Some(first) = ranks.first() else {
        return Err(missing(path, format!("a checkpoint has a directory mp_rank_00 with {WEIGHTS} in it")));
    };
    let label = first.source.file().to_string();
    let args = Args::of(&first.source, ranks.len())?;
    let vocab = first.tensors.get(EMBED).and_then(|info| info.shape.first()).map_or(0, |rows| rows * ranks.len());
    let dtype = dtype.unwrap_or_else(|| natural(&ranks));
    let (tokenizer, companions) = read_tokenizer(tokenizer)?;
    let mut config = args.config(vocab)?;
    config["torch_dtype"] = json!(match dtype {
        DType::F64 => "float64",
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
    });
    for (field, token) in [("bos_token_id", "bos_token"), ("eos_token_id", "eos_token")] {
        config[field] = special_id(&companions, token, &tokenizer).map_or(Json::Null, |id| json!(id));
    }
    let mut config = Config::parse(config.to_string().as_bytes(), &format!("{label}: as config.json"))?;
    tokenizer.check_vocabulary(config.vocab_size, "the tokenizer")?;
    if let Some(compression) = args.compression(path)? {
        config = config.with_compression(compression)?;
    }

    let mut kinds = BTreeMap::new();
    for info in ranks.iter().flat_map(|rank| rank.tensors.values()) {
        *kinds.entry(info.storage.trim_end_matches("Storage").to_uppercase()).or_insert(0) += 1;
    }
    let mut whole = Merged { ranks, shape: Shape::of(&config), used: BTreeSet::new() };
    let mut tensors = BTreeMap::new();
    for (ours, dims) in Weights::<()>::expected(&whole.shape) {
        let tensor = whole.tensor(&ours)?.to_dtype(dtype);
        crate::checkpoint::check(&tensor, &ours, &dims, &label)?;
        tensors.insert(ours, tensor);
    }
    whole.ensure_all_used()?;
    let checkpoint = Checkpoint { config, tensors, tokenizer, companions, ignored: Vec::new(), source: label };
    Ok(Imported { checkpoint, dtype, kinds, name: None, license: None, files })
}

fn missing(path: &Path, hint: String) -> ModelError {
    ModelError::MissingFile { file: path.display().to_string(), hint }
}

/// The files of all ranks, in order.
fn rank_files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let latest = path.join(LATEST);
    let dir = match std::fs::read_to_string(&latest) {
        Err(_) => path.to_path_buf(),
        Ok(text) => match text.trim().parse::<u32>() {
            Ok(iteration) => path.join(format!("iter_{iteration:07}")),
            Err(_) => path.join("release"),
        },
    };
    if dir.join("mp_rank_00_000").exists() {
        let reason =
            "pipeline-parallel checkpoints are not; convert it to a pipeline of one stage with Megatron's tools";
        return Err(ModelError::Unsupported {
            file: dir.display().to_string(),
            field: "mp_rank_00_000".into(),
            found: "there".into(),
            reason: reason.into(),
        });
    }
    let files = (0..100).map(|rank| dir.join(format!("mp_rank_{rank:02}")).join(WEIGHTS));
    Ok(files.take_while(|file| file.exists()).collect())
}

impl Rank {
    fn open(path: &Path) -> Result<Rank> {
        let source = TorchFile::open(path)?;
        let model = source.root().get("model");
        let Some(model) = model else {
            return Err(field(
                source.file(),
                "model",
                "missing",
                "the weights; model0 is one of several pipeline stages",
            ));
        };
        let mut tensors = BTreeMap::new();
        flatten(model, "", 0, &mut tensors);
        Ok(Rank { tensors, source })
    }
}

/// Tensors of nested dictionaries, by their names joined, in Megatron-core's spelling.
fn flatten(value: Value<'_>, prefix: &str, depth: usize, to: &mut BTreeMap<String, TensorInfo>) {
    // Real files are four deep; one that contains itself ends here.
    const DEEPEST: usize = 8;
    for (key, value) in value.entries() {
        let name = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
        // States of low-precision formats and frequencies that follow from the arguments.
        if name.ends_with("_extra_state") || name.ends_with("inv_freq") {
            continue;
        }
        match value.tensor() {
            Some(info) => drop(to.insert(spelling(&name), info.clone())),
            None if depth < DEEPEST => flatten(value, &name, depth + 1, to),
            None => {}
        }
    }
}

/// A name as Megatron-core spells it.
fn spelling(name: &str) -> String {
    const OLD: [(&str, &str); 13] = [
        ("language_model.encoder.", "decoder."),
        ("language_model.transformer.", "decoder."),
        ("language_model.", ""),
        (".query_key_value.", ".linear_qkv."),
        ("self_attention.dense.", "self_attention.linear_proj."),
        (".dense_h_to_4h.", ".linear_fc1."),
        (".dense_4h_to_h.", ".linear_fc2."),
        (".input_norm.", ".input_layernorm."),
        (".post_attention_norm.", ".pre_mlp_layernorm."),
        (".post_attention_layernorm.", ".pre_mlp_layernorm."),
        (".final_norm.", ".final_layernorm."),
        // The fused layers of Transformer Engine hold the norm before them.
        (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
        (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
    ];
    OLD.iter().fold(name.to_owned(), |name, (old, new)| name.replacen(old, new, 1))
}

/// The tokenizer of a directory, and the files beside it that a model hands on.
fn read_tokenizer(dir: &Path) -> Result<(Tokenizer, BTreeMap<String, Vec<u8>>)> {
    let read = |name: &str| {
        let file = dir.join(name);
        let label = file.display().to_string();
        match std::fs::read(&file) {
            Ok(bytes) => Ok((label, Some(bytes))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok((label, None)),
            Err(source) => Err(ModelError::Io { file: label, action: "read", source }),
        }
    };
    let (label, json) = read("tokenizer.json")?;
    let hint = "--tokenizer names a directory with the model's tokenizer in its fast form".to_string();
    let json = json.ok_or(ModelError::MissingFile { file: label.clone(), hint })?;
    let tokenizer = Tokenizer::from_json(&json, &label)?;
    let mut companions = BTreeMap::new();
    for name in ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"] {
        if let (_, Some(bytes)) = read(name)? {
            companions.insert(name.to_string(), bytes);
        }
    }
    Ok((tokenizer, companions))
}

/// The id of a token that `tokenizer_config.json` names, as a text or as an object with its content.
fn special_id(companions: &BTreeMap<String, Vec<u8>>, token: &str, tokenizer: &Tokenizer) -> Option<u32> {
    let config: Json = serde_json::from_slice(companions.get("tokenizer_config.json")?).ok()?;
    let named = &config[token];
    tokenizer.token_id(named.as_str().or_else(|| named["content"].as_str())?)
}

/// The dtype that all weights share, or F32.
fn natural(ranks: &[Rank]) -> DType {
    let mut kinds: Vec<&str> =
        ranks.iter().flat_map(|rank| rank.tensors.values()).map(|info| info.storage.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    match kinds[..] {
        ["BFloat16Storage"] => DType::BF16,
        ["HalfStorage"] => DType::F16,
        _ => DType::F32,
    }
}

fn field(file: &str, field: &str, found: impl Into<String>, expected: &str) -> ModelError {
    ModelError::Field { file: file.into(), field: field.into(), found: found.into(), expected: expected.into() }
}

/// The training arguments.
struct Args<'a> {
    file: &'a str,
    args: Value<'a>,
}

impl<'a> Args<'a> {
    fn of(source: &'a TorchFile, ranks: usize) -> Result<Self> {
        let file = source.file();
        let version = source.root().get("checkpoint_version").and_then(Value::number);
        if version.is_some_and(|version| version < 3.0) {
            let found = format!("{}", version.unwrap_or_default());
            return Err(field(file, "checkpoint_version", found, "3 or later, whose rows stand group by group"));
        }
        let args = source.root().get("args");
        let args = Args { file, args: args.ok_or_else(|| field(file, "args", "missing", "the training arguments"))? };
        args.refuse_what_is_not_computed(ranks)?;
        Ok(args)
    }

    /// An argument that is set.
    fn get(&self, name: &str) -> Option<Value<'a>> {
        self.args.get(name).filter(|value| !value.is_none())
    }

    fn count(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let count = value.integer().and_then(|n| usize::try_from(n).ok());
        count.map(Some).ok_or_else(|| self.wrong(name, value, "a whole number"))
    }

    fn need(&self, name: &str) -> Result<usize> {
        self.count(name)?.ok_or_else(|| field(self.file, &format!("args.{name}"), "missing", "a whole number"))
    }

    fn number(&self, name: &str, default: f64) -> Result<f64> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value.number().ok_or_else(|| self.wrong(name, value, "a number")),
        }
    }

    fn flag(&self, name: &str) -> bool {
        self.get(name).and_then(Value::flag).unwrap_or(false)
    }

    fn wrong(&self, name: &str, value: Value<'_>, expected: &str) -> ModelError {
        field(self.file, &format!("args.{name}"), format!("{value:?}"), expected)
    }

    fn refuse_what_is_not_computed(&self, ranks: usize) -> Result<()> {
        let unsupported = |name: &str, found: String, reason: &str| {
            let (file, field) = (self.file.into(), format!("args.{name}"));
            Err(ModelError::Unsupported { file, field, found, reason: reason.into() })
        };
        for (name, wanted) in [("normalization", "RMSNorm"), ("position_embedding_type", "rope")] {
            let found = self.get(name).and_then(Value::text).unwrap_or("missing");
            if found != wanted {
                return unsupported(name, found.into(), &format!("a Llama has {wanted}"));
            }
        }
        if !self.flag("swiglu") {
            return unsupported("swiglu", "False".into(), "a Llama's MLP is gated by SiLU");
        }
        for name in ["add_bias_linear", "add_qkv_bias", "apply_layernorm_1p", "rotary_interleaved", "qk_layernorm"] {
            if self.flag(name) {
                return unsupported(name, "True".into(), "a plain Llama does without");
            }
        }
        for name in ["num_experts", "window_size", "rotary_seq_len_interpolation_factor"] {
            if let Some(value) = self.get(name) {
                return unsupported(name, format!("{value:?}"), "only dense models without such a setting are");
            }
        }
        if self.number("rotary_percent", 1.0)? != 1.0 {
            return unsupported("rotary_percent", "not 1".into(), "all channels are rotated");
        }
        if self.flag("dmc_is_stage_one") {
            return unsupported(
                "dmc_is_stage_one",
                "True".into(),
                "the channels of a model in this stage are half faded",
            );
        }
        if self.count("pipeline_model_parallel_size")?.unwrap_or(1) != 1 {
            return unsupported("pipeline_model_parallel_size", "above 1".into(), "pipelines of one stage are");
        }
        let parallel = self.count("tensor_model_parallel_size")?.unwrap_or(1);
        if parallel != ranks {
            let expected = format!("{ranks}, the ranks found: name the directory that has all of mp_rank_00 and so on");
            return Err(field(self.file, "args.tensor_model_parallel_size", parallel.to_string(), &expected));
        }
        Ok(())
    }

    fn config(&self, vocab: usize) -> Result<Json> {
        let heads = self.need("num_attention_heads")?;
        let hidden = self.need("hidden_size")?;
        let kv = if self.flag("group_query_attention") { self.need("num_query_groups")? } else { heads };
        let context = match self.count("max_position_embeddings")? {
            Some(context) => context,
            None => self.need("seq_length")?,
        };
        Ok(json!({
            "architectures": [Family::Llama.architecture()],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": self.need("ffn_hidden_size")?,
            "num_hidden_layers": self.need("num_layers")?,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": self.count("kv_channels")?.unwrap_or(hidden / heads.max(1)),
            "vocab_size": vocab,
            "max_position_embeddings": context,
            "rope_theta": self.number("rotary_base", 10_000.0)?,
            "rms_norm_eps": self.number("norm_epsilon", 1e-5)?,
            "hidden_act": "silu",
            "tie_word_embeddings": !self.flag("untie_embeddings_and_output_weights"),
        }))
    }

    /// How a DMC model compresses (spec 1.2, 1.4): the released code has no other settings. `None` for a plain model.
    fn compression(&self, path: &Path) -> Result<Option<Compression>> {
        if self.get("dmc_cr").is_none() {
            return Ok(None);
        }
        let window = self.count("dmc_window_size")?.unwrap_or(12);
        let dmc = Dmc {
            method: Method::Dmc,
            decision: Decision::Borrowed { scale: 1.0, offset: self.number("dmc_init_val", 5.0)? },
            delay: 0,
            sinks: 0,
            pool_window: (window > 0).then_some(window),
            log_mass: false,
            share: Share::Head,
        };
        Ok(Some(Compression {
            dmc,
            ratio: self.number("dmc_cr", 4.0)?,
            trained_length: self.need("seq_length")?,
            base_model: path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
        }))
    }
}

/// The ranks' tensors put together.
struct Merged {
    ranks: Vec<Rank>,
    shape: Shape,
    /// Names that were asked for.
    used: BTreeSet<String>,
}

/// How a tensor is divided among ranks.
#[derive(Clone, Copy)]
enum Divided {
    /// Every rank has all of it.
    Not,
    /// Each has rows.
    Rows,
    /// Each has columns.
    Columns,
}

/// Which rows of each rank's part are wanted.
#[derive(Clone)]
struct Blocks {
    /// Groups of rows.
    groups: usize,
    /// Blocks of a group, equally many rows each.
    of: usize,
    /// Those of them that are wanted.
    wanted: Range<usize>,
}

impl Merged {
    /// A weight under Hugging Face's name.
    fn tensor(&mut self, ours: &str) -> Result<HostTensor> {
        use Divided::{Columns, Not, Rows};
        let layer = ours.split('.').nth(2).and_then(|layer| layer.parse::<usize>().ok());
        let Some(layer) = layer else {
            return match ours {
                names::EMBED => self.whole(EMBED, Rows, None),
                names::LM_HEAD => self.whole("output_layer.weight", Rows, None),
                _ => self.whole("decoder.final_layernorm.weight", Not, None),
            };
        };
        let part = |part: &str| ours == names::layer(layer, part);
        let theirs = |part: &str| format!("decoder.layers.{layer}.{part}.weight");
        let heads = self.shape.heads;
        let (queries, all, groups) = (heads.group(), heads.group() + 2, heads.kv / self.ranks.len());
        let (name, divided, blocks) = match () {
            () if part(names::INPUT_NORM) => ("input_layernorm", Not, None),
            () if part(names::POST_ATTENTION_NORM) => ("pre_mlp_layernorm", Not, None),
            () if part(names::O_PROJ) => ("self_attention.linear_proj", Columns, None),
            () if part(names::DOWN_PROJ) => ("mlp.linear_fc2", Columns, None),
            () if part(names::GATE_PROJ) => ("mlp.linear_fc1", Rows, Some((1, 2, 0..1))),
            () if part(names::UP_PROJ) => ("mlp.linear_fc1", Rows, Some((1, 2, 1..2))),
            () if part(names::Q_PROJ) => ("self_attention.linear_qkv", Rows, Some((groups, all, 0..queries))),
            () if part(names::K_PROJ) => ("self_attention.linear_qkv", Rows, Some((groups, all, queries..queries + 1))),
            () => ("self_attention.linear_qkv", Rows, Some((groups, all, queries + 1..all))),
        };
        let blocks = blocks.map(|(groups, of, wanted)| Blocks { groups, of, wanted });
        self.whole(&theirs(name), divided, blocks)
    }

    fn whole(&mut self, name: &str, divided: Divided, blocks: Option<Blocks>) -> Result<HostTensor> {
        self.used.insert(name.to_string());
        let ranks = match divided {
            Divided::Not => 1,
            Divided::Rows | Divided::Columns => self.ranks.len(),
        };
        let mut parts = Vec::with_capacity(ranks);
        for Rank { source, tensors } in &mut self.ranks[..ranks] {
            let file = source.file().to_string();
            let Some(info) = tensors.get(name) else {
                return Err(ModelError::MissingTensor { file, tensor: name.into(), expected: Vec::new() });
            };
            let part = source.tensor(name, info)?;
            let part = match &blocks {
                None => part,
                Some(blocks) => taken(&part, blocks).ok_or_else(|| ModelError::Shape {
                    file,
                    tensor: name.into(),
                    found: part.shape().into(),
                    expected: vec![blocks.groups * blocks.of, self.shape.hidden],
                })?,
            };
            parts.push(part);
        }
        match joined(&parts, divided) {
            Some(tensor) => Ok(tensor),
            None => Err(ModelError::Shape {
                file: self.ranks[ranks - 1].source.file().into(),
                tensor: name.into(),
                found: parts[ranks - 1].shape().into(),
                expected: parts[0].shape().into(),
            }),
        }
    }

    /// Checks that nothing is left over: a bias, for one, would change every result.
    fn ensure_all_used(&self) -> Result<()> {
        for Rank { source, tensors } in &self.ranks {
            if let Some(tensor) = tensors.keys().find(|name| !self.used.contains(*name)) {
                let (file, tensor) = (source.file().to_string(), tensor.clone());
                return Err(match tensor.ends_with(".bias") {
                    true => ModelError::NoPlace { file, tensor },
                    false => ModelError::UnknownTensor { file, tensor },
                });
            }
        }
        Ok(())
    }
}

/// The wanted blocks of every group of rows; `None` when the rows do not divide into them.
fn taken(part: &HostTensor, Blocks { groups, of, wanted }: &Blocks) -> Option<HostTensor> {
    let (&[rows, cols], pieces) = (part.shape(), groups * of) else { return None };
    if pieces == 0 || rows == 0 || !rows.is_multiple_of(pieces) {
        return None;
    }
    let block = part.bytes().len() / pieces;
    let mut out = HostTensor::zeros(part.dtype(), [rows / of * wanted.len(), cols]);
    let to = out.bytes_mut().chunks_exact_mut((block * wanted.len()).max(1));
    for (from, to) in part.bytes().chunks_exact((block * of).max(1)).zip(to) {
        to.copy_from_slice(&from[block * wanted.start..block * wanted.end]);
    }
    Some(out)
}

/// The parts one below the other, or side by side; `None` when they are not alike.
fn joined(parts: &[HostTensor], divided: Divided) -> Option<HostTensor> {
    let first = parts.first()?;
    if parts.iter().any(|part| (part.shape(), part.dtype()) != (first.shape(), first.dtype())) {
        return None;
    }
    let mut shape = first.shape().to_vec();
    let lines = match divided {
        Divided::Not | Divided::Rows => {
            *shape.first_mut()? *= parts.len();
            1
        }
        Divided::Columns => {
            *shape.get_mut(1)? *= parts.len();
            first.shape()[0]
        }
    };
    let mut out = HostTensor::zeros(first.dtype(), shape);
    let line = first.bytes().len() / lines.max(1);
    for (n, to) in out.bytes_mut().chunks_exact_mut(line.max(1)).enumerate() {
        to.copy_from_slice(&parts[n % parts.len()].bytes()[n / parts.len() * line..][..line]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_names_are_read_as_those_of_megatron_core() {
        for (old, new) in [
            ("language_model.embedding.word_embeddings.weight", EMBED),
            ("language_model.output_layer.weight", "output_layer.weight"),
            ("language_model.encoder.final_norm.weight", "decoder.final_layernorm.weight"),
            ("language_model.transformer.final_layernorm.weight", "decoder.final_layernorm.weight"),
            ("language_model.encoder.layers.3.input_norm.weight", "decoder.layers.3.input_layernorm.weight"),
            (
                "language_model.encoder.layers.3.self_attention.query_key_value.weight",
                "decoder.layers.3.self_attention.linear_qkv.weight",
            ),
            (
                "language_model.encoder.layers.3.self_attention.dense.weight",
                "decoder.layers.3.self_attention.linear_proj.weight",
            ),
            (
                "language_model.encoder.layers.3.post_attention_layernorm.weight",
                "decoder.layers.3.pre_mlp_layernorm.weight",
            ),
            ("language_model.encoder.layers.3.mlp.dense_h_to_4h.weight", "decoder.layers.3.mlp.linear_fc1.weight"),
            ("language_model.encoder.layers.3.mlp.dense_4h_to_h.weight", "decoder.layers.3.mlp.linear_fc2.weight"),
            ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
            ("decoder.layers.3.mlp.linear_fc2.weight", "decoder.layers.3.mlp.linear_fc2.weight"),
        ] {
            assert_eq!(spelling(old), new);
        }
    }

    #[test]
    fn rows_and_columns_of_ranks_are_put_together_in_order() {
        let part = |first: f32| HostTensor::from_f32([2, 2], &[first, first + 1.0, first + 2.0, first + 3.0]);
        let parts = [part(0.0), part(10.0)];
        let rows = joined(&parts, Divided::Rows).expect("alike");
        assert_eq!((rows.shape(), rows.to_f32()), (&[4, 2][..], vec![0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]));
        let columns = joined(&parts, Divided::Columns).expect("alike");
        assert_eq!(
            (columns.shape(), columns.to_f32()),
            (&[2, 4][..], vec![0.0, 1.0, 10.0, 11.0, 2.0, 3.0, 12.0, 13.0])
        );
        assert!(joined(&[part(0.0), HostTensor::from_f32([4], &[0.0; 4])], Divided::Rows).is_none());

        let fused = HostTensor::from_f32([6, 1], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let of = |wanted| taken(&fused, &Blocks { groups: 2, of: 3, wanted }).map(|taken| taken.to_f32());
        assert_eq!(of(0..1), Some(vec![0.0, 3.0]));
        assert_eq!(of(1..3), Some(vec![1.0, 2.0, 4.0, 5.0]));
        assert!(taken(&fused, &Blocks { groups: 4, of: 1, wanted: 0..1 }).is_none());
    }
}
