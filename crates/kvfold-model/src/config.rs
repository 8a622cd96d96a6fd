//! The shape of a model: Hugging Face's `config.json`, checked.
//!
//! The reader is strict where being lenient would give wrong numbers (a RoPE scaling that is not computed, a bias that is not
//! added, another activation) and lenient where it would not: fields it does not know are kept and written back, and absent
//! ones have the defaults of the family's class at Hugging Face.

use serde_json::{Map, Value, json};

use crate::compression::{Compression, SECTION};
use crate::error::{ModelError, Result};
use crate::family::{Defaults, Family};
use crate::fields::Fields;
use crate::rope::Rope;

/// The largest width, vocabulary or context that is believed. Real ones stay far below, and below it no product of two
/// dimensions and an element size can overflow, so that the code behind the configuration multiplies without checking.
const MAX_DIM: usize = 1 << 24;

/// The largest number of layers that is believed: names and shapes of all layers are listed before a weight is read.
const MAX_LAYERS: usize = 1 << 12;

/// A model's shape and constants.
///
/// The fields are what the JSON says, and it is the JSON that is written back: to get another model, parse other JSON.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// Which family the model is of.
    pub family: Family,
    /// Width of the residual stream, `C`.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks, `L`.
    pub num_hidden_layers: usize,
    /// Query heads per layer, `H`.
    pub num_attention_heads: usize,
    /// Key-value heads per layer, `G`; divides `H`.
    pub num_key_value_heads: usize,
    /// Width of one head, `D`; even, because RoPE rotates pairs.
    pub head_dim: usize,
    /// Rows of the embedding, `V`.
    pub vocab_size: usize,
    /// The longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Rotary frequencies.
    pub rope: Rope,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether the queries and keys of each head are normed before they are rotated.
    pub qk_norm: bool,
    /// Added to the mean square before its root is taken.
    pub rms_norm_eps: f64,
    /// Whether the embedding is also the output head.
    pub tie_word_embeddings: bool,
    /// The token that starts a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end one.
    pub eos_token_ids: Vec<u32>,
    /// How the model compresses its cache; `None` for a plain model.
    pub compression: Option<Compression>,
    /// The whole file, for the way back.
    raw: Map<String, Value>,
}

impl Config {
    /// Reads and checks a `config.json`. `file` is what errors call it.
    pub fn parse(json: &[u8], file: &str) -> Result<Config> {
        let raw: Map<String, Value> = serde_json::from_slice(json)
            .map_err(|error| ModelError::Json { file: file.into(), reason: error.to_string() })?;
        Self::from_map(raw, file)
    }

    fn from_map(raw: Map<String, Value>, file: &str) -> Result<Config> {
        let fields = Fields { file, prefix: "", map: &raw };
        let (family, retrofitted) = architecture(&fields)?;
        let defaults = family.defaults();
        refuse_what_is_not_computed(&fields)?;

        let hidden_size = fields.count("hidden_size", MAX_DIM, None)?;
        let num_attention_heads = fields.count("num_attention_heads", MAX_DIM, None)?;
        // An explicit null means as many as query heads in every family.
        let heads = defaults.num_key_value_heads.filter(|_| !raw.contains_key("num_key_value_heads"));
        let heads = heads.unwrap_or(num_attention_heads);
        let num_key_value_heads = fields.count("num_key_value_heads", MAX_DIM, Some(heads))?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of `num_attention_heads`, {num_attention_heads}");
            return Err(fields.wrong("num_key_value_heads", expected));
        }
        let vocab_size = fields.count("vocab_size", MAX_DIM, None)?;
        let context = defaults.max_position_embeddings;
        let max_position_embeddings = fields.count("max_position_embeddings", MAX_DIM, Some(context))?;
        let num_hidden_layers = fields.count("num_hidden_layers", MAX_LAYERS, None)?;
        refuse_a_window(&fields, family, (max_position_embeddings, num_hidden_layers))?;

        let compression = match (retrofitted, fields.get(SECTION)) {
            (false, None) => None,
            (true, Some(Value::Object(section))) => Some(Compression::parse(section, max_position_embeddings, file)?),
            (true, _) => {
                return Err(fields.wrong(
                    SECTION,
                    format!("the object that a model of architecture {} carries", family.retrofitted_architecture()),
                ));
            }
            (false, Some(_)) => {
                let (plain, ours) = (family.architecture(), family.retrofitted_architecture());
                let expected = format!("none in a model of architecture {plain}; {ours} has one");
                return Err(fields.wrong(SECTION, expected));
            }
        };

        let attention_bias = matches!(family, Family::Llama | Family::Qwen3) && fields.flag("attention_bias")?;
        Ok(Config {
            family,
            hidden_size,
            intermediate_size: fields.count("intermediate_size", MAX_DIM, None)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim: head_dim(&fields, (hidden_size, num_attention_heads), defaults.head_dim)?,
            vocab_size,
            max_position_embeddings,
            rope: Rope::parse(&fields, max_position_embeddings)?,
            qkv_bias: family == Family::Qwen2 || attention_bias,
            o_bias: attention_bias,
            qk_norm: family == Family::Qwen3,
            rms_norm_eps: fields.number(
                "rms_norm_eps",
                Some(1e-6),
                |x| x > 0.0 && x < 1.0,
                "a number above 0 and below 1",
            )?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            bos_token_id: bos_token_id(&fields, &defaults, vocab_size)?,
            eos_token_ids: eos_token_ids(&fields, &defaults, vocab_size)?,
            compression,
            raw,
        })
    }

    /// The configuration of this model once it has been retrofitted: another architecture, so that loaders of plain
    /// models refuse it, and a `kvfold` section. A section that is there already is replaced.
    pub fn with_compression(&self, compression: Compression) -> Result<Config> {
        compression.validate(self.max_position_embeddings, "the new config.json")?;
        let mut raw = self.raw.clone();
        raw.insert("architectures".into(), json!([self.family.retrofitted_architecture()]));
        raw.insert("model_type".into(), json!(self.family.retrofitted_model_type()));
        // Would lead a loader back to code for the plain model.
        raw.shift_remove("auto_map");
        raw.insert(SECTION.into(), compression.to_json());
        Ok(Config { compression: Some(compression), raw, ..self.clone() })
    }

    /// The configuration of this model with `kv_heads` KV heads: the same architecture, so that any loader takes it.
    pub fn with_kv_heads(&self, kv_heads: usize) -> Result<Config> {
        let mut raw = self.raw.clone();
        raw.insert("num_key_value_heads".into(), json!(kv_heads));
        // The default of a width that is not stated is the same before and after: it follows from the query heads.
        Self::from_map(raw, "the new config.json")
    }

    /// The file for this configuration, unknown fields included, in the order they were read.
    pub fn to_json(&self) -> String {
        debug_assert_eq!(Self::from_map(self.raw.clone(), "").as_ref().ok(), Some(self), "a field was changed by hand");
        // `{:#}` of a JSON value is its indented form.
        format!("{:#}\n", Value::Object(self.raw.clone()))
    }

    /// The architecture's name.
    pub fn architecture(&self) -> &'static str {
        match self.compression {
            Some(_) => self.family.retrofitted_architecture(),
            None => self.family.architecture(),
        }
    }

    /// Width of all query heads together, `H * D`; often but not always the hidden size.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads together, `G * D`.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Query heads that share one key-value head, `H / G`.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }
}

/// The family, and whether the model is one of ours. Other architectures are refused.
fn architecture(fields: &Fields) -> Result<(Family, bool)> {
    let plain = Family::ALL.map(Family::architecture).join(", ");
    let supported = format!("{plain} and their retrofitted forms, such as KvfoldLlamaForCausalLM, are");
    let name = match fields.get("architectures").and_then(Value::as_array).map(Vec::as_slice) {
        Some([Value::String(name)]) => name,
        _ => {
            return Err(fields.wrong("architectures", format!("a list of one name; {supported} supported")));
        }
    };
    let family = |of: fn(Family) -> &'static str| Family::ALL.into_iter().find(|&family| of(family) == name);
    let (family, retrofitted) = match (family(Family::architecture), family(Family::retrofitted_architecture)) {
        (Some(family), _) => (family, false),
        (_, Some(family)) => (family, true),
        _ => return Err(fields.unsupported("architectures", supported)),
    };
    let model_type = if retrofitted { family.retrofitted_model_type() } else { family.model_type() };
    match fields.text("model_type")? {
        Some(found) if found != model_type => {
            Err(fields.wrong("model_type", format!("\"{model_type}\", which belongs to {name}")))
        }
        _ => Ok((family, retrofitted)),
    }
}

/// Features of these families and their kin that would change the numbers if they were passed over.
fn refuse_what_is_not_computed(fields: &Fields) -> Result<()> {
    if fields.flag("mlp_bias")? {
        return Err(fields.unsupported("mlp_bias", "only MLPs without biases are"));
    }
    if fields.text("hidden_act")?.is_some_and(|act| act != "silu") {
        return Err(fields.unsupported("hidden_act", "only \"silu\" is"));
    }
    if fields.get("quantization_config").is_some() {
        return Err(fields.unsupported("quantization_config", "use the model's unquantized checkpoint"));
    }
    Ok(())
}

/// Refuses a window that a sequence within the context can outgrow. Mistral has one unless it is null; Qwen only from
/// `max_window_layers` on, and only if `use_sliding_window` says so or `layer_types` names the layers.
fn refuse_a_window(fields: &Fields, family: Family, (context, layers): (usize, usize)) -> Result<()> {
    let default = family.defaults().sliding_window.filter(|_| !fields.map.contains_key("sliding_window"));
    let window = match fields.get("sliding_window") {
        Some(_) => Some(fields.count("sliding_window", MAX_DIM, None)?),
        None => default,
    };
    let used = match family {
        Family::Llama => false,
        Family::Mistral => true,
        Family::Qwen2 | Family::Qwen3 => match fields.get("layer_types") {
            None => {
                let first = fields.map.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28);
                fields.flag("use_sliding_window")? && first < layers as u64
            }
            Some(kinds) => {
                let full = |kind: &Value| kind.as_str() == Some("full_attention");
                fields.flag("use_sliding_window")? && !kinds.as_array().is_some_and(|kinds| kinds.iter().all(full))
            }
        },
    };
    match window {
        Some(window) if used && window < context => {
            let reason = format!(
                "all tokens of the context attend to each other, and `max_position_embeddings` is {context}; set that to \
                 {window} to use the model within its window"
            );
            Err(fields.unsupported("sliding_window", reason))
        }
        _ => Ok(()),
    }
}

fn head_dim(fields: &Fields, (hidden_size, heads): (usize, usize), default: Option<usize>) -> Result<usize> {
    let default = default.filter(|_| !fields.map.contains_key("head_dim"));
    if fields.get("head_dim").is_none() && default.is_none() && !hidden_size.is_multiple_of(heads) {
        let expected = format!("a multiple of `num_attention_heads`, {heads}, as there is no `head_dim`");
        return Err(fields.wrong("hidden_size", expected));
    }
    let head_dim = fields.count("head_dim", MAX_DIM, Some(default.unwrap_or(hidden_size / heads)))?;
    if !head_dim.is_multiple_of(2) {
        let expected = "an even number, because RoPE rotates pairs of channels";
        return Err(match fields.get("head_dim") {
            Some(_) => fields.wrong("head_dim", expected),
            None => fields.wrong("hidden_size", format!("`num_attention_heads`, {heads}, times {expected}")),
        });
    }
    if heads * head_dim > MAX_DIM {
        let expected = format!("at most {MAX_DIM} / `num_attention_heads`, {heads}");
        return Err(fields.wrong("head_dim", expected));
    }
    Ok(head_dim)
}

fn bos_token_id(fields: &Fields, defaults: &Defaults, vocab_size: usize) -> Result<Option<u32>> {
    match fields.get("bos_token_id") {
        None => Ok(absent(fields, "bos_token_id", defaults.bos_token_id, vocab_size)),
        Some(value) => match token_id(value, vocab_size) {
            Some(id) => Ok(Some(id)),
            None => Err(fields.wrong("bos_token_id", format!("an integer below `vocab_size`, {vocab_size}, or null"))),
        },
    }
}

fn eos_token_ids(fields: &Fields, defaults: &Defaults, vocab_size: usize) -> Result<Vec<u32>> {
    match fields.get("eos_token_id") {
        None => Ok(absent(fields, "eos_token_id", defaults.eos_token_id, vocab_size).into_iter().collect()),
        Some(_) => end_token_ids(fields, vocab_size),
    }
}

/// The end tokens that a `generation_config.json` names for a vocabulary of `vocab_size`.
pub(crate) fn generation_end_token_ids(json: &[u8], vocab_size: usize, file: &str) -> Result<Vec<u32>> {
    let map: Map<String, Value> = serde_json::from_slice(json)
        .map_err(|error| ModelError::Json { file: file.into(), reason: error.to_string() })?;
    end_token_ids(&Fields { file, prefix: "", map: &map }, vocab_size)
}

fn end_token_ids(fields: &Fields, vocab_size: usize) -> Result<Vec<u32>> {
    let ids = match fields.get("eos_token_id") {
        None => Some(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(|value| token_id(value, vocab_size)).collect(),
        Some(value) => token_id(value, vocab_size).map(|id| vec![id]),
    };
    ids.ok_or_else(|| {
        fields.wrong("eos_token_id", format!("an integer below `vocab_size`, {vocab_size}, a list of them, or null"))
    })
}

/// What a field that is not there means to Hugging Face: `default`, while an explicit null means none.
fn absent(fields: &Fields, field: &str, default: Option<u32>, vocab_size: usize) -> Option<u32> {
    default.filter(|&id| !fields.map.contains_key(field) && (id as usize) < vocab_size)
}

fn token_id(value: &Value, vocab_size: usize) -> Option<u32> {
    value.as_u64().filter(|&id| id < vocab_size as u64).and_then(|id| u32::try_from(id).ok())
}
