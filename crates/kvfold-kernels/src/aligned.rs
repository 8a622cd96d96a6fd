//! Vectors of numbers that begin where the machine likes to read.
//!
//! What lies across two cache lines costs twice to load, and a tile of AMX is 16 lines: products of operands that begin
//! anywhere run at half their speed.

use aligned_vec::{AVec, ConstAlign};
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the widest register.
pub(crate) const CACHE_LINE: usize = 64;

/// A vector that begins at a cache line.
#[derive(Debug)]
pub(crate) struct Aligned<T>(AVec<T, ConstAlign<CACHE_LINE>>);

impl<T: Clone + Default> Aligned<T> {
    /// `len` numbers of their type's default, 0.
    pub(crate) fn new(len: usize) -> Self {
        let mut numbers = Self::default();
        numbers.resize(len, T::default());
        numbers
    }

    /// Room for so many numbers.
    pub(crate) fn with_capacity(len: usize) -> Self {
        Self(AVec::with_capacity(CACHE_LINE, len))
    }
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self(AVec::new(CACHE_LINE))
    }
}

impl<T> Deref for Aligned<T> {
    type Target = AVec<T, ConstAlign<CACHE_LINE>>;

    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}
