//! Attention over the paged cache: what serving puts into the block walk.

use kvfold_cache::{CachePolicy, PagePool, SequenceCache};
use kvfold_kernels::CacheOps;
use kvfold_kernels::ops::CachedAttention;
use kvfold_model::attend::{Gated, gated, rotated_query};
use kvfold_model::block::{Attend, Pass, Projected};

/// The caches of a batch, one per span, in a pool that admitted the batch.
#[derive(Debug)]
pub struct CachedAttend<'a, O: CacheOps> {
    /// What becomes of a token.
    pub policy: &'a dyn CachePolicy,
    /// Memory.
    pub pool: &'a mut PagePool<O>,
    /// One cache per span.
    pub caches: Vec<&'a mut SequenceCache>,
}

impl<O: CacheOps> Attend<O> for CachedAttend<'_, O> {
    fn attend(&mut self, layer: usize, pass: &Pass<'_, O>, p: Projected<O::Tensor>) -> O::Tensor {
        let Pass { ops, shape, angles, spans } = *pass;
        let (q, k, v, logit, ahead, omega) = match self.policy.decisions() {
            None => (ops.rope(&p.q, angles, spans), p.k, p.v, None, None, None),
            Some(dmc) => {
                let Gated { q, k, v, logit, ahead, omega } = gated(pass, dmc, p);
                (rotated_query(pass, dmc, &q), k, v, Some(logit), ahead, omega)
            }
        };
        for (cache, span) in self.caches.iter_mut().zip(spans) {
            self.pool.reserve(ops, cache, (layer, span.len));
        }
        let out = ops.cached_attention(CachedAttention {
            q: &q,
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
            tables: self.caches.iter_mut().map(|cache| cache.layer_mut(layer)).collect(),
        });
        for cache in &mut self.caches {
            self.pool.trim(cache, layer);
        }
        out
    }
}
