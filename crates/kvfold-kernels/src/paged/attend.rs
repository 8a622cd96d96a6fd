//! Attention of one new token over slots and ring: decode.
//!
//! Per query: scores, each one chain of additions over D; their maximum; the exponentials, added up lane by lane over
//! the slots and then the ring; and the output, one chain over slots, then seats. Prefill computes every number in the same
//! order (`prefill.rs`), so it makes no difference how a text is cut into chunks (promise I3).
//!
//! A row of scores is the closed slots, the open one, lanes that nobody sees up to a multiple of 16, and likewise the
//! ring's seats.

use super::page::{Half, Page};
use super::page_kernel::{PageKernel, Vectors};
use super::take::{Moving, take};
use super::words::OpenSlots;
use super::{HeadInput, HeadTable, PAGE_SLOTS};
use crate::aligned::Aligned;
use crate::kernel_set::{Fast, KernelSet};
use crate::real::{self, LANES, Real};
use crate::rope::rotate_row;
use crate::simd::Level;
use std::ops::Range;

/// What a thread needs to attend, kept from token to token.
#[derive(Debug, Default)]
pub(crate) struct Scratch<F> {
    pub(super) moving: Moving<F>,
    /// Turned queries, `[rows][D]`.
    pub(super) q: Aligned<F>,
    /// Scores, then weights, `[rows][slots, ring]`; in words, of some panels of some rows.
    pub(super) scores: Aligned<F>,
    /// What makes a row's weights probabilities, `[rows]`.
    pub(super) shares: Vec<F>,
    /// Half a page, widened.
    pub(super) page: Aligned<F>,
    /// Outputs `[rows][D]`, before they are shared out.
    pub(super) sums: Aligned<F>,
    /// Queries as words.
    pub(super) words: Aligned<u32>,
    /// What exponentials of rows are taken beside, and their sums, lane by lane.
    pub(super) tops: Vec<F>,
    pub(super) totals: Vec<[F; LANES]>,
    /// Exponentials of some panels, as words.
    pub(super) weights: Aligned<u32>,
    /// Panels that are multiplied: keys and values.
    pub(super) keys: Aligned<u32>,
    pub(super) values: Aligned<u32>,
    /// The open slot as a page.
    pub(super) open: OpenSlots<F>,
}

/// Queries of tokens as scores need them, `[tokens * group][D]`: rotated, and times `unit / sqrt(D)`.
#[inline(always)]
pub(super) fn turn_queries<F: Real>(input: &HeadInput<'_, F>, tokens: Range<usize>, unit: F, q: &mut Aligned<F>) {
    let row = input.heads.group() * input.heads.dim;
    let scale = unit / F::of(input.heads.dim as f64).sqrt();
    q.resize(tokens.len() * row, F::zero());
    for (t, to) in tokens.zip(q.chunks_exact_mut(row)) {
        rotate_row(input.q.row(t, 0, row), input.angles(input.start + t), F::one(), to);
        to.iter_mut().for_each(|q| *q *= scale);
        if let Some(channel) = input.zeroed {
            to.chunks_exact_mut(channel.every).for_each(|to| to[channel.at] = F::zero());
        }
    }
}

/// Turns rows of scores into exponentials; a row's share makes its own probabilities.
#[inline(always)]
pub(super) fn exponentials<F: Real, K: KernelSet<F>>(scores: &mut [F], stride: usize, shares: &mut Vec<F>) {
    shares.clear();
    for row in scores.chunks_exact_mut(stride) {
        let top = real::max(row);
        let total = real::map_and_sum(
            row,
            #[inline(always)]
            |s| K::exp_share(s - top),
        );
        shares.push(F::one() / total);
    }
}

/// Pages that are on their way from memory while one is read. A page is too short for the machine to see by itself where
/// reading goes next.
const AHEAD: usize = 2;

/// The pages of `pages()`, each asked for while those before it are read.
#[inline(always)]
fn fetched<'a, F: Real, P: Iterator<Item = (usize, (Page<'a, F>, usize))>>(
    pages: impl Fn() -> P,
    half: Half,
) -> impl Iterator<Item = (usize, (Page<'a, F>, usize))> {
    let mut later = pages();
    later.by_ref().take(AHEAD).for_each(|(_, (page, _))| page.prefetch(half));
    pages().inspect(
        #[inline(always)]
        move |_| {
            if let Some((_, (page, _))) = later.next() {
                page.prefetch(half);
            }
        },
    )
}

/// One token of one head.
#[derive(Debug)]
pub struct DecodeJob<'a, F> {
    pub(crate) input: &'a HeadInput<'a, F>,
    pub(crate) table: &'a mut HeadTable,
    pub(crate) scratch: &'a mut Scratch<F>,
    /// `[group][D]`.
    pub(crate) out: &'a mut [F],
}

/// Takes the token and attends to what it sees, with the vectors of an instruction set: all of it in one function that is
/// compiled for that.
pub(crate) fn decode(level: Level, job: DecodeJob<'_, f32>) {
    match level {
        Level::Portable => Level::Portable.run(
            #[inline(always)]
            || one::<f32, Fast, Vectors<[f32; 8]>>(job),
        ),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => Level::Avx2.run(
            #[inline(always)]
            || one::<f32, Fast, Vectors<std::arch::x86_64::__m256>>(job),
        ),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 | Level::AmxBf16 => Level::Avx512.run(
            #[inline(always)]
            || one::<f32, Fast, Vectors<std::arch::x86_64::__m512>>(job),
        ),
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not an x86-64 machine"),
    }
}

/// Takes the token and attends to what it sees.
#[inline(always)]
pub(crate) fn one<F: Real, K: KernelSet<F>, P: PageKernel<F>>(job: DecodeJob<'_, F>) {
    let DecodeJob { input, table, scratch, out } = job;
    let dim = input.heads.dim;
    scratch.moving.resize(dim);
    take(input, table, 0, &mut scratch.moving);
    let Scratch { q, scores, shares, .. } = scratch;
    turn_queries(input, 0..1, F::one(), q);
    let (closed, seats) = (table.closed(input.rule), table.exact(input.rule));
    let open = (closed < table.slots).then(|| input.open_slot(&table.state));
    let ring = table.slots.next_multiple_of(PAGE_SLOTS);
    let stride = ring + seats.next_multiple_of(PAGE_SLOTS);
    scores.resize(input.heads.group() * stride, F::zero());
    let pages = || {
        let slots = input.slot_pages(table, closed).enumerate().map(|(n, page)| (n * PAGE_SLOTS, page));
        slots.chain(input.ring_pages(table).enumerate().map(move |(n, page)| (ring + n * PAGE_SLOTS, page)))
    };
    for (at, (page, _)) in fetched(&pages, Half::Keys) {
        P::scores(&page, dim, q, (&mut scores[at..], stride));
        add_masses(&mut scores[at..], stride, (page.mass, F::one()));
    }
    for row in scores.chunks_exact_mut(stride) {
        row[closed..ring].fill(F::neg_infinity());
        row[ring + seats..].fill(F::neg_infinity());
    }
    if let Some((k, _, mass)) = open {
        P::score(k, q, (&mut scores[closed..], stride));
        if input.rule.has_mass() {
            scores.chunks_exact_mut(stride).for_each(|row| row[closed] += mass);
        }
    }
    exponentials::<F, K>(scores, stride, shares);
    out.fill(F::zero());
    let mut pages = fetched(&pages, Half::Values);
    for (at, (page, used)) in pages.by_ref().take(closed.div_ceil(PAGE_SLOTS)) {
        P::values(&page, used, (&scores[at..], stride), (out, dim));
    }
    if let Some((_, v, _)) = open {
        P::value(v, (&scores[closed..], stride), out);
    }
    for (at, (page, used)) in pages {
        P::values(&page, used, (&scores[at..], stride), (out, dim));
    }
    out.chunks_exact_mut(dim).zip(shares).for_each(|(out, share)| out.iter_mut().for_each(|o| *o *= *share));
}

/// Adds so many times the log masses of a page's slots, when there are any, to rows of scores.
#[inline(always)]
pub(super) fn add_masses<F: Real>(scores: &mut [F], stride: usize, (mass, times): (&[F], F)) {
    if !mass.is_empty() {
        let add = |(score, &mass): (&mut F, &F)| *score += mass * times;
        scores.chunks_mut(stride).for_each(|row| row.iter_mut().zip(mass).for_each(add));
    }
}
