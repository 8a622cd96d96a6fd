//! The `kvfold` section of `config.json`: what a retrofitted model must be run with.
//!
//! ```json
//! "kvfold": {
//!   "version": 2,
//!   "cache": { "method": "dmc", "decision": { "source": "borrowed", "scale": 1.0, "offset": 5.0 }, "delay": 0,
//!              "pool_window": 12, "log_mass": false, "share": "head" },
//!   "ratio": 4.0,
//!   "trained_length": 512,
//!   "base_model": "stories260k"
//! }
//! ```
//!
//! The section is read strictly. A field this build does not know may change what the weights mean, so it is an error, not
//! something to skip; whoever adds one raises [`Compression::VERSION`]. Version 1 knew DMC alone: its `cache` was called
//! `dmc` and had no `method`.

use kvfold_kernels::dmc::{Decision, Dmc, Method};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{ModelError, Result};
use crate::fields::Fields;

/// The key of the section in `config.json`.
pub(crate) const SECTION: &str = "kvfold";

/// How a model was taught to compress its cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compression {
    /// The settings that training, prefill and decode share.
    #[serde(rename = "cache")]
    pub dmc: Dmc,
    /// The compression ratio that was asked for: 4 means that a quarter of the slots is kept.
    pub ratio: f64,
    /// Tokens of the sequences it was trained on; decisions further into a text are extrapolation.
    pub trained_length: usize,
    /// The model that was retrofitted, as the user named it.
    pub base_model: String,
}

impl Compression {
    /// The version of the section that this build writes; it reads all up to this one.
    pub const VERSION: u64 = 2;

    /// Reads the section of a model whose context is `context` tokens long.
    pub(crate) fn parse(section: &Map<String, Value>, context: usize, file: &str) -> Result<Self> {
        let fields = Fields { file, prefix: "kvfold.", map: section };
        let cache = match fields.get("version").map(Value::as_u64) {
            Some(Some(1)) => "dmc",
            Some(Some(Self::VERSION)) => "cache",
            Some(Some(_)) => {
                let reason =
                    format!("this build reads versions 1 to {}; use the kvfold that wrote the model", Self::VERSION);
                return Err(fields.unsupported("version", reason));
            }
            _ => return Err(fields.wrong("version", format!("an integer from 1 to {}", Self::VERSION))),
        };
        let Some(settings) = fields.get(cache).and_then(Value::as_object) else {
            return Err(fields.wrong(cache, "an object"));
        };
        let mut settings = settings.clone();
        if cache == "dmc" {
            if settings.contains_key("method") {
                let fields = Fields { prefix: "kvfold.dmc.", map: &settings, ..fields };
                return Err(fields.wrong("method", "none: version 1 has no such field"));
            }
            settings.insert("method".into(), json!(Method::Dmc));
        }
        let mut rest = section.clone();
        rest.remove("version");
        rest.remove(cache);
        let unreadable = |section: &str, error: serde_json::Error| ModelError::Section {
            file: file.into(),
            section: section.into(),
            reason: error.to_string(),
        };
        // Read apart first, so that an error says which of the two it is in.
        let settings = Value::Object(settings);
        Dmc::deserialize(&settings).map_err(|error| unreadable(&format!("{SECTION}.{cache}"), error))?;
        if rest.insert("cache".into(), settings).is_some() {
            return Err(fields.wrong("cache", "none: version 1 has no such field"));
        }
        let compression = Compression::deserialize(Value::Object(rest)).map_err(|error| unreadable(SECTION, error))?;
        compression.validate_as(cache, context, file)?;
        Ok(compression)
    }

    /// The section as it stands in `config.json`.
    pub(crate) fn to_json(&self) -> Value {
        let mut section = Map::from_iter([("version".to_string(), json!(Self::VERSION))]);
        match serde_json::to_value(self) {
            Ok(Value::Object(fields)) => section.extend(fields),
            _ => unreachable!("a struct of numbers and strings is a JSON object"),
        }
        Value::Object(section)
    }

    /// Checks what the types leave open, for a model whose context is `context` tokens long.
    pub(crate) fn validate(&self, context: usize, file: &str) -> Result<()> {
        self.validate_as("cache", context, file)
    }

    /// The same, for a section that calls its settings `cache`.
    fn validate_as(&self, cache: &str, context: usize, file: &str) -> Result<()> {
        let check = |field: &str, valid: bool, found: String, expected: &str| match valid {
            true => Ok(()),
            false => Err(ModelError::Field {
                file: file.into(),
                field: format!("{SECTION}.{field}"),
                found,
                expected: expected.into(),
            }),
        };
        let (Decision::Borrowed { scale, offset } | Decision::Head { scale, offset, .. }) = self.dmc.decision;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        check(&format!("{cache}.decision.scale"), positive(scale), scale.to_string(), "a finite number above 0")?;
        check(&format!("{cache}.decision.offset"), offset.is_finite(), offset.to_string(), "a finite number")?;

        let limit = format!(
            "at most {context}, the model's `max_position_embeddings`: no token of a longer delay is ever folded"
        );
        check(&format!("{cache}.delay"), self.dmc.delay <= context, self.dmc.delay.to_string(), &limit)?;
        let limit = format!("less than {context}, the model's `max_position_embeddings`, or nothing is ever folded");
        check(&format!("{cache}.sinks"), self.dmc.sinks < context, self.dmc.sinks.to_string(), &limit)?;
        if let Some(window) = self.dmc.pool_window {
            let limit = format!(
                "1 to {context}, the model's `max_position_embeddings`, or null for the mean of the whole segment"
            );
            check(&format!("{cache}.pool_window"), (1..=context).contains(&window), window.to_string(), &limit)?;
        }

        if self.dmc.method == Method::Dms {
            let window = self.dmc.pool_window.map_or("null".to_owned(), |window| window.to_string());
            let expected = "null: DMS averages nothing";
            check(&format!("{cache}.pool_window"), self.dmc.pool_window.is_none(), window, expected)?;
            let expected = "false: DMS has no importances";
            check(&format!("{cache}.log_mass"), !self.dmc.log_mass, self.dmc.log_mass.to_string(), expected)?;
        }

        let valid = self.ratio.is_finite() && self.ratio >= 1.0;
        check("ratio", valid, self.ratio.to_string(), "a finite number from 1 (nothing is folded) upwards")?;
        check("trained_length", self.trained_length >= 1, self.trained_length.to_string(), "an integer from 1")
    }
}
