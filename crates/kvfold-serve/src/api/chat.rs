//! `POST /v1/chat/completions`.

use super::answer::{Asked, Choice, Usage, chat_log_probs, finish_reason, with_trace};
use super::form::{self, Form, Read};
use super::sampling::{Sampling, TOP};
use super::stream::Teller;
use super::{App, Body, Head};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::{Served, chat_of};
use crate::text::{Piece, Said};
use crate::tools::{self, Call, Watch};
use crate::worker::{End, Update};
use axum::extract::State;
use axum::response::Response;
use kvfold_engine::Constraint;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Fields of OpenAI's or vLLM's that would change the answer.
const UNSUPPORTED: [&str; 14] = [
    "audio",
    "functions",
    "function_call",
    "prediction",
    "reasoning_effort",
    "web_search_options",
    "use_beam_search",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "documents",
    "continue_final_message",
    "echo",
];

/// How tools may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Calls {
    /// Not at all.
    Never,
    /// If the model does.
    Free,
    /// The answer is a call.
    Forced,
}

/// What is wanted beside the text.
struct Wanted {
    log_probs: bool,
    calls: Calls,
    served: Arc<Served>,
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
        let max = fields.number("max_completion_tokens", (1, u64::MAX))?;
        let max = max.or(fields.number("max_tokens", (1, u64::MAX))?);
        let top = fields.number("top_logprobs", (0, TOP))?;
        let log_probs = fields.take("logprobs")?.unwrap_or(false).then_some(top.unwrap_or(0) as usize);
        if top.is_some() && log_probs.is_none() {
            return Err(ApiError::param("top_logprobs", "`top_logprobs` needs `logprobs` to be true"));
        }
        let messages = fields.need("messages")?;
        let tools: Option<Vec<Value>> = fields.take("tools")?;
        let (calls, forced) = calls(&mut fields, tools.as_deref().unwrap_or_default())?;
        let constraint = match (forced, format(&mut fields)?) {
            (Some(_), Some(_)) => {
                let message = "`response_format` cannot be met by a call that `tool_choice` demands";
                return Err(ApiError::param("response_format", message));
            }
            (Some(schema), None) => Some((schema, "tools")),
            (None, Some(schema)) => Some((schema, "response_format")),
            (None, None) => None,
        };
        // OpenAI's default, and the only way here: calls stand in the text in the order in which they are written.
        fields.take::<bool>("parallel_tool_calls")?;
        let variables = fields.take::<Map<String, Value>>("chat_template_kwargs")?.unwrap_or_default();
        let mut ignored = sampling.ignored.clone();
        ignored.extend(fields.finish(&UNSUPPORTED)?);

        let tools = tools.filter(|_| calls != Calls::Never);
        let asked = Asked {
            prompts: vec![served.encode_prompt(
                &served.render(&chat_of(messages, tools, variables)?)?,
                false,
                "messages",
            )?],
            sampling,
            max_tokens: max.map(|max| max.try_into().unwrap_or(usize::MAX)),
            log_probs,
            prompt_log_probs: None,
            constraint: constraint.map(|(schema, param)| constrained(served, schema, param)).transpose()?,
        };
        let wanted = Wanted { log_probs: log_probs.is_some(), calls, served: Arc::clone(served) };
        Ok(Read { asked, form: wanted, ignored })
    }

    fn head(model: &str, stream: bool) -> Head {
        Head::new("chatcmpl", if stream { "chat.completion.chunk" } else { "chat.completion" }, model)
    }

    fn whole(&self, head: Head, mut usage: Usage, choices: Vec<Choice>) -> Value {
        let mut trace = None;
        let mut told = Vec::with_capacity(choices.len());
        for (n, choice) in choices.into_iter().enumerate() {
            let Choice { text, said, end, .. } = choice;
            usage.add(&end, n == 0);
            let (content, calls) = match self.calls {
                Calls::Never => (text, Vec::new()),
                Calls::Free | Calls::Forced => {
                    let mut watch = Watch::default();
                    let shown = watch.push(&text);
                    let (rest, calls) = watch.finish();
                    (shown + &rest, calls)
                }
            };
            let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
            if !calls.is_empty() {
                message["tool_calls"] = calls.iter().enumerate().map(|(n, call)| call.json(n, false)).collect();
                if content.is_empty() {
                    message["content"] = Value::Null;
                }
            }
            told.push(json!({
                "index": n,
                "message": message,
                "logprobs": self.log_probs(&said),
                "finish_reason": ending(&calls, &end),
            }));
            trace = end.trace;
        }
        with_trace(head.answer(told, usage.json()), &self.served, trace.as_ref())
    }

    fn teller(self, choices: usize) -> Streamed {
        Streamed { wanted: self, watches: vec![Watch::default(); choices] }
    }
}

/// What `tool_choice` says of the tools; where it demands a call, the schema of that.
fn calls(fields: &mut Fields, tools: &[Value]) -> Result<(Calls, Option<Value>), ApiError> {
    let wrong = |reason: &str| Err(ApiError::param("tool_choice", format!("`tool_choice` {reason}")));
    if let Some(n) = tools.iter().position(|tool| tool.pointer("/function/name").and_then(Value::as_str).is_none()) {
        let param = format!("tools[{n}]");
        return Err(ApiError::param(param.clone(), format!("`{param}` is no function with a name")));
    }
    let choice: Value = fields.take("tool_choice")?.unwrap_or(Value::Null);
    let name = choice.pointer("/function/name").and_then(Value::as_str);
    let forced = match (&choice, name) {
        (Value::Null, _) if tools.is_empty() => return Ok((Calls::Never, None)),
        (Value::Null, _) => return Ok((Calls::Free, None)),
        (Value::String(text), _) => match text.as_str() {
            "none" => return Ok((Calls::Never, None)),
            "auto" if tools.is_empty() => return Ok((Calls::Never, None)),
            "auto" => return Ok((Calls::Free, None)),
            "required" => tools::schema(tools, None),
            _ => return wrong("must be none, auto, required, or a function"),
        },
        (Value::Object(_), Some(name)) => tools::schema(tools, Some(name)),
        _ => return wrong("must be none, auto, required, or a function"),
    };
    match forced {
        Some(schema) => Ok((Calls::Forced, Some(schema))),
        None => wrong("demands a tool that is not among `tools`"),
    }
}

/// The schema that `response_format` asks for; none for free text.
fn format(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    let kind: String = format.need("type")?;
    match kind.as_str() {
        "text" => Ok(None),
        "json_object" => Ok(Some(json!({ "type": "object" }))),
        "json_schema" => {
            let mut inner = format.object("json_schema")?.ok_or_else(|| {
                ApiError::param("response_format.json_schema", "`response_format.json_schema` is missing")
            })?;
            let schema: Map<String, Value> = inner.need("schema")?;
            Ok(Some(schema.into()))
        }
        _ => {
            let message = format!("`response_format.type` is `{kind}`; expected text, json_object or json_schema");
            Err(ApiError::param("response_format.type", message))
        }
    }
}

fn constrained(served: &Served, schema: Value, param: &'static str) -> Result<Box<dyn Constraint>, ApiError> {
    let grammars = served.grammars()?;
    grammars
        .json(schema)
        .map_err(|reason| ApiError::param(param, format!("`{param}` has a schema that cannot be followed: {reason}")))
}

/// Why a choice ended.
fn ending(calls: &[Call], end: &End) -> &'static str {
    if calls.is_empty() { finish_reason(end.reason) } else { "tool_calls" }
}

impl Wanted {
    fn log_probs(&self, said: &[Said]) -> Value {
        if self.log_probs { chat_log_probs(&self.served, said) } else { Value::Null }
    }
}

/// The answer as it grows.
struct Streamed {
    wanted: Wanted,
    /// One per choice.
    watches: Vec<Watch>,
}

fn choice(n: usize, delta: Value, log_probs: Value, finish_reason: Option<&str>) -> Value {
    json!({ "index": n, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason })
}

impl Teller for Streamed {
    fn begin(&mut self, n: usize) -> Option<Value> {
        Some(choice(n, json!({ "role": "assistant", "content": "", "refusal": null }), Value::Null, None))
    }

    fn tell(&mut self, n: usize, update: &Update) -> Option<Value> {
        let Update::Text { piece: Piece { text, said }, .. } = update else { return None };
        let text = match self.wanted.calls {
            Calls::Never => text.clone(),
            Calls::Free | Calls::Forced => self.watches[n].push(text),
        };
        let told = !text.is_empty() || self.wanted.log_probs && !said.is_empty();
        told.then(|| choice(n, json!({ "content": text }), self.wanted.log_probs(said), None))
    }

    fn end(&mut self, n: usize, end: &End) -> Vec<Value> {
        let mut told = Vec::new();
        let mut calls = Vec::new();
        if self.wanted.calls != Calls::Never {
            let (rest, found) = std::mem::take(&mut self.watches[n]).finish();
            calls = found;
            if !rest.is_empty() {
                told.push(choice(n, json!({ "content": rest }), Value::Null, None));
            }
            if !calls.is_empty() {
                let calls: Vec<Value> = calls.iter().enumerate().map(|(n, call)| call.json(n, true)).collect();
                told.push(choice(n, json!({ "tool_calls": calls }), Value::Null, None));
            }
        }
        told.push(choice(n, json!({}), Value::Null, Some(ending(&calls, end))));
        told
    }
}
