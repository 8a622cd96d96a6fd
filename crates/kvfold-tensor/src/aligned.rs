//! Bytes whose first one lies on a cache line, so that vector kernels may load them without a peel loop.

use std::fmt;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

/// One cache line. A `Vec` of these is how the allocator is asked for the alignment without any `unsafe` of our own.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; AlignedBytes::ALIGN]);

/// A byte buffer of fixed length that starts on a 64-byte boundary.
///
/// The tail of the last cache line is zero and stays out of sight: [`Deref`] gives exactly the length asked for.
#[derive(Clone)]
pub struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBytes {
    /// The alignment of the first byte: a cache line, and the width of an AVX-512 register.
    pub const ALIGN: usize = 64;

    /// A buffer of `len` zero bytes. The pages come zeroed from the system and cost nothing until they are touched.
    pub fn zeroed(len: usize) -> Self {
        AlignedBytes { lines: bytemuck::zeroed_vec(len.div_ceil(Self::ALIGN)), len }
    }
}

impl From<&[u8]> for AlignedBytes {
    fn from(bytes: &[u8]) -> Self {
        let mut out = Self::zeroed(bytes.len());
        out.copy_from_slice(bytes);
        out
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl PartialEq for AlignedBytes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for AlignedBytes {}

impl fmt::Debug for AlignedBytes {
    /// The length only: nobody wants a gigabyte in a panic message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBytes({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_starts_on_a_cache_line_and_keeps_its_bytes() {
        for len in [0, 1, 63, 64, 65, 1000] {
            let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let aligned = AlignedBytes::from(&bytes[..]);
            assert_eq!(aligned.as_ptr() as usize % AlignedBytes::ALIGN, 0);
            assert_eq!(&*aligned, &bytes[..]);
            assert_eq!(aligned.clone().as_ptr() as usize % AlignedBytes::ALIGN, 0);
        }
    }
}
