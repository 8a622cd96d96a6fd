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
    /// Every dtype, widest first: the order in which safetensors files keep their tensors aligned.
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

    /// The dtype that a safetensors header calls `name`, if kvfold can hold it.
    pub fn from_name(name: &str) -> Option<DType> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_dtypes() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(DType::from_name("I8"), None);
        assert_eq!(DType::from_name("bf16"), None);
    }
}
