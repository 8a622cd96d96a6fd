//! Promise I4 on the pool alone: a page is written by its only holder, and all of them come back.

use kvfold_cache::{CacheError, CachePolicy, CacheShape, Dense, Folding, PagePool, Prefix, PrefixCache, SequenceCache};
use kvfold_kernels::Reference;
use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::noise::hash;
use kvfold_kernels::ops::Heads;
use kvfold_kernels::paged::{CacheDType, PAGE_SLOTS};
use proptest::prelude::*;
use std::collections::BTreeSet;

type Pool = PagePool<Reference<f32>>;

const LAYERS: usize = 2;
const HEADS: Heads = Heads { query: 4, kv: 2, dim: 4 };

fn folding(delay: usize) -> Folding {
    let decision = Decision::Head { scale: 1.0, offset: 0.0, bias: false, ahead: false };
    Folding::new(Dmc {
        method: Method::Dmc,
        decision,
        delay,
        sinks: 0,
        pool_window: None,
        log_mass: false,
        share: Share::Head,
    })
}

fn pool(policy: &dyn CachePolicy, dtype: CacheDType, limit: usize) -> (Reference<f32>, Pool) {
    let ops = Reference::reference();
    let shape = CacheShape { layers: LAYERS, heads: HEADS, rule: policy.rule(), dtype };
    let pool = PagePool::new(&ops, shape, limit);
    (ops, pool)
}

/// Plays the kernel: `more` tokens, of which each head keeps what `kept` says of the tokens that leave the ring. A slot that
/// closes is written: the number that `written` gives for the token that closes it.
fn take(
    ops: &Reference<f32>,
    pool: &mut Pool,
    sequence: &mut SequenceCache,
    more: usize,
    (kept, written): (impl Fn(usize) -> bool, impl Fn(usize) -> f32),
) {
    for layer in 0..LAYERS {
        pool.reserve(ops, sequence, (layer, more));
        let rule = pool.rule();
        let delay = rule.delay();
        for table in sequence.layer_mut(layer) {
            for token in table.tokens..table.tokens + more {
                if token >= delay && (table.slots == 0 || kept(token)) {
                    table.slots += 1;
                    if let Some(slot) = table.closed(rule).checked_sub(1) {
                        let page =
                            table.pages[slot / PAGE_SLOTS].get_mut().expect("a page that is written is not shared");
                        pool.pages().slice_mut(page)[slot % PAGE_SLOTS] = written(token);
                    }
                }
            }
            table.tokens += more;
            assert!(table.closed(rule) <= table.pages.len() * PAGE_SLOTS);
            assert!(table.tokens.min(delay) <= table.ring.len() * PAGE_SLOTS);
        }
        pool.trim(sequence, layer);
    }
}

/// What happens to a text, or to the beginnings that are kept.
#[derive(Clone, Debug)]
enum Act {
    Start { tokens: u64, len: usize },
    Take { which: usize, tokens: u64, more: usize },
    Fork { which: usize },
    Offer { which: usize },
    Preempt { which: usize },
    Finish { which: usize },
    Clear,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let which = any::<usize>();
    let act = prop_oneof![
        4 => (0u64..6, 1usize..90).prop_map(|(tokens, len)| Act::Start { tokens, len }),
        12 => (which, 0u64..3, 1usize..40).prop_map(|(which, tokens, more)| Act::Take { which, tokens, more }),
        3 => which.prop_map(|which| Act::Fork { which }),
        4 => which.prop_map(|which| Act::Offer { which }),
        1 => which.prop_map(|which| Act::Preempt { which }),
        2 => which.prop_map(|which| Act::Finish { which }),
        1 => Just(Act::Clear),
    ];
    prop::collection::vec(act, 1..150)
}

/// A text and its cache. What a slot holds is a function of the tokens before it, as in a model.
struct Text {
    tokens: Vec<u32>,
    cache: SequenceCache,
}

/// The number that a token leaves in the slot that it closes.
fn number(tokens: &[u32], token: usize) -> f32 {
    let seen: Vec<u64> = tokens[..=token].iter().map(|&token| u64::from(token)).collect();
    (hash(&seen) & 0xffff) as f32
}

fn keeps(tokens: &[u32], token: usize, keep_every: usize) -> bool {
    (number(tokens, token) as usize).is_multiple_of(keep_every)
}

/// Few tokens, so that many texts begin alike.
fn tokens(seed: u64, len: usize) -> impl Iterator<Item = u32> {
    (0..len as u64).map(move |n| (hash(&[seed, n / 20]) & 1) as u32)
}

impl Text {
    /// Whether all slots hold what the text wrote into them, whoever else read or wrote meanwhile.
    fn is_intact(&mut self, pool: &Pool, keep_every: usize) -> bool {
        let rule = pool.rule();
        let gone = rule.delay()..self.tokens.len();
        let kept = gone.clone().filter(|&token| token == gone.start || keeps(&self.tokens, token, keep_every));
        let wanted: Vec<f32> = kept.skip(1).map(|token| number(&self.tokens, token)).collect();
        (0..LAYERS).all(|layer| {
            self.cache.layer_mut(layer).iter().all(|table| {
                let pages = table.pages.iter().flat_map(|page| &pool.pages().slice(page)[..PAGE_SLOTS]);
                pages.take(table.closed(rule)).eq(&wanted)
            })
        })
    }
}

/// Pages of slots that texts hold, each once, and pages of rings.
fn held(live: &mut [Text]) -> usize {
    let mut pages = BTreeSet::new();
    let mut rings = 0;
    for text in live {
        for layer in 0..LAYERS {
            for table in text.cache.layer_mut(layer) {
                pages.extend(table.pages.iter().map(|page| page.index()));
                rings += table.ring.len();
            }
        }
    }
    pages.len() + rings
}

proptest! {
    #[test]
    fn pages_are_shared_or_written_and_all_come_back(
        acts in acts(), delay in 0usize..40, keep_every in 1usize..6, limit in 40usize..400, most in 0usize..12,
    ) {
        let (ops, mut pool) = pool(&folding(delay), CacheDType::F32, limit);
        let mut prefixes = PrefixCache::new(most);
        let mut live: Vec<Text> = Vec::new();
        for act in acts {
            match act {
                Act::Start { tokens: seed, len } => {
                    let text: Vec<u32> = tokens(seed, len).collect();
                    let prefix = |len| Prefix { tokens: &text[..len], compress: true };
                    let longest = prefixes.longest(prefix(len));
                    let (begun, alone) = longest.map_or((0, 0), |s| (s.tokens(), s.pages_alone()));
                    if alone <= pool.limit() - pool.pages_in_use() {
                        let cache = prefixes.begin(&ops, &mut pool, &[prefix(begun)]).remove(0);
                        prop_assert_eq!(cache.tokens(), begun);
                        live.push(Text { tokens: text[..begun].to_vec(), cache });
                    }
                }
                Act::Clear => prefixes.clear(),
                _ if live.is_empty() => {}
                Act::Take { which, tokens: seed, more } => {
                    let n = which % live.len();
                    let Text { tokens: text, cache } = &mut live[n];
                    let needed = cache.pages_needed(more);
                    prefixes.make_room(&pool, needed);
                    let fits = pool.pages_in_use() + needed <= limit;
                    prop_assert_eq!(pool.admit([(&*cache, more)]).is_ok(), fits, "snapshots take nobody's room");
                    if fits {
                        text.extend(tokens(seed, text.len() + more).skip(text.len()).collect::<Vec<_>>());
                        let text = &text[..];
                        let kernel = (|token| keeps(text, token, keep_every), |token| number(text, token));
                        take(&ops, &mut pool, cache, more, kernel);
                    }
                }
                Act::Fork { which } => {
                    let n = which % live.len();
                    let needed = live[n].cache.pages_to_copy();
                    prefixes.make_room(&pool, needed);
                    let fits = pool.pages_in_use() + needed <= limit;
                    let fork = pool.fork(&ops, &mut live[n].cache);
                    prop_assert_eq!(fork.is_ok(), fits);
                    let tokens = live[n].tokens.clone();
                    live.extend(fork.map(|cache| Text { tokens, cache }));
                }
                Act::Offer { which } => {
                    let n = which % live.len();
                    let Text { tokens, cache } = &mut live[n];
                    prefixes.offer(&ops, &mut pool, Prefix { tokens, compress: true }, cache);
                }
                Act::Preempt { which } => {
                    let Text { tokens, cache } = live.swap_remove(which % live.len());
                    let held = pool.pages_held();
                    prefixes.keep(Prefix { tokens: &tokens, compress: true }, cache);
                    prop_assert!(pool.pages_held() <= held);
                }
                Act::Finish { which } => {
                    let mut text = live.swap_remove(which % live.len());
                    prop_assert!(text.is_intact(&pool, keep_every));
                    let (in_use, alone) = (pool.pages_in_use(), text.cache.pages_alone());
                    drop(text);
                    prop_assert_eq!(pool.pages_in_use(), in_use - alone);
                }
            }
            prop_assert_eq!(pool.pages_in_use(), held(&mut live));
            prop_assert!(pool.pages_held() >= pool.pages_in_use() && pool.pages_held() <= limit);
            prop_assert!(prefixes.len() <= most);
            for text in &live {
                let usage = pool.usage(&ops, &text.cache);
                let held = text.cache.held();
                let exact = held.tokens.min(delay);
                let closed = |slots: usize| (slots - exact).saturating_sub(1);
                let pages: usize = held.slots.iter().flatten().map(|&s| closed(s).div_ceil(PAGE_SLOTS)).sum();
                prop_assert_eq!(usage.slot_pages, pages);
                prop_assert_eq!(usage.ring_pages, LAYERS * HEADS.kv * exact.div_ceil(PAGE_SLOTS));
                prop_assert_eq!(text.cache.pages(), usage.slot_pages + usage.ring_pages);
            }
        }
        prop_assert!(live.iter_mut().all(|text| text.is_intact(&pool, keep_every)));
        prefixes.clear();
        prop_assert_eq!(pool.pages_held(), pool.pages_in_use());
        drop(live);
        prop_assert_eq!((pool.pages_held(), pool.states_held()), (0, 0));
    }
}

#[test]
fn a_full_pool_says_so_before_it_takes_anything() {
    let (ops, mut pool) = pool(&Dense, CacheDType::F32, LAYERS * HEADS.kv * 2);
    let mut sequence = pool.sequence();
    pool.admit([(&sequence, 2 * PAGE_SLOTS)]).expect("two pages a head");
    let error = pool.admit([(&sequence, 2 * PAGE_SLOTS + 1)]).expect_err("three pages a head");
    assert_eq!(error, CacheError::OutOfPages { needed: 12, available: 8, limit: 8 });
    take(&ops, &mut pool, &mut sequence, 2 * PAGE_SLOTS, (|_| true, |_| 0.0));
    assert!(pool.admit([(&sequence, 1)]).is_err());
    drop(sequence);
    pool.admit([(&pool.sequence(), 2 * PAGE_SLOTS)]).expect("everything came back");
}

#[test]
fn bytes_are_whole_pages_and_open_states() {
    let policy = folding(16);
    // Bytes of a slot of an int8 cache: keys and values of 4 channels and two scales. Its ring is in bf16.
    let types = [(CacheDType::F32, 32, 32), (CacheDType::Bf16, 16, 16), (CacheDType::Int8, 12, 16)];
    for (dtype, slot, seat) in types {
        let (ops, mut pool) = pool(&policy, dtype, 1000);
        let mut sequence = pool.sequence();
        take(&ops, &mut pool, &mut sequence, 34, (|_| true, |_| 0.0));
        let usage = pool.usage(&ops, &sequence);
        let state = (4 * HEADS.dim + 2 + 16) * 4;
        assert_eq!((usage.page_bytes, usage.ring_page_bytes, usage.state_bytes), (16 * slot, 16 * seat, state));
        // 18 of 34 tokens have left the ring of 16, the last of them to the open slot: two pages of slots, one of the
        // ring, and a state, for each of 4 heads.
        assert_eq!(usage.bytes(), 4 * (2 * 16 * slot + 16 * seat + state));
        assert_eq!(sequence.held().logical_ratio(), 1.0);
    }
}

#[test]
fn the_longest_beginning_is_found_and_the_oldest_is_given_up() {
    let (ops, mut pool) = pool(&Dense, CacheDType::F32, 10_000);
    let mut prefixes = PrefixCache::new(4);
    let of = |tokens| Prefix { tokens, compress: true };
    let offer = |prefixes: &mut PrefixCache, pool: &mut Pool, prefix: Prefix<'_>| {
        let mut sequence = pool.sequence();
        take(&ops, pool, &mut sequence, prefix.tokens.len(), (|_| true, |_| 0.0));
        prefixes.offer(&ops, pool, prefix, &mut sequence);
    };
    let found = |prefixes: &PrefixCache, text| prefixes.longest(of(text)).map_or(0, SequenceCache::tokens);
    for tokens in [&[1, 2][..], &[1, 2, 3, 4], &[1, 3], &[1, 2, 3, 3, 9]] {
        offer(&mut prefixes, &mut pool, of(tokens));
    }
    assert_eq!(found(&prefixes, &[1, 2, 3, 4, 5]), 4);
    assert_eq!(found(&prefixes, &[1, 2, 3, 3, 8]), 2, "past one that is no beginning");
    assert_eq!((found(&prefixes, &[1, 2, 9]), found(&prefixes, &[1, 2]), found(&prefixes, &[1])), (2, 2, 0));
    assert_eq!((found(&prefixes, &[2, 2]), found(&prefixes, &[])), (0, 0));
    assert!(prefixes.longest(Prefix { tokens: &[1, 2, 3, 4], compress: false }).is_none(), "a cache of another kind");
    // A text's shorter beginnings outlast the longer: 1 2 was met with the newest.
    offer(&mut prefixes, &mut pool, of(&[7, 7]));
    assert_eq!((prefixes.len(), found(&prefixes, &[1, 2, 3, 4])), (4, 2));
    offer(&mut prefixes, &mut pool, of(&[8, 8]));
    assert_eq!((found(&prefixes, &[1, 3]), found(&prefixes, &[1, 2, 3, 3, 9])), (0, 5));
    prefixes.set_most(1);
    assert_eq!((prefixes.len(), found(&prefixes, &[8, 8])), (1, 2));
    prefixes.clear();
    assert_eq!((prefixes.is_empty(), pool.pages_held()), (true, 0));
}

/// A snapshot of most of a pool, and one text or two that begin with it.
#[test]
fn a_snapshot_becomes_the_text_where_there_is_no_room_for_a_copy() {
    let text: Vec<u32> = (0..40).collect();
    let prefix = Prefix { tokens: &text, compress: true };
    for (limit, begun) in [(12, 1), (16, 2)] {
        let (ops, mut pool) = pool(&Dense, CacheDType::F32, limit);
        let mut prefixes = PrefixCache::new(4);
        let mut sequence = pool.sequence();
        take(&ops, &mut pool, &mut sequence, 40, (|_| true, |_| 0.0));
        prefixes.keep(prefix, sequence);
        // Two full pages and a part of one in each of 4 heads.
        assert_eq!((pool.pages_held(), pool.pages_in_use()), (12, 0));
        let texts = prefixes.begin(&ops, &mut pool, &vec![prefix; begun]);
        assert!(texts.len() == begun && texts.iter().all(|text| text.tokens() == 40));
        assert_eq!((pool.pages_held(), pool.pages_in_use(), prefixes.len()), (limit, limit, 0));
        assert!(texts.iter().all(|text| text.pages() == 12));
        assert_eq!(texts[0].pages_alone(), if begun == 1 { 12 } else { 4 });
        drop(texts);
        assert_eq!(pool.pages_held(), 0);
    }
}

#[test]
fn what_is_stored_is_restored_or_refused() {
    for (policy, dtype) in CacheDType::ALL.map(|dtype| [(folding(20), dtype), (folding(0), dtype)]).concat() {
        let (ops, mut pool) = pool(&policy, dtype, 100);
        let mut sequence = pool.sequence();
        assert_eq!(pool.restore(&ops, &pool.store(&ops, &sequence)).map(|empty| empty.tokens()), Ok(0));
        take(&ops, &mut pool, &mut sequence, 70, (|token| token % 2 == 0, |token| token as f32));
        let stored = pool.store(&ops, &sequence);
        let restored = pool.restore(&ops, &stored).expect("room for two");
        assert_eq!((restored.held(), pool.pages_held()), (sequence.held(), 2 * sequence.pages()));
        assert_eq!(pool.store(&ops, &restored), stored);
        drop((restored, sequence));
        assert_eq!((pool.pages_held(), pool.states_held()), (0, 0));
        let mut refused = |field, change: &dyn Fn(&mut kvfold_cache::StoredCache)| {
            let mut changed = stored.clone();
            change(&mut changed);
            let error = pool.restore(&ops, &changed).expect_err(field);
            assert!(matches!(error, CacheError::Stored { field: found, .. } if found == field), "{error}");
        };
        refused("slots", &|stored| stored.slots.truncate(3));
        refused("slots", &|stored| stored.slots[1] = 71);
        refused("slots", &|stored| stored.slots[1] = 0);
        refused("ahead", &|stored| stored.ahead.push(0.0));
        refused("pages", &|stored| stored.pages.truncate(5));
        refused("pages", &|stored| stored.slots[1] = 50);
        refused("rings", &|stored| stored.rings.push(0));
        refused("states", &|stored| stored.states.clear());
        refused("slots", &|stored| stored.tokens = 10);
        assert_eq!((pool.pages_held(), pool.states_held()), (0, 0));
    }
}
