//! Vectors of numbers that begin where the machine likes to read.
//!
//! What lies across two cache lines costs twice to load, and a tile of AMX is 16 lines: products of operands that begin
//! anywhere run at half their speed. Where numbers are many, finding out where each page of 4 KiB is takes time, too (a tenth
//! of decoding from a long compressed cache): those begin at a huge page, and the system is asked for such.

use aligned_vec::{AVec, RuntimeAlign};
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the widest register.
pub(crate) const CACHE_LINE: usize = 64;

/// Bytes of a huge page on most machines.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// A vector that begins at a cache line, and at a huge page where it is made with room for one.
#[derive(Debug)]
pub(crate) struct Aligned<T>(AVec<T, RuntimeAlign>);

impl<T: Clone + Default> Aligned<T> {
    /// `len` numbers of their type's default, 0.
    pub(crate) fn new(len: usize) -> Self {
        let mut numbers = Self::with_capacity(len);
        numbers.resize(len, T::default());
        numbers
    }

    /// Room for so many numbers.
    pub(crate) fn with_capacity(len: usize) -> Self {
        let bytes = len * size_of::<T>();
        if bytes < HUGE_PAGE {
            return Self(AVec::with_capacity(CACHE_LINE, len));
        }
        let mut room = AVec::<T, RuntimeAlign>::with_capacity(HUGE_PAGE, len);
        ask_for_huge_pages(room.as_mut_ptr().cast(), bytes);
        Self(room)
    }
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self(AVec::new(CACHE_LINE))
    }
}

impl<T> Deref for Aligned<T> {
    type Target = AVec<T, RuntimeAlign>;

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

/// Asks the system to back memory with huge pages when it is first touched. Where it does not, memory is what it was.
#[cfg(target_os = "linux")]
pub(crate) fn ask_for_huge_pages(memory: *mut u8, bytes: usize) {
    use rustix::mm::{Advice, madvise};
    // SAFETY: the advice changes neither content nor validity of the pages, whoever else has a part of the last one.
    let _ = unsafe { madvise(memory.cast(), bytes, Advice::LinuxHugepage) };
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn ask_for_huge_pages(_: *mut u8, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_begin_at_cache_lines_and_large_ones_at_huge_pages() {
        for len in [1, 100, HUGE_PAGE / 4 - 1] {
            assert_eq!(Aligned::<f32>::new(len).as_ptr() as usize % CACHE_LINE, 0, "{len} numbers");
        }
        for len in [HUGE_PAGE / 4, HUGE_PAGE] {
            let numbers = Aligned::<f32>::new(len);
            assert_eq!(numbers.as_ptr() as usize % HUGE_PAGE, 0, "{len} numbers");
            assert!(numbers.len() == len && numbers.iter().all(|&x| x == 0.0));
        }
    }
}
