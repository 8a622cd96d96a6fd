//! The element types a weight may be stored in.

use std::fmt;

/// The element type of a [`HostTensor`](crate::HostTensor): the float types that Llama checkpoints come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 double precision; for reference computations, not for weights in use.
    F64,
    /// IEEE 754 single precision; master weights.
    F32,
    /// IEEE 754 half precision: 5 exponent bits, 10 of mantissa.
    F16,
    /// The upper half of an `F32`: 8 exponent bits, 7 of mantissa.
    BF16,
}

impl DType {
    /// Every dtype, widest first.
    pub const ALL: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F64 => "F64",
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
