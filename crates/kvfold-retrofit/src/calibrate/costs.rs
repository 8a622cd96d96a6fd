//! What it costs to fold each token, in the plain model's eyes.

use super::Reader;
use kvfold_kernels::Grad;
use kvfold_kernels::dmc::{Dmc, Method, Share};
use kvfold_kernels::ops::{Heads, Keys, Late, LateReads, Precision, Span, Spans, Visible};
use kvfold_model::block::{Attend, Pass, Projected};
use kvfold_model::weights::Block;

/// Queries that the mean over a token's late readers is taken over at least: what few have read at the end of a text weighs
/// less.
const READERS: usize = 32;

/// Added to costs, so that what nobody reads still has one: a change of one in a million of the residual stream.
const FLOOR: f64 = 1e-6;

/// Plain attention that notes who is read late.
pub(super) struct Reading<T> {
    pub(super) late: Late,
    /// Late reads and values `[N, G*D]`.
    pub(super) seen: Option<(LateReads<T>, T)>,
}

impl<T> Reading<T> {
    /// What folds of these decisions need to know.
    pub(super) fn of(dmc: &Dmc) -> Self {
        Self { late: Late { later: dmc.delay, pair: if dmc.log_mass { 2.0 } else { 1.0 } }, seen: None }
    }
}

impl<O: Grad> Attend<O> for Reading<O::Tensor> {
    fn attend(&mut self, _: usize, pass: &Pass<'_, O>, p: Projected<O::Tensor>) -> O::Tensor {
        let Pass { ops, shape, angles, spans, .. } = *pass;
        let q = ops.rope(&p.q, angles, spans);
        let exact = Some(Keys { k: ops.rope(&p.k, angles, spans), v: p.v.clone(), mass: None });
        let visible = Visible { exact, pooled: None, delay: 0, precision: p.precision };
        let saved = ops.attention_saving(&q, &visible, spans, shape.heads);
        let reads = ops.late_reads((&q, &visible), &saved, spans, shape.heads, self.late);
        self.seen = Some((reads, p.v));
        saved.out
    }
}

/// Rows of tokens that may fold, each of which is read by a later query.
pub(super) fn known(spans: &Spans, dmc: &Dmc) -> Vec<bool> {
    let mut known = vec![false; spans.rows()];
    for &Span { start, len, .. } in spans {
        let tokens = dmc.exempt().foldable(len);
        known[start..start + len][tokens.start.min(len)..tokens.end.min(len)].fill(true);
    }
    known
}

/// Costs `[N, G]` of a block's tokens, above 0; only those of known rows mean anything. `x` is the residual stream before it.
pub(super) fn costs<O: Grad>(
    reader: &Reader<'_, O>,
    dmc: &Dmc,
    (spans, known): (&Spans, &[bool]),
    block: &Block<O::Tensor>,
    (x, reads, v): (&O::Tensor, &LateReads<O::Tensor>, &O::Tensor),
) -> Vec<f64> {
    let Reader { ops, shape, .. } = *reader;
    let Heads { query, kv, dim } = shape.heads;
    let (group, rows) = (shape.heads.group(), spans.rows());
    let stream = mean_norm(&ops.to_host(x), known);
    let mean = |sums: &O::Tensor| means(&ops.to_host(sums), spans, (query, dmc.delay));
    // What each error of a fold is weighed by; of an eviction, that of the token before.
    let weights = match dmc.method {
        Method::Dmc => vec![(mean(&reads.apart), 0), (mean(&reads.lost), 0)],
        Method::Dms => vec![(mean(&reads.own), 1)],
    };
    let (o, v) = (ops.to_host(&block.o), ops.to_host(v));
    let like = ops.master(&[dim, dim], &vec![0.0; dim * dim], Precision::F32);
    let mut squares = vec![0.0f64; rows * kv];
    for g in 0..kv {
        let errors = errors(&v, spans, (dmc.method, g), (kv, dim));
        for h in g * group..(g + 1) * group {
            // |O_h d|^2 = d . (O_h^T O_h d)
            let columns =
                o.chunks_exact(query * dim).flat_map(|row| &row[h * dim..][..dim]).copied().collect::<Vec<_>>();
            let columns = ops.tensor(&[shape.hidden, dim], &columns);
            let square = ops.to_host(&ops.linear_grad_w(&columns, &like, &columns));
            let square = ops.master(&[dim, dim], &square, Precision::F32);
            for (errors, (weights, before)) in errors.iter().zip(&weights) {
                let turned = ops.to_host(&ops.linear(&ops.tensor(&[rows, dim], errors), &square));
                for t in spans.iter().flat_map(|span| span.start + 1..span.start + span.len) {
                    let pairs = errors[t * dim..][..dim].iter().zip(&turned[t * dim..]);
                    let moved: f64 = pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    squares[t * kv + g] += weights[(t - before) * query + h] * moved.max(0.0);
                }
            }
        }
    }
    if dmc.share == Share::Layer {
        for row in squares.chunks_exact_mut(kv) {
            let sum = row.iter().sum();
            row.fill(sum);
        }
    }
    squares.iter().map(|&square| square.sqrt() / stream + FLOOR).collect()
}

/// Mean norm of the known rows.
fn mean_norm(x: &[f32], known: &[bool]) -> f64 {
    let rows = x.chunks_exact(x.len() / known.len()).zip(known).filter(|(_, known)| **known);
    let norm = |row: &[f32]| row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let (sum, rows) = rows.fold((0.0, 0usize), |(sum, rows), (row, _)| (sum + norm(row), rows + 1));
    (sum / rows as f64).max(f64::MIN_POSITIVE)
}

/// Means over late readers of sums over them, `[N, H]`.
fn means(sums: &[f32], spans: &Spans, (query, delay): (usize, usize)) -> Vec<f64> {
    let mut means = vec![0.0; sums.len()];
    for &Span { start, len, .. } in spans {
        for t in 0..len {
            let readers = len.saturating_sub(t + delay).max(READERS) as f64;
            for at in (start + t) * query..(start + t + 1) * query {
                means[at] = f64::from(sums[at]) / readers;
            }
        }
    }
    means
}

/// What a fold of each token changes, `[N, D]` each, of a KV head's values `v [N, G*D]`. A fold: half of how far the value is
/// from the one before it, which is what a slot cannot tell apart; and how far the mean of both is from their sequence's, for
/// what the slot is read less. An eviction: how far the value before is from its sequence's mean.
fn errors(v: &[f32], spans: &Spans, (method, g): (Method, usize), (kv, dim): (usize, usize)) -> Vec<Vec<f32>> {
    let value = |t: usize| &v[(t * kv + g) * dim..][..dim];
    let of = |error: &dyn Fn(f32, f32, f32) -> f32| {
        let mut errors = vec![0.0; spans.rows() * dim];
        for &Span { start, len, .. } in spans {
            let mut mean = vec![0.0; dim];
            for t in start..start + len {
                mean.iter_mut().zip(value(t)).for_each(|(mean, &v)| *mean += v / len as f32);
            }
            for t in start + 1..start + len {
                let values = value(t).iter().zip(value(t - 1)).zip(&mean);
                errors[t * dim..]
                    .iter_mut()
                    .zip(values)
                    .for_each(|(to, ((&v, &last), &mean))| *to = error(v, last, mean));
            }
        }
        errors
    };
    match method {
        Method::Dmc => vec![of(&|v, last, _| (v - last) / 2.0), of(&|v, last, mean| (v + last) / 2.0 - mean)],
        Method::Dms => vec![of(&|_, last, mean| last - mean)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvfold_kernels::dmc::Decision;
    use kvfold_kernels::{FastCpu, Ops};
    use kvfold_model::Checkpoint;
    use kvfold_model::shape::Shape;
    use kvfold_model::weights::Weights;

    const LENGTHS: [usize; 2] = [70, 23];
    const DELAY: usize = 3;

    /// The module's formula for one token, from a layer's projections, one number at a time.
    fn defined(dmc: &Dmc, shape: &Shape, span: &Span, (t, g): (usize, usize), [q, k, v, o, x]: [&[f32]; 5]) -> f64 {
        let Heads { query, kv, dim } = shape.heads;
        let of = |of: &[f32], t: usize, head: usize, heads: usize, c: usize| {
            f64::from(of[((span.start + t) * heads + head) * dim + c])
        };
        let share = |h: usize, i: usize, j: usize| {
            let score =
                |j| (0..dim).map(|c| of(q, i, h, query, c) * of(k, j, g, kv, c)).sum::<f64>() / (dim as f64).sqrt();
            score(j).exp() / (0..=i).map(|j| score(j).exp()).sum::<f64>()
        };
        // The mean of a function of the shares of a token and the one before it over the queries that read it late.
        let late = |h: usize, t: usize, of: &dyn Fn(f64, f64) -> f64| {
            let seen: Vec<f64> = (t + DELAY..span.len).map(|i| of(share(h, i, t), share(h, i, t - 1))).collect();
            seen.iter().sum::<f64>() / seen.len().max(READERS) as f64
        };
        let mean = |c: usize| (0..span.len).map(|t| of(v, t, g, kv, c)).sum::<f64>() / span.len as f64;
        let seen = |h: usize, away: &dyn Fn(usize) -> f64| {
            let out = |row: &[f32]| (0..dim).map(|c| f64::from(row[h * dim + c]) * away(c)).sum::<f64>();
            o.chunks_exact(query * dim).map(|row| out(row).powi(2)).sum::<f64>()
        };
        let (new, old) = (|c| of(v, t, g, kv, c), |c| of(v, t - 1, g, kv, c));
        let squares = (g * query / kv..(g + 1) * query / kv).map(|h| match dmc.method {
            Method::Dmc => {
                let pair = if dmc.log_mass { 2.0 } else { 1.0 };
                let apart = late(h, t, &|p, q| (p - q).powi(2)) * seen(h, &|c| (new(c) - old(c)) / 2.0);
                let lost = late(h, t, &|p, q| (p + q - pair * (p * q).sqrt()).powi(2));
                apart + lost * seen(h, &|c| (new(c) + old(c)) / 2.0 - mean(c))
            }
            Method::Dms => late(h, t - 1, &|p, _| p.powi(2)) * seen(h, &|c| old(c) - mean(c)),
        });
        squares.sum::<f64>().sqrt() / mean_norm(x, &[true].repeat(x.len() / shape.hidden)) + FLOOR
    }

    #[test]
    fn costs_are_the_formula() {
        let ops = FastCpu::new();
        let base = Checkpoint::open("stories260k").unwrap();
        let shape = Shape::of(&base.config);
        let built = Weights::build(&shape, |name, dims| {
            Ok::<_, std::convert::Infallible>(ops.master(dims, &base.tensors[name].to_f32(), Precision::F32))
        });
        let Ok(weights) = built;
        let angles = ops.rope_table(&shape.inv_freq(), shape.context);
        let spans = Spans::of_lengths(&LENGTHS);
        let reader = Reader { ops: &ops, shape: &shape, angles: &angles, weights: &weights };
        let ids: Vec<u32> = (0..spans.rows() as u32).map(|n| 3 + n * 37 % 500).collect();
        let (x, block) = (ops.embed(&ids, &weights.embed), &weights.blocks[0]);
        let pass = Pass { ops: &ops, shape: &shape, angles: &angles, spans: &spans, wanted: None };
        let y = ops.rms_norm(&x, &block.input_norm, shape.norm_eps);
        let turned = |w| ops.to_host(&ops.rope(&ops.linear(&y, w), &angles, &spans));
        let (q, k) = (turned(&block.q), turned(&block.k));
        let all = vec![true; spans.rows()];
        let cases = [
            (Method::Dmc, Share::Head, true),
            (Method::Dmc, Share::Head, false),
            (Method::Dmc, Share::Layer, true),
            (Method::Dms, Share::Head, false),
        ];
        for (method, share, log_mass) in cases {
            let dmc = Dmc {
                method,
                decision: Decision::Head { scale: 1.0, offset: 0.0, bias: true, ahead: false },
                delay: DELAY,
                sinks: 1,
                pool_window: None,
                log_mass,
                share,
            };
            let mut reading = Reading::of(&dmc);
            pass.block(0, block, &x, &mut reading);
            let (reads, v) = reading.seen.unwrap();
            let host = [&v, &block.o, &x].map(|x| ops.to_host(x));
            let found = costs(&reader, &dmc, (&spans, &all), block, (&x, &reads, &v));
            for span in &spans {
                for t in dmc.exempt().foldable(span.len) {
                    let one = |g| defined(&dmc, &shape, span, (t, g), [&q, &k, &host[0], &host[1], &host[2]]);
                    let heads: Vec<f64> = (0..shape.heads.kv).map(one).collect();
                    let together = heads.iter().map(|cost| (cost - FLOOR).powi(2)).sum::<f64>().sqrt() + FLOOR;
                    for (g, alone) in heads.iter().enumerate() {
                        let expected = if share == Share::Layer { together } else { *alone };
                        let found = found[(span.start + t) * shape.heads.kv + g];
                        assert!(
                            (found / expected - 1.0).abs() < 1e-3,
                            "{method:?}, {share:?}, {t}: {found}, not {expected}"
                        );
                    }
                }
            }
        }
    }
}
