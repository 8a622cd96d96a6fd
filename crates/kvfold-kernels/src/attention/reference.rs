//! Attention by its definition, one score at a time.

use super::{AttentionJob, AttentionJobGrad, KeyView};
use crate::ops::{Late, LateReads};
use crate::real::Real;

/// A key that a query sees.
struct Seen<F> {
    pooled: bool,
    j: usize,
    /// A pooled state whose score includes `close`.
    closing: bool,
    score: F,
}

fn seen<F: Real>(job: &AttentionJob<'_, F>, g: usize, i: usize) -> Vec<Seen<F>> {
    let q = job.q.row(i, g * job.dim, job.dim);
    let score = |keys: &KeyView<'_, F>, j: usize| {
        let dot: F = q.iter().zip(keys.k.row(j, 0, job.dim)).map(|(&q, &k)| q * k).sum();
        dot * job.scale() + keys.mass.map_or(F::zero(), |mass| mass.at(j))
    };
    let mut all = Vec::new();
    if let Some((keys, close)) = &job.pooled {
        let n = job.pooled_count(i);
        for j in 0..n {
            let closing = j + 1 < n;
            let bias = if closing { close.at(j) } else { F::zero() };
            all.push(Seen { pooled: true, j, closing, score: score(keys, j) + bias });
        }
    }
    if let Some(keys) = &job.exact {
        let (lo, hi) = job.exact_range(i);
        all.extend((lo..hi).map(|j| Seen { pooled: false, j, closing: false, score: score(keys, j) }));
    }
    all
}

/// Output `[group][T][D]` and log-sum-exp `[group][T]`.
pub(crate) fn reference<F: Real>(job: &AttentionJob<'_, F>, out: &mut [F], lse: &mut [F]) {
    for g in 0..job.group {
        for i in 0..job.len {
            let seen = seen(job, g, i);
            let top = seen.iter().fold(F::neg_infinity(), |m, s| m.max(s.score));
            let total: F = seen.iter().map(|s| (s.score - top).exp()).sum();
            let row = &mut out[(g * job.len + i) * job.dim..][..job.dim];
            row.fill(F::zero());
            for s in &seen {
                let p = (s.score - top).exp() / total;
                let keys = if s.pooled { job.pooled.map(|(keys, _)| keys) } else { job.exact };
                let v = keys.expect("seen keys exist").v.row(s.j, 0, job.dim);
                row.iter_mut().zip(v).for_each(|(o, &v)| *o += p * v);
            }
            lse[g * job.len + i] = top + total.ln();
        }
    }
}

/// Sums over the queries that read each key late, `[group][T]` each; of plain attention.
pub(crate) fn reference_reads<F: Real>(
    job: &AttentionJob<'_, F>,
    lse: &[F],
    Late { later, pair }: Late,
    LateReads { own, apart, lost }: LateReads<&mut [F]>,
) {
    [&mut *own, &mut *apart, &mut *lost].into_iter().for_each(|sums| sums.fill(F::zero()));
    for g in 0..job.group {
        for i in later..job.len {
            let mut before = F::zero();
            for s in seen(job, g, i).iter().filter(|s| s.j + later <= i) {
                let share = (s.score - lse[g * job.len + i]).exp();
                let at = g * job.len + s.j;
                own[at] += share.powi(2);
                apart[at] += (share - before).powi(2);
                lost[at] += (share + before - F::of(pair) * (share * before).sqrt()).powi(2);
                before = share;
            }
        }
    }
}

/// The adjoint of [`reference`].
pub(crate) fn reference_grad<F: Real>(job: &AttentionJob<'_, F>, grad: &mut AttentionJobGrad<'_, F>) {
    let (dim, scale) = (job.dim, job.scale());
    for g in 0..job.group {
        for i in 0..job.len {
            let at = g * job.len + i;
            let d = grad.d.row(i, g * dim, dim);
            let q = job.q.row(i, g * dim, dim);
            let delta: F = d.iter().zip(&grad.out[at * dim..]).map(|(&d, &o)| d * o).sum();
            for s in seen(job, g, i) {
                let p = (s.score - grad.lse[at]).exp();
                let (keys, to) = if s.pooled {
                    (job.pooled.expect("seen keys exist").0, &mut grad.pooled)
                } else {
                    (job.exact.expect("seen keys exist"), &mut grad.exact)
                };
                let (k, v) = (keys.k.row(s.j, 0, dim), keys.v.row(s.j, 0, dim));
                let dp: F = d.iter().zip(v).map(|(&d, &v)| d * v).sum();
                let ds = p * (dp - delta);
                for c in 0..dim {
                    grad.q[at * dim + c] += ds * k[c] * scale;
                    to.k[s.j * dim + c] += ds * q[c] * scale;
                    to.v[s.j * dim + c] += p * d[c];
                }
                if keys.mass.is_some() {
                    to.mass[s.j] += ds;
                }
                if s.closing {
                    to.close[s.j] += ds;
                }
            }
        }
    }
}
