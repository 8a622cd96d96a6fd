//! How the elements of a GGUF tensor are stored.

use std::fmt;

use super::dequantize as by;

/// A tensor's element type: a float, or blocks of quantised values with shared scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names are ggml's and say what there is to say")]
#[allow(non_camel_case_types, reason = "ggml's names")]
pub enum Kind {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    /// A type that kvfold does not read, by its number in the format.
    Other(u32),
}

/// A run of values that is stored together.
pub(super) struct Blocks {
    /// Values of a block.
    pub(super) values: usize,
    /// Bytes of a block.
    pub(super) bytes: usize,
    /// Turns whole blocks into values.
    pub(super) dequantize: fn(&[u8], &mut [f32]),
}

impl Kind {
    const READABLE: [Kind; 13] = [
        Kind::F32,
        Kind::F16,
        Kind::BF16,
        Kind::Q4_0,
        Kind::Q4_1,
        Kind::Q5_0,
        Kind::Q5_1,
        Kind::Q8_0,
        Kind::Q2_K,
        Kind::Q3_K,
        Kind::Q4_K,
        Kind::Q5_K,
        Kind::Q6_K,
    ];

    /// The type of this number in the format.
    pub fn of(number: u32) -> Kind {
        Self::READABLE.into_iter().find(|kind| kind.number() == number).unwrap_or(Kind::Other(number))
    }

    /// The number in the format.
    pub fn number(self) -> u32 {
        match self {
            Kind::F32 => 0,
            Kind::F16 => 1,
            Kind::Q4_0 => 2,
            Kind::Q4_1 => 3,
            Kind::Q5_0 => 6,
            Kind::Q5_1 => 7,
            Kind::Q8_0 => 8,
            Kind::Q2_K => 10,
            Kind::Q3_K => 11,
            Kind::Q4_K => 12,
            Kind::Q5_K => 13,
            Kind::Q6_K => 14,
            Kind::BF16 => 30,
            Kind::Other(number) => number,
        }
    }

    /// The block's sizes and its arithmetic; `None` for a type that is not read.
    pub(super) fn blocks(self) -> Option<Blocks> {
        let blocks = |values, bytes, dequantize| Some(Blocks { values, bytes, dequantize });
        match self {
            Kind::F32 => blocks(1, 4, by::f32),
            Kind::F16 => blocks(1, 2, by::f16),
            Kind::BF16 => blocks(1, 2, by::bf16),
            Kind::Q4_0 => blocks(32, 18, by::q4_0),
            Kind::Q4_1 => blocks(32, 20, by::q4_1),
            Kind::Q5_0 => blocks(32, 22, by::q5_0),
            Kind::Q5_1 => blocks(32, 24, by::q5_1),
            Kind::Q8_0 => blocks(32, 34, by::q8_0),
            Kind::Q2_K => blocks(256, 84, by::q2_k),
            Kind::Q3_K => blocks(256, 110, by::q3_k),
            Kind::Q4_K => blocks(256, 144, by::q4_k),
            Kind::Q5_K => blocks(256, 176, by::q5_k),
            Kind::Q6_K => blocks(256, 210, by::q6_k),
            Kind::Other(_) => None,
        }
    }

    /// The names of the types that are read, for messages.
    pub(super) fn readable() -> String {
        Self::READABLE.map(|kind| kind.to_string()).join(", ")
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Other(number) => write!(f, "ggml type {number}"),
            kind => write!(f, "{kind:?}"),
        }
    }
}
