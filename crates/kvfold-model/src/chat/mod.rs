//! Chat templates: from messages to the text that a model was trained to answer.
//!
//! A model's template is a Jinja program that came with it, in `chat_template.jinja` or in `tokenizer_config.json`. It is
//! rendered as transformers does: blocks trimmed, Python's methods on values, `raise_exception`, `strftime_now`, Python's
//! JSON, the special tokens by their roles. A template comes from strangers: it can read nothing but what it is given, and
//! its work is bounded.

use std::fmt;

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, context};
use serde_json::{Map, Value, json};

use crate::checkpoint::Checkpoint;
use crate::error::{ModelError, Result};

mod json;

/// The file that holds a template alone.
const TEMPLATE: &str = "chat_template.jinja";

/// The file that holds the special tokens and, in older models, the template.
const CONFIG: &str = "tokenizer_config.json";

/// The older place of the special tokens.
const TOKENS: &str = "special_tokens_map.json";

/// The template of a model that has several, and the one that it prefers when there are tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Instructions of a template at most, hundreds of times what a long chat needs.
const FUEL: u64 = 10_000_000;

/// A conversation to be put into words.
#[derive(Clone, Debug)]
pub struct Chat {
    /// Messages in the form of OpenAI's API: `role`, `content`, and what else the template knows, such as `tool_calls`.
    pub messages: Vec<Value>,
    /// JSON schemas of the tools that the model may call; `None` or empty for none.
    pub tools: Option<Vec<Value>>,
    /// Whether the text ends where the model's answer begins.
    pub add_generation_prompt: bool,
    /// More variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Value>,
    /// What `strftime_now` takes for now, in local time.
    pub now: DateTime,
}

impl Chat {
    /// A conversation that the model is to go on with, now.
    pub fn new(messages: Vec<Value>) -> Self {
        let now = jiff::ZonedDateTime::now().datetime();
        Self { messages, tools: None, add_generation_prompt: true, variables: Map::new(), now }
    }

    /// A message of plain text.
    pub fn message(role: &str, content: &str) -> Value {
        json!({ "role": role, "content": content })
    }
}

/// A model's chat template, parsed.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// What errors call the template.
    file: String,
    /// Special tokens by their roles, such as `bos_token`.
    tokens: Map<String, Value>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChatTemplate({})", self.file)
    }
}

impl ChatTemplate {
    /// The template of a model. A model without one is an error, as is one that is no valid template.
    pub fn of(checkpoint: &Checkpoint) -> Result<ChatTemplate> {
        let label = |name: &str| format!("{}: {name}", checkpoint.source);
        let read = |name: &str| -> Result<Map<String, Value>> {
            let Some(bytes) = checkpoint.companions.get(name) else { return Ok(Map::new()) };
            serde_json::from_slice(bytes)
                .map_err(|error| ModelError::Json { file: label(name), reason: error.to_string() })
        };
        let (config, mut tokens) = (read(CONFIG)?, special_tokens(&read(TOKENS)?));
        tokens.extend(special_tokens(&config));
        let (file, sources) = match checkpoint.companions.get(TEMPLATE) {
            Some(bytes) => (TEMPLATE, vec![(DEFAULT.into(), String::from_utf8_lossy(bytes).into_owned())]),
            None => (CONFIG, templates(config.get("chat_template"))),
        };
        if sources.is_empty() {
            return Err(ModelError::NoTemplate { model: checkpoint.source.clone() });
        }
        Self::parse(sources, tokens, label(file))
    }

    /// Parses templates given by name. `file` is what errors call them.
    fn parse(sources: Vec<(String, String)>, tokens: Map<String, Value>, file: String) -> Result<ChatTemplate> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| template_error(&file, &error))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_filter("tojson", json::tojson);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message).with_source(Refused))
            },
        );
        for (name, source) in sources {
            let added = environment.add_template_owned(name, plain_blocks(&source));
            added.map_err(|error| template_error(&file, &error))?;
        }
        Ok(ChatTemplate { environment, file, tokens })
    }

    /// The text of a chat. It holds every special token that is needed: encode it without adding others.
    pub fn render(&self, chat: &Chat) -> Result<String> {
        let Chat { messages, tools, add_generation_prompt, variables, now } = chat;
        let tools = tools.as_ref().filter(|tools| !tools.is_empty());
        let name = match tools {
            Some(_) if self.environment.get_template(TOOL_USE).is_ok() => TOOL_USE,
            _ => DEFAULT,
        };
        let failed = |error| template_error(&self.file, &error);
        let template = self.environment.get_template(name).map_err(failed)?;
        let mut data = self.tokens.clone();
        data.insert("messages".into(), messages.as_slice().into());
        data.insert("tools".into(), json!(tools));
        data.insert("documents".into(), Value::Null);
        data.insert("add_generation_prompt".into(), (*add_generation_prompt).into());
        data.extend(variables.clone());
        let now = *now;
        let strftime_now = minijinja::Value::from_function(move |format: String| strftime(&format, now));
        let context = context! { strftime_now, ..minijinja::Value::from(Serde(&data)) };
        template.render(context).map_err(failed)
    }
}

/// What `raise_exception` leaves in its error, to be told from a mistake of the template.
#[derive(Debug, thiserror::Error)]
#[error("raise_exception")]
struct Refused;

fn strftime(format: &str, now: DateTime) -> std::result::Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, now)
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

fn template_error(file: &str, error: &minijinja::Error) -> ModelError {
    let reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    if std::error::Error::source(error).is_some_and(|source| source.is::<Refused>()) {
        return ModelError::ChatRefused { file: file.into(), reason };
    }
    let reason = match error.detail() {
        Some(_) => format!("{}: {reason}", error.kind()),
        None => reason,
    };
    ModelError::Template { file: file.into(), line: error.line().unwrap_or(0), reason }
}

/// The templates of a field: a text, or a list of them by name.
fn templates(field: Option<&Value>) -> Vec<(String, String)> {
    match field {
        Some(Value::String(source)) => vec![(DEFAULT.into(), source.clone())],
        Some(Value::Array(list)) => {
            let text = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
            list.iter().filter_map(|entry| Some((text(entry, "name")?, text(entry, "template")?))).collect()
        }
        _ => Vec::new(),
    }
}

/// Special tokens by their roles: fields such as `bos_token`, texts or objects with a `content`.
fn special_tokens(config: &Map<String, Value>) -> Map<String, Value> {
    let text = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(Value::from);
    let roles = config.iter().filter(|(role, _)| role.ends_with("_token"));
    roles.filter_map(|(role, value)| Some((role.clone(), text(value)?))).collect()
}

/// `{% generation %}` marks what is trained on and renders as what it holds: here, a condition that is true.
fn plain_blocks(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let end = rest[start..].find("%}").map_or(rest.len(), |end| start + end);
        let (before, tag) = (&rest[..start], &rest[start..end]);
        plain.push_str(before);
        match tag.trim_start_matches("{%").trim_matches(['-', '+', ' ', '\t', '\n', '\r']) {
            "generation" => plain.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => plain.push_str(&tag.replace("endgeneration", "endif")),
            _ => plain.push_str(tag),
        }
        rest = &rest[end..];
    }
    plain + rest
}
