//! The model that is served, as far as requests need to know it.

use crate::error::ApiError;
use crate::grammar::Grammars;
use axum::http::StatusCode;
use kvfold_kernels::dmc::Dmc;
use kvfold_model::chat::{Chat, ChatTemplate};
use kvfold_model::{Checkpoint, DecodeStream, ModelError, Tokenizer};
use serde_json::{Map, Value};
use std::sync::OnceLock;

/// A model to be served.
#[derive(Debug)]
pub struct Served {
    /// What clients call it.
    pub(crate) name: String,
    pub(crate) tokenizer: Tokenizer,
    /// The chat template, or why there is none.
    template: Result<ChatTemplate, String>,
    /// Tokens of a sequence at most.
    pub(crate) context: usize,
    pub(crate) vocab: usize,
    /// Tokens that end a text.
    pub(crate) stop: Vec<u32>,
    /// The token that a text begins with.
    start: Option<u32>,
    /// Bytes of each token.
    bytes: Vec<Vec<u8>>,
    /// Bytes of a text that fits the context, whatever its tokens are, at most.
    longest_prompt: usize,
    /// How the model was taught to compress.
    pub(crate) dmc: Option<Dmc>,
    /// The compression ratio that it was taught, 1 for none.
    pub(crate) ratio: f64,
    /// Seconds since 1970 when it was loaded.
    pub(crate) created: i64,
    grammars: OnceLock<Grammars>,
}

impl Served {
    /// A model that clients call `name`. A model without a chat template is served all the same; chats are then refused.
    pub fn new(checkpoint: &Checkpoint, name: String) -> Result<Self, ModelError> {
        /// Bytes that a normaliser makes one of at most: NFC joins a letter and its marks.
        const JOINED: usize = 4;
        let config = &checkpoint.config;
        let bytes = checkpoint.tokenizer.token_bytes(config.vocab_size);
        let longest = bytes.iter().map(Vec::len).max().unwrap_or(0);
        Ok(Self {
            name,
            template: ChatTemplate::of(checkpoint).map_err(|error| error.to_string()),
            context: config.max_position_embeddings,
            vocab: config.vocab_size,
            stop: checkpoint.stop_token_ids()?,
            start: config.bos_token_id,
            longest_prompt: config.max_position_embeddings.saturating_mul(longest).saturating_mul(JOINED),
            bytes,
            ratio: config.compression.as_ref().map_or(1.0, |compression| compression.ratio.max(1.0)),
            dmc: config.compression.as_ref().map(|compression| compression.dmc.clone()),
            created: jiff::Timestamp::now().as_second(),
            tokenizer: checkpoint.tokenizer.clone(),
            grammars: OnceLock::new(),
        })
    }

    /// Whether it has a chat template.
    pub(crate) fn can_chat(&self) -> bool {
        self.template.is_ok()
    }

    /// Whether a request that names a model means this one.
    pub(crate) fn check_name(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            Some(name) if name != self.name => {
                let message = format!("the model `{name}` is not here; this server has `{}`", self.name);
                let error = ApiError { param: Some("model".into()), ..ApiError::new(StatusCode::NOT_FOUND, message) };
                Err(error.code("model_not_found"))
            }
            _ => Ok(()),
        }
    }

    /// Tokens of a text, after those that a text begins with.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        let mut tokens =
            self.tokenizer.encode(text, add_special).map_err(|error| ApiError::invalid(error.to_string()))?;
        if add_special {
            tokens.extend(self.start.filter(|_| tokens.is_empty()));
        }
        Ok(tokens)
    }

    /// Tokens of a text that the model is to go on with. One that is too long for its context whatever its tokens are is
    /// refused unread: reading takes some hundred bytes of memory per byte of text.
    pub(crate) fn encode_prompt(
        &self,
        text: &str,
        add_special: bool,
        param: &'static str,
    ) -> Result<Vec<u32>, ApiError> {
        if text.len() > self.longest_prompt {
            let (bytes, context) = (text.len(), self.context);
            let message = format!(
                "a text of {bytes} bytes is longer than any that the model's context of {context} tokens can hold; shorten it"
            );
            return Err(ApiError::param(param, message).code("context_length_exceeded"));
        }
        self.encode(text, add_special)
    }

    /// The text of a chat that the model is to go on with.
    pub(crate) fn render(&self, chat: &Chat) -> Result<String, ApiError> {
        let template = self.template.as_ref().map_err(|reason| {
            let message = format!("this model cannot chat: {reason}; use /v1/completions");
            ApiError::param("messages", message).code("no_chat_template")
        })?;
        template.render(chat).map_err(|error| ApiError::param("messages", error.to_string()))
    }

    /// A decoder of what follows a prompt.
    pub(crate) fn stream_after(&self, prompt: &[u32]) -> Result<DecodeStream, ApiError> {
        self.tokenizer.stream_after(prompt).map_err(|error| ApiError::internal(error.to_string()))
    }

    /// Checks that a field's tokens are the model's.
    pub(crate) fn check_tokens(&self, tokens: &[u32], param: &'static str) -> Result<(), ApiError> {
        match tokens.iter().find(|token| **token as usize >= self.vocab) {
            Some(token) => {
                let message = format!("`{param}` has token {token}; the model's vocabulary ends at {}", self.vocab - 1);
                Err(ApiError::param(param, message))
            }
            None => Ok(()),
        }
    }

    /// Text of tokens.
    pub(crate) fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String, ApiError> {
        self.tokenizer.decode(tokens, skip_special).map_err(|error| ApiError::invalid(error.to_string()))
    }

    /// A token's bytes.
    pub(crate) fn token_bytes(&self, token: u32) -> &[u8] {
        self.bytes.get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// A token's text by itself; of one that is no text by itself its bytes, as OpenAI spells them.
    pub(crate) fn token_text(&self, token: u32) -> String {
        let bytes = self.token_bytes(token);
        std::str::from_utf8(bytes).map_or_else(
            |_| bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
            str::to_owned,
        )
    }

    /// What texts can be held to.
    pub(crate) fn grammars(&self) -> Result<&Grammars, ApiError> {
        if let Some(grammars) = self.grammars.get() {
            return Ok(grammars);
        }
        let end = self.stop.first().copied().ok_or_else(|| {
            ApiError::param(
                "response_format",
                "this model has no token that ends a text, so none can be held to a form",
            )
        })?;
        let grammars = Grammars::new(&self.bytes, end, &self.stop).map_err(ApiError::internal)?;
        Ok(self.grammars.get_or_init(|| grammars))
    }
}

/// A chat of messages in OpenAI's form: content parts become text, `developer` is `system`.
pub(crate) fn chat_of(
    messages: Vec<Map<String, Value>>,
    tools: Option<Vec<Value>>,
    variables: Map<String, Value>,
) -> Result<Chat, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "`messages` is empty; a chat has at least one message"));
    }
    let messages = messages.into_iter().enumerate().map(|(n, message)| plain(n, message));
    let messages = messages.collect::<Result<Vec<_>, _>>()?;
    Ok(Chat { tools, variables, ..Chat::new(messages) })
}

/// A message as templates expect it.
fn plain(n: usize, mut message: Map<String, Value>) -> Result<Value, ApiError> {
    let wrong = |field: &str, reason: &str| {
        let param = format!("messages[{n}].{field}");
        ApiError::param(param.clone(), format!("`{param}` {reason}"))
    };
    const ROLES: &str = "must be system, developer, user, assistant or tool";
    let role = message.get("role").and_then(Value::as_str).ok_or_else(|| wrong("role", ROLES))?.to_owned();
    match role.as_str() {
        "developer" => drop(message.insert("role".into(), "system".into())),
        "system" | "user" | "assistant" | "tool" => {}
        _ => return Err(wrong("role", ROLES)),
    }
    let content = match message.remove("content") {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => {
            let text = |part: Value| match part {
                Value::Object(part) if part.get("type").and_then(Value::as_str) == Some("text") => {
                    part.get("text").and_then(Value::as_str).map(str::to_owned)
                }
                _ => None,
            };
            let parts: Option<Vec<String>> = parts.into_iter().map(text).collect();
            Some(
                parts
                    .ok_or_else(|| wrong("content", "has a part that is no text; this model reads text alone"))?
                    .concat(),
            )
        }
        // An assistant that only called tools said nothing.
        None | Some(Value::Null) if role == "assistant" => None,
        _ => return Err(wrong("content", "must be a text or a list of text parts")),
    };
    message.insert("content".into(), content.map_or_else(|| "".into(), Value::String));
    parse_arguments(&mut message);
    Ok(Value::Object(message))
}

/// Arguments of tool calls are JSON in a text for OpenAI, and objects for templates.
fn parse_arguments(message: &mut Map<String, Value>) {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok())
        {
            *arguments = parsed;
        }
    }
}
