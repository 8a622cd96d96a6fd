//! From the vocabulary of a GGUF file to `tokenizer.json` and `tokenizer_config.json`.
//!
//! Two kinds are known. `gpt2` is a byte-level BPE with merges, whose words a regular expression cuts; which one, the key
//! `tokenizer.ggml.pre` says. `llama` is a BPE by scores on whole texts, after SentencePiece, with bytes for what has no
//! piece: the merge that makes the piece of the highest score goes first, so every way to cut a piece into two others
//! becomes a merge of that rank.

use std::collections::HashMap;

use kvfold_tensor::gguf::Value as Stored;
use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use crate::error::Result;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const TEMPLATE: &str = "tokenizer.chat_template";

/// What a piece is for, by GGUF's numbers.
const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// SentencePiece's sign for a space.
const SPACE: &str = "▁";

/// How a vocabulary is applied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    /// Merges on bytes within words.
    Bytes,
    /// Scores on whole texts.
    Pieces,
}

/// A file's tokens.
pub(super) struct Vocabulary<'a> {
    algorithm: Algorithm,
    tokens: &'a [String],
    types: Vec<i64>,
}

/// The id of the special token `name` (`bos`, `eos`), if the file names one.
pub(super) fn special_id(metadata: &Metadata, name: &str) -> Result<Option<u32>> {
    let key = match name {
        "unk" => "tokenizer.ggml.unknown_token_id".to_string(),
        "pad" => "tokenizer.ggml.padding_token_id".to_string(),
        name => format!("tokenizer.ggml.{name}_token_id"),
    };
    let Some(id) = metadata.integer(&key)? else {
        return Ok(None);
    };
    let count = metadata.texts(TOKENS)?.len();
    let fits = u32::try_from(id).ok().filter(|&id| (id as usize) < count);
    fits.map(Some).ok_or_else(|| metadata.wrong(&key, format!("the id of one of the {count} tokens")))
}

impl<'a> Vocabulary<'a> {
    /// Reads the tokens and their types.
    pub(super) fn read(metadata: &Metadata<'a>) -> Result<Self> {
        let algorithm = match metadata.text(MODEL)? {
            Some("gpt2") => Algorithm::Bytes,
            Some("llama") => Algorithm::Pieces,
            Some(_) => return Err(metadata.unsupported(MODEL, "\"gpt2\" and \"llama\" are")),
            None => return Err(metadata.wrong(MODEL, "\"gpt2\" or \"llama\"")),
        };
        let tokens = metadata.texts(TOKENS)?;
        let types = match metadata.get(TYPES) {
            None => vec![NORMAL; tokens.len()],
            Some(Stored::Integers(types)) if types.len() == tokens.len() => types.clone(),
            Some(_) => return Err(metadata.wrong(TYPES, format!("a list of {} integers", tokens.len()))),
        };
        Ok(Vocabulary { algorithm, tokens, types })
    }

    /// The ids of the tokens. Two of one name would be one.
    fn ids(&self, metadata: &Metadata) -> Result<HashMap<&'a str, usize>> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.as_str(), id) {
                let expected = format!("no token twice; {first} and {id} are both {token:?}");
                return Err(metadata.wrong(TOKENS, expected));
            }
        }
        Ok(ids)
    }

    /// `tokenizer.json`.
    pub(super) fn tokenizer_json(&self, metadata: &Metadata) -> Result<Value> {
        let ids = self.ids(metadata)?;
        let vocab: Map<String, Value> =
            self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let (model, normalizer, pre_tokenizer, decoder) = match self.algorithm {
            Algorithm::Bytes => {
                let mut model = bpe(vocab, merges(metadata)?, None, false);
                let cut = Cut::read(metadata)?;
                // Llama 3 takes a word that is a token as it is, whatever the merges would make of it.
                model["ignore_merges"] = json!(cut == Cut::Llama3);
                let normalizer = if cut == Cut::Qwen2 { json!({ "type": "NFC" }) } else { Value::Null };
                (model, normalizer, cut.words(), byte_letters(true))
            }
            Algorithm::Pieces => {
                let replace = |from, to| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
                let mut before = vec![replace(" ", SPACE)];
                let mut after = vec![replace(SPACE, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
                if metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
                    before.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
                    after.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
                }
                let fallback = (0..=255_u8).all(|byte| ids.contains_key(format!("<0x{byte:02X}>").as_str()));
                let unknown = special_id(metadata, "unk")?.map(|id| self.tokens[id as usize].as_str());
                let model = bpe(vocab, self.merges_by_score(metadata, &ids)?, unknown, fallback);
                let normalizer = json!({ "type": "Sequence", "normalizers": before });
                (model, normalizer, Value::Null, json!({ "type": "Sequence", "decoders": after }))
            }
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added(metadata)?,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.frame(metadata)?,
            "decoder": decoder,
            "model": model,
        }))
    }

    /// Tokens that are found in a text before anything else.
    fn added(&self, metadata: &Metadata) -> Result<Vec<Value>> {
        let unknown = special_id(metadata, "unk")?;
        let mut added = Vec::new();
        for (id, (token, &kind)) in self.tokens.iter().zip(&self.types).enumerate() {
            let special = kind == CONTROL || self.algorithm == Algorithm::Pieces && unknown == Some(id as u32);
            if (special || kind == USER_DEFINED) && !token.is_empty() {
                added.push(json!({ "id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": special }));
            }
        }
        Ok(added)
    }

    /// The special tokens that are put around a text.
    fn frame(&self, metadata: &Metadata) -> Result<Value> {
        let (start, end) = self.framed(metadata)?;
        if start.is_none() && end.is_none() {
            return Ok(Value::Null);
        }
        let special = |id: Option<u32>, kind: u32| {
            id.map(|id| json!({ "SpecialToken": { "id": self.tokens[id as usize], "type_id": kind } }))
        };
        let text = |name: &str, kind: u32| {
            let body = json!({ "Sequence": { "id": name, "type_id": kind } });
            special(start, kind).into_iter().chain([body]).chain(special(end, kind)).collect::<Vec<_>>()
        };
        let tokens: Map<String, Value> = [start, end]
            .into_iter()
            .flatten()
            .map(|id| (id, &self.tokens[id as usize]))
            .map(|(id, token)| (token.clone(), json!({ "id": token, "ids": [id], "tokens": [token] })))
            .collect();
        let pair = [text("A", 0), text("B", 1)].concat();
        Ok(json!({ "type": "TemplateProcessing", "single": text("A", 0), "pair": pair, "special_tokens": tokens }))
    }

    /// The ids of the tokens before and after a text, if there are to be any.
    fn framed(&self, metadata: &Metadata) -> Result<(Option<u32>, Option<u32>)> {
        let by_default = match self.algorithm {
            Algorithm::Pieces => true,
            Algorithm::Bytes => Cut::read(metadata)? == Cut::Llama3,
        };
        let start = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(by_default);
        let end = metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        let id = |wanted: bool, name| if wanted { special_id(metadata, name) } else { Ok(None) };
        Ok((id(start, "bos")?, id(end, "eos")?))
    }

    /// Every way to cut a piece into two others, the pieces of the highest score first. Among equals the longer left part
    /// wins, then the longer right one, as where Hugging Face converts SentencePiece models.
    fn merges_by_score(&self, metadata: &Metadata, ids: &HashMap<&str, usize>) -> Result<Vec<Value>> {
        let count = self.tokens.len();
        let scores = match metadata.get(SCORES) {
            Some(Stored::Floats(scores)) if scores.len() == count && scores.iter().all(|x| x.is_finite()) => scores,
            _ => return Err(metadata.wrong(SCORES, format!("a list of {count} finite numbers"))),
        };
        let mut merges = Vec::new();
        let mergeable = |part: &str| ids.get(part).is_some_and(|&id| self.types[id] == NORMAL);
        for (token, &score) in self.tokens.iter().zip(scores).filter(|(token, _)| mergeable(token)) {
            for (cut, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(cut);
                if mergeable(left) && mergeable(right) {
                    merges.push((score, left, right));
                }
            }
        }
        let length = |part: &str| part.chars().count();
        merges.sort_by(|a, b| {
            b.0.total_cmp(&a.0).then_with(|| (length(b.1), length(b.2)).cmp(&(length(a.1), length(a.2))))
        });
        Ok(merges.into_iter().map(|(_, left, right)| json!([left, right])).collect())
    }

    /// `tokenizer_config.json`: the special tokens by their roles, and the chat template.
    pub(super) fn tokenizer_config(&self, metadata: &Metadata, context: usize) -> Result<String> {
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        for name in ["bos", "eos", "unk", "pad"] {
            if let Some(id) = special_id(metadata, name)? {
                config.insert(format!("{name}_token"), json!(self.tokens[id as usize]));
            }
        }
        let (start, end) = self.framed(metadata)?;
        config.insert("add_bos_token".into(), json!(start.is_some()));
        config.insert("add_eos_token".into(), json!(end.is_some()));
        config.insert("model_max_length".into(), json!(context));
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        if let Some(template) = metadata.text(TEMPLATE)? {
            config.insert("chat_template".into(), json!(template));
        }
        Ok(format!("{:#}", Value::Object(config)))
    }
}

fn bpe(vocab: Map<String, Value>, merges: Vec<Value>, unknown: Option<&str>, fallback: bool) -> Value {
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": unknown.is_some(),
        "byte_fallback": fallback,
        "ignore_merges": false,
        "vocab": vocab,
        "merges": merges,
    })
}

/// The merges of a byte-level vocabulary, each two parts with a space between them.
fn merges(metadata: &Metadata) -> Result<Vec<Value>> {
    let merges = metadata.texts(MERGES)?;
    merges
        .iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() => Ok(json!([left, right])),
            _ => Err(metadata.wrong(MERGES, format!("two parts with a space between them, unlike {merge:?}"))),
        })
        .collect()
}

/// Gives bytes their letters, after cutting into words as GPT-2 does if `regex`.
fn byte_letters(regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex })
}

/// What cuts the texts of a byte-level vocabulary into words.
#[cfg(test)]
pub(super) fn pre_tokenizer(metadata: &Metadata) -> Result<Value> {
    Ok(Cut::read(metadata)?.words())
}

/// How a text is cut into words, whose bytes are then given letters. Only those are here that encode llama.cpp's test
/// vectors as llama.cpp does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// As GPT-2 does.
    Gpt2,
    /// Digits one by one, then as GPT-2.
    Digits,
    /// As Llama 3 does, digits by up to three.
    Llama3,
    /// As Qwen2 does: as Llama 3, but digits one by one, after composing characters.
    Qwen2,
}

impl Cut {
    fn read(metadata: &Metadata) -> Result<Cut> {
        match metadata.text(PRE)? {
            Some("gpt-2") => Ok(Cut::Gpt2),
            Some("smollm" | "starcoder" | "refact") => Ok(Cut::Digits),
            Some("llama-bpe") => Ok(Cut::Llama3),
            Some("qwen2") => Ok(Cut::Qwen2),
            found => {
                let known = r#""gpt-2", "smollm", "starcoder", "refact", "llama-bpe" and "qwen2" are"#;
                Err(match found {
                    Some(_) => metadata.unsupported(PRE, known),
                    None => metadata.wrong(PRE, format!("the name of a pre-tokenizer; {known} supported")),
                })
            }
        }
    }

    /// The pre-tokenizer.
    fn words(self) -> Value {
        let sequence = |first: Value, then: Value| json!({ "type": "Sequence", "pretokenizers": [first, then] });
        let by_regex = |digits: &str| {
            let pattern = format!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            );
            json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
        };
        match self {
            Cut::Gpt2 => byte_letters(true),
            Cut::Digits => sequence(json!({ "type": "Digits", "individual_digits": true }), byte_letters(true)),
            Cut::Llama3 => sequence(by_regex(r"\p{N}{1,3}"), byte_letters(false)),
            Cut::Qwen2 => sequence(by_regex(r"\p{N}"), byte_letters(false)),
        }
    }
}
