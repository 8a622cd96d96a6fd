//! A request's body, field by field.

use crate::error::ApiError;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::borrow::Cow;

/// The fields that nobody has looked at yet.
#[derive(Clone, Debug)]
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Where they are, such as `stream_options.`; empty at the top.
    inside: String,
}

impl Fields {
    /// The fields of a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value = serde_json::from_slice(body)
            .map_err(|error| ApiError::invalid(format!("the body is not valid JSON: {error}")))?;
        match value {
            Value::Object(map) => Ok(Self { map, inside: String::new() }),
            _ => Err(ApiError::invalid("the body is not a JSON object; send one with the request's fields")),
        }
    }

    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.inside)
    }

    /// A field of a type; none where it is absent or null.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let value = match self.map.remove(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        serde_path_to_error::deserialize(value).map(Some).map_err(|error| {
            let inside = error.path().to_string();
            let param = match inside.as_str() {
                "." | "?" => self.path(name),
                inside if inside.starts_with('[') => format!("{}{inside}", self.path(name)),
                inside => format!("{}.{inside}", self.path(name)),
            };
            ApiError::param(param.clone(), format!("`{param}`: {}", error.into_inner()))
        })
    }

    /// A field that must be there.
    pub(crate) fn need<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<T, ApiError> {
        let missing = || ApiError::param(self.path(name), format!("`{}` is missing", self.path(name)));
        let missing = missing();
        self.take(name)?.ok_or(missing)
    }

    /// The fields of an object; none where it is absent or null.
    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        let inside = format!("{}.", self.path(name));
        Ok(self.take(name)?.map(|map| Self { map, inside }))
    }

    /// A number within bounds.
    pub(crate) fn number(&mut self, name: &'static str, (low, high): (u64, u64)) -> Result<Option<u64>, ApiError> {
        let number: Option<u64> = self.take(name)?;
        match number {
            Some(n) if !(low..=high).contains(&n) => {
                let param = self.path(name);
                Err(ApiError::param(param.clone(), format!("`{param}` is {n}; expected {low} to {high}")))
            }
            number => Ok(number),
        }
    }

    /// Refuses fields that would change the answer and that nobody here honours. What is left is not known; their names.
    pub(crate) fn finish(self, unsupported: &[&'static str]) -> Result<Vec<String>, ApiError> {
        for &name in unsupported {
            if self.map.get(name).is_some_and(|value| !harmless(value)) {
                let message = format!("`{name}` is not supported by this server; leave it out");
                return Err(ApiError::param(Cow::Borrowed(name), message).code("unsupported_parameter"));
            }
        }
        let left = self.map.keys().filter(|name| !unsupported.contains(&name.as_str()));
        Ok(left.map(|name| self.path(name)).collect())
    }
}

/// Whether a value asks for nothing.
fn harmless(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_wrong_field_is_named_with_its_place() {
        let error = fields(r#"{"prompt": [[1, 2], [3, -4]]}"#).take::<Vec<Vec<u32>>>("prompt").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("prompt[1][1]"));
        assert!(error.message.starts_with("`prompt[1][1]`: invalid value: integer `-4`"), "{}", error.message);
        let mut inner = fields(r#"{"kvfold": {"live": 3}}"#).object("kvfold").unwrap().unwrap();
        assert_eq!(inner.take::<bool>("live").unwrap_err().param.as_deref(), Some("kvfold.live"));
        assert_eq!(fields("{}").need::<bool>("prompt").unwrap_err().message, "`prompt` is missing");
        let error = fields(r#"{"n": 99}"#).number("n", (1, 16)).unwrap_err();
        assert_eq!(error.message, "`n` is 99; expected 1 to 16");
    }

    #[test]
    fn null_is_absent_and_the_rest_is_named() {
        let mut fields = fields(r#"{"stop": null, "made_up": 1, "suffix": null, "audio": false, "user": "u"}"#);
        assert_eq!(fields.take::<String>("stop").unwrap(), None);
        assert_eq!(fields.take::<String>("user").unwrap().as_deref(), Some("u"));
        assert_eq!(fields.finish(&["suffix", "audio"]).unwrap(), ["made_up"]);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        let error = fields(r#"{"suffix": "x"}"#).finish(&["suffix"]).unwrap_err();
        assert_eq!((error.param.as_deref(), error.code), (Some("suffix"), Some("unsupported_parameter")));
    }

    #[test]
    fn bodies_that_are_no_objects_are_refused() {
        for body in ["", "[]", "1", "nul", "{", "{\"a\": NaN}", "\u{feff}{}"] {
            let error = Fields::parse(body.as_bytes()).unwrap_err();
            assert!(error.message.contains("JSON"), "{body}: {}", error.message);
        }
        let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(Fields::parse(format!("{{\"a\": {deep}}}").as_bytes()).unwrap_err().message.contains("recursion"));
        assert!(Fields::parse(b"{\"a\": \"\xff\"}").is_err());
    }
}
