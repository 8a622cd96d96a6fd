//! A compressed model beside its original, token by token on the same windows.

use crate::error::EvalError;
use crate::windows::{Perplexity, log_sum_exp, run};
use kvfold_engine::Engine;
use kvfold_kernels::CacheOps;

/// Two models on the same text.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The original.
    pub original: Perplexity,
    /// The compressed one.
    pub compressed: Perplexity,
    /// KL(original || compressed) at every position, nats.
    pub kl: Vec<f64>,
    /// Positions at which both find the same token most likely.
    pub agreed: usize,
}

impl Comparison {
    /// Share of positions at which both find the same token most likely.
    pub fn top1_agreement(&self) -> f64 {
        self.agreed as f64 / self.kl.len().max(1) as f64
    }
}

/// Runs both engines over the windows; `on_window` is told how many are done.
pub fn compare<O: CacheOps>(
    (original, compressed): (&mut Engine<O>, &mut Engine<O>),
    windows: &[&[u32]],
    mut on_window: impl FnMut(usize),
) -> Result<Comparison, EvalError> {
    let empty = || Perplexity { nll: 0.0, predicted: 0, measured: Default::default() };
    let mut result = Comparison { original: empty(), compressed: empty(), kl: Vec::new(), agreed: 0 };
    for (n, window) in windows.iter().enumerate() {
        let p = run(original, window, &mut result.original.measured)?;
        let q = run(compressed, window, &mut result.compressed.measured)?;
        let vocab = p.len() / window.len();
        let rows = p.chunks_exact(vocab).zip(q.chunks_exact(vocab));
        for ((p, q), &target) in rows.zip(&window[1..]) {
            let (p_log, q_log) = (log_sum_exp(p), log_sum_exp(q));
            let target = target as usize;
            result.original.nll += p_log - f64::from(p[target]);
            result.compressed.nll += q_log - f64::from(q[target]);
            let divergence = p.iter().zip(q).map(|(&p, &q)| {
                let (log_p, log_q) = (f64::from(p) - p_log, f64::from(q) - q_log);
                log_p.exp() * (log_p - log_q)
            });
            let divergence: f64 = divergence.sum();
            // Rounding can take a divergence of nothing a hair below zero. Not `f64::max`, which would call a NaN perfect.
            result.kl.push(if divergence < 0.0 { 0.0 } else { divergence });
            result.agreed += usize::from(argmax(p).is_some_and(|top| argmax(q) == Some(top)));
        }
        result.original.predicted += window.len() - 1;
        result.compressed.predicted += window.len() - 1;
        on_window(n + 1);
    }
    Ok(result)
}

/// The first of the largest; none when something is not a number.
fn argmax(row: &[f32]) -> Option<usize> {
    let best = (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
    (!row.iter().any(|x| x.is_nan())).then_some(best)
}
