//! Tool calls in a model's text: found in the forms that models write, or forced into one.

use serde_json::{Map, Value, json};

/// A call that a model made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

impl Call {
    /// The call in OpenAI's form; `n` is its place in the answer.
    pub(crate) fn json(&self, n: usize, with_index: bool) -> Value {
        let id = format!("call_{}", uuid::Uuid::new_v4().simple());
        let function = json!({ "name": self.name, "arguments": self.arguments });
        let mut call = json!({ "id": id, "type": "function", "function": function });
        if with_index {
            call["index"] = n.into();
        }
        call
    }

    /// The call that an object makes: a name, and arguments or, as Llama writes them, parameters.
    fn of(value: &Value) -> Option<Self> {
        let name = value.get("name")?.as_str()?.to_owned();
        let arguments = value.get("arguments").or_else(|| value.get("parameters"))?;
        let arguments = arguments.as_str().map_or_else(|| arguments.to_string(), str::to_owned);
        Some(Self { name, arguments })
    }
}

/// Where models of different families begin to call: Qwen's and Hermes', Mistral's.
const MARKS: [&str; 2] = ["<tool_call>", "[TOOL_CALLS]"];

/// A text in which calls are looked for while it grows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch {
    text: String,
    shown: usize,
    /// Whether nothing is shown any more: a call has begun.
    closed: bool,
}

impl Watch {
    /// More of the text. What of it is no call.
    pub(crate) fn push(&mut self, more: &str) -> String {
        self.text.push_str(more);
        let start = self.text.trim_start();
        // Llama's calls are the whole answer.
        if self.closed || start.is_empty() || start.starts_with('{') {
            return String::new();
        }
        let rest = &self.text[self.shown..];
        let mark = MARKS.iter().filter_map(|mark| rest.find(mark)).min();
        self.closed = mark.is_some();
        let begun = |mark: &&str| (1..mark.len()).rev().find(|&n| rest.ends_with(&mark[..n])).unwrap_or(0);
        let end = mark.unwrap_or_else(|| rest.len() - MARKS.iter().map(begun).max().unwrap_or(0));
        let shown = rest[..end].to_owned();
        self.shown += end;
        shown
    }

    /// The text is over: what was not shown and is no call, and the calls.
    pub(crate) fn finish(self) -> (String, Vec<Call>) {
        let rest = &self.text[self.shown..];
        let calls = calls(rest);
        if calls.is_empty() { (rest.to_owned(), calls) } else { (String::new(), calls) }
    }
}

/// The calls of a text that is nothing else.
fn calls(text: &str) -> Vec<Call> {
    let parse = |text: &str| serde_json::from_str::<Value>(text.trim()).ok();
    let list = |value: Value| match value {
        Value::Array(list) => list,
        value => vec![value],
    };
    let values: Vec<Value> = if let Some(rest) = text.trim().strip_prefix(MARKS[1]) {
        parse(rest).map(list).unwrap_or_default()
    } else if text.contains(MARKS[0]) {
        let inner = text.split(MARKS[0]).skip(1).map(|part| part.split("</tool_call>").next().unwrap_or(part));
        inner.filter_map(parse).collect()
    } else {
        parse(text).map(list).unwrap_or_default()
    };
    let calls: Option<Vec<Call>> = values.iter().map(Call::of).collect();
    calls.unwrap_or_default()
}

/// The schema of a text that calls one of some tools, or the one with a name. None if there is no such tool.
pub(crate) fn schema(tools: &[Value], name: Option<&str>) -> Option<Value> {
    let one = |tool: &Value| {
        let function = tool.get("function")?;
        let own = function.get("name")?.as_str()?;
        let parameters = function.get("parameters").filter(|value| value.is_object()).cloned();
        let parameters = parameters.unwrap_or_else(|| Map::new().into());
        name.is_none_or(|name| name == own).then(|| {
            json!({
                "type": "object",
                "properties": { "name": { "const": own }, "arguments": parameters },
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        })
    };
    let mut calls: Vec<Value> = tools.iter().filter_map(one).collect();
    match calls.len() {
        0 => None,
        1 => calls.pop(),
        _ => Some(json!({ "anyOf": calls })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown and called when a text comes in pieces of n characters.
    fn watched(text: &str, n: usize) -> (String, Vec<Call>) {
        let mut watch = Watch::default();
        let chars: Vec<char> = text.chars().collect();
        let mut shown: String = chars.chunks(n).map(|piece| watch.push(&piece.iter().collect::<String>())).collect();
        let (rest, calls) = watch.finish();
        shown.push_str(&rest);
        (shown, calls)
    }

    #[test]
    fn calls_are_found_in_the_forms_that_models_write() {
        let call = |name: &str, arguments: &str| Call { name: name.into(), arguments: arguments.into() };
        let hermes = "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
        let cases = [
            (hermes, "Let me see.\n", vec![call("f", "{\"x\":1}"), call("g", "{}")]),
            ("[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}}]", "", vec![call("f", "{}")]),
            ("{\"name\": \"f\", \"parameters\": {\"x\": [2]}}", "", vec![call("f", "{\"x\":[2]}")]),
            ("{\"answer\": 4}", "{\"answer\": 4}", vec![]),
            ("a < b, [TOOL and <tool", "a < b, [TOOL and <tool", vec![]),
            ("<tool_call>nonsense", "<tool_call>nonsense", vec![]),
            ("", "", vec![]),
        ];
        for (text, shown, calls) in cases {
            for n in [1, 3, 1000] {
                assert_eq!(watched(text, n), (shown.to_owned(), calls.clone()), "{text} by {n}");
            }
        }
    }

    #[test]
    fn a_schema_names_the_tools_that_may_be_called() {
        let tool = |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } });
        let tools = [tool("f"), tool("g")];
        assert_eq!(schema(&tools, None).unwrap()["anyOf"].as_array().map(Vec::len), Some(2));
        assert_eq!(schema(&tools, Some("g")).unwrap()["properties"]["name"]["const"], "g");
        assert_eq!(schema(&tools, Some("h")), None);
        assert_eq!(schema(&[json!(3)], None), None);
    }
}
