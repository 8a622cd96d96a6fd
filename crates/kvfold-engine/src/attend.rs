//! Attention over the paged cache: what serving puts into the block walk.

use crate::trace::Trace;
use kvfold_cache::{CachePolicy, PagePool, SequenceCache};
use kvfold_kernels::CacheOps;
use kvfold_kernels::ops::{CachedAttention, Spans};
use kvfold_model::attend::{Gated, gated, lost_by_queries};
use kvfold_model::block::{Attend, Pass, Projected};

/// One sequence of a batch.
#[derive(Debug)]
pub struct Member<'a> {
    /// Its cache.
    pub cache: &'a mut SequenceCache,
    /// Whether its tokens all keep slots of their own, whatever the model decides.
    pub full: bool,
    /// Where decisions are noted, if anywhere.
    pub trace: Option<&'a mut Trace>,
}

impl<'a> Member<'a> {
    /// A sequence that does what the model decides.
    pub fn of(cache: &'a mut SequenceCache) -> Self {
        Self { cache, full: false, trace: None }
    }
}

/// The caches of a batch, one per span, in a pool that admitted the batch.
#[derive(Debug)]
pub struct CachedAttend<'a, O: CacheOps> {
    /// What becomes of a token.
    pub policy: &'a dyn CachePolicy,
    /// Memory.
    pub pool: &'a mut PagePool<O>,
    /// One sequence per span.
    pub members: Vec<Member<'a>>,
}

/// Added to the logits of tokens that are to keep their slots. No model's logits are near.
const NEVER: f32 = -1e30;

impl<O: CacheOps> CachedAttend<'_, O> {
    /// Logits `[N, G]` with those of full caches far below the threshold.
    fn kept(&self, ops: &O, logit: O::Tensor, spans: &Spans, kv: usize) -> O::Tensor {
        if !self.members.iter().any(|member| member.full) {
            return logit;
        }
        let of =
            |(member, len): (&Member<'_>, usize)| std::iter::repeat_n(if member.full { NEVER } else { 0.0 }, len * kv);
        let lengths = spans.iter().map(|span| span.len);
        let never: Vec<f32> = self.members.iter().zip(lengths).flat_map(of).collect();
        ops.add(&logit, &ops.tensor(&[spans.rows(), kv], &never), 1.0)
    }

    /// Notes the decisions of those who want it.
    fn note(&mut self, ops: &O, layer: usize, spans: &Spans, (logit, ahead): (&O::Tensor, Option<&O::Tensor>)) {
        if self.members.iter().all(|member| member.trace.is_none()) {
            return;
        }
        let (logit, ahead) = (ops.to_host(logit), ahead.map(|ahead| ops.to_host(ahead)));
        let rule = self.pool.rule();
        for (member, span) in self.members.iter_mut().zip(spans) {
            if let Some(trace) = &mut member.trace {
                trace.note(layer, (member.cache.layer_mut(layer), rule), span, (&logit, ahead.as_deref()));
            }
        }
    }
}

impl<O: CacheOps> Attend<O> for CachedAttend<'_, O> {
    fn attend(&mut self, layer: usize, pass: &Pass<'_, O>, p: Projected<O::Tensor>) -> O::Tensor {
        let Pass { ops, shape, angles, spans, .. } = *pass;
        let decisions = self.policy.decisions();
        let (q, k, v, logit, ahead, omega) = match decisions {
            None => (p.q, p.k, p.v, None, None, None),
            Some(dmc) => {
                let Gated { q, k, v, logit, ahead, omega } = gated(pass, dmc, p);
                let logit = self.kept(ops, logit, spans, shape.heads.kv);
                self.note(ops, layer, spans, (&logit, ahead.as_ref()));
                (q, k, v, Some(logit), ahead, omega)
            }
        };
        for (member, span) in self.members.iter_mut().zip(spans) {
            self.pool.reserve(ops, member.cache, (layer, span.len));
        }
        let out = ops.cached_attention(CachedAttention {
            q: &q,
            zeroed: decisions.and_then(|dmc| lost_by_queries(dmc.borrows(), shape.heads)),
            k: &k,
            v: &v,
            logit: logit.as_ref(),
            ahead: ahead.as_ref(),
            omega: omega.as_ref(),
            angles,
            spans,
            heads: shape.heads,
            rule: self.pool.rule(),
            dtype: self.pool.dtype(),
            pages: self.pool.pages(),
            rings: self.pool.rings(),
            states: self.pool.states(),
            tables: self.members.iter_mut().map(|member| member.cache.layer_mut(layer)).collect(),
            wanted: pass.wanted.filter(|_| layer + 1 == shape.layers),
        });
        for member in &mut self.members {
            self.pool.trim(member.cache, layer);
        }
        out
    }
}
