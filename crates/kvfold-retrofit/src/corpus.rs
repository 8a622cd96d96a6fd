//! Sequences to train on, and which of them make which batch.

use crate::error::RetrofitError;
use kvfold_kernels::noise::hash;
use sha2::{Digest, Sha256};

/// Token sequences of one length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    length: usize,
    tokens: Vec<u32>,
}

impl Corpus {
    /// Cuts a stream of tokens into consecutive sequences; an incomplete last one is dropped.
    pub fn cut(mut tokens: Vec<u32>, length: usize) -> Result<Self, RetrofitError> {
        if length == 0 {
            let expected = "at least 1 token".into();
            return Err(RetrofitError::Setting { setting: "length", found: "0".into(), expected });
        }
        if tokens.len() < length {
            return Err(RetrofitError::TooLittleText { tokens: tokens.len(), length });
        }
        tokens.truncate(tokens.len() / length * length);
        Ok(Self { length, tokens })
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.tokens.len() / self.length
    }

    /// True when there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens of a sequence.
    pub fn length(&self) -> usize {
        self.length
    }

    /// All tokens, sequence after sequence.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// One sequence.
    pub fn sequence(&self, n: usize) -> &[u32] {
        &self.tokens[n * self.length..][..self.length]
    }

    /// SHA-256 of length and tokens, in hex.
    pub fn digest(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update((self.length as u64).to_le_bytes());
        self.tokens.iter().for_each(|id| hasher.update(id.to_le_bytes()));
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
}

/// Bytes in lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
