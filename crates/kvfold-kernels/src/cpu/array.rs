//! Arrays of the CPU backend, and the memory they are made from.
//!
//! A training step makes the same few hundred arrays every time, and fresh pages from the system cost more than filling
//! them. So a large buffer goes back to its backend's [`Recycler`] when the last array that uses it is dropped, and the
//! next array of about that size takes it: batches of packed documents are never quite equally long.

use crate::aligned::Aligned;
use crate::ops::Precision;
use crate::paged::Scratch;
use crate::q8;
use crate::real::Real;
use crate::simd::{PANEL, STRIP};
use crate::stored::{Store, Stored};
use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Buffers below this many elements come from the system allocator, which keeps them by itself.
const SMALL: usize = 16 * 1024;

/// Elements that a backend keeps for reuse at most while nobody uses them, of either kind.
pub const RECYCLED: usize = 1 << 30;

/// Large buffers that wait for their next use.
#[derive(Debug, Default)]
pub(crate) struct Recycler<T>(Mutex<Waiting<T>>);

#[derive(Debug, Default)]
struct Waiting<T> {
    by_class: HashMap<usize, Vec<Aligned<T>>>,
    elements: usize,
}

/// `len` rounded up to a size that buffers come in, by less than an eighth.
fn size_class(len: usize) -> usize {
    let step = (len.next_power_of_two() / 16).max(1);
    len.next_multiple_of(step)
}

impl<T: Copy + Default> Recycler<T> {
    /// A buffer of `len` elements, of any content: callers overwrite all of it.
    pub(crate) fn take(&self, len: usize) -> Aligned<T> {
        if len < SMALL {
            return Aligned::new(len);
        }
        let class = size_class(len);
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = waiting.by_class.get_mut(&class).and_then(Vec::pop);
        if found.is_some() {
            waiting.elements -= class;
        }
        drop(waiting);
        let mut buffer = found.unwrap_or_else(|| Aligned::with_capacity(class));
        buffer.resize(len, T::default());
        buffer
    }

    /// The same for a while: it comes back when it is dropped.
    pub(crate) fn lend(&self, len: usize) -> Lent<'_, T> {
        Lent { buffer: self.take(len), to: self }
    }

    pub(crate) fn give(&self, buffer: Aligned<T>) {
        // One that was not taken from here may have room for no more than its elements.
        let class = size_class(buffer.len());
        if buffer.len() >= SMALL && buffer.capacity() >= class {
            let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.elements + class <= RECYCLED {
                waiting.elements += class;
                waiting.by_class.entry(class).or_default().push(buffer);
            }
        }
    }
}

/// A buffer that goes back to its recycler when it is dropped.
#[derive(Debug)]
pub(crate) struct Lent<'a, T: Copy + Default> {
    buffer: Aligned<T>,
    to: &'a Recycler<T>,
}

impl<T: Copy + Default> Lent<'_, T> {
    /// The buffer, to keep.
    pub(crate) fn kept(mut self) -> Aligned<T> {
        std::mem::take(&mut self.buffer)
    }
}

impl<T: Copy + Default> Drop for Lent<'_, T> {
    fn drop(&mut self) {
        self.to.give(std::mem::take(&mut self.buffer));
    }
}

impl<T: Copy + Default> Deref for Lent<'_, T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.buffer
    }
}

impl<T: Copy + Default> DerefMut for Lent<'_, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.buffer
    }
}

/// What threads need to attend to a cache, while no thread uses it.
#[derive(Debug, Default)]
pub(super) struct ScratchPool<F>(Mutex<Vec<Scratch<F>>>);

impl<F: Real> ScratchPool<F> {
    /// Runs `f` with scratch that nobody else uses and that outlives the call.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut Scratch<F>) -> R) -> R {
        let waiting = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = waiting().pop().unwrap_or_default();
        let result = f(&mut scratch);
        waiting().push(scratch);
        result
    }
}

/// Where a backend's buffers go when nobody uses them.
#[derive(Debug, Default)]
pub(crate) struct Home<F> {
    pub(crate) floats: Recycler<F>,
    pub(crate) words: Recycler<u32>,
    pub(crate) weights: Store,
    pub(super) scratch: ScratchPool<F>,
}

/// Words of two bf16 terms, in panels.
#[derive(Debug)]
pub(super) enum PackedPanels {
    /// Of an array that may change.
    Recycled(Aligned<u32>),
    /// Of a weight that is only read.
    Stored(Stored<u32>),
}

impl Deref for PackedPanels {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        match self {
            PackedPanels::Recycled(words) => words,
            PackedPanels::Stored(words) => words,
        }
    }
}

/// Packings of an array, each made at its first use (see `bf16.rs`).
#[derive(Debug, Default)]
pub(super) struct Packings<F> {
    /// Strips of 16 rows, each `[C][16]`, in the backend's floats.
    pub(super) floats: OnceLock<Aligned<F>>,
    /// bf16, terms along the columns, as a left factor.
    pub(super) rows: OnceLock<Aligned<u32>>,
    /// bf16, terms along the columns, as a right factor.
    pub(super) panels_of_rows: OnceLock<PackedPanels>,
    /// bf16, terms along the rows.
    pub(super) panels_of_columns: OnceLock<Aligned<u32>>,
    /// Integers of 8 bits and their scales.
    pub(super) quantised: OnceLock<q8::Panels>,
}

#[derive(Debug)]
struct Buffer<F: Real> {
    /// Empty when only a packing is held.
    data: Aligned<F>,
    precision: Precision,
    packings: Packings<F>,
    home: Arc<Home<F>>,
}

impl<F: Real> Drop for Buffer<F> {
    fn drop(&mut self) {
        self.home.floats.give(std::mem::take(&mut self.data));
        self.forget_packings();
    }
}

impl<F: Real> Buffer<F> {
    /// Gives the packings back: the numbers are about to change.
    fn forget_packings(&mut self) {
        let Packings { floats, rows, panels_of_rows, panels_of_columns, .. } = std::mem::take(&mut self.packings);
        floats.into_inner().into_iter().for_each(|floats| self.home.floats.give(floats));
        let lent = panels_of_rows.into_inner().and_then(|words| match words {
            PackedPanels::Recycled(words) => Some(words),
            PackedPanels::Stored(_) => None,
        });
        let words = [rows, panels_of_columns].into_iter().filter_map(OnceLock::into_inner).chain(lent);
        words.for_each(|words| self.home.words.give(words));
    }
}

/// A row-major array; clones share their numbers.
#[derive(Clone, Debug)]
pub struct Array<F: Real> {
    shape: Arc<[usize]>,
    buffer: Arc<Buffer<F>>,
}

impl<F: Real> Array<F> {
    pub(crate) fn new(shape: &[usize], data: Aligned<F>, home: &Arc<Home<F>>) -> Self {
        Self::with_precision(shape, data, Precision::F32, home)
    }

    /// An array whose products as a weight are of some precision.
    pub(super) fn with_precision(shape: &[usize], data: Aligned<F>, precision: Precision, home: &Arc<Home<F>>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "shape {shape:?} and {} elements", data.len());
        let buffer = Buffer { data, precision, packings: Packings::default(), home: Arc::clone(home) };
        Self { shape: shape.into(), buffer: Arc::new(buffer) }
    }

    /// Gives the numbers' memory back to the system, since nothing as large is needed again; what was packed stays. For
    /// the only user of an array.
    pub(super) fn keep_packed(mut self) -> Self {
        let buffer = Arc::get_mut(&mut self.buffer).expect("the only user");
        buffer.data = Aligned::default();
        self
    }

    /// Lengths of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The numbers, row-major.
    pub fn data(&self) -> &[F] {
        let data = &self.buffer.data;
        assert!(!data.is_empty() || self.shape.contains(&0), "only a packing of this {:?} is held", self.shape);
        data
    }

    /// Bytes that a product with this array as the weight reads: of the packing that it reads, or of the numbers.
    pub fn read_bytes(&self) -> usize {
        let Packings { floats, panels_of_rows, quantised, .. } = self.packings();
        match (quantised.get(), panels_of_rows.get(), floats.get()) {
            (Some(panels), _, _) => panels.bytes(),
            (_, Some(words), _) => size_of_val(&words[..]),
            (_, _, Some(panels)) => size_of_val(&panels[..]),
            _ => size_of_val(&self.buffer.data[..]),
        }
    }

    /// Whether the numbers themselves are held, and not only a packing.
    pub(super) fn is_whole(&self) -> bool {
        !self.buffer.data.is_empty() || self.shape.contains(&0)
    }

    /// How products with this array as the weight are computed.
    pub(super) fn precision(&self) -> Precision {
        self.buffer.precision
    }

    /// What was packed so far.
    pub(super) fn packings(&self) -> &Packings<F> {
        &self.buffer.packings
    }

    /// Rows and columns of a matrix; a vector is one row.
    pub(crate) fn matrix(&self) -> (usize, usize) {
        match *self.shape {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            _ => panic!("a matrix was expected, not {:?}", self.shape),
        }
    }

    /// The numbers for changing in place; copies them first if another array shares them.
    pub(crate) fn data_mut(&mut self) -> &mut [F] {
        if Arc::get_mut(&mut self.buffer).is_none() {
            let home = Arc::clone(&self.buffer.home);
            let mut copy = home.floats.take(self.data().len());
            copy.copy_from_slice(self.data());
            *self = Self::with_precision(&self.shape, copy, self.precision(), &home);
        }
        let buffer = Arc::get_mut(&mut self.buffer).expect("the only user, by the copy above");
        buffer.forget_packings();
        &mut buffer.data
    }

    /// A weight `[M,K]` as strips of 16 output columns, each `[K][16]`, filled up with zeros to a multiple of 32.
    pub(super) fn float_strips(&self) -> &[F] {
        self.buffer.packings.floats.get_or_init(|| {
            let (m, k) = self.matrix();
            let mut strips = self.buffer.home.floats.take(m.div_ceil(PANEL) * k * PANEL);
            strips.chunks_exact_mut(k * PANEL).last().into_iter().for_each(|last| last.fill(F::zero()));
            for (row, weights) in self.data().chunks_exact(k).enumerate() {
                let strip = &mut strips[row / STRIP * k * STRIP..][..k * STRIP];
                for (p, &w) in weights.iter().enumerate() {
                    strip[p * STRIP + row % STRIP] = w;
                }
            }
            strips
        })
    }
}
