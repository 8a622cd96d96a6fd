//! Arrays of the CPU backend, and the memory they are made from.
//!
//! A training step makes the same few hundred arrays every time, and fresh pages from the system cost more than filling
//! them. So a large buffer goes back to its backend's [`Recycler`] when the last array that uses it is dropped, and the
//! next array of about that size takes it: batches of packed documents are never quite equally long.

use crate::real::Real;
use crate::simd::PANEL;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Buffers below this many elements come from the system allocator, which keeps them by itself.
const SMALL: usize = 16 * 1024;

/// Elements that a recycler keeps at most while nobody uses them.
const KEPT: usize = 1 << 29;

/// Large buffers that wait for their next use.
#[derive(Debug, Default)]
pub(crate) struct Recycler<F>(Mutex<Waiting<F>>);

#[derive(Debug, Default)]
struct Waiting<F> {
    by_class: HashMap<usize, Vec<Vec<F>>>,
    elements: usize,
}

/// `len` rounded up to a size that buffers come in, by less than an eighth.
fn size_class(len: usize) -> usize {
    let step = (len.next_power_of_two() / 16).max(1);
    len.next_multiple_of(step)
}

impl<F: Real> Recycler<F> {
    /// A buffer of `len` elements, of any content: callers overwrite all of it.
    pub(crate) fn take(&self, len: usize) -> Vec<F> {
        if len < SMALL {
            return vec![F::zero(); len];
        }
        let class = size_class(len);
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = waiting.by_class.get_mut(&class).and_then(Vec::pop);
        if found.is_some() {
            waiting.elements -= class;
        }
        drop(waiting);
        let mut buffer = found.unwrap_or_else(|| Vec::with_capacity(class));
        buffer.resize(len, F::zero());
        buffer
    }

    fn give(&self, buffer: Vec<F>) {
        // One that was not taken from here may have room for no more than its elements.
        let class = size_class(buffer.len());
        if buffer.len() >= SMALL && buffer.capacity() >= class {
            let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.elements + class <= KEPT {
                waiting.elements += class;
                waiting.by_class.entry(class).or_default().push(buffer);
            }
        }
    }
}

#[derive(Debug)]
struct Buffer<F: Real> {
    data: Vec<F>,
    /// `data` as a weight, packed for [`crate::Ops::linear`]; made at first use.
    panels: OnceLock<Vec<F>>,
    home: Arc<Recycler<F>>,
}

impl<F: Real> Drop for Buffer<F> {
    fn drop(&mut self) {
        self.home.give(std::mem::take(&mut self.data));
    }
}

/// A row-major array; clones share their numbers.
#[derive(Clone, Debug)]
pub struct Array<F: Real> {
    shape: Arc<[usize]>,
    buffer: Arc<Buffer<F>>,
}

impl<F: Real> Array<F> {
    pub(crate) fn new(shape: &[usize], data: Vec<F>, home: &Arc<Recycler<F>>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "shape {shape:?} and {} elements", data.len());
        let buffer = Buffer { data, panels: OnceLock::new(), home: Arc::clone(home) };
        Self { shape: shape.into(), buffer: Arc::new(buffer) }
    }

    /// Lengths of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The numbers, row-major.
    pub fn data(&self) -> &[F] {
        &self.buffer.data
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
            let mut copy = home.take(self.buffer.data.len());
            copy.copy_from_slice(&self.buffer.data);
            *self = Self::new(&self.shape, copy, &home);
        }
        let buffer = Arc::get_mut(&mut self.buffer).expect("the only user, by the copy above");
        buffer.panels = OnceLock::new();
        &mut buffer.data
    }

    /// A weight `[M,K]` as panels of 32 output columns, each `[K][32]`, the last one filled up with zeros.
    pub(crate) fn panels(&self) -> &[F] {
        self.buffer.panels.get_or_init(|| {
            let (m, k) = self.matrix();
            let mut panels = vec![F::zero(); m.div_ceil(PANEL) * k * PANEL];
            for (row, weights) in self.data().chunks_exact(k).enumerate() {
                let panel = &mut panels[row / PANEL * k * PANEL..][..k * PANEL];
                for (p, &w) in weights.iter().enumerate() {
                    panel[p * PANEL + row % PANEL] = w;
                }
            }
            panels
        })
    }
}
