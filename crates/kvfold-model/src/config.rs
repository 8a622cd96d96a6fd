//! The shape of a model: Hugging Face's `config.json`, checked.
//!
//! The reader is strict where being lenient would give wrong numbers (a RoPE scaling that is not computed, a bias that is not
//! added, another activation) and lenient where it would not: fields it does not know are kept and written back, and absent
//! ones have the defaults of Hugging Face's `LlamaConfig`.

use serde_json::{Map, Value, json};

use crate::compression::{Compression, SECTION};
use crate::error::{ModelError, Result};
use crate::fields::Fields;

/// The architecture of a model as Hugging Face knows it.
pub const LLAMA: &str = "LlamaForCausalLM";

/// The architecture of a model that this program has retrofitted.
pub const KVFOLD_LLAMA: &str = "KvfoldLlamaForCausalLM";

/// The largest width, vocabulary or context that is believed. Real ones stay far below, and below it no product of two
/// dimensions and an element size can overflow, so that the code behind the configuration multiplies without checking.
const MAX_DIM: usize = 1 << 24;

/// The largest number of layers that is believed: names and shapes of all layers are listed before a weight is read.
const MAX_LAYERS: usize = 1 << 12;

/// A Llama model's shape and constants.
///
/// The fields are what the JSON says, and it is the JSON that is written back: to get another model, parse other JSON.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Config {
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
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square before its root is taken.
    pub rms_norm_eps: f64,
    /// Whether the embedding is also the output head.
    pub tie_word_embeddings: bool,
    /// The token that starts a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end one.
    pub eos_token_ids: Vec<u32>,
    /// How the model compresses its cache; `None` for a plain Llama.
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
        let retrofitted = architecture(&fields)?;
        refuse_what_is_not_computed(&fields)?;

        let hidden_size = fields.count("hidden_size", MAX_DIM, None)?;
        let num_attention_heads = fields.count("num_attention_heads", MAX_DIM, None)?;
        let num_key_value_heads = fields.count("num_key_value_heads", MAX_DIM, Some(num_attention_heads))?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of `num_attention_heads`, {num_attention_heads}");
            return Err(fields.wrong("num_key_value_heads", expected));
        }
        let vocab_size = fields.count("vocab_size", MAX_DIM, None)?;
        let max_position_embeddings = fields.count("max_position_embeddings", MAX_DIM, Some(2048))?;

        let compression = match (retrofitted, fields.get(SECTION)) {
            (false, None) => None,
            (true, Some(Value::Object(section))) => Some(Compression::parse(section, max_position_embeddings, file)?),
            (true, _) => {
                return Err(
                    fields.wrong(SECTION, format!("the object that a model of architecture {KVFOLD_LLAMA} carries"))
                );
            }
            (false, Some(_)) => {
                let expected = format!("none in a model of architecture {LLAMA}; {KVFOLD_LLAMA} has one");
                return Err(fields.wrong(SECTION, expected));
            }
        };

        Ok(Config {
            hidden_size,
            intermediate_size: fields.count("intermediate_size", MAX_DIM, None)?,
            num_hidden_layers: fields.count("num_hidden_layers", MAX_LAYERS, None)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim: head_dim(&fields, hidden_size, num_attention_heads)?,
            vocab_size,
            max_position_embeddings,
            rope_theta: rope_theta(&fields)?,
            rms_norm_eps: fields.number(
                "rms_norm_eps",
                Some(1e-6),
                |x| x > 0.0 && x < 1.0,
                "a number above 0 and below 1",
            )?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            bos_token_id: bos_token_id(&fields, vocab_size)?,
            eos_token_ids: eos_token_ids(&fields, vocab_size)?,
            compression,
            raw,
        })
    }

    /// The configuration of this model once it has been retrofitted: another architecture, so that loaders of plain Llamas
    /// refuse it, and a `kvfold` section. A section that is there already is replaced.
    pub fn with_compression(&self, compression: Compression) -> Result<Config> {
        compression.validate(self.max_position_embeddings, "the new config.json")?;
        let mut raw = self.raw.clone();
        raw.insert("architectures".into(), json!([KVFOLD_LLAMA]));
        raw.insert("model_type".into(), json!("kvfold_llama"));
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
        if self.compression.is_some() { KVFOLD_LLAMA } else { LLAMA }
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

/// Whether the model is one of ours. Anything but the two architectures of this crate is refused.
fn architecture(fields: &Fields) -> Result<bool> {
    let supported = format!("{LLAMA} and {KVFOLD_LLAMA} are");
    let name = match fields.get("architectures").and_then(Value::as_array).map(Vec::as_slice) {
        Some([Value::String(name)]) => name,
        _ => {
            return Err(fields.wrong("architectures", format!("a list of one name; {supported} supported")));
        }
    };
    let (retrofitted, model_type) = match name.as_str() {
        LLAMA => (false, "llama"),
        KVFOLD_LLAMA => (true, "kvfold_llama"),
        _ => return Err(fields.unsupported("architectures", supported)),
    };
    match fields.text("model_type")? {
        Some(found) if found != model_type => {
            Err(fields.wrong("model_type", format!("\"{model_type}\", which belongs to {name}")))
        }
        _ => Ok(retrofitted),
    }
}

/// Features of `LlamaConfig` and its kin that would change the numbers if they were passed over.
fn refuse_what_is_not_computed(fields: &Fields) -> Result<()> {
    if fields.get("rope_scaling").is_some() {
        return Err(fields.unsupported("rope_scaling", "only plain RoPE is computed, without scaling (null)"));
    }
    for field in ["attention_bias", "mlp_bias"] {
        if fields.flag(field)? {
            return Err(fields.unsupported(field, "only models without biases are"));
        }
    }
    if fields.text("hidden_act")?.is_some_and(|act| act != "silu") {
        return Err(fields.unsupported("hidden_act", "only \"silu\" is"));
    }
    if fields.get("quantization_config").is_some() {
        return Err(fields.unsupported("quantization_config", "use the model's unquantized checkpoint"));
    }
    Ok(())
}

fn head_dim(fields: &Fields, hidden_size: usize, heads: usize) -> Result<usize> {
    if fields.get("head_dim").is_none() && !hidden_size.is_multiple_of(heads) {
        let expected = format!("a multiple of `num_attention_heads`, {heads}, as there is no `head_dim`");
        return Err(fields.wrong("hidden_size", expected));
    }
    let head_dim = fields.count("head_dim", MAX_DIM, Some(hidden_size / heads))?;
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

/// The base of the rotary frequencies, which Hugging Face's version 5 has moved into `rope_parameters`.
fn rope_theta(fields: &Fields) -> Result<f64> {
    let number =
        |fields: &Fields, default| fields.number("rope_theta", default, |x| x > 0.0, "a finite number above 0");
    let theta = number(fields, Some(10000.0))?;
    let Some(value) = fields.get("rope_parameters") else {
        return Ok(theta);
    };
    let Some(map) = value.as_object() else {
        return Err(fields.wrong("rope_parameters", "an object"));
    };
    let fields = Fields { prefix: "rope_parameters.", map, ..*fields };
    if fields.text("rope_type")?.is_some_and(|kind| kind != "default") {
        return Err(fields.unsupported("rope_type", "only plain RoPE, \"default\", is computed"));
    }
    if fields.get("partial_rotary_factor").is_some_and(|factor| factor.as_f64() != Some(1.0)) {
        return Err(fields.unsupported("partial_rotary_factor", "all channels are rotated"));
    }
    number(&fields, Some(theta))
}

fn bos_token_id(fields: &Fields, vocab_size: usize) -> Result<Option<u32>> {
    match fields.get("bos_token_id") {
        None => Ok(absent(fields, "bos_token_id", 1, vocab_size)),
        Some(value) => match token_id(value, vocab_size) {
            Some(id) => Ok(Some(id)),
            None => Err(fields.wrong("bos_token_id", format!("an integer below `vocab_size`, {vocab_size}, or null"))),
        },
    }
}

fn eos_token_ids(fields: &Fields, vocab_size: usize) -> Result<Vec<u32>> {
    let ids = match fields.get("eos_token_id") {
        None => {
            return Ok(absent(fields, "eos_token_id", 2, vocab_size).into_iter().collect());
        }
        Some(Value::Array(values)) => values.iter().map(|value| token_id(value, vocab_size)).collect(),
        Some(value) => token_id(value, vocab_size).map(|id| vec![id]),
    };
    ids.ok_or_else(|| {
        fields.wrong("eos_token_id", format!("an integer below `vocab_size`, {vocab_size}, a list of them, or null"))
    })
}

/// What a field that is not there means to Hugging Face: `default`, while an explicit null means none.
fn absent(fields: &Fields, field: &str, default: u32, vocab_size: usize) -> Option<u32> {
    (!fields.map.contains_key(field) && (default as usize) < vocab_size).then_some(default)
}

fn token_id(value: &Value, vocab_size: usize) -> Option<u32> {
    value.as_u64().filter(|&id| id < vocab_size as u64).and_then(|id| u32::try_from(id).ok())
}
