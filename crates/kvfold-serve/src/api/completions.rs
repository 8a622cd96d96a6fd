//! `POST /v1/completions`.

use super::answer::{Asked, Choice, TextLogProbs, Usage, finish_reason, with_trace};
use super::form::{self, Form, Read};
use super::sampling::{Sampling, TOP};
use super::stream::Teller;
use super::{App, Body, Head};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::Served;
use crate::text::Said;
use crate::worker::{End, Update};
use axum::extract::State;
use axum::response::Response;
use kvfold_engine::LogProbs;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// New tokens unless the request says otherwise: OpenAI's number.
const MAX_TOKENS: u64 = 16;

/// Prompts of a request at most.
const PROMPTS: usize = 256;

/// Fields of OpenAI's or vLLM's that would change the answer.
const UNSUPPORTED: [&str; 8] = [
    "suffix",
    "use_beam_search",
    "prompt_embeds",
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "logits_processors",
    "response_format",
];

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string, a list of strings, token ids, or a list of lists of token ids")]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    Many(Vec<Vec<u32>>),
}

/// A prompt's tokens, and its text if it came as one.
type Tokens = (Vec<u32>, Option<String>);

impl Prompt {
    /// Each prompt's tokens, and its text if it came as one.
    fn tokens(self, served: &Served) -> Result<Vec<Tokens>, ApiError> {
        let of = |text: String| Ok((served.encode_prompt(&text, true, "prompt")?, Some(text)));
        let prompts = match self {
            Prompt::Text(text) => vec![of(text)?],
            Prompt::Texts(texts) => texts.into_iter().map(of).collect::<Result<_, ApiError>>()?,
            Prompt::Tokens(tokens) => vec![(tokens, None)],
            Prompt::Many(many) => many.into_iter().map(|tokens| (tokens, None)).collect(),
        };
        match prompts.len() {
            1..=PROMPTS => Ok(prompts),
            n => Err(ApiError::param("prompt", format!("`prompt` has {n} prompts; expected 1 to {PROMPTS}"))),
        }
    }
}

/// What is wanted beside the new text.
struct Wanted {
    echo: Option<Vec<String>>,
    log_probs: bool,
    prompts: Vec<Vec<u32>>,
    n: usize,
    served: Arc<Served>,
}

impl Wanted {
    /// The prompt's text, where it is to be told.
    fn before(&self, choice: usize) -> &str {
        self.echo.as_ref().map_or("", |texts| &texts[choice / self.n])
    }

    fn log_probs(&self, choice: usize, prompt: Option<&[LogProbs]>, said: &[Said]) -> Value {
        if !self.log_probs {
            return Value::Null;
        }
        let mut told = TextLogProbs::default();
        if let Some(prompt) = prompt {
            told.prompt(&self.served, &self.prompts[choice / self.n], prompt);
        }
        told.new_tokens(&self.served, self.before(choice).len(), said);
        told.json()
    }
}

/// Answers.
pub(super) async fn completions(State(app): State<Arc<App>>, Body(body): Body) -> Result<Response, ApiError> {
    form::answer::<Wanted>(app, body).await
}

impl Form for Wanted {
    type Teller = Streamed;

    fn read(served: &Arc<Served>, body: &[u8]) -> Result<Read<Self>, ApiError> {
        let mut fields = Fields::parse(body)?;
        let sampling = Sampling::take(&mut fields, served)?;
        let prompts = fields.need::<Prompt>("prompt")?.tokens(served)?;
        let echo: bool = fields.take("echo")?.unwrap_or(false);
        let max_tokens = fields.number("max_tokens", (u64::from(!echo), u64::MAX))?.unwrap_or(MAX_TOKENS) as usize;
        let log_probs = fields.number("logprobs", (0, TOP))?.map(|top| top as usize);
        if let Some(best) = fields.number("best_of", (1, u64::MAX))?
            && best != sampling.n as u64
        {
            let message = "`best_of` other than `n` is not supported";
            return Err(ApiError::param("best_of", message).code("unsupported_parameter"));
        }
        if (sampling.live || sampling.trace) && prompts.len() > 1 {
            return Err(ApiError::param("kvfold", "`kvfold.live` and `kvfold.trace` need one prompt"));
        }
        let mut ignored = sampling.ignored.clone();
        ignored.extend(fields.finish(&UNSUPPORTED)?);

        let text = |(tokens, text): &Tokens| match text {
            Some(text) => Ok(text.clone()),
            None => served.decode(tokens, true),
        };
        let echo = echo.then(|| prompts.iter().map(text).collect::<Result<Vec<_>, _>>()).transpose()?;
        let prompts: Vec<Vec<u32>> = prompts.into_iter().map(|(tokens, _)| tokens).collect();
        let n = sampling.n;
        let wanted =
            Wanted { log_probs: log_probs.is_some(), prompts: prompts.clone(), n, served: Arc::clone(served), echo };
        let asked = Asked {
            prompts,
            sampling,
            max_tokens: Some(max_tokens),
            log_probs,
            prompt_log_probs: log_probs.filter(|_| wanted.echo.is_some()),
            constraint: None,
        };
        Ok(Read { asked, form: wanted, ignored })
    }

    fn head(model: &str, _: bool) -> Head {
        Head::new("cmpl", "text_completion", model)
    }

    fn whole(&self, head: Head, mut usage: Usage, choices: Vec<Choice>) -> Value {
        let mut trace = None;
        let mut told = Vec::with_capacity(choices.len());
        for (n, choice) in choices.into_iter().enumerate() {
            let Choice { text, said, prompt, end } = choice;
            usage.add(&end, n.is_multiple_of(self.n));
            told.push(json!({
                "index": n,
                "text": format!("{}{text}", self.before(n)),
                "logprobs": self.log_probs(n, self.echo.as_ref().map(|_| &prompt[..]), &said),
                "finish_reason": finish_reason(end.reason),
            }));
            trace = end.trace;
        }
        with_trace(head.answer(told, usage.json()), &self.served, trace.as_ref())
    }

    fn teller(self, _: usize) -> Streamed {
        Streamed { wanted: self }
    }
}

/// The answer as it grows.
struct Streamed {
    wanted: Wanted,
}

impl Streamed {
    fn choice(n: usize, text: &str, log_probs: Value, finish_reason: Option<&str>) -> Value {
        json!({ "index": n, "text": text, "logprobs": log_probs, "finish_reason": finish_reason })
    }
}

impl Teller for Streamed {
    fn begin(&mut self, choice: usize) -> Option<Value> {
        // With probabilities the prompt is told when they are known.
        if self.wanted.echo.is_none() || self.wanted.log_probs {
            return None;
        }
        Some(Self::choice(choice, self.wanted.before(choice), Value::Null, None))
    }

    fn tell(&mut self, choice: usize, update: &Update) -> Option<Value> {
        match update {
            Update::Prompt(prompt) => {
                let log_probs = self.wanted.log_probs(choice, Some(prompt), &[]);
                Some(Self::choice(choice, self.wanted.before(choice), log_probs, None))
            }
            Update::Text { piece, .. } if !piece.text.is_empty() || self.wanted.log_probs && !piece.said.is_empty() => {
                Some(Self::choice(choice, &piece.text, self.wanted.log_probs(choice, None, &piece.said), None))
            }
            _ => None,
        }
    }

    fn end(&mut self, choice: usize, end: &End) -> Vec<Value> {
        vec![Self::choice(choice, "", Value::Null, Some(finish_reason(end.reason)))]
    }
}
