//! Attention in blocks of queries and keys: no T x T array, all products on register tiles.
//!
//! Forward keeps a running maximum and sum per query (online softmax); backward recomputes the probabilities of a block
//! from the saved log-sum-exp. Blocks that no query of the block sees are never visited.

mod factors;

use super::{AttentionJob, AttentionJobGrad, KeyGrad, KeyView, View};
use crate::aligned::Aligned;
use crate::kernel_set::KernelSet;
use crate::ops::{Late, LateReads, Precision};
use crate::real::{self, Real};
use factors::{Block, Factors, Floats, Words};

/// Queries of a block at most.
const QUERIES: usize = 64;
/// Keys of a block.
const KEYS: usize = 128;

/// `[T,D]` rows of a view, times `factor`.
fn gather<F: Real, K: KernelSet<F>>(
    set: K,
    view: &View<'_, F>,
    col: usize,
    (len, dim): (usize, usize),
    factor: F,
) -> Aligned<F> {
    let mut rows = Aligned::new(len * dim);
    set.run(
        #[inline(always)]
        || {
            for (t, row) in rows.chunks_exact_mut(dim).enumerate() {
                row.iter_mut().zip(view.row(t, col, dim)).for_each(|(to, &x)| *to = x * factor);
            }
        },
    );
    rows
}

/// One set of keys, laid out for its products.
struct Packed<F, N> {
    k_by_token: Aligned<N>,
    v_by_token: Aligned<N>,
    k_by_channel: Aligned<N>,
    v_by_channel: Aligned<N>,
    mass: Option<Vec<F>>,
    /// For pooled states: spared for the last state a query sees.
    close: Option<Vec<F>>,
}

/// Which products keys are laid out for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Scores,
    Forward,
    Backward,
}

/// A job with its keys packed; walks the blocks that matter.
struct Walk<'a, F, N> {
    job: &'a AttentionJob<'a, F>,
    exact: Option<Packed<F, N>>,
    pooled: Option<Packed<F, N>>,
}

impl<'a, F: Real, N: Copy> Walk<'a, F, N> {
    fn new<K: KernelSet<F>>(
        (set, products): (K, &impl Factors<F, K, Number = N>),
        job: &'a AttentionJob<'a, F>,
        pass: Pass,
    ) -> Self {
        let size = (job.len, job.dim);
        let pack = |keys: &KeyView<'_, F>, close: Option<&View<'_, F>>| {
            let column = |view: &View<'_, F>| (0..job.len).map(|t| view.at(t)).collect();
            let (k, v) = (gather(set, &keys.k, 0, size, F::one()), gather(set, &keys.v, 0, size, F::one()));
            let when = |passes: &[Pass], packed: &dyn Fn() -> Aligned<N>| match passes.contains(&pass) {
                true => packed(),
                false => Aligned::default(),
            };
            Packed {
                k_by_token: products.by_token(&k, size),
                v_by_token: when(&[Pass::Backward], &|| products.by_token(&v, size)),
                k_by_channel: when(&[Pass::Backward], &|| products.by_channel(&k, size)),
                v_by_channel: when(&[Pass::Forward], &|| products.by_channel(&v, size)),
                mass: keys.mass.as_ref().map(column),
                close: close.map(column),
            }
        };
        let exact = job.exact.as_ref().map(|keys| pack(keys, None));
        let pooled = job.pooled.as_ref().map(|(keys, close)| pack(keys, Some(close)));
        Self { job, exact, pooled }
    }

    /// The blocks that some of the queries `i0..i0+rows` see, pooled states first, each in the order of its keys.
    fn blocks(&self, i0: usize, rows: usize, align: usize) -> impl Iterator<Item = (&Packed<F, N>, Block)> {
        let (job, last) = (self.job, i0 + rows - 1);
        let exact = (job.exact_range(i0).0, job.exact_range(last).1);
        let of = move |keys: &'_ Option<Packed<F, N>>, (lo, hi): (usize, usize)| {
            let starts = if keys.is_some() { lo - lo % align..hi } else { 0..0 };
            starts.step_by(KEYS).map(move |j0| Block { i0, rows, j0, width: KEYS.min(hi - j0) })
        };
        let pooled = of(&self.pooled, (0, job.pooled_count(last)));
        let exact = of(&self.exact, exact);
        self.pooled.iter().cycle().zip(pooled).chain(self.exact.iter().cycle().zip(exact))
    }

    /// The scores of a block into `s`, rows `KEYS` apart; keys that a query does not see get minus infinity.
    fn scores<K: KernelSet<F>>(
        &self,
        (set, products): (K, &impl Factors<F, K, Number = N>),
        (packed, block): (&Packed<F, N>, Block),
        q: &[N],
        s: &mut [F],
    ) {
        let job = self.job;
        let Block { i0, rows, j0, width } = block;
        products.scores((job.len, job.dim), block, q, &packed.k_by_token, s);
        let sees_all = |i: usize| {
            let (lo, hi) = job.exact_range(i);
            lo <= j0 && j0 + width <= hi
        };
        // Between its ends a block's queries see what they all see.
        if packed.mass.is_none() && packed.close.is_none() && sees_all(i0) && sees_all(i0 + rows - 1) {
            return;
        }
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

/// The heads of a group of queries, or of their gradients, `[group][T][D]`.
fn gather_group<F: Real, K: KernelSet<F>>(
    set: K,
    job: &AttentionJob<'_, F>,
    view: &View<'_, F>,
    factor: F,
) -> Vec<Aligned<F>> {
    (0..job.group).map(|g| gather(set, view, g * job.dim, (job.len, job.dim), factor)).collect()
}

/// Runs `$of` on the layout that a job's precision asks for and the machine is fast with.
macro_rules! with_layout {
    ($of:ident, $set:expr, $job:expr $(, $rest:expr)*) => {
        match $job.precision {
            Precision::Bf16 if $set.tiles() => $of::<F, K, Words<K>>($set, $job $(, $rest)*),
            _ => $of::<F, K, Floats<K>>($set, $job $(, $rest)*),
        }
    };
}

/// Output `[group][T][D]` and log-sum-exp `[group][T]`.
pub(crate) fn forward<F: Real, K: KernelSet<F>>(set: K, job: &AttentionJob<'_, F>, out: &mut [F], lse: &mut [F]) {
    with_layout!(forward_with, set, job, out, lse);
}

/// Sums over the queries that read each key late, `[group][T]` each; of plain attention.
pub(crate) fn reads<F: Real, K: KernelSet<F>>(
    set: K,
    job: &AttentionJob<'_, F>,
    lse: &[F],
    late: Late,
    sums: LateReads<&mut [F]>,
) {
    with_layout!(reads_with, set, job, lse, late, sums);
}

/// The adjoint of [`forward`].
pub(crate) fn backward<F: Real, K: KernelSet<F>>(
    set: K,
    job: &AttentionJob<'_, F>,
    grad: &mut AttentionJobGrad<'_, F>,
) {
    with_layout!(backward_with, set, job, grad);
}

fn forward_with<F: Real, K: KernelSet<F>, P: Factors<F, K>>(
    set: K,
    job: &AttentionJob<'_, F>,
    out: &mut [F],
    lse: &mut [F],
) {
    let size @ (len, dim) = (job.len, job.dim);
    let mut products = P::new(set);
    let walk = Walk::new((set, &products), job, Pass::Forward);
    let q = gather_group(set, job, &job.q, job.scale());
    let q: Vec<_> = q.into_iter().map(|q| products.left(q, size)).collect();
    let mut s = Aligned::new(P::QUERIES * KEYS);
    let mut running = vec![([F::zero(); QUERIES], [F::zero(); QUERIES]); job.group];
    out.fill(F::zero());
    for i0 in (0..len).step_by(P::QUERIES) {
        let rows = P::QUERIES.min(len - i0);
        running.fill(([F::neg_infinity(); QUERIES], [F::zero(); QUERIES]));
        for (packed, block) in walk.blocks(i0, rows, P::ALIGN) {
            // A block's keys stay in cache for all queries of the group.
            for (g, (top, total)) in running.iter_mut().enumerate() {
                let acc = &mut out[(g * len + i0) * dim..][..rows * dim];
                walk.scores((set, &products), (packed, block), &q[g], &mut s);
                set.run(
                    #[inline(always)]
                    || {
                        // What is left of the sums so far, first as how much the largest score grew.
                        let mut keep = [F::zero(); QUERIES];
                        for (r, s) in s.chunks_exact(KEYS).take(rows).enumerate() {
                            let new = top[r].max(real::max(&s[..block.width]));
                            keep[r] = if new == top[r] { F::zero() } else { top[r] - new };
                            top[r] = new;
                        }
                        // Where it did not grow, exactly 1: also where no query has seen anything yet.
                        let share = |grown: F| if grown == F::zero() { F::one() } else { K::exp_share(grown) };
                        keep.iter_mut().for_each(|keep| *keep = share(*keep));
                        for (r, s) in s.chunks_exact_mut(KEYS).take(rows).enumerate() {
                            let s = &mut s[..block.width];
                            let (top, keep) = (top[r], keep[r]);
                            if top == F::neg_infinity() {
                                s.fill(F::zero());
                                continue;
                            }
                            let sum = real::map_and_sum(
                                s,
                                #[inline(always)]
                                |s| K::exp_share(s - top),
                            );
                            total[r] = total[r] * keep + sum;
                            if keep != F::one() {
                                acc[r * dim..][..dim].iter_mut().for_each(|o| *o *= keep);
                            }
                        }
                    },
                );
                products.over_keys(size, block, &s, &packed.v_by_channel, acc);
            }
        }
        for (g, (top, total)) in running.iter().enumerate() {
            for r in 0..rows {
                let share = F::one() / total[r];
                out[(g * len + i0 + r) * dim..][..dim].iter_mut().for_each(|o| *o *= share);
                lse[g * len + i0 + r] = top[r] + total[r].ln();
            }
        }
    }
}

fn reads_with<F: Real, K: KernelSet<F>, P: Factors<F, K>>(
    set: K,
    job: &AttentionJob<'_, F>,
    lse: &[F],
    Late { later, pair }: Late,
    LateReads { own, apart, lost }: LateReads<&mut [F]>,
) {
    let (size, more) = ((job.len, job.dim), F::of(2.0 - pair));
    let len = job.len;
    let products = P::new(set);
    let walk = Walk::new((set, &products), job, Pass::Scores);
    let q = gather_group(set, job, &job.q, job.scale());
    let q: Vec<_> = q.into_iter().map(|q| products.left(q, size)).collect();
    let mut s = Aligned::new(P::QUERIES * KEYS);
    // Roots of the shares of a block's keys, after that of the key before them.
    let mut roots = [F::zero(); KEYS + 1];
    let mut before = vec![[F::zero(); QUERIES]; job.group];
    let half = F::of(0.5);
    [&mut *own, &mut *apart, &mut *lost].into_iter().for_each(|sums| sums.fill(F::zero()));
    for i0 in (0..len).step_by(P::QUERIES) {
        before.fill([F::zero(); QUERIES]);
        // Blocks come in the order of their keys.
        for (packed, block) in walk.blocks(i0, P::QUERIES.min(len - i0), P::ALIGN) {
            for ((g, q), before) in q.iter().enumerate().zip(&mut before) {
                walk.scores((set, &products), (packed, block), q, &mut s);
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
                                *root = K::exp_share((s - lse) * half);
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
        }
    }
}

fn backward_with<F: Real, K: KernelSet<F>, P: Factors<F, K>>(
    set: K,
    job: &AttentionJob<'_, F>,
    grad: &mut AttentionJobGrad<'_, F>,
) {
    let size @ (len, dim) = (job.len, job.dim);
    let mut products = P::new(set);
    let walk = Walk::new((set, &products), job, Pass::Backward);
    let (q, d) = (gather_group(set, job, &job.q, job.scale()), gather_group(set, job, &grad.d, F::one()));
    // What the normalisation takes from every gradient of a query's scores, `[group][T]`.
    let mut deltas = Aligned::new(job.group * len);
    set.run(
        #[inline(always)]
        || {
            let rows = d.iter().flat_map(|d| d.chunks_exact(dim)).zip(grad.out.chunks_exact(dim));
            deltas.iter_mut().zip(rows).for_each(|(delta, (d, out))| *delta = real::dot(d, out));
        },
    );
    let by_channel = |heads: &[Aligned<F>]| -> Vec<_> { heads.iter().map(|x| products.by_channel(x, size)).collect() };
    let (q_by_channel, d_by_channel) = (by_channel(&q), by_channel(&d));
    let left = |heads: Vec<Aligned<F>>| -> Vec<_> { heads.into_iter().map(|x| products.left(x, size)).collect() };
    let (q, d) = (left(q), left(d));
    let (mut p, mut ds) = (Aligned::new(P::QUERIES * KEYS), Aligned::new(P::QUERIES * KEYS));
    for i0 in (0..len).step_by(P::QUERIES) {
        let rows = P::QUERIES.min(len - i0);
        for (packed, block) in walk.blocks(i0, rows, P::ALIGN) {
            let Block { j0, width, .. } = block;
            let to = if packed.close.is_some() { &mut grad.pooled } else { &mut grad.exact };
            for g in 0..job.group {
                let at = g * len + i0;
                let (lse, delta) = (&grad.lse[at..], &deltas[at..]);
                walk.scores((set, &products), (packed, block), &q[g], &mut p);
                products.scores(size, block, &d[g], &packed.v_by_token, &mut ds);
                set.run(
                    #[inline(always)]
                    || {
                        for r in 0..rows {
                            let (p, ds) = (&mut p[r * KEYS..][..width], &mut ds[r * KEYS..][..width]);
                            for (p, ds) in p.iter_mut().zip(ds) {
                                *p = K::exp_share(*p - lse[r]);
                                *ds = *p * (*ds - delta[r]);
                            }
                        }
                        bias_grads(job, packed, block, &ds, to);
                    },
                );
                products.over_keys(size, block, &ds, &packed.k_by_channel, &mut grad.q[at * dim..][..rows * dim]);
                products.over_queries(size, block, &ds, &q_by_channel[g], &mut to.k[j0 * dim..][..width * dim]);
                products.over_queries(size, block, &p, &d_by_channel[g], &mut to.v[j0 * dim..][..width * dim]);
            }
        }
    }
    let scale = job.scale();
    grad.q.iter_mut().for_each(|q| *q *= scale);
}

/// Column sums of the score gradients: what the biases on a key get.
#[inline(always)]
fn bias_grads<F: Real, N>(
    job: &AttentionJob<'_, F>,
    packed: &Packed<F, N>,
    block: Block,
    ds: &[F],
    to: &mut KeyGrad<'_, F>,
) {
    let Block { i0, rows, j0, width } = block;
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
