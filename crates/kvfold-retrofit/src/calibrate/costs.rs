//! What it costs to fold each token, in the plain model's eyes.

use super::Reader;
use kvfold_kernels::Grad;
use kvfold_kernels::dmc::{Dmc, Method, Share};
use kvfold_kernels::ops::{Heads, Keys, Precision, Span, Spans, Visible};
use kvfold_model::block::{Attend, Pass, Projected};
use kvfold_model::weights::Block;

/// Queries that the mean over a token's late readers is taken over at least: what few have read at the end of a text weighs
/// less.
const READERS: usize = 32;

/// Added to costs, so that what nobody reads still has one: a change of one in a million of the residual stream.
const FLOOR: f64 = 1e-6;

/// Plain attention that notes who is read late.
pub(super) struct Reading<T> {
    pub(super) later: usize,
    /// Late reads `[N, H]` and values `[N, G*D]`.
    pub(super) seen: Option<(T, T)>,
}

impl<O: Grad> Attend<O> for Reading<O::Tensor> {
    fn attend(&mut self, _: usize, pass: &Pass<'_, O>, p: Projected<O::Tensor>) -> O::Tensor {
        let Pass { ops, shape, angles, spans } = *pass;
        let q = ops.rope(&p.q, angles, spans);
        let exact = Some(Keys { k: ops.rope(&p.k, angles, spans), v: p.v.clone(), mass: None });
        let visible = Visible { exact, pooled: None, delay: 0 };
        let saved = ops.attention_saving(&q, &visible, spans, shape.heads);
        let reads = ops.late_reads((&q, &visible), &saved, spans, shape.heads, self.later);
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
    (x, reads, v): (&O::Tensor, &O::Tensor, &O::Tensor),
) -> Vec<f64> {
    let Reader { ops, shape, .. } = *reader;
    let Heads { query, kv, dim } = shape.heads;
    let (group, rows) = (shape.heads.group(), spans.rows());
    let stream = mean_norm(&ops.to_host(x), known);
    let roots = roots(&ops.to_host(reads), spans, (query, dmc.delay));
    let (o, v) = (ops.to_host(&block.o), ops.to_host(v));
    let like = ops.master(&[dim, dim], &vec![0.0; dim * dim], Precision::F32);
    let mut squares = vec![0.0f64; rows * kv];
    for g in 0..kv {
        let away = apart(&v, spans, (dmc.method, g), (kv, dim));
        let away_rows = ops.tensor(&[rows, dim], &away);
        for h in g * group..(g + 1) * group {
            // |O_h d|^2 = d . (O_h^T O_h d)
            let columns =
                o.chunks_exact(query * dim).flat_map(|row| &row[h * dim..][..dim]).copied().collect::<Vec<_>>();
            let columns = ops.tensor(&[shape.hidden, dim], &columns);
            let square = ops.to_host(&ops.linear_grad_w(&columns, &like, &columns));
            let turned = ops.linear(&away_rows, &ops.master(&[dim, dim], &square, Precision::F32));
            let turned = ops.to_host(&turned);
            for span in spans {
                for t in span.start + 1..span.start + span.len {
                    let pairs = away[t * dim..][..dim].iter().zip(&turned[t * dim..]);
                    let moved: f64 = pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    let before = roots[(t - 1) * query + h];
                    let read = match dmc.method {
                        Method::Dmc => roots[t * query + h] + before,
                        Method::Dms => before,
                    };
                    squares[t * kv + g] += read * read * moved.max(0.0);
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

/// Root mean squares of late shares, `[N, H]`.
fn roots(reads: &[f32], spans: &Spans, (query, delay): (usize, usize)) -> Vec<f64> {
    let mut roots = vec![0.0; reads.len()];
    for &Span { start, len, .. } in spans {
        for t in 0..len {
            let readers = len.saturating_sub(t + delay).max(READERS) as f64;
            for at in (start + t) * query..(start + t + 1) * query {
                roots[at] = (f64::from(reads[at]) / readers).sqrt();
            }
        }
    }
    roots
}

/// How far the two values that a fold makes one of are apart, `[N, D]`: of a KV head's `v [N, G*D]`, each value minus the one
/// before it; where the one before is evicted, that one minus the mean of its sequence.
fn apart(v: &[f32], spans: &Spans, (method, g): (Method, usize), (kv, dim): (usize, usize)) -> Vec<f32> {
    let mut away = vec![0.0; spans.rows() * dim];
    let value = |t: usize| &v[(t * kv + g) * dim..][..dim];
    for &Span { start, len, .. } in spans {
        let mut mean = vec![0.0; dim];
        for t in start..start + len {
            mean.iter_mut().zip(value(t)).for_each(|(mean, &v)| *mean += v / len as f32);
        }
        for t in start + 1..start + len {
            let (from, to) = match method {
                Method::Dmc => (value(t), value(t - 1)),
                Method::Dms => (value(t - 1), &mean[..]),
            };
            away[t * dim..][..dim].iter_mut().zip(from.iter().zip(to)).for_each(|(d, (&a, &b))| *d = a - b);
        }
    }
    away
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
        let root = |h: usize, t: usize| {
            let shares: Vec<f64> = (t + DELAY..span.len).map(|i| share(h, i, t).powi(2)).collect();
            (shares.iter().sum::<f64>() / shares.len().max(READERS) as f64).sqrt()
        };
        let mean = |c: usize| (0..span.len).map(|t| of(v, t, g, kv, c)).sum::<f64>() / span.len as f64;
        let squares = (g * query / kv..(g + 1) * query / kv).map(|h| {
            let (read, away): (f64, Vec<f64>) = match dmc.method {
                Method::Dmc => {
                    let away = |c| of(v, t, g, kv, c) - of(v, t - 1, g, kv, c);
                    (root(h, t) + root(h, t - 1), (0..dim).map(away).collect())
                }
                Method::Dms => (root(h, t - 1), (0..dim).map(|c| of(v, t - 1, g, kv, c) - mean(c)).collect()),
            };
            let out = |row: &[f32]| (0..dim).map(|c| f64::from(row[h * dim + c]) * away[c]).sum::<f64>();
            read * read * o.chunks_exact(query * dim).map(|row| out(row).powi(2)).sum::<f64>()
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
        let pass = Pass { ops: &ops, shape: &shape, angles: &angles, spans: &spans };
        let mut reading = Reading { later: DELAY, seen: None };
        pass.block(0, block, &x, &mut reading);
        let (reads, v) = reading.seen.unwrap();
        let y = ops.rms_norm(&x, &block.input_norm, shape.norm_eps);
        let turned = |w| ops.to_host(&ops.rope(&ops.linear(&y, w), &angles, &spans));
        let (q, k) = (turned(&block.q), turned(&block.k));
        let host = [&v, &block.o, &x].map(|x| ops.to_host(x));
        let all = vec![true; spans.rows()];
        for (method, share) in [(Method::Dmc, Share::Head), (Method::Dmc, Share::Layer), (Method::Dms, Share::Head)] {
            let dmc = Dmc {
                method,
                decision: Decision::Head { scale: 1.0, offset: 0.0, bias: true, ahead: false },
                delay: DELAY,
                sinks: 1,
                pool_window: None,
                log_mass: false,
                share,
            };
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
