//! The arguments of commands that write text: `kvfold generate` and `kvfold chat`.

use super::ModelArgs;
use clap::Args;
use kvfold_engine::Sampler;
use std::path::PathBuf;

/// How tokens are chosen, and how many.
#[derive(Clone, Debug, Args)]
pub(crate) struct SamplingArgs {
    /// New tokens at most [default: 256, or what the model's context leaves]
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<usize>,

    /// 0 takes the most likely token; higher is more varied
    #[arg(long, default_value_t = 0.0, value_name = "T", value_parser = temperature, allow_negative_numbers = true)]
    pub(crate) temperature: f64,

    /// Draw from the N most likely tokens alone; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) top_k: usize,

    /// Draw from the most likely tokens that have probability P together
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub(crate) top_p: f64,

    /// Draw no token of less than P times the most likely one's probability
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub(crate) min_p: f64,

    /// Divide the logits of tokens that are there already (multiply negative ones) by X
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    pub(crate) repetition_penalty: f64,

    /// Seed of the draws
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) seed: u64,
}

impl SamplingArgs {
    /// The sampler.
    pub(crate) fn sampler(&self) -> Sampler {
        Sampler {
            temperature: self.temperature,
            seed: self.seed,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            ..Sampler::GREEDY
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: String,

    /// Take the prompt for a user's message and answer it, through the model's chat template
    #[arg(long)]
    pub(crate) chat: bool,

    /// What the model is told before the chat
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,

    /// Print one JSON document instead of the text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// What the model is told before the chat
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,

    /// Answer with the full cache: nothing folds, nothing is evicted
    #[arg(long)]
    pub(crate) full: bool,

    /// Keep the conversation in FILE after every answer, its cache included, and go on with it if it is there
    #[arg(long, value_name = "FILE")]
    pub(crate) session: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(t) if t.is_finite() && t >= 0.0 => Ok(t),
        _ => Err("a number of at least 0 is expected".into()),
    }
}
