//! [`CacheOps`] on the CPU.

use super::heads::{JobLayout, split_jobs, view};
use super::{Array, Cpu};
use crate::kernel_set::KernelSet;
use crate::ops::{CacheOps, CachedAttention};
use crate::paged::{self, Arena, Block, HeadInput};
use crate::real::Real;
use rayon::prelude::*;

/// Products of a query and a slot below which a step stays on the calling thread.
const SERIAL: usize = 64 * 1024;

impl<F: Real, K: KernelSet<F>> CacheOps for Cpu<F, K> {
    type Arena = Arena<F>;

    fn arena(&self, block_len: usize) -> Arena<F> {
        Arena::new(block_len)
    }

    fn grow(&self, arena: &mut Arena<F>, wanted: usize) -> Vec<Block> {
        arena.grow(wanted)
    }

    fn block_bytes(&self, arena: &Arena<F>) -> usize {
        arena.block_bytes()
    }

    fn cached_attention(&self, step: CachedAttention<'_, Self>) -> Array<F> {
        let CachedAttention { q, k, v, logit, omega, angles, spans, heads, rule, pages, states, tables } = step;
        let (kv, dim, group) = (heads.kv, heads.dim, heads.group());
        assert_eq!(tables.len(), spans.len(), "one set of heads per sequence");
        let mut out = self.buffer(spans.rows() * heads.query * dim);
        let mut work = Vec::with_capacity(spans.len() * kv);
        let mut cost = 0;
        let outs = split_jobs(&mut out, spans, kv, group * dim);
        let heads_of = spans.iter().zip(tables).flat_map(|(span, tables)| {
            assert_eq!(tables.len(), kv, "one table per KV head");
            tables.iter_mut().enumerate().map(move |(g, table)| (span, g, table))
        });
        for ((span, g, table), out) in heads_of.zip(outs) {
            assert_eq!(span.position, table.tokens, "a span begins where its cache ends");
            cost += span.len * (table.slots + span.len) * dim * group;
            let input = HeadInput {
                len: span.len,
                heads,
                rule,
                q: view(q, span, g, group * dim),
                k: view(k, span, g, dim),
                v: view(v, span, g, dim),
                logit: logit.map(|logit| view(logit, span, g, 1)),
                omega: omega.map(|omega| view(omega, span, g, 1)),
                angles: angles.data(),
                pages,
                states,
            };
            work.push((input, table, out));
        }
        if cost < SERIAL {
            work.into_iter().for_each(|(input, table, out)| paged::run(self.set, &input, table, out));
        } else {
            work.into_par_iter().for_each(|(input, table, out)| paged::run(self.set, &input, table, out));
        }
        self.to_rows(&out, spans, JobLayout { kv, parts: 1, width: group * dim })
    }
}
