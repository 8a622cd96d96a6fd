//! Texts held to a JSON schema, by llguidance: of the tokens that the model likes, those that the schema allows.

use kvfold_engine::Constraint;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::fmt;
use std::sync::Arc;

/// What a vocabulary can spell.
pub(crate) struct Grammars {
    factory: ParserFactory,
    ends: Arc<[u32]>,
    end: u32,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammars")
    }
}

impl Grammars {
    /// Of tokens with these bytes; `end` is one that ends a text, `ends` are all of them.
    pub(crate) fn new(bytes: &[Vec<u8>], end: u32, ends: &[u32]) -> Result<Self, String> {
        let info = TokRxInfo::new(bytes.len() as u32, end);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, bytes)));
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
        factory.quiet();
        Ok(Self { factory, ends: ends.into(), end })
    }

    /// Texts that are JSON of a schema. The error says what is wrong with the schema.
    pub(crate) fn json(&self, mut schema: Value) -> Result<Box<dyn Constraint>, String> {
        // Free white space lets a small model write nothing else.
        if let Some(schema) = schema.as_object_mut() {
            let style = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
            schema.entry("x-guidance").or_insert(style);
        }
        let parser = self.factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => Err(error),
            None => Ok(Box::new(Schema { matcher, ends: Arc::clone(&self.ends), end: self.end })),
        }
    }
}

/// A text on its way to be JSON of a schema.
struct Schema {
    matcher: Matcher,
    ends: Arc<[u32]>,
    end: u32,
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Schema")
    }
}

impl Constraint for Schema {
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|error| error.to_string())?;
        let ends = allowed.is_allowed(self.end);
        for (token, logit) in logits.iter_mut().enumerate() {
            let token = token as u32;
            if !(allowed.is_allowed(token) || ends && self.ends.contains(&token)) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn take(&mut self, token: u32) -> Result<bool, String> {
        self.matcher.consume_token(token).map_err(|error| error.to_string())?;
        Ok(self.matcher.is_stopped())
    }

    fn copy(&self) -> Box<dyn Constraint> {
        Box::new(Self { matcher: self.matcher.deep_clone(), ends: Arc::clone(&self.ends), end: self.end })
    }
}
