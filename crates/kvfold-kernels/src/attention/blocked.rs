//! Attention in blocks of queries and keys: no T x T array, all products on register tiles.
//!
//! Forward keeps a running maximum and sum per query (online softmax); backward recomputes the probabilities of a block
//! from the saved log-sum-exp. Blocks that no query of the block sees are never visited.

use super::{AttentionJob, AttentionJobGrad, KeyGrad, KeyView, View};
use crate::kernel_set::KernelSet;
use crate::real::{self, Real};
use crate::simd::{Gemm, PANEL};

/// Queries of a block.
const QUERIES: usize = 48;
/// Keys of a block.
const KEYS: usize = 128;

/// `[T,D]` rows of a view, times `factor`.
fn gather<F: Real>(view: &View<'_, F>, col: usize, (len, dim): (usize, usize), factor: F) -> Vec<F> {
    let mut rows = Vec::with_capacity(len * dim);
    for t in 0..len {
        rows.extend(view.row(t, col, dim).iter().map(|&x| x * factor));
    }
    rows
}

/// `[T,D]` as `[D][T rounded up to a panel]`.
fn transposed<F: Real>(rows: &[F], len: usize, dim: usize) -> Vec<F> {
    let stride = len.next_multiple_of(PANEL);
    let mut out = vec![F::zero(); dim * stride];
    for (t, row) in rows.chunks_exact(dim).enumerate() {
        for (d, &x) in row.iter().enumerate() {
            out[d * stride + t] = x;
        }
    }
    out
}

/// One set of keys, laid out for the tiles.
struct Packed<F> {
    k: Vec<F>,
    kt: Vec<F>,
    v: Vec<F>,
    mass: Option<Vec<F>>,
    /// For pooled states: spared for the last state a query sees.
    close: Option<Vec<F>>,
}

impl<F: Real> Packed<F> {
    fn new(keys: &KeyView<'_, F>, close: Option<&View<'_, F>>, len: usize, dim: usize) -> Self {
        let column = |view: &View<'_, F>| (0..len).map(|t| view.at(t)).collect();
        let k = gather(&keys.k, 0, (len, dim), F::one());
        let kt = transposed(&k, len, dim);
        let v = gather(&keys.v, 0, (len, dim), F::one());
        Self { k, kt, v, mass: keys.mass.as_ref().map(column), close: close.map(column) }
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
    fn new(job: &'a AttentionJob<'a, F>) -> Self {
        let pack = |keys: &KeyView<'_, F>, close: Option<&View<'_, F>>| Packed::new(keys, close, job.len, job.dim);
        Self {
            job,
            exact: job.exact.as_ref().map(|keys| pack(keys, None)),
            pooled: job.pooled.as_ref().map(|(keys, close)| pack(keys, Some(close))),
        }
    }

    /// Calls `visit` with every block that some query of `i0..i0+rows` sees.
    fn blocks(&self, i0: usize, rows: usize, mut visit: impl FnMut(&Packed<F>, &Block)) {
        let last = i0 + rows - 1;
        let mut cover = |packed: &Option<Packed<F>>, lo: usize, hi: usize| {
            let Some(packed) = packed else { return };
            for j0 in (lo..hi).step_by(KEYS) {
                visit(packed, &Block { i0, rows, j0, width: KEYS.min(hi - j0) });
            }
        };
        cover(&self.pooled, 0, self.job.pooled_count(last));
        cover(&self.exact, self.job.exact_range(i0).0, self.job.exact_range(last).1);
    }

    /// The scores of a block into `s`, rows `KEYS` apart; keys that a query does not see get minus infinity.
    fn scores<K: KernelSet<F>>(&self, set: K, packed: &Packed<F>, block: &Block, q: &[F], s: &mut [F]) {
        let (job, dim) = (self.job, self.job.dim);
        let &Block { i0, rows, j0, width } = block;
        let stride = job.len.next_multiple_of(PANEL);
        let product = Gemm {
            m: rows,
            n: width,
            k: dim,
            a: &q[i0 * dim..],
            a_row: dim,
            a_col: 1,
            b: &packed.kt[j0..],
            b_row: stride,
            c_row: KEYS,
            accumulate: false,
        };
        set.gemm(product, s);
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

/// Output `[group][T][D]` and log-sum-exp `[group][T]`.
pub(crate) fn forward<F: Real, K: KernelSet<F>>(set: K, job: &AttentionJob<'_, F>, out: &mut [F], lse: &mut [F]) {
    let (len, dim) = (job.len, job.dim);
    let walk = Walk::new(job);
    let mut s = vec![F::zero(); QUERIES * KEYS];
    for g in 0..job.group {
        let q = gather(&job.q, g * dim, (len, dim), job.scale());
        for i0 in (0..len).step_by(QUERIES) {
            let rows = QUERIES.min(len - i0);
            let acc = &mut out[(g * len + i0) * dim..][..rows * dim];
            acc.fill(F::zero());
            let (mut top, mut total) = ([F::neg_infinity(); QUERIES], [F::zero(); QUERIES]);
            walk.blocks(i0, rows, |packed, block| {
                walk.scores(set, packed, block, &q, &mut s);
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
                let product = Gemm {
                    m: rows,
                    n: dim,
                    k: block.width,
                    a: &s,
                    a_row: KEYS,
                    a_col: 1,
                    b: &packed.v[block.j0 * dim..],
                    b_row: dim,
                    c_row: dim,
                    accumulate: true,
                };
                set.gemm(product, acc);
            });
            for r in 0..rows {
                let share = F::one() / total[r];
                acc[r * dim..][..dim].iter_mut().for_each(|o| *o *= share);
                lse[g * len + i0 + r] = top[r] + total[r].ln();
            }
        }
    }
}

/// The adjoint of [`forward`].
pub(crate) fn backward<F: Real, K: KernelSet<F>>(
    set: K,
    job: &AttentionJob<'_, F>,
    grad: &mut AttentionJobGrad<'_, F>,
) {
    let (len, dim) = (job.len, job.dim);
    let walk = Walk::new(job);
    let vt = |packed: &Option<Packed<F>>| packed.as_ref().map(|p| transposed(&p.v, len, dim));
    let (exact_vt, pooled_vt) = (vt(&walk.exact), vt(&walk.pooled));
    let stride = len.next_multiple_of(PANEL);
    let (mut p, mut ds) = (vec![F::zero(); QUERIES * KEYS], vec![F::zero(); QUERIES * KEYS]);
    for g in 0..job.group {
        let q = gather(&job.q, g * dim, (len, dim), job.scale());
        let d = gather(&grad.d, g * dim, (len, dim), F::one());
        for i0 in (0..len).step_by(QUERIES) {
            let rows = QUERIES.min(len - i0);
            let at = g * len + i0;
            let (out, lse) = (&grad.out[at * dim..], &grad.lse[at..]);
            let mut delta = [F::zero(); QUERIES];
            for (r, delta) in delta.iter_mut().enumerate().take(rows) {
                *delta = real::dot(&d[(i0 + r) * dim..][..dim], &out[r * dim..][..dim]);
            }
            walk.blocks(i0, rows, |packed, block| {
                let &Block { j0, width, .. } = block;
                let pooled = packed.close.is_some();
                let vt = if pooled { &pooled_vt } else { &exact_vt }.as_ref().expect("packed with its keys");
                let to = if pooled { &mut grad.pooled } else { &mut grad.exact };
                walk.scores(set, packed, block, &q, &mut p);
                let dp = Gemm {
                    m: rows,
                    n: width,
                    k: dim,
                    a: &d[i0 * dim..],
                    a_row: dim,
                    a_col: 1,
                    b: &vt[j0..],
                    b_row: stride,
                    c_row: KEYS,
                    accumulate: false,
                };
                set.gemm(dp, &mut ds);
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
                let back = Gemm {
                    m: rows,
                    n: dim,
                    k: width,
                    a: &ds,
                    a_row: KEYS,
                    a_col: 1,
                    b: &packed.k[j0 * dim..],
                    b_row: dim,
                    c_row: dim,
                    accumulate: true,
                };
                set.gemm(back, &mut grad.q[at * dim..][..rows * dim]);
                let across = |a, b| Gemm { m: width, n: dim, k: rows, a, a_row: 1, a_col: KEYS, b, ..back };
                set.gemm(across(&ds, &q[i0 * dim..]), &mut to.k[j0 * dim..][..width * dim]);
                set.gemm(across(&p, &d[i0 * dim..]), &mut to.v[j0 * dim..][..width * dim]);
            });
        }
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
