//! JSONL: one JSON object per line.

use super::{Document, unreadable};
use crate::error::RetrofitError;
use serde_json::{Map, Value};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Field pairs that make one document: what was asked, and what was answered.
const PAIRS: [(&str, &str); 2] = [("prompt", "response"), ("prompt", "completion")];

/// Adds the documents of a file: each line's `field`, or its prompt and response, joined by a line break.
pub(super) fn read(
    content: impl Read,
    path: &Path,
    field: &str,
    documents: &mut Vec<Document>,
) -> Result<(), RetrofitError> {
    let mut content = BufReader::with_capacity(1 << 20, content);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if content.read_until(b'\n', &mut line).map_err(|source| unreadable(path, source))? == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let source = format!("{}:{number}", path.display());
        let text = match serde_json::from_slice::<Map<String, Value>>(&line) {
            Ok(object) => text(&object, field),
            Err(error) => Err(format!("not a JSON object: {error}")),
        };
        match text {
            Ok(text) if text.trim().is_empty() => {}
            Ok(text) => documents.push(Document { source, text }),
            Err(reason) => return Err(RetrofitError::Text { place: source, reason }),
        }
    }
    Ok(())
}

/// The text of an object.
fn text(object: &Map<String, Value>, field: &str) -> Result<String, String> {
    let string = |name: &str| object.get(name).and_then(Value::as_str);
    if let Some(text) = string(field) {
        return Ok(text.to_owned());
    }
    for (asked, answered) in PAIRS {
        if let (Some(prompt), Some(response)) = (string(asked), string(answered)) {
            return Ok(format!("{prompt}\n{response}"));
        }
    }
    let names: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
    Err(format!(
        "no text in field `{field}`, and no pair of `prompt` and `response`; the fields are {}: name the right one with \
         --text-field",
        names.join(", ")
    ))
}
