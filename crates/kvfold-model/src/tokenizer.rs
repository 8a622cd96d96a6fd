//! Text to token ids and back.
//!
//! The work is done by Hugging Face's `tokenizers`; around it are the three things that a server gets wrong otherwise.
//! Truncation and padding, which many a `tokenizer.json` carries over from its training script, are switched off: a prompt
//! that loses its end without a word is a wrong answer. A tokenizer whose ids exceed the embedding is refused. And
//! [`DecodeStream`] cuts a sampled sequence into text at places where no character is torn.

use std::fmt;
use std::sync::Arc;

use tokenizers::DecoderWrapper;

use crate::error::{ModelError, Result};

/// A model's tokenizer. Clones are cheap and share everything.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    json: Arc<[u8]>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. `file` is what errors call it.
    pub fn from_json(json: &[u8], file: &str) -> Result<Tokenizer> {
        let invalid = |error: tokenizers::Error| ModelError::Tokenizer { file: file.into(), reason: error.to_string() };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(invalid)?;
        inner.with_truncation(None).map_err(invalid)?;
        inner.with_padding(None);
        Ok(Tokenizer { inner: Arc::new(inner), json: json.into() })
    }

    /// The file this tokenizer was read from, byte for byte.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// The ids of `text`. With `add_special`, the tokens that the tokenizer puts around a text (such as a first `<s>`) are
    /// added. Special tokens that are spelled out in the text become their ids either way.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|error| ModelError::Text { action: "encode the text", reason: error.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, with or without the special tokens among them.
    ///
    /// An id without a token (rows by which an embedding was padded) adds nothing; bytes that are no UTF-8 become `�`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|error| ModelError::Text { action: "decode the ids", reason: error.to_string() })
    }

    /// A decoder for ids that arrive one by one.
    pub fn stream(&self, skip_special: bool) -> DecodeStream {
        DecodeStream { tokenizer: self.clone(), skip_special, ids: Vec::new(), read: 0 }
    }

    /// A decoder for ids that follow a prompt, without the special ones: it joins them to the prompt as [`decode`](Self::decode)
    /// would, and does not say the prompt again.
    pub fn stream_after(&self, prompt: &[u32]) -> Result<DecodeStream> {
        let mut stream = self.stream(true);
        for &id in &prompt[prompt.len().saturating_sub(DecodeStream::CONTEXT)..] {
            stream.push(id)?;
        }
        Ok(stream)
    }

    /// The id of a token by its spelling.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The bytes of every token of a vocabulary of `vocab_size`, by id. A token that is no text, such as one that ends a
    /// text, has its spelling, and an id without a token has none.
    pub fn token_bytes(&self, vocab_size: usize) -> Vec<Vec<u8>> {
        let spelling = Spelling::of(self.inner.get_decoder());
        let added = self.inner.get_added_tokens_decoder();
        let bytes = |id: u32| match added.get(&id) {
            Some(token) => token.content.clone().into_bytes(),
            None => self.inner.id_to_token(id).map_or_else(Vec::new, |token| spelling.bytes(&token)),
        };
        (0..vocab_size as u32).map(bytes).collect()
    }

    /// Checks that every token has a row in an embedding of `vocab_size` rows. `file` is what an error calls the tokenizer.
    pub fn check_vocabulary(&self, vocab_size: usize, file: &str) -> Result<()> {
        match self.inner.get_vocab(true).into_iter().max_by_key(|&(_, id)| id) {
            Some((token, id)) if id as usize >= vocab_size => {
                Err(ModelError::Vocabulary { file: file.into(), token, id, vocab_size })
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.inner.get_vocab_size(true))
    }
}

/// How a vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// A character for every byte, as GPT-2 does.
    ByteLevel,
    /// As text with `▁` for a space, and `<0xAB>` for bytes that are no text, as SentencePiece does.
    Pieces,
}

impl Spelling {
    /// That of the vocabulary which a decoder reads.
    fn of(decoder: Option<&DecoderWrapper>) -> Self {
        let is_byte_level = |decoder: &DecoderWrapper| matches!(decoder, DecoderWrapper::ByteLevel(_));
        let found = match decoder {
            Some(DecoderWrapper::Sequence(all)) => all.get_decoders().iter().any(is_byte_level),
            decoder => decoder.is_some_and(is_byte_level),
        };
        if found { Spelling::ByteLevel } else { Spelling::Pieces }
    }

    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Spelling::ByteLevel => token.chars().flat_map(byte_of).collect(),
            Spelling::Pieces => {
                let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => token.replace('▁', " ").into_bytes(),
                }
            }
        }
    }
}

/// The byte that a character of GPT-2's alphabet stands for: visible Latin-1 characters for themselves, those from U+0100 on
/// for the others in order. Any other character is text.
fn byte_of(c: char) -> Vec<u8> {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF if visible(code as u8) => vec![code as u8],
        code @ 0x100..=0x1FF => {
            let other = (0..=u8::MAX).filter(|&byte| !visible(byte)).nth((code - 0x100) as usize);
            other.map_or_else(|| c.to_string().into_bytes(), |byte| vec![byte])
        }
        _ => c.to_string().into_bytes(),
    }
}

/// Turns ids into text as they are sampled.
///
/// A token is not a piece of text by itself: a character may be spread over several, and whether a token starts with a
/// space can depend on there being one before it. So the ids since the last but one cut are kept, decoded with and without
/// the new ones, and the difference is what the new ones say; it is held back while it ends in the middle of a character.
///
/// The pieces, [`finish`](Self::finish) included, make up the text that [`Tokenizer::decode`] gives for all ids at once, as
/// long as there is no `�` in it. Bytes that are no UTF-8 become `�` in both, but not always the same number of them.
#[derive(Clone, Debug)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The ids since the last but one cut.
    ids: Vec<u32>,
    /// How many of them are behind the last cut: they have been returned and are kept as context.
    read: usize,
}

impl DecodeStream {
    /// Ids held back at most. A character has at most four bytes, so more of them are noise and not an unfinished character;
    /// without a limit each further id would decode all of the noise again.
    const HELD: usize = 8;

    /// Ids of a prompt that are read before those that follow it. It keeps those since the last but one cut, and a cut is at
    /// most `HELD` ids after the one before.
    const CONTEXT: usize = 2 * Self::HELD;

    /// Adds one id and returns the text that is complete with it, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.unread()?;
        let torn = text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER);
        if torn && self.ids.len() - self.read < Self::HELD {
            return Ok(None);
        }
        self.ids.drain(..self.read);
        self.read = self.ids.len();
        Ok((!text.is_empty()).then_some(text))
    }

    /// Returns what was held back at the end of the sequence, an unfinished character as `�`, and starts anew.
    pub fn finish(&mut self) -> Result<Option<String>> {
        let text = self.unread()?;
        self.ids.clear();
        self.read = 0;
        Ok((!text.is_empty()).then_some(text))
    }

    /// The text of the ids after the last cut.
    fn unread(&self) -> Result<String> {
        let all = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let read = self.tokenizer.decode(&self.ids[..self.read], self.skip_special)?;
        match all.strip_prefix(&read) {
            Some(text) => Ok(text.into()),
            // Invalid bytes can reach back and change how those before them are read, which have been returned already.
            None => self.tokenizer.decode(&self.ids[self.read..], self.skip_special),
        }
    }
}
