//! Rotary frequencies, plain and scaled, as `config.json` states them.
//!
//! A scaling stretches a model trained on `original` tokens over a longer context by turning some frequencies more slowly.
//! The formulas are those of Hugging Face's `modeling_rope_utils.py`, so that models answer as they do there. Both layouts
//! are read: `rope_theta` beside `rope_scaling`, and `rope_parameters` with both inside.

use std::f64::consts::PI;

use crate::error::Result;
use crate::fields::Fields;

/// How positions become angles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies, above 0.
    pub theta: f64,
    /// What stretches them.
    pub scaling: Scaling,
}

/// A way to stretch rotary frequencies. Factors are at least 1, lengths are in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Scaling {
    /// None: `theta^(-2i/D)`.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by a factor, high ones kept, those between interpolated.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Turns within `original` tokens below which a frequency is divided.
        low: f64,
        /// Turns within `original` tokens above which a frequency is kept; above `low`.
        high: f64,
        /// Tokens that the model was first trained on.
        original: usize,
    },
    /// YaRN (Peng et al. 2023): as Llama 3.1 but interpolated over channels, with sharper attention.
    Yarn {
        /// The factor.
        factor: f64,
        /// Turns within `original` tokens above which a frequency is kept.
        beta_fast: f64,
        /// Turns within `original` tokens below which a frequency is divided.
        beta_slow: f64,
        /// Whether the channels between which to interpolate are rounded outwards.
        truncate: bool,
        /// Tokens that the model was first trained on.
        original: usize,
        /// Factor on rotated queries and on rotated keys.
        attention_factor: f64,
    },
}

impl Rope {
    /// Plain RoPE.
    pub fn plain(theta: f64) -> Self {
        Self { theta, scaling: Scaling::None }
    }

    /// Frequencies of a head of `dim` channels: radians per token for each of its `dim/2` pairs.
    pub fn inv_freq(&self, dim: usize) -> Vec<f64> {
        let plain = (0..dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / dim as f64));
        match self.scaling {
            Scaling::None => plain.collect(),
            Scaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            Scaling::Llama3 { factor, low, high, original } => plain
                .map(|f| {
                    let turns = original as f64 * f / (2.0 * PI);
                    // 1 keeps the frequency, 0 divides it.
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    keep * f + (1.0 - keep) * f / factor
                })
                .collect(),
            Scaling::Yarn { factor, beta_fast, beta_slow, truncate, original, .. } => {
                // The channel pair that makes so many turns within `original` tokens, as a real number.
                let pair =
                    |turns: f64| dim as f64 * (original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut first, mut last) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                (first, last) = (first.max(0.0), last.min(dim as f64 - 1.0));
                if first == last {
                    last += 0.001;
                }
                plain
                    .enumerate()
                    .map(|(i, f)| {
                        let divide = ((i as f64 - first) / (last - first)).clamp(0.0, 1.0);
                        divide * f / factor + (1.0 - divide) * f
                    })
                    .collect()
            }
        }
    }

    /// Factor on every score. YaRN multiplies rotated queries and rotated keys by its attention factor; scores only know
    /// the product, so queries take the square and keys stay what a rotation leads back from.
    pub fn score_factor(&self) -> f64 {
        match self.scaling {
            Scaling::Yarn { attention_factor, .. } => attention_factor * attention_factor,
            _ => 1.0,
        }
    }

    /// Reads what the fields of a `config.json` say for a model whose context is `context` tokens long.
    pub(crate) fn parse(fields: &Fields, context: usize) -> Result<Rope> {
        let theta = |fields: &Fields, default| {
            fields.number("rope_theta", Some(default), |x| x > 0.0, "a finite number above 0")
        };
        whole_head(fields)?;
        let mut rope = Rope::plain(theta(fields, 10000.0)?);
        let layouts = [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")];
        let Some((field, prefix)) = layouts.into_iter().find(|(field, _)| fields.get(field).is_some()) else {
            return Ok(rope);
        };
        let Some(map) = fields.get(field).and_then(|value| value.as_object()) else {
            return Err(fields.wrong(field, "an object"));
        };
        if map.values().any(|value| value.is_object()) {
            return Err(fields.unsupported(field, "only one RoPE for all layers is computed"));
        }
        let inner = Fields { prefix, map, ..*fields };
        whole_head(&inner)?;
        rope.theta = theta(&inner, rope.theta)?;
        // Phi's place for it, which Hugging Face lets win.
        let original = match fields.get("original_max_position_embeddings") {
            Some(_) => fields.count("original_max_position_embeddings", context, None)?,
            None => inner.count("original_max_position_embeddings", usize::MAX, Some(context))?,
        };
        rope.scaling = scaling(&inner, (rope.theta, context, original))?;
        Ok(rope)
    }
}

/// Refuses heads of which only some channels are rotated, and positions of more than one dimension.
fn whole_head(fields: &Fields) -> Result<()> {
    if fields.get("partial_rotary_factor").is_some_and(|factor| factor.as_f64() != Some(1.0)) {
        return Err(fields.unsupported("partial_rotary_factor", "all channels are rotated"));
    }
    if fields.get("mrope_section").is_some() {
        return Err(fields.unsupported("mrope_section", "only positions in a text are computed"));
    }
    Ok(())
}

fn scaling(fields: &Fields, (theta, context, original): (f64, usize, usize)) -> Result<Scaling> {
    // The older name of the field is `type`.
    let field = if fields.get("rope_type").is_some() { "rope_type" } else { "type" };
    let kind = fields.text(field)?.unwrap_or("default");
    let positive = |field, default| fields.number(field, default, |x| x > 0.0, "a finite number above 0");
    let factor = || fields.number("factor", None, |x| x >= 1.0, "a finite number from 1 upwards");
    match kind {
        "default" => Ok(Scaling::None),
        "linear" => Ok(Scaling::Linear { factor: factor()? }),
        // Stretches by the length of each sequence, and not at all up to the original one.
        "dynamic" if original >= context => Ok(Scaling::None),
        "dynamic" => {
            let reason = format!(
                "frequencies that change with the length of a sequence are not computed; they do not within the \
                 original {original} tokens: set `max_position_embeddings` to that and remove the scaling"
            );
            Err(fields.unsupported(field, reason))
        }
        "llama3" => {
            let low = positive("low_freq_factor", None)?;
            let above = format!("a finite number above `low_freq_factor`, {low}");
            let high = fields.number("high_freq_factor", None, |x| x > low, &above)?;
            Ok(Scaling::Llama3 { factor: factor()?, low, high, original })
        }
        "yarn" => {
            if theta <= 1.0 {
                return Err(fields.wrong("rope_theta", "a number above 1, which YaRN takes the logarithm of"));
            }
            // A null factor is the ratio of the lengths; an absent one is a mistake.
            let factor = match fields.map.get("factor") {
                Some(value) if value.is_null() => (context as f64 / original as f64).max(1.0),
                _ => factor()?,
            };
            let beta_slow = positive("beta_slow", Some(1.0))?;
            let least = format!("a finite number of at least `beta_slow`, {beta_slow}");
            let beta_fast = fields.number("beta_fast", Some(beta_slow.max(32.0)), |x| x >= beta_slow, &least)?;
            let truncate = fields.get("truncate").is_none() || fields.flag("truncate")?;
            let attention_factor = match fields.get("attention_factor") {
                Some(_) => positive("attention_factor", None)?,
                None => yarn_attention_factor(fields, factor)?,
            };
            Ok(Scaling::Yarn { factor, beta_fast, beta_slow, truncate, original, attention_factor })
        }
        _ => {
            let kinds = "\"default\", \"linear\", \"dynamic\", \"llama3\" and \"yarn\" are";
            Err(fields.unsupported(field, kinds))
        }
    }
}

/// `0.1 * mscale * ln(factor) + 1`, or a ratio of two of them where the file gives both scales, neither of them 0.
fn yarn_attention_factor(fields: &Fields, factor: f64) -> Result<f64> {
    let scale = |field| fields.number(field, Some(0.0), |x| x >= 0.0, "a finite number from 0 upwards");
    let mscale = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
    Ok(match (scale("mscale")?, scale("mscale_all_dim")?) {
        (above, below) if above > 0.0 && below > 0.0 => mscale(above) / mscale(below),
        _ => mscale(1.0),
    })
}
