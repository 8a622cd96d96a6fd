//! Sequences to train on, and which of them make which batch.
//!
//! A sequence is a pack of whole documents: attention, positions and folding start afresh at each. Documents longer than a
//! sequence are cut; shorter ones are packed, each into the fullest sequence that has room for it (best fit), so none is
//! torn. Batches are ragged, so room that is left costs nothing.

use crate::documents::Document;
use crate::error::RetrofitError;
use kvfold_kernels::noise::hash;
use kvfold_kernels::team;
use kvfold_model::digest::hex;
use kvfold_model::{ModelError, Tokenizer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Fewest tokens of a piece: one has nothing to predict.
const SMALLEST: usize = 2;

/// Text that is tokenised at a time, in bytes; documents are counted whole.
const CHUNK: usize = 1 << 20;

/// Bytes of a token, at most, in texts that people write; longer cuts are tried if they turn out too short.
const BYTES_PER_TOKEN: usize = 16;

/// A document's tokens, and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The document's name, for messages.
    pub source: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
}

/// How much of some documents is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    /// Tokens in all.
    pub tokens: usize,
    /// Tokens of each document, where there are enough documents: many texts say more of what a model will meet than one
    /// long one.
    pub of_each: usize,
}

impl Amount {
    /// Everything.
    pub const ALL: Self = Self { tokens: usize::MAX, of_each: usize::MAX };
}

/// Tokenises documents in parallel, in their order, with the special tokens that the tokenizer puts around a text, until
/// there are as many tokens as wanted: an excerpt of each, or whole documents if these are too few. `on_progress` is told the
/// bytes read.
pub fn encode(
    documents: &[Document],
    tokenizer: &Tokenizer,
    Amount { tokens, of_each }: Amount,
    mut on_progress: impl FnMut(usize),
) -> Result<Vec<Encoded>, RetrofitError> {
    if of_each < tokens {
        let excerpts = encode_each(documents, tokenizer, (tokens, of_each), &mut on_progress)?;
        if excerpts.iter().map(|document| document.tokens.len()).sum::<usize>() == tokens {
            return Ok(excerpts);
        }
    }
    encode_each(documents, tokenizer, (tokens, usize::MAX), &mut on_progress)
}

/// Up to `limit` tokens of documents, `of_each` at most.
fn encode_each(
    documents: &[Document],
    tokenizer: &Tokenizer,
    (limit, of_each): (usize, usize),
    on_progress: &mut impl FnMut(usize),
) -> Result<Vec<Encoded>, RetrofitError> {
    let (mut encoded, mut rest, mut bytes) = (Vec::new(), documents, 0);
    let mut left = limit;
    while !rest.is_empty() && left > 0 {
        let mut size = 0;
        let within = |document: &&Document| {
            let taken = size < CHUNK;
            size += document.text.len();
            taken
        };
        let (chunk, later) = rest.split_at(rest.iter().take_while(within).count());
        let wanted = left.min(of_each);
        let tokens = team::map(chunk, |document| encode_prefix(excerpt(&document.text, of_each), tokenizer, wanted));
        let tokens = tokens.into_iter().collect::<Result<Vec<_>, ModelError>>()?;
        for (document, mut tokens) in chunk.iter().zip(tokens) {
            tokens.truncate(left.min(of_each));
            left -= tokens.len();
            if !tokens.is_empty() {
                encoded.push(Encoded { source: document.source.clone(), tokens });
            }
        }
        bytes += chunk.iter().map(|document| document.text.len()).sum::<usize>();
        on_progress(bytes);
        rest = later;
    }
    Ok(encoded)
}

/// A text from somewhere in its first half on, if it is much longer than the tokens that are wanted: its beginning is often
/// a title page or a licence.
fn excerpt(text: &str, tokens: usize) -> &str {
    if text.len() / BYTES_PER_TOKEN < tokens {
        return text;
    }
    let at = hash(&[text.len() as u64]) % (text.len() as u64 / 2);
    let rest = &text[text.floor_char_boundary(at as usize)..];
    rest.find(char::is_whitespace).map_or(rest, |word| rest[word..].trim_start())
}

/// At least the first `limit` tokens of a text, without reading all of it if it has many more.
fn encode_prefix(text: &str, tokenizer: &Tokenizer, limit: usize) -> Result<Vec<u32>, ModelError> {
    // Tokens at a cut may differ from those of the whole text, so there have to be some to spare.
    let wanted = limit.saturating_add(64);
    let mut cut = wanted.saturating_mul(BYTES_PER_TOKEN);
    while cut < text.len() {
        let tokens = tokenizer.encode(&text[..text.floor_char_boundary(cut)], true)?;
        if tokens.len() >= wanted {
            return Ok(tokens);
        }
        cut = cut.saturating_mul(2);
    }
    tokenizer.encode(text, true)
}

/// A document or a part of one: `len` tokens of document `source`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Piece {
    len: usize,
    source: usize,
}

/// What says where documents begin and end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layout {
    /// Most tokens of a sequence.
    length: usize,
    /// The pieces of each sequence.
    sequences: Vec<Vec<Piece>>,
    /// Names of the documents.
    sources: Vec<String>,
}

/// Token sequences, each a pack of pieces that know nothing of each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    tokens: Vec<u32>,
    layout: Layout,
    /// First token of every sequence, and the end of the last.
    starts: Vec<usize>,
}

impl Corpus {
    /// Cuts a stream of tokens into consecutive sequences of one piece each; an incomplete last one is dropped.
    pub fn cut(tokens: Vec<u32>, length: usize) -> Result<Self, RetrofitError> {
        Self::stream(vec![Encoded { source: "the text".into(), tokens }], length)
    }

    /// Cuts documents, one after the other, as [`Corpus::cut`] does: a sequence may hold the end of one and the beginning of
    /// the next without a boundary in between, as the paper's code does. A sequence is called by its first token's document.
    pub fn stream(documents: Vec<Encoded>, length: usize) -> Result<Self, RetrofitError> {
        check_length(length)?;
        let (mut ends, mut sources, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        for document in documents {
            tokens.extend(document.tokens);
            ends.push(tokens.len());
            sources.push(document.source);
        }
        let count = tokens.len() / length;
        if count == 0 {
            return Err(RetrofitError::TooLittleText { tokens: tokens.len(), length });
        }
        tokens.truncate(count * length);
        let of = |n: usize| ends.partition_point(|&end| end <= n * length);
        let sequences = (0..count).map(|n| vec![Piece { len: length, source: of(n) }]).collect();
        Ok(Self::of(tokens, Layout { length, sequences, sources }))
    }

    /// Packs documents into sequences of at most `length` tokens. Parts of fewer than 2 tokens are dropped.
    pub fn pack(documents: Vec<Encoded>, length: usize) -> Result<Self, RetrofitError> {
        check_length(length)?;
        let total = documents.iter().map(|document| document.tokens.len()).sum();
        let mut sequences: Vec<Vec<(usize, &[u32])>> = Vec::new();
        // Sequences with room, by how much: the first of the least that suffices is taken.
        let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (source, document) in documents.iter().enumerate() {
            for piece in document.tokens.chunks(length).filter(|piece| piece.len() >= SMALLEST.min(length)) {
                let found = open.range_mut(piece.len()..).find_map(|(&room, those)| Some((room, those.pop()?)));
                let (room, sequence) = found.unwrap_or_else(|| {
                    sequences.push(Vec::new());
                    (length, sequences.len() - 1)
                });
                if open.get(&room).is_some_and(Vec::is_empty) {
                    open.remove(&room);
                }
                sequences[sequence].push((source, piece));
                if room - piece.len() >= SMALLEST {
                    open.entry(room - piece.len()).or_default().push(sequence);
                }
            }
        }
        if sequences.is_empty() {
            return Err(RetrofitError::TooLittleText { tokens: total, length });
        }
        let tokens = sequences.iter().flatten().flat_map(|(_, piece)| piece.iter().copied()).collect();
        let pieces = |sequence: &Vec<(usize, &[u32])>| {
            sequence.iter().map(|&(source, piece)| Piece { len: piece.len(), source }).collect()
        };
        let sequences = sequences.iter().map(pieces).collect();
        let sources = documents.into_iter().map(|document| document.source).collect();
        Ok(Self::of(tokens, Layout { length, sequences, sources }))
    }

    fn of(tokens: Vec<u32>, layout: Layout) -> Self {
        let mut starts = vec![0];
        for sequence in &layout.sequences {
            let end = starts[starts.len() - 1] + sequence.iter().map(|piece| piece.len).sum::<usize>();
            starts.push(end);
        }
        Self { tokens, layout, starts }
    }

    /// Tokens and what says where documents begin, as a run stores them; `None` if they do not belong together.
    pub(crate) fn from_parts(tokens: Vec<u32>, layout: Layout) -> Option<Self> {
        let pieces = || layout.sequences.iter().flatten();
        let fits = layout.length > 0
            && pieces().map(|piece| piece.len).try_fold(0usize, usize::checked_add) == Some(tokens.len())
            && pieces().all(|piece| piece.len > 0 && piece.source < layout.sources.len());
        fits.then(|| Self::of(tokens, layout))
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.layout.sequences.len()
    }

    /// True when there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.layout.sequences.is_empty()
    }

    /// Most tokens of a sequence.
    pub fn length(&self) -> usize {
        self.layout.length
    }

    /// All tokens, sequence after sequence.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens of one sequence.
    pub fn sequence(&self, n: usize) -> &[u32] {
        &self.tokens[self.starts[n]..self.starts[n + 1]]
    }

    /// Tokens of each piece of a sequence, in order.
    pub fn lengths(&self, n: usize) -> impl Iterator<Item = usize> {
        self.layout.sequences[n].iter().map(|piece| piece.len)
    }

    /// The documents of a sequence by name, for messages.
    pub fn sources(&self, n: usize) -> impl Iterator<Item = &str> {
        self.layout.sequences[n].iter().map(|piece| self.layout.sources[piece.source].as_str())
    }

    /// Where the texts of some sequences came from, in a few words.
    pub fn describe(&self, sequences: &[usize]) -> String {
        const NAMED: usize = 6;
        let mut names: Vec<&str> = sequences.iter().flat_map(|&n| self.sources(n)).collect();
        names.dedup();
        let more = names.len().saturating_sub(NAMED);
        names.truncate(NAMED);
        let names = names.join(", ");
        if more == 0 { names } else { format!("{names} and {more} more") }
    }

    /// The pieces of a sequence.
    pub fn pieces(&self, n: usize) -> impl Iterator<Item = &[u32]> {
        let mut at = self.starts[n];
        self.lengths(n).map(move |len| {
            at += len;
            &self.tokens[at - len..at]
        })
    }

    /// Some of the sequences, in the order given.
    pub fn select(&self, sequences: &[usize]) -> Self {
        let tokens = sequences.iter().flat_map(|&n| self.sequence(n)).copied().collect();
        let sequences = sequences.iter().map(|&n| self.layout.sequences[n].clone()).collect();
        Self::of(tokens, Layout { sequences, ..self.layout.clone() })
    }

    /// SHA-256 of tokens, boundaries and names, in hex.
    pub fn digest(&self) -> String {
        let mut hasher = Sha256::new();
        let mut number = |n: usize| hasher.update((n as u64).to_le_bytes());
        number(self.layout.length);
        for sequence in &self.layout.sequences {
            number(sequence.len());
            sequence.iter().flat_map(|piece| [piece.len, piece.source]).for_each(&mut number);
        }
        self.tokens.iter().for_each(|id| hasher.update(id.to_le_bytes()));
        for source in &self.layout.sources {
            hasher.update((source.len() as u64).to_le_bytes());
            hasher.update(source.as_bytes());
        }
        hex(&hasher.finalize())
    }

    /// The sequences of a step: each epoch goes through all of them in an order of its own.
    pub fn batch(&self, seed: u64, step: u64, batch: usize) -> Vec<usize> {
        let len = self.len() as u64;
        let first = step * batch as u64;
        let mut order: Option<(u64, Vec<usize>)> = None;
        (first..first + batch as u64)
            .map(|place| {
                let epoch = place / len;
                if order.as_ref().is_none_or(|(of, _)| *of != epoch) {
                    let mut sequences: Vec<usize> = (0..self.len()).collect();
                    sequences.sort_by_key(|&n| hash(&[seed, epoch, n as u64]));
                    order = Some((epoch, sequences));
                }
                order.as_ref().map_or(0, |(_, sequences)| sequences[(place % len) as usize])
            })
            .collect()
    }

    /// The sequences that a run takes first and that have `tokens` tokens together, or all there are.
    pub(crate) fn first_taken(&self, seed: u64, tokens: usize) -> Vec<usize> {
        let mut taken = 0;
        let wanted = self.batch(seed, 0, self.len()).into_iter().take_while(|&n| {
            let before = taken;
            taken += self.sequence(n).len();
            before < tokens
        });
        wanted.collect()
    }
}

fn check_length(length: usize) -> Result<(), RetrofitError> {
    match length {
        0 => {
            let expected = "at least 1 token".into();
            Err(RetrofitError::Setting { setting: "length", found: "0".into(), expected })
        }
        _ => Ok(()),
    }
}
