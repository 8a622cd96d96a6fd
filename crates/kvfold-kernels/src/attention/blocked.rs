//! Attention in blocks of queries and keys: no T x T array, all products on register tiles.
//!
//! Forward keeps a running maximum and sum per query (online softmax); backward recomputes the probabilities of a block
//! from the saved log-sum-exp. Blocks that no query of the block sees are never visited.

use super::{AttentionJob, AttentionJobGrad, KeyGrad, KeyView, View};
use crate::kernel_set::KernelSet;
use crate::ops::{Late, LateReads};
use crate::real::{self, Real};
use crate::simd::{Gemm, STRIP};

/// Queries of a block.
const QUERIES: usize = 48;
/// Keys of a block.
const KEYS: usize = 128;

/// `[T,D]` rows of a view, times `factor`.
fn gather<F: Real>(view: &View<'_, F>, col: usize, (len, dim): (usize, usize), factor: F) -> Vec<F> {
    let mut rows = vec![F::zero(); len * dim];
    for (t, row) in rows.chunks_exact_mut(dim).enumerate() {
        row.iter_mut().zip(view.row(t, col, dim)).for_each(|(to, &x)| *to = x * factor);
    }
    rows
}

/// `[T,D]` as a right factor whose terms are tokens: strips of 16 channels, `[D/16][T][16]`.
fn strips_of_channels<F: Real>(rows: &[F], (len, dim): (usize, usize)) -> Vec<F> {
    let mut strips = vec![F::zero(); dim.div_ceil(STRIP) * len * STRIP];
    for (n, strip) in strips.chunks_exact_mut(len * STRIP).enumerate() {
        let width = STRIP.min(dim - n * STRIP);
        for (to, row) in strip.chunks_exact_mut(STRIP).zip(rows.chunks_exact(dim)) {
            to[..width].copy_from_slice(&row[n * STRIP..][..width]);
        }
    }
    strips
}

/// `[T,D]` as a right factor whose terms are channels: strips of 16 tokens, `[T/16][D][16]`.
fn strips_of_tokens<F: Real>(rows: &[F], (len, dim): (usize, usize)) -> Vec<F> {
    let mut strips = vec![F::zero(); len.div_ceil(STRIP) * dim * STRIP];
    for (strip, rows) in strips.chunks_exact_mut(dim * STRIP).zip(rows.chunks(dim * STRIP)) {
        for (t, row) in rows.chunks_exact(dim).enumerate() {
            row.iter().enumerate().for_each(|(d, &x)| strip[d * STRIP + t] = x);
        }
    }
    strips
}

/// One set of keys, laid out for the tiles.
struct Packed<F> {
    /// Keys and values, strips of tokens.
    k_by_token: Vec<F>,
    v_by_token: Vec<F>,
    /// Keys and values, strips of channels.
    k_by_channel: Vec<F>,
    v_by_channel: Vec<F>,
    mass: Option<Vec<F>>,
    /// For pooled states: spared for the last state a query sees.
    close: Option<Vec<F>>,
}

/// Which products keys are laid out for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

impl<F: Real> Packed<F> {
    fn new(keys: &KeyView<'_, F>, close: Option<&View<'_, F>>, size: (usize, usize), pass: Pass) -> Self {
        let column = |view: &View<'_, F>| (0..size.0).map(|t| view.at(t)).collect();
        let (k, v) = (gather(&keys.k, 0, size, F::one()), gather(&keys.v, 0, size, F::one()));
        let (k_by_channel, v_by_token, v_by_channel) = match pass {
            Pass::Forward => (Vec::new(), Vec::new(), strips_of_channels(&v, size)),
            Pass::Backward => (strips_of_channels(&k, size), strips_of_tokens(&v, size), Vec::new()),
        };
        Self {
            k_by_token: strips_of_tokens(&k, size),
            v_by_token,
            k_by_channel,
            v_by_channel,
            mass: keys.mass.as_ref().map(column),
            close: close.map(column),
        }
    }
}

/// One block of scores: queries `i0..i0+rows` of a head, keys `j0..j0+width`.
struct Block {
    i0: usize,
    rows: usize,
    j0: usize,
    width: usize,
}

/// A job with its keys packed; walks the blocks that matter.
struct Walk<'a, F> {
    job: &'a AttentionJob<'a, F>,
    exact: Option<Packed<F>>,
    pooled: Option<Packed<F>>,
}

impl<'a, F: Real> Walk<'a, F> {
    fn new(job: &'a AttentionJob<'a, F>, pass: Pass) -> Self {
        let pack = |keys: &KeyView<'_, F>, close| Packed::new(keys, close, (job.len, job.dim), pass);
        Self {
            job,
            exact: job.exact.as_ref().map(|keys| pack(keys, None)),
            pooled: job.pooled.as_ref().map(|(keys, close)| pack(keys, Some(close))),
        }
    }

    /// Calls `visit` with every block that some query of `i0..i0+rows` sees. Blocks begin where strips do.
    fn blocks(&self, i0: usize, rows: usize, mut visit: impl FnMut(&Packed<F>, &Block)) {
        let last = i0 + rows - 1;
        let mut cover = |packed: &Option<Packed<F>>, lo: usize, hi: usize| {
            let Some(packed) = packed else { return };
            for j0 in (lo - lo % STRIP..hi).step_by(KEYS) {
                visit(packed, &Block { i0, rows, j0, width: KEYS.min(hi - j0) });
            }
        };
        cover(&self.pooled, 0, self.job.pooled_count(last));
        cover(&self.exact, self.job.exact_range(i0).0, self.job.exact_range(last).1);
    }

    /// Products of the rows of queries, or of their gradients, with the keys, or the values, of a block.
    fn by_token<'b>(&self, block: &Block, rows: &'b [F], strips: &'b [F]) -> Gemm<'b, F> {
        let dim = self.job.dim;
        Gemm {
            m: block.rows,
            n: block.width,
            k: dim,
            a: &rows[block.i0 * dim..],
            a_row: dim,
            a_col: 1,
            b: &strips[block.j0 * dim..],
            b_row: STRIP,
            b_strip: dim * STRIP,
            c_row: KEYS,
            accumulate: false,
        }
    }

    /// Sums over the tokens of a block, from token `first` of `strips` on.
    fn over_tokens<'b>(&self, (m, k): (usize, usize), a: &'b [F], strips: &'b [F], first: usize) -> Gemm<'b, F> {
        let Self { job: &AttentionJob { len, dim, .. }, .. } = *self;
        Gemm {
            m,
            n: dim,
            k,
            a,
            a_row: KEYS,
            a_col: 1,
            b: &strips[first * STRIP..],
            b_row: STRIP,
            b_strip: len * STRIP,
            c_row: dim,
            accumulate: true,
        }
    }

    /// The scores of a block into `s`, rows `KEYS` apart; keys that a query does not see get minus infinity.
    fn scores<K: KernelSet<F>>(&self, set: K, packed: &Packed<F>, block: &Block, q: &[F], s: &mut [F]) {
        let job = self.job;
        let &Block { i0, rows, j0, width } = block;
        set.gemm(self.by_token(block, q, &packed.k_by_token), s);
        set.run(
            #[inline(always)]
            || {
                for (r, s) in s.chunks_exact_mut(KEYS).take(rows).enumerate() {
                    let i = i0 + r;
                    let (lo, hi) = if packed.close.is_some() { (0, job.pooled_count(i)) } else { job.exact_range(i) };
                    let clip = |j: usize| j.clamp(j0, j0 + width) - j0;
                    let (lo, hi) = (clip(lo), clip(hi).max(clip(lo)));
                    if let Some(mass) = &packed.mass {
                        s[lo..hi].iter_mut().zip(&mass[j0 + lo..]).for_each(|(s, &b)| *s += b);
                    }
                    if let Some(close) = &packed.close {
                        let closing = clip(job.pooled_count(i).saturating_sub(1)).max(lo);
                        s[lo..closing].iter_mut().zip(&close[j0 + lo..]).for_each(|(s, &b)| *s += b);
                    }
                    s[..lo].fill(F::neg_infinity());
                    s[hi..width].fill(F::neg_infinity());
                }
            },
        );
    }
}

/// The queries' heads, `[group][T][D]`.
fn gather_group<F: Real>(job: &AttentionJob<'_, F>, view: &View<'_, F>, factor: F) -> Vec<Vec<F>> {
    (0..job.group).map(|g| gather(view, g * job.dim, (job.len, job.dim), factor)).collect()
}

/// Output `[group][T][D]` and log-sum-exp `[group][T]`.
pub(crate) fn forward<F: Real, K: KernelSet<F>>(set: K, job: &AttentionJob<'_, F>, out: &mut [F], lse: &mut [F]) {
    let (len, dim) = (job.len, job.dim);
    let walk = Walk::new(job, Pass::Forward);
    let q = gather_group(job, &job.q, job.scale());
    let mut s = vec![F::zero(); QUERIES * KEYS];
    let mut running = vec![([F::zero(); QUERIES], [F::zero(); QUERIES]); job.group];
    out.fill(F::zero());
    for i0 in (0..len).step_by(QUERIES) {
        let rows = QUERIES.min(len - i0);
        running.fill(([F::neg_infinity(); QUERIES], [F::zero(); QUERIES]));
        walk.blocks(i0, rows, |packed, block| {
            // A block's keys stay in cache for all queries of the group.
            for (g, (top, total)) in running.iter_mut().enumerate() {
                let acc = &mut out[(g * len + i0) * dim..][..rows * dim];
                walk.scores(set, packed, block, &q[g], &mut s);
                set.run(
                    #[inline(always)]
                    || {
                        for (r, s) in s.chunks_exact_mut(KEYS).take(rows).enumerate() {
                            let s = &mut s[..block.width];
                            let new = top[r].max(real::max(s));
                            if new == F::neg_infinity() {
                                s.fill(F::zero());
                                continue;
                            }
                            let keep = K::exp(top[r] - new);
                            s.iter_mut().for_each(|s| *s = K::exp(*s - new));
                            total[r] = total[r] * keep + real::total(s);
                            acc[r * dim..][..dim].iter_mut().for_each(|o| *o *= keep);
                            top[r] = new;
                        }
                    },
                );
                set.gemm(walk.over_tokens((rows, block.width), &s, &packed.v_by_channel, block.j0), acc);
            }
        });
        for (g, (top, total)) in running.iter().enumerate() {
            for r in 0..rows {
                let share = F::one() / total[r];
                out[(g * len + i0 + r) * dim..][..dim].iter_mut().for_each(|o| *o *= share);
                lse[g * len + i0 + r] = top[r] + total[r].ln();
            }
        }
    }
}

/// Sums over the queries that read each key late, `[group][T]` each; of plain attention.
pub(crate) fn reads<F: Real, K: KernelSet<F>>(
    set: K,
    job: &AttentionJob<'_, F>,
    lse: &[F],
    Late { later, pair }: Late,
    LateReads { own, apart, lost }: LateReads<&mut [F]>,
) {
    let (len, more) = (job.len, F::of(2.0 - pair));
    let walk = Walk::new(job, Pass::Forward);
    let q = gather_group(job, &job.q, job.scale());
    let mut s = vec![F::zero(); QUERIES * KEYS];
    // Roots of the shares of a block's keys, after that of the key before them.
    let mut roots = [F::zero(); KEYS + 1];
    let mut before = vec![[F::zero(); QUERIES]; job.group];
    let half = F::of(0.5);
    [&mut *own, &mut *apart, &mut *lost].into_iter().for_each(|sums| sums.fill(F::zero()));
    for i0 in (0..len).step_by(QUERIES) {
        before.fill([F::zero(); QUERIES]);
        // Blocks come in the order of their keys.
        walk.blocks(i0, QUERIES.min(len - i0), |packed, block| {
            for ((g, q), before) in q.iter().enumerate().zip(&mut before) {
                walk.scores(set, packed, block, q, &mut s);
                let at = g * len + block.j0..g * len + block.j0 + block.width;
                let (own, apart, lost) = (&mut own[at.clone()], &mut apart[at.clone()], &mut lost[at]);
                set.run(
                    #[inline(always)]
                    || {
                        for (r, s) in s.chunks_exact(KEYS).take(block.rows).enumerate() {
                            let (i, lse) = (block.i0 + r, lse[g * len + block.i0 + r]);
                            let late = (i + 1).saturating_sub(later).clamp(block.j0, block.j0 + block.width) - block.j0;
                            roots[0] = before[r];
                            for (root, &s) in roots[1..][..late].iter_mut().zip(s) {
                                *root = K::exp((s - lse) * half);
                            }
                            before[r] = roots[late];
                            let sums = own[..late].iter_mut().zip(&mut apart[..late]).zip(&mut lost[..late]);
                            for (((own, apart), lost), (&last, &root)) in sums.zip(roots.iter().zip(&roots[1..])) {
                                let (p, q) = (root * root, last * last);
                                *own += p * p;
                                *apart += (p - q) * (p - q);
                                // Without the cancellation of p + q - pair * root * last.
                                let less = (root - last) * (root - last) + more * root * last;
                                *lost += less * less;
                            }
                        }
                    },
                );
            }
        });
    }
}

/// The adjoint of [`forward`].
pub(crate) fn backward<F: Real, K: KernelSet<F>>(
    set: K,
    job: &AttentionJob<'_, F>,
    grad: &mut AttentionJobGrad<'_, F>,
) {
    let (len, dim) = (job.len, job.dim);
    let walk = Walk::new(job, Pass::Backward);
    let (q, d) = (gather_group(job, &job.q, job.scale()), gather_group(job, &grad.d, F::one()));
    let by_channel = |heads: &[Vec<F>]| -> Vec<_> { heads.iter().map(|x| strips_of_channels(x, (len, dim))).collect() };
    let (q_by_channel, d_by_channel) = (by_channel(&q), by_channel(&d));
    let (mut p, mut ds) = (vec![F::zero(); QUERIES * KEYS], vec![F::zero(); QUERIES * KEYS]);
    let mut deltas = vec![[F::zero(); QUERIES]; job.group];
    for i0 in (0..len).step_by(QUERIES) {
        let rows = QUERIES.min(len - i0);
        for (g, deltas) in deltas.iter_mut().enumerate() {
            for (r, delta) in deltas.iter_mut().enumerate().take(rows) {
                *delta = real::dot(&d[g][(i0 + r) * dim..][..dim], &grad.out[(g * len + i0 + r) * dim..][..dim]);
            }
        }
        walk.blocks(i0, rows, |packed, block| {
            let &Block { j0, width, .. } = block;
            let to = if packed.close.is_some() { &mut grad.pooled } else { &mut grad.exact };
            for (g, delta) in deltas.iter().enumerate() {
                let (at, lse) = (g * len + i0, &grad.lse[g * len + i0..]);
                walk.scores(set, packed, block, &q[g], &mut p);
                set.gemm(walk.by_token(block, &d[g], &packed.v_by_token), &mut ds);
                set.run(
                    #[inline(always)]
                    || {
                        for r in 0..rows {
                            let (p, ds) = (&mut p[r * KEYS..][..width], &mut ds[r * KEYS..][..width]);
                            for (p, ds) in p.iter_mut().zip(ds) {
                                *p = K::exp(*p - lse[r]);
                                *ds = *p * (*ds - delta[r]);
                            }
                        }
                        bias_grads(job, packed, block, &ds, to);
                    },
                );
                let back = walk.over_tokens((rows, width), &ds, &packed.k_by_channel, j0);
                set.gemm(back, &mut grad.q[at * dim..][..rows * dim]);
                let across = |a, strips| {
                    let sum = walk.over_tokens((width, rows), a, strips, i0);
                    Gemm { a_row: 1, a_col: KEYS, ..sum }
                };
                set.gemm(across(&ds, &q_by_channel[g]), &mut to.k[j0 * dim..][..width * dim]);
                set.gemm(across(&p, &d_by_channel[g]), &mut to.v[j0 * dim..][..width * dim]);
            }
        });
    }
    let scale = job.scale();
    grad.q.iter_mut().for_each(|q| *q *= scale);
}

/// Column sums of the score gradients: what the biases on a key get.
#[inline(always)]
fn bias_grads<F: Real>(
    job: &AttentionJob<'_, F>,
    packed: &Packed<F>,
    block: &Block,
    ds: &[F],
    to: &mut KeyGrad<'_, F>,
) {
    let &Block { i0, rows, j0, width } = block;
    for r in 0..rows {
        let ds = &ds[r * KEYS..][..width];
        if packed.mass.is_some() {
            to.mass[j0..j0 + width].iter_mut().zip(ds).for_each(|(to, &ds)| *to += ds);
        }
        if packed.close.is_some() {
            let closing = job.pooled_count(i0 + r).saturating_sub(1).clamp(j0, j0 + width) - j0;
            to.close[j0..j0 + closing].iter_mut().zip(ds).for_each(|(to, &ds)| *to += ds);
        }
    }
}
