//! Promise I4 on the pool alone: pages have one owner, and all of them come back.

use kvfold_cache::{CacheError, CachePolicy, CacheShape, Dense, Folding, PagePool, SequenceCache};
use kvfold_kernels::Reference;
use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::ops::Heads;
use kvfold_kernels::paged::{CacheDType, PAGE_SLOTS};
use proptest::prelude::*;

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

/// Plays the kernel: `more` tokens, of which each head keeps what `kept` says of the tokens that leave the ring.
fn take(
    ops: &Reference<f32>,
    pool: &mut Pool,
    sequence: &mut SequenceCache,
    more: usize,
    kept: impl Fn(usize) -> bool,
) {
    for layer in 0..LAYERS {
        pool.reserve(ops, sequence, (layer, more));
        let rule = pool.rule();
        let delay = rule.delay();
        for table in sequence.layer_mut(layer) {
            for token in table.tokens..table.tokens + more {
                let slots = token >= delay && (table.slots == 0 || kept(token));
                table.slots += usize::from(slots);
            }
            table.tokens += more;
            assert!(table.closed(rule) <= table.pages.len() * PAGE_SLOTS);
            assert!(table.tokens.min(delay) <= table.ring.len() * PAGE_SLOTS);
        }
        pool.trim(sequence, layer);
    }
}

#[derive(Clone, Debug)]
enum Act {
    Start,
    Take { which: usize, more: usize, keep_every: usize },
    Finish { which: usize },
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        2 => Just(Act::Start),
        8 => (any::<usize>(), 1usize..40, 1usize..6)
            .prop_map(|(which, more, keep_every)| Act::Take { which, more, keep_every }),
        1 => any::<usize>().prop_map(|which| Act::Finish { which }),
    ];
    prop::collection::vec(act, 1..120)
}

proptest! {
    #[test]
    fn pages_have_one_owner_and_all_come_back(acts in acts(), delay in 0usize..40) {
        let policy = folding(delay);
        let (ops, mut pool) = pool(&policy, CacheDType::F32, 10_000);
        let mut live: Vec<SequenceCache> = Vec::new();
        for act in acts {
            match act {
                Act::Start => live.push(pool.sequence()),
                Act::Take { which, more, keep_every } if !live.is_empty() => {
                    let n = which % live.len();
                    take(&ops, &mut pool, &mut live[n], more, |token| token % keep_every == 0);
                }
                Act::Finish { which } if !live.is_empty() => drop(live.swap_remove(which % live.len())),
                _ => {}
            }
            let owned: usize = live
                .iter_mut()
                .map(|s| (0..LAYERS).map(|l| s.layer_mut(l).iter().map(|t| t.pages.len() + t.ring.len()).sum::<usize>()).sum::<usize>())
                .sum();
            prop_assert_eq!(pool.pages_held(), owned);
            for sequence in &live {
                let usage = pool.usage(&ops, sequence);
                let held = sequence.held();
                let exact = held.tokens.min(delay);
                let closed = |slots: usize| (slots - exact).saturating_sub(1);
                let pages: usize = held.slots.iter().flatten().map(|&s| closed(s).div_ceil(PAGE_SLOTS)).sum();
                prop_assert_eq!(usage.slot_pages, pages);
                prop_assert_eq!(usage.ring_pages, LAYERS * HEADS.kv * exact.div_ceil(PAGE_SLOTS));
            }
        }
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
    take(&ops, &mut pool, &mut sequence, 2 * PAGE_SLOTS, |_| true);
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
        take(&ops, &mut pool, &mut sequence, 34, |_| true);
        let usage = pool.usage(&ops, &sequence);
        let state = (4 * HEADS.dim + 2 + 16) * 4;
        assert_eq!((usage.page_bytes, usage.ring_page_bytes, usage.state_bytes), (16 * slot, 16 * seat, state));
        // 18 of 34 tokens have left the ring of 16, the last of them to the open slot: two pages of slots, one of the
        // ring, and a state, for each of 4 heads.
        assert_eq!(usage.bytes(), 4 * (2 * 16 * slot + 16 * seat + state));
        assert_eq!(sequence.held().logical_ratio(), 1.0);
    }
}
