//! From tokens to the text that a client sees: whole characters, and nothing of a stop string.

use kvfold_engine::LogProbs;
use kvfold_model::{DecodeStream, ModelError};

/// A new token, and where in the new text its own begins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Said {
    pub(crate) token: u32,
    pub(crate) log_probs: Option<LogProbs>,
    /// Bytes of new text before it.
    pub(crate) offset: usize,
}

/// What can be shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// Tokens since the last piece.
    pub(crate) said: Vec<Said>,
}

/// The new text of a request as it grows.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    stream: DecodeStream,
    stops: Vec<String>,
    /// The end of the text, which may be the beginning of a stop string.
    held: String,
    /// Bytes that were shown.
    shown: usize,
    /// Tokens of the text that is held.
    said: Vec<Said>,
}

impl Text {
    /// New text that `stream` decodes, ending before the first of the stop strings.
    pub(crate) fn new(stream: DecodeStream, stops: Vec<String>) -> Self {
        Self { stream, stops, held: String::new(), shown: 0, said: Vec::new() }
    }

    /// Takes a token. What can be shown now, and whether a stop string ended the text.
    pub(crate) fn push(&mut self, token: u32, log_probs: Option<LogProbs>) -> Result<(Piece, bool), ModelError> {
        self.said.push(Said { token, log_probs, offset: self.shown + self.held.len() });
        if let Some(text) = self.stream.push(token)? {
            self.held.push_str(&text);
        }
        Ok(self.show())
    }

    /// Takes a token that ends the text and is no part of it.
    pub(crate) fn end(&mut self, token: u32, log_probs: Option<LogProbs>) {
        self.said.push(Said { token, log_probs, offset: self.shown + self.held.len() });
    }

    /// The text is over: what was held back.
    pub(crate) fn finish(&mut self) -> Result<Piece, ModelError> {
        if let Some(text) = self.stream.finish()? {
            self.held.push_str(&text);
        }
        let (mut piece, stopped) = self.show();
        if !stopped {
            piece.text.push_str(&std::mem::take(&mut self.held));
            piece.said.append(&mut self.said);
        }
        Ok(piece)
    }

    fn show(&mut self) -> (Piece, bool) {
        let stop = self.stops.iter().filter_map(|stop| self.held.find(stop)).min();
        let end = stop.unwrap_or_else(|| self.held.len() - self.begun());
        let cut = self.shown + end;
        let text: String = self.held.drain(..end).collect();
        self.shown = cut;
        // A token goes with the first of its text. Of a text that is cut, tokens that would begin at the cut are no part.
        let whole = self.held.is_empty() && stop.is_none();
        let split = self.said.iter().position(|said| said.offset >= cut && !whole).unwrap_or(self.said.len());
        let said = self.said.drain(..split).collect();
        if stop.is_some() {
            self.held.clear();
            self.said.clear();
        }
        (Piece { text, said }, stop.is_some())
    }

    /// Bytes at the end of what is held that a stop string could begin with.
    fn begun(&self) -> usize {
        let begins = |stop: &String| {
            let longest = stop.len().saturating_sub(1).min(self.held.len());
            (1..=longest).rev().find(|&n| {
                self.held.is_char_boundary(self.held.len() - n)
                    && stop.as_bytes().starts_with(&self.held.as_bytes()[self.held.len() - n..])
            })
        };
        self.stops.iter().filter_map(begins).max().unwrap_or(0)
    }
}
