//! What all completions ask for alike.

use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::Served;
use kvfold_engine::Sampler;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Choices of a request at most.
const CHOICES: u64 = 16;

/// Stop strings of a request at most, and bytes of each.
const STOPS: usize = 16;
const STOP_BYTES: usize = 1024;

/// Likeliest tokens that are told beside the chosen one, at most.
pub(super) const TOP: u64 = 20;

/// How to answer.
#[derive(Clone, Debug)]
pub(super) struct Sampling {
    pub(super) sampler: Sampler,
    pub(super) stops: Vec<String>,
    pub(super) min_tokens: usize,
    pub(super) ignore_eos: bool,
    /// Choices for each prompt.
    pub(super) n: usize,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) full: bool,
    pub(super) live: bool,
    pub(super) trace: bool,
    /// Fields inside of others that nobody knows.
    pub(super) ignored: Vec<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Stops {
    One(String),
    Many(Vec<String>),
}

impl Sampling {
    /// Takes the fields that all completions have.
    pub(super) fn take(fields: &mut Fields, served: &Served) -> Result<Self, ApiError> {
        served.check_name(fields.take::<String>("model")?.as_deref())?;
        let sampler = sampler(fields)?;
        sampler.validate(served.vocab).map_err(|error| ApiError::param(error.setting, error.to_string()))?;
        let mut sampling = Self {
            sampler,
            stops: stops(fields)?,
            min_tokens: fields.number("min_tokens", (0, served.context as u64))?.unwrap_or(0) as usize,
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            n: fields.number("n", (1, CHOICES))?.unwrap_or(1) as usize,
            stream: fields.take("stream")?.unwrap_or(false),
            include_usage: false,
            continuous_usage: false,
            full: false,
            live: false,
            trace: false,
            ignored: Vec::new(),
        };
        if let Some(mut options) = fields.object("stream_options")? {
            sampling.include_usage = options.take("include_usage")?.unwrap_or(false);
            sampling.continuous_usage = options.take("continuous_usage_stats")?.unwrap_or(false);
            sampling.ignored.extend(options.finish(&[])?);
        }
        if let Some(mut wishes) = fields.object("kvfold")? {
            sampling.full = !wishes.take("enabled")?.unwrap_or(true);
            sampling.live = wishes.take("live")?.unwrap_or(false);
            sampling.trace = wishes.take("trace")?.unwrap_or(false);
            sampling.ignored.extend(wishes.finish(&[])?);
        }
        if (sampling.live || sampling.trace) && sampling.n > 1 {
            return Err(ApiError::param("kvfold", "`kvfold.live` and `kvfold.trace` need `n` to be 1"));
        }
        // They change nothing of the answer.
        fields.take::<serde_json::Value>("user")?;
        fields.take::<serde_json::Value>("metadata")?;
        Ok(sampling)
    }
}

fn sampler(fields: &mut Fields) -> Result<Sampler, ApiError> {
    let top_k: i64 = fields.take("top_k")?.unwrap_or(0);
    if top_k < -1 {
        return Err(ApiError::param("top_k", format!("`top_k` is {top_k}; expected at least 0, or -1 for all")));
    }
    let bias: BTreeMap<String, f32> = fields.take("logit_bias")?.unwrap_or_default();
    let token = |(token, bias): (String, f32)| match token.parse() {
        Ok(token) => Ok((token, bias)),
        Err(_) => Err(ApiError::param("logit_bias", format!("`logit_bias`: `{token}` is no token id"))),
    };
    Ok(Sampler {
        temperature: fields.take("temperature")?.unwrap_or(1.0),
        // Negative seeds are seeds as well.
        seed: fields.take::<i64>("seed")?.map_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0, |seed| seed as u64),
        top_k: top_k.max(0).try_into().unwrap_or(usize::MAX),
        top_p: fields.take("top_p")?.unwrap_or(1.0),
        min_p: fields.take("min_p")?.unwrap_or(0.0),
        repetition_penalty: fields.take("repetition_penalty")?.unwrap_or(1.0),
        presence_penalty: fields.take("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: fields.take("frequency_penalty")?.unwrap_or(0.0),
        bias: bias.into_iter().map(token).collect::<Result<_, _>>()?,
    })
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop")? {
        None => Vec::new(),
        Some(Stops::One(stop)) => vec![stop],
        Some(Stops::Many(stops)) => stops,
    };
    let wrong = |reason: String| Err(ApiError::param("stop", format!("`stop` {reason}")));
    if stops.len() > STOPS {
        return wrong(format!("has {} strings; expected at most {STOPS}", stops.len()));
    }
    match stops.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES) {
        Some(stop) => wrong(format!("has a string of {} bytes; expected 1 to {STOP_BYTES}", stop.len())),
        None => Ok(stops),
    }
}
