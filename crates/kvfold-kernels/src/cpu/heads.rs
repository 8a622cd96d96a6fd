//! Token-major arrays seen head by head: jobs for one KV head of one sequence, and the way back.
//!
//! A job writes its rows side by side (`[T, E]` per job); [`Cpu::to_rows`] puts the jobs' rows back into token order.
//! Jobs are ordered by sequence, then KV head.

use super::{Array, Cpu, for_rows};
use crate::attention::{KeyView, View};
use crate::kernel_set::KernelSet;
use crate::ops::{Keys, Span, Spans};
use crate::real::Real;

/// Columns `[head*width, (head+1)*width)` of a span's rows.
pub(super) fn view<'a, F: Real>(x: &'a Array<F>, span: &Span, head: usize, width: usize) -> View<'a, F> {
    let (_, cols) = x.matrix();
    View { data: x.data(), start: span.start * cols + head * width, row: cols }
}

/// One head's keys, values and masses.
pub(super) fn key_view<'a, F: Real>(keys: &'a Keys<Array<F>>, span: &Span, head: usize, dim: usize) -> KeyView<'a, F> {
    KeyView {
        k: view(&keys.k, span, head, dim),
        v: view(&keys.v, span, head, dim),
        mass: keys.mass.as_ref().map(|mass| view(mass, span, head, 1)),
    }
}

/// Splits a job-major buffer into one slice of `len * per_token` per job.
pub(super) fn split_jobs<'a, F>(mut data: &'a mut [F], spans: &Spans, kv: usize, per_token: usize) -> Vec<&'a mut [F]> {
    let mut jobs = Vec::with_capacity(spans.len() * kv);
    for span in spans {
        for _ in 0..kv {
            let (job, rest) = data.split_at_mut(span.len * per_token);
            jobs.push(job);
            data = rest;
        }
    }
    jobs
}

/// Splits token-major rows of `kv * per_token` elements, so many of each sequence, into the tokens' parts of every job.
pub(super) fn split_rows<'a, F>(
    rows: &'a mut [F],
    lens: &[usize],
    kv: usize,
    per_token: usize,
) -> Vec<Vec<&'a mut [F]>> {
    let mut jobs: Vec<Vec<&mut [F]>> =
        lens.iter().flat_map(|&len| (0..kv).map(move |_| Vec::with_capacity(len))).collect();
    let mut parts = rows.chunks_exact_mut(per_token);
    for (jobs, &len) in jobs.chunks_exact_mut(kv).zip(lens) {
        let of_sequence = parts.by_ref().take(len * kv);
        of_sequence.enumerate().for_each(|(n, part)| jobs[n % kv].push(part));
    }
    jobs
}

/// Where a job keeps the elements of one token.
#[derive(Clone, Copy, Debug)]
pub(super) struct JobLayout {
    /// KV heads.
    pub(super) kv: usize,
    /// Parts of a job, each `[T, width]`: the query heads of a group.
    pub(super) parts: usize,
    /// Elements of a part's token.
    pub(super) width: usize,
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// Jobs of `parts x [T, width]` as `[N, kv * parts * width]`.
    pub(super) fn to_rows(&self, jobs: &[F], spans: &Spans, layout: JobLayout) -> Array<F> {
        let JobLayout { kv, parts, width } = layout;
        let cols = kv * parts * width;
        let places: Vec<(&Span, usize)> = spans.iter().flat_map(|span| (0..span.len).map(move |t| (span, t))).collect();
        let mut rows = self.buffer(places.len() * cols);
        for_rows(&mut rows, cols, |first, block| {
            for (to, &(span, t)) in block.chunks_exact_mut(cols).zip(&places[first..]) {
                for (part, to) in to.chunks_exact_mut(width).enumerate() {
                    let from = span.start * cols + (part * span.len + t) * width;
                    to.copy_from_slice(&jobs[from..][..width]);
                }
            }
        });
        self.array_of(&[places.len(), cols], rows)
    }
}
