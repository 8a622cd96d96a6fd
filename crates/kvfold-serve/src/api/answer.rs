//! From a request to what is told of it, whole or as a stream.

use super::App;
use super::sampling::Sampling;
use crate::error::ApiError;
use crate::model::Served;
use crate::text::{Said, Text};
use crate::worker::{CacheUse, End, Job, Reason, Refused, Ticket, Traced, Update};
use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kvfold_engine::{Constraint, EngineError, Kind, LogProbs, Options, Request, Stop};
use serde_json::{Map, Value, json};

/// What is asked of the engine.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) prompts: Vec<Vec<u32>>,
    pub(super) sampling: Sampling,
    /// New tokens at most; none for as many as there is room for.
    pub(super) max_tokens: Option<usize>,
    pub(super) log_probs: Option<usize>,
    pub(super) prompt_log_probs: Option<usize>,
    pub(super) constraint: Option<Box<dyn Constraint>>,
}

impl Asked {
    /// Hands it to the engine: a ticket for each choice, those of a prompt together.
    pub(super) async fn submit(self, app: &App) -> Result<Vec<Ticket>, ApiError> {
        let served = &*app.served;
        let mut jobs = Vec::with_capacity(self.prompts.len() * self.sampling.n);
        for prompt in &self.prompts {
            for n in 0..self.sampling.n {
                jobs.push(self.job(prompt, n, (served, app.worker.capacity))?);
            }
        }
        app.worker.submit(jobs).await.map_err(refused)
    }

    fn job(&self, prompt: &[u32], n: usize, (served, capacity): (&Served, usize)) -> Result<Job, ApiError> {
        let Self { sampling, log_probs, prompt_log_probs, constraint, .. } = self;
        let room = served.context.min(capacity.saturating_add(1)).saturating_sub(prompt.len());
        let stop = Stop {
            max_new_tokens: self.max_tokens.unwrap_or(room.max(1)),
            min_new_tokens: sampling.min_tokens,
            at: if sampling.ignore_eos && constraint.is_none() { Vec::new() } else { served.stop.clone() },
        };
        served.check_tokens(prompt, "prompt")?;
        let request = Request {
            stream: n as u64,
            log_probs: *log_probs,
            prompt_log_probs: *prompt_log_probs,
            kind: Kind { full: sampling.full, trace: sampling.trace },
            constraint: constraint.clone(),
            ..Request::new(prompt.to_vec(), Options { sampler: sampling.sampler.clone(), stop })
        };
        let text = Text::new(served.stream_after(prompt)?, sampling.stops.clone());
        Ok(Job { request, text, live: sampling.live && sampling.stream })
    }
}

/// Why the engine did not take a request, for its client.
fn refused(refused: Refused) -> ApiError {
    let message = refused.to_string();
    match refused {
        Refused::Busy { .. } => ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).code("queue_full"),
        Refused::Dead => ApiError::internal(message),
        Refused::Engine(error) => match error {
            EngineError::TooLong { .. } | EngineError::TooLarge(_) => {
                ApiError::param("max_tokens", message).code("context_length_exceeded")
            }
            EngineError::EmptyPrompt => ApiError::param("prompt", message),
            EngineError::Sampler(bad) => ApiError::param(bad.setting, message),
            _ => ApiError::invalid(message),
        },
    }
}

/// One choice, whole.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) text: String,
    pub(super) said: Vec<Said>,
    /// Of its prompt's tokens, from the second on.
    pub(super) prompt: Vec<LogProbs>,
    pub(super) end: End,
}

impl Choice {
    /// Waits for all choices.
    pub(super) async fn all(tickets: Vec<Ticket>) -> Result<Vec<Self>, ApiError> {
        let mut choices = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            choices.push(Self::of(ticket).await?);
        }
        Ok(choices)
    }

    /// Waits for the whole choice.
    async fn of(mut ticket: Ticket) -> Result<Self, ApiError> {
        let (mut text, mut said, mut prompt) = (String::new(), Vec::new(), Vec::new());
        while let Some(update) = ticket.next().await {
            match update {
                Update::Prompt(log_probs) => prompt = log_probs,
                Update::Text { piece, .. } => {
                    text.push_str(&piece.text);
                    said.extend(piece.said);
                }
                Update::End(end) => return Ok(Self { text, said, prompt, end }),
                Update::Failed(reason) => return Err(failed(&reason)),
            }
        }
        Err(ApiError::internal("the thread that computes has stopped; see the server's log"))
    }
}

/// An answer that came to nothing.
pub(super) fn failed(reason: &str) -> ApiError {
    ApiError::invalid(format!("the answer cannot be held to its form: {reason}")).code("constraint_failed")
}

/// OpenAI's word for why a text ended.
pub(super) fn finish_reason(reason: Reason) -> &'static str {
    match reason {
        Reason::Stop => "stop",
        Reason::Length => "length",
    }
}

/// Tokens and cache of an answer.
#[derive(Clone, Debug, Default)]
pub(super) struct Usage {
    prompt: usize,
    cached: usize,
    new: usize,
    caches: Vec<CacheUse>,
}

impl Usage {
    pub(super) fn of_prompts(prompts: &[Vec<u32>]) -> Self {
        Self { prompt: prompts.iter().map(Vec::len).sum(), ..Self::default() }
    }

    /// Tokens of choices that are on their way.
    pub(super) fn with_new(&self, new: usize) -> Self {
        Self { new: self.new + new, ..self.clone() }
    }

    /// What a choice came to. Of a prompt that several choices answer, what the first of them was spared counts.
    pub(super) fn add(&mut self, end: &End, first: bool) {
        self.new += end.tokens;
        self.cached += if first { end.cached } else { 0 };
        self.caches.push(end.cache.clone());
    }

    pub(super) fn json(&self) -> Value {
        let mut usage = json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        });
        if !self.caches.is_empty() {
            usage["kvfold"] = cache_json(&self.caches);
        }
        usage
    }
}

/// What caches hold, together.
fn cache_json(caches: &[CacheUse]) -> Value {
    let (mut seen, mut slots, mut bytes, mut dense) = (0, 0.0, 0, 0);
    for cache in caches {
        if let Some(held) = &cache.held {
            seen += held.tokens;
            slots += held.tokens as f64 / held.logical_ratio();
        }
        bytes += cache.bytes;
        dense += cache.dense_bytes;
    }
    let ratio = |many: f64, few: f64| if few == 0.0 { 1.0 } else { many / few };
    json!({
        "engaged": caches.iter().any(|cache| cache.engaged),
        "tokens_seen": seen,
        "slots_held": slots,
        "logical_ratio": ratio(seen as f64, slots),
        "physical_ratio": ratio(dense as f64, bytes as f64),
        "kv_bytes": bytes,
        "dense_kv_bytes": dense,
    })
}

/// What a cache holds while its text grows.
pub(super) fn live_json(cache: &CacheUse) -> Value {
    let mut live = cache_json(std::slice::from_ref(cache));
    if let (Some(live), Some(held)) = (live.as_object_mut(), &cache.held) {
        live.insert("heads".into(), json!(held.slots));
    }
    live
}

/// A whole answer, and what was decided on its tokens, if that was to be told.
pub(super) fn with_trace(mut answer: Value, served: &Served, trace: Option<&Traced>) -> Value {
    if let Some(trace) = trace {
        answer["kvfold"] = json!({ "trace": trace_json(served, trace) });
    }
    answer
}

/// What became of each token.
pub(super) fn trace_json(served: &Served, Traced { tokens, trace }: &Traced) -> Value {
    let bits = |folds: &Vec<bool>| {
        let byte = |bits: &[bool]| bits.iter().rev().fold(0u8, |byte, &bit| byte << 1 | u8::from(bit));
        STANDARD.encode(folds.chunks(8).map(byte).collect::<Vec<u8>>())
    };
    let delay = served.dmc.as_ref().map_or(0, |dmc| dmc.delay);
    // What is not decided yet says nothing.
    let decided = tokens.len().saturating_sub(delay);
    let folds = trace.folds().iter().map(|heads| {
        let settled = |folds: &Vec<bool>| folds[..decided.min(folds.len())].to_vec();
        heads.iter().map(|folds| bits(&settled(folds))).collect::<Vec<_>>()
    });
    json!({
        "delay": delay,
        "method": served.dmc.as_ref().map(|dmc| dmc.method.name()),
        "tokens": tokens.iter().map(|&token| served.token_text(token)).collect::<Vec<_>>(),
        "folds": folds.collect::<Vec<_>>(),
    })
}

/// Smallest logarithm that is told: JSON has no infinity.
const LOWEST: f64 = -9999.0;

/// A logarithm as JSON.
fn log_prob(p: f64) -> Value {
    json!(p.max(LOWEST))
}

/// Probabilities as chats tell them.
pub(super) fn chat_log_probs(served: &Served, said: &[Said]) -> Value {
    let one = |token: u32, p: f64| {
        let bytes = served.token_bytes(token);
        json!({ "token": served.token_text(token), "logprob": log_prob(p), "bytes": bytes })
    };
    let content = said.iter().filter_map(|said| {
        let LogProbs { token, top } = said.log_probs.as_ref()?;
        let mut entry = one(said.token, *token);
        entry["top_logprobs"] = top.iter().map(|&(token, p)| one(token, p)).collect();
        Some(entry)
    });
    json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
}

/// Probabilities as completions tell them: token by token, each with where its text begins.
#[derive(Debug, Default)]
pub(super) struct TextLogProbs {
    tokens: Vec<String>,
    token_log_probs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
}

impl TextLogProbs {
    /// A prompt's, of which nothing is known of the first token. `text` is the prompt.
    pub(super) fn prompt(&mut self, served: &Served, tokens: &[u32], log_probs: &[LogProbs]) {
        let mut offset = 0;
        for (n, &token) in tokens.iter().enumerate() {
            self.add(served, (token, offset), n.checked_sub(1).and_then(|before| log_probs.get(before)));
            offset += served.token_bytes(token).len();
        }
    }

    /// New tokens, after `before` bytes of text.
    pub(super) fn new_tokens(&mut self, served: &Served, before: usize, said: &[Said]) {
        for said in said {
            self.add(served, (said.token, before + said.offset), said.log_probs.as_ref());
        }
    }

    fn add(&mut self, served: &Served, (token, offset): (u32, usize), log_probs: Option<&LogProbs>) {
        self.tokens.push(served.token_text(token));
        self.offsets.push(offset);
        self.token_log_probs.push(log_probs.map_or(Value::Null, |log_probs| log_prob(log_probs.token)));
        self.top.push(log_probs.map_or(Value::Null, |LogProbs { token: own, top }| {
            let mut map: Map<String, Value> =
                top.iter().map(|&(token, p)| (served.token_text(token), log_prob(p))).collect();
            map.entry(served.token_text(token)).or_insert_with(|| log_prob(*own));
            map.into()
        }));
    }

    pub(super) fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_log_probs,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}
