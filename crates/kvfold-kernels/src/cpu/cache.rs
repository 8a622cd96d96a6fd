//! [`CacheOps`] on the CPU.

use super::heads::{JobLayout, split_jobs, view};
use super::{Array, Cpu};
use crate::kernel_set::KernelSet;
use crate::ops::{CacheOps, CachedAttention};
use crate::paged::{self, Arena, Block, HeadInput, HeadTable, Prepared};
use crate::real::Real;
use rayon::prelude::*;

/// Products of a query and a slot below which a step stays on the calling thread.
const SERIAL: usize = 64 * 1024;

/// A head's new tokens, its memory, and where its output goes.
struct Head<'a, F> {
    input: HeadInput<'a, F>,
    table: &'a mut HeadTable,
    out: &'a mut [F],
}

/// A head that has taken several tokens, which are to be attended to in blocks.
struct Chunk<'a, F> {
    input: HeadInput<'a, F>,
    table: &'a HeadTable,
    prepared: Prepared<F>,
    out: &'a mut [F],
}

impl<'a, F: Real> Head<'a, F> {
    /// Takes the tokens; a single one is done with that.
    fn take<K: KernelSet<F>>(self, set: K) -> Option<Chunk<'a, F>> {
        let Self { input, table, out } = self;
        if input.len == 1 {
            paged::one(set, &input, table, out);
            return None;
        }
        let prepared = paged::prepare(set, &input, table);
        Some(Chunk { input, table, prepared, out })
    }
}

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
            work.push(Head { input, table, out });
        }
        let set = self.set;
        let parallel = cost >= SERIAL;
        let mut chunks: Vec<_> = match parallel {
            false => work.into_iter().filter_map(|head| head.take(set)).collect(),
            true => work.into_par_iter().filter_map(|head| head.take(set)).collect(),
        };
        let mut blocks = Vec::new();
        for Chunk { input, table, prepared, out } in &mut chunks {
            let mut rest: &mut [F] = out;
            for tokens in prepared.blocks(rule.delay()) {
                let (block, after) = rest.split_at_mut(tokens.len() * group * dim);
                blocks.push(((&*input, &**table, &*prepared), tokens, block));
                rest = after;
            }
        }
        let attend = |(head, tokens, out)| paged::block(set, head, tokens, out);
        match parallel {
            false => blocks.into_iter().for_each(attend),
            true => blocks.into_par_iter().for_each(attend),
        }
        self.to_rows(&out, spans, JobLayout { kv, parts: 1, width: group * dim })
    }
}
