//! [`CacheOps`] on the CPU.

use super::heads::{split_rows, view};
use super::{Array, Cpu};
use crate::kernel_set::KernelSet;
use crate::ops::{CacheOps, CachedAttention};
use crate::paged::{self, Arena, Block, DecodeJob, HeadInput, HeadTable, PageLayout, Prepared, Scratch};
use crate::real::Real;
use crate::team;
use std::cmp::Reverse;

/// Products of a query and a slot below which a step stays on the calling thread.
const SERIAL: usize = 64 * 1024;

/// A head's new tokens, its memory, and where its output goes.
struct Head<'a, F> {
    input: HeadInput<'a, F>,
    table: &'a mut HeadTable,
    /// Of wanted tokens, `[group][D]` each.
    out: Vec<&'a mut [F]>,
}

/// A head that has taken several tokens, which are to be attended to in blocks.
struct Chunk<'a, F> {
    input: HeadInput<'a, F>,
    table: &'a HeadTable,
    prepared: Prepared<F>,
    out: Vec<&'a mut [F]>,
}

impl<'a, F: Real> Head<'a, F> {
    /// Products of a query and a slot, about.
    fn cost(&self) -> usize {
        let held = self.table.slots + self.table.exact(self.input.rule);
        self.input.len * (held + self.input.len) * self.input.heads.dim * self.input.heads.group()
    }

    /// Takes the tokens; a single one is done with that.
    fn take<K: KernelSet<F>>(self, set: K, scratch: &mut Scratch<F>) -> Option<Chunk<'a, F>> {
        let Self { input, table, mut out } = self;
        if let (1, [out]) = (input.len, &mut out[..]) {
            let job = DecodeJob { input: &input, table, scratch, out };
            match paged::in_words(set, input.dtype) {
                true => paged::decode_words(set, job),
                false => set.decode(job),
            }
            return None;
        }
        let prepared = paged::prepare(set, &input, table, scratch);
        Some(Chunk { input, table, prepared, out })
    }
}

impl<F: Real, K: KernelSet<F>> CacheOps for Cpu<F, K> {
    type Arena = Arena<F>;

    fn page_arena(&self, layout: PageLayout) -> Arena<F> {
        Arena::new(layout.floats::<F>())
    }

    fn state_arena(&self, len: usize) -> Arena<F> {
        Arena::new(len)
    }

    fn grow(&self, arena: &mut Arena<F>, wanted: usize) -> Vec<Block> {
        arena.grow(wanted)
    }

    fn block_bytes(&self, arena: &Arena<F>) -> usize {
        arena.block_bytes()
    }

    fn copy_block(&self, arena: &Arena<F>, from: &Block, to: &mut Block) {
        arena.slice_mut(to).copy_from_slice(arena.slice(from));
    }

    fn block_to_host(&self, arena: &Arena<F>, block: &Block) -> Vec<u8> {
        paged::bytes(arena.slice(block)).to_vec()
    }

    fn page_to_host(&self, arena: &Arena<F>, page: &Block, layout: PageLayout, used: usize) -> Vec<u8> {
        let mut page = arena.slice(page).to_vec();
        layout.clear(&mut page, used);
        paged::bytes(&page).to_vec()
    }

    fn block_from_host(&self, arena: &Arena<F>, bytes: &[u8], block: &mut Block) {
        paged::bytes_mut(arena.slice_mut(block)).copy_from_slice(bytes);
    }

    fn cached_attention(&self, step: CachedAttention<'_, Self>) -> Array<F> {
        let CachedAttention { q, k, v, logit, ahead, omega, spans, heads, rule, .. } = step;
        let (kv, dim, group) = (heads.kv, heads.dim, heads.group());
        assert_eq!(step.tables.len(), spans.len(), "one set of heads per sequence");
        assert!(step.wanted.is_none_or(|wanted| wanted.len() == spans.len()), "one number of outputs per sequence");
        let wanted: Vec<usize> = match step.wanted {
            Some(wanted) => wanted.to_vec(),
            None => spans.iter().map(|span| span.len).collect(),
        };
        let rows = wanted.iter().sum::<usize>();
        let mut out = self.buffer(rows * heads.query * dim);
        let outs = split_rows(&mut out, &wanted, kv, group * dim);
        let heads_of = spans.iter().zip(wanted).zip(step.tables).flat_map(|((span, wanted), tables)| {
            assert_eq!(tables.len(), kv, "one table per KV head");
            assert!(wanted <= span.len, "{wanted} outputs of {} tokens", span.len);
            tables.iter_mut().enumerate().map(move |(g, table)| (span, wanted, g, table))
        });
        let mut work = Vec::with_capacity(spans.len() * kv);
        for ((span, wanted, g, table), out) in heads_of.zip(outs) {
            assert_eq!(span.position, table.tokens, "a span begins where its cache ends");
            let input = HeadInput {
                start: span.position,
                len: span.len,
                wanted,
                heads,
                rule,
                q: view(q, span, g, group * dim),
                zeroed: step.zeroed,
                k: view(k, span, g, dim),
                v: view(v, span, g, dim),
                logit: logit.map(|logit| view(logit, span, g, 1)),
                ahead: ahead.map(|ahead| view(ahead, span, g, 1)),
                omega: omega.map(|omega| view(omega, span, g, 1)),
                angles: step.angles.data(),
                dtype: step.dtype,
                pages: step.pages,
                rings: step.rings,
                states: step.states,
            };
            work.push(Head { input, table, out });
        }
        let set = self.set;
        let parallel = work.iter().map(Head::cost).sum::<usize>() >= SERIAL;
        // A thread that is done with a head takes the next largest, so that no long one is left for last.
        work.sort_by_key(|head| Reverse(head.cost()));
        let mut chunks = self.each(parallel, work, |head, scratch| head.take(set, scratch));
        let mut blocks = Vec::new();
        for Chunk { input, table, prepared, out } in chunks.iter_mut().flatten() {
            let (mut rest, of_head) = (&mut out[..], blocks.len());
            for tokens in prepared.blocks(input) {
                let (block, after) = rest.split_at_mut(tokens.len());
                blocks.push(((&*input, &**table, &*prepared), tokens, block));
                rest = after;
            }
            // What one head holds stays near while all of its blocks read it; the shortest come last.
            blocks[of_head..].reverse();
        }
        self.each(parallel, blocks, |(head, tokens, out), scratch| paged::block(set, head, tokens, scratch, out));
        self.array_of(&[rows, heads.query * dim], out)
    }
}

impl<F: Real, K: KernelSet<F>> Cpu<F, K> {
    /// Carries out work, with a thread's scratch.
    fn each<W: Send, R: Send>(
        &self,
        parallel: bool,
        work: Vec<W>,
        f: impl Fn(W, &mut Scratch<F>) -> R + Sync,
    ) -> Vec<R> {
        let scratch = &self.home.scratch;
        match parallel {
            true => team::map(work, |item| scratch.with(|scratch| f(item, scratch))),
            false => scratch.with(|scratch| work.into_iter().map(|item| f(item, scratch)).collect()),
        }
    }
}
