//! Shared pages and kept beginnings: the same bytes on a hit as on a miss (I3), and every page comes back (I4).

use crate::common::{Case, LAYERS, METHODS, Rng, cut, serve};
use kvfold_engine::scheduler::{Id, Limits};
use kvfold_engine::{
    Batcher, Engine, Event, Kind, Options, PrefixSettings, PrefixStats, Request, Sampler, Sequence, Stop,
};
use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::ops::Heads;
use kvfold_kernels::paged::{CacheDType, PAGE_SLOTS};
use kvfold_kernels::team::Team;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Cases of all that a cache can hold: a ring, a pooling window, masses, decisions that look back, eviction, and none of it.
pub(crate) fn cases() -> Vec<(Case, bool)> {
    let heads = Heads { query: 4, kv: 2, dim: 8 };
    let folding = |seed, delay, pool_window, log_mass, ahead| {
        let decision = Decision::Head { scale: 1.0, offset: -0.5, bias: true, ahead };
        let share = Share::Head;
        let dmc = Dmc { method: Method::Dmc, decision, delay, sinks: 1, pool_window, log_mass, share };
        Case::new(seed, heads, dmc)
    };
    let evicting = |seed, delay| {
        let Case { dmc, .. } = folding(seed, delay, None, false, true);
        Case::new(seed, heads, Dmc { method: Method::Dms, ..dmc })
    };
    let compressing = [
        folding(1, 0, None, false, false),
        folding(2, 5, Some(3), true, true),
        folding(3, 33, Some(12), true, false),
        folding(4, 16, None, true, true),
        evicting(5, 0),
        evicting(6, 20),
    ];
    compressing.into_iter().map(|case| (case, true)).chain([(folding(7, 0, None, false, false), false)]).collect()
}

pub(crate) fn engine((case, compresses): &(Case, bool), dtype: CacheDType) -> Engine<FastCpu> {
    let engine = if *compresses { case.engine(FastCpu::new()) } else { case.dense_engine(FastCpu::new()) };
    engine.with_cache_dtype(dtype)
}

/// Bits of the logits of the tokens of a text that a sequence has not seen, taken `size` at a time.
pub(crate) fn rest(engine: &mut Engine<FastCpu>, sequence: &mut Sequence, text: &[u32], size: usize) -> Vec<u32> {
    let chunks: Vec<&[u32]> = text[sequence.tokens()..].chunks(size).collect();
    chunks.into_iter().flat_map(|chunk| engine.logits(sequence, chunk).expect("room")).map(f32::to_bits).collect()
}

#[test]
fn a_fork_goes_on_with_the_same_bytes_and_disturbs_nobody() {
    let mut shared = 0;
    for (case, dtype) in cases().into_iter().flat_map(|case| CacheDType::ALL.map(|dtype| (case.clone(), dtype))) {
        let mut rng = Rng::new(case.0.seed);
        let vocab = case.0.shape.vocab;
        let text = rng.tokens(130, vocab);
        let mut engine = engine(&case, dtype);
        let whole: Vec<u32> =
            serve(&mut engine, &text, &cut(130, &[130]), |_, _| {}).into_iter().map(f32::to_bits).collect();
        for (threads, at) in [(1, 1), (2, 16), (1, 37), (2, 64), (1, 100)] {
            let team = Arc::new(Team::new(threads).expect("threads"));
            team.install(|| {
                let mut first = engine.sequence();
                engine.logits(&mut first, &text[..at]).expect("room");
                let (held, usage) = (first.held(), engine.usage(&first));
                let mut fork = engine.fork(&mut first).expect("room");
                assert_eq!((fork.held(), engine.usage(&fork)), (held, usage), "{case:?}");
                shared += 2 * engine.pages_held(&first) - engine.pool().pages_held();
                // Another text after the same beginning, before and while the two go on.
                let other = [&text[..at], &rng.tokens(130 - at, vocab)].concat();
                let mut stranger = engine.fork(&mut fork).expect("room");
                rest(&mut engine, &mut stranger, &other[..at + (130 - at) / 2], 7);
                assert_eq!(rest(&mut engine, &mut fork, &text, 9), whole[at * vocab..], "a fork at {at}, {case:?}");
                rest(&mut engine, &mut stranger, &other, 1);
                assert_eq!(rest(&mut engine, &mut first, &text, 1), whole[at * vocab..], "the first, {at}, {case:?}");
                let mut alone = engine.sequence();
                let alone = rest(&mut engine, &mut alone, &other, 50);
                let mut again = engine.fork(&mut stranger).expect("room");
                drop(stranger);
                let last = engine.logits(&mut again, &[1]).expect("room");
                let mut expected = engine.sequence();
                rest(&mut engine, &mut expected, &other, 130);
                assert_eq!(last, engine.logits(&mut expected, &[1]).expect("room"), "another text, {at}, {case:?}");
                assert_eq!(alone[..at * vocab], whole[..at * vocab]);
            });
            assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0), "{case:?}");
        }
    }
    assert!(shared > 100, "{shared} pages shared");
}

pub(crate) fn greedy(prompt: Vec<u32>, new: usize) -> Request {
    let options = Options { sampler: Sampler::GREEDY, stop: Stop { max_new_tokens: new, ..Stop::default() } };
    Request { log_probs: Some(0), ..Request::new(prompt, options) }
}

/// What came of a request: its tokens, the bits of their probabilities, its slots, and the tokens that were cached.
pub(crate) type Outcome = (Vec<u32>, Vec<u64>, Vec<Vec<usize>>, usize);

/// Runs requests, all at once, to their ends.
pub(crate) fn run(batcher: &mut Batcher<'_, FastCpu>, requests: &[Request]) -> Vec<Outcome> {
    let ids: Vec<Id> =
        requests.iter().map(|request| batcher.submit(request.clone()).expect("a request that fits")).collect();
    let mut outcomes: BTreeMap<Id, Outcome> = ids.iter().map(|&id| (id, Outcome::default())).collect();
    while !batcher.is_idle() {
        for event in batcher.step().expect("a plan that holds") {
            match event {
                Event::Token { id, token, log_probs } => {
                    let outcome = outcomes.get_mut(&id).expect("a live request");
                    outcome.0.push(token);
                    outcome.1.extend(log_probs.map(|log_probs| log_probs.token.to_bits()));
                }
                Event::Finished { id, sequence, cached, .. } => {
                    let outcome = outcomes.get_mut(&id).expect("a live request");
                    (outcome.2, outcome.3) = (sequence.held().slots, cached);
                }
                Event::Prompt { .. } | Event::Failed { .. } => panic!("nobody asked"),
            }
        }
    }
    ids.into_iter().map(|id| outcomes.remove(&id).expect("all ended")).collect()
}

pub(crate) const LIMITS: Limits = Limits { tokens: 40, running: 8 };

#[test]
fn a_hit_gives_the_bytes_of_a_miss() {
    let mut hits = 0;
    for (case, dtype) in cases().into_iter().flat_map(|case| CacheDType::ALL.map(|dtype| (case.clone(), dtype))) {
        let mut rng = Rng::new(case.0.seed);
        let vocab = case.0.shape.vocab;
        let (start, mut engine) = (rng.tokens(70, vocab), engine(&case, dtype));
        // A conversation: each prompt is the last one, its answer, and more. Then others that begin like it.
        let mut prompts = vec![start.clone()];
        let mut batcher = Batcher::new(&mut engine, LIMITS, 1.0);
        let mut outcomes = Vec::new();
        for turn in 0..3 {
            outcomes.extend(run(&mut batcher, &[greedy(prompts[turn].clone(), 9)]));
            prompts.push([&prompts[turn][..], &outcomes[turn].0, &rng.tokens(10, vocab)].concat());
        }
        prompts.truncate(3);
        prompts.extend([20, 33, 69].map(|same| [&start[..same], &rng.tokens(40, vocab)].concat()));
        prompts.push(start.clone());
        outcomes.extend(run(
            &mut batcher,
            &prompts[3..].iter().map(|prompt| greedy(prompt.clone(), 9)).collect::<Vec<_>>(),
        ));
        assert_eq!(batcher.prefix_stats(), PrefixStats::default());
        drop(batcher);
        assert_eq!((engine.pool().pages_held(), engine.prefixes().len()), (0, 0), "nothing is kept but when asked to");
        for threads in [1, 2] {
            let cached: Vec<usize> = Arc::new(Team::new(threads).expect("threads")).install(|| {
                let settings = PrefixSettings { every: 16, most: 100 };
                let mut batcher = Batcher::new(&mut engine, LIMITS, 1.0).with_prefixes(settings);
                let found = prompts.iter().flat_map(|prompt| run(&mut batcher, &[greedy(prompt.clone(), 9)]));
                let found: Vec<Outcome> = found.collect();
                for (found, missed) in found.iter().zip(&outcomes) {
                    assert_eq!(
                        (&found.0, &found.1, &found.2),
                        (&missed.0, &missed.1, &missed.2),
                        "{dtype:?}, {case:?}"
                    );
                }
                let unwilling = Request { reuse: false, ..greedy(prompts[1].clone(), 9) };
                assert_eq!(run(&mut batcher, &[unwilling])[0].3, 0);
                let PrefixStats { queried, hit } = batcher.prefix_stats();
                assert_eq!(queried, prompts.iter().map(Vec::len).sum::<usize>() as u64);
                assert_eq!(hit, found.iter().map(|outcome| outcome.3).sum::<usize>() as u64);
                hits += hit;
                found.iter().map(|outcome| outcome.3).collect()
            });
            // All that a turn before has read, its last token but not the last one of its answer; and up to the last place
            // that was kept. The whole of a prompt is never found: its last token has to be computed.
            assert_eq!(cached, [0, 78, 97, 16, 32, 64, 64], "{case:?}");
            engine.clear_prefixes();
            assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0), "{case:?}");
        }
    }
    assert!(hits > 10_000, "{hits}");
}

#[test]
fn texts_that_begin_alike_share_what_they_hold() {
    let case = (Case::draw(6000).never(), false);
    let mut engine = engine(&case, CacheDType::F32);
    let mut rng = Rng::new(1);
    let start = rng.tokens(97, case.0.shape.vocab);
    // Room for one text and a half: of texts that share their first 96 tokens, for many more.
    let limit = engine.pool().worst_pages(110) * 3 / 2;
    engine = engine.with_page_limit(limit);
    let mut batcher = Batcher::new(&mut engine, LIMITS, 1.0).with_prefixes(PrefixSettings { every: 32, most: 9 });
    run(&mut batcher, &[greedy(start.clone(), 1)]);
    for _ in 0..4 {
        batcher.submit(greedy([&start[..96], &rng.tokens(4, case.0.shape.vocab)].concat(), 10)).expect("room for one");
    }
    let mut most = 0;
    while !batcher.is_idle() {
        batcher.step().expect("a plan that holds");
        most = most.max(batcher.scheduler().running());
    }
    assert_eq!((most, batcher.preemptions(), batcher.prefix_stats().hit), (4, 0, 4 * 96));
}

/// Several answers to one prompt, and other texts that begin as it does, all asked for at once: what they have in common is
/// read by the first of them alone, and the answers are those of each alone.
#[test]
fn what_comes_at_once_reads_a_common_beginning_once() {
    const EVERY: usize = 32;
    for case in cases() {
        let mut rng = Rng::new(case.0.seed);
        let vocab = case.0.shape.vocab;
        let prompt = rng.tokens(120, vocab);
        let drawn = |stream| {
            let mut request = greedy(prompt.clone(), 6);
            request.options.sampler.temperature = 1.0;
            Request { stream, ..request }
        };
        let mut requests: Vec<Request> = (0..4).map(drawn).collect();
        requests.push(greedy([&prompt[..], &rng.tokens(20, vocab)].concat(), 5));
        requests.push(greedy([&prompt[..70], &rng.tokens(20, vocab)].concat(), 5));
        // Of these one begins otherwise, and one is held otherwise.
        requests.push(greedy(rng.tokens(90, vocab), 5));
        requests.push(Request { kind: Kind { full: true, trace: false }, ..greedy(prompt.clone(), 5) });
        let mut engine = engine(&case, CacheDType::Bf16);
        let alone: Vec<Outcome> = requests
            .iter()
            .map(|request| run(&mut Batcher::new(&mut engine, LIMITS, 1.0), std::slice::from_ref(request)).remove(0))
            .collect();
        let settings = PrefixSettings { every: EVERY, most: 99 };
        let mut batcher = Batcher::new(&mut engine, LIMITS, 1.0).with_prefixes(settings);
        let together = run(&mut batcher, &requests);
        for (n, (together, alone)) in together.iter().zip(&alone).enumerate() {
            assert_eq!((&together.0, &together.1, &together.2), (&alone.0, &alone.1, &alone.2), "{n}, {case:?}");
        }
        let cached: Vec<usize> = together.iter().map(|outcome| outcome.3).collect();
        assert_eq!(cached, [0, 96, 96, 96, 120, 64, 0, 0], "{case:?}");
    }
}

/// Requests of few kinds, so that many begin alike; with `full`, half of them with full caches.
fn request(case: &Case, rng: &mut Rng, full: bool) -> Request {
    let stem = Rng::new(rng.within(0..3) as u64).tokens(100, case.shape.vocab);
    let own = rng.within(1..30);
    let prompt = [&stem[..rng.within(0..90)], &rng.tokens(own, case.shape.vocab)].concat();
    let room = case.shape.context - prompt.len();
    let sampler = Sampler { temperature: rng.pick(&[0.0, 0.8]), seed: rng.within(0..2) as u64, ..Sampler::GREEDY };
    let stop =
        Stop { max_new_tokens: rng.within(0..room.min(40)), at: (0..rng.pick(&[0, 1])).collect(), ..Stop::default() };
    let reuse = rng.within(0..8) > 0;
    let kind = Kind { full: full && own.is_multiple_of(2), trace: false };
    Request { log_probs: Some(0), kind, reuse, ..Request::new(prompt, Options { sampler, stop }) }
}

#[test]
fn a_storm_of_texts_that_begin_alike_gives_the_texts_of_each_alone() {
    let (mut preempted, mut cancelled, mut finished, mut stats) = (0, 0, 0, PrefixStats::default());
    for (seed, method) in (7000..7016).flat_map(|seed| METHODS.map(|method| (seed, method))) {
        let case = match seed % 4 {
            0 => Case::draw_of(method, seed).never(),
            _ => Case::draw_of(method, seed),
        };
        let mut rng = Rng::new(seed);
        let dtype = CacheDType::ALL[seed as usize % 3];
        let heads = LAYERS * case.shape.heads.kv;
        let whole = case.shape.context.div_ceil(PAGE_SLOTS) + case.dmc.delay.div_ceil(PAGE_SLOTS) + 1;
        let limits = Limits { tokens: rng.pick(&[3, 16, 64]), running: rng.pick(&[4, 33]) };
        let limit = heads * whole * rng.pick(&[1, 2]);
        let built = || case.engine(FastCpu::new()).with_cache_dtype(dtype);
        let (mut engine, mut alone) = (built().with_page_limit(limit).with_chunk(rng.pick(&[7, 128])), built());
        let settings = PrefixSettings { every: rng.pick(&[1, 8, 16, 33]), most: rng.pick(&[3, 40]) };
        // A guess that is too good, so that some lose their caches.
        let mut batcher = Batcher::new(&mut engine, limits, 0.1).with_prefixes(settings);
        let mut live: BTreeMap<Id, (Request, Outcome)> = BTreeMap::new();
        for n in 0.. {
            if n < 33 || n < 60 && rng.within(0..3) == 0 {
                let request = request(&case, &mut rng, seed % 8 == 1);
                live.insert(batcher.submit(request.clone()).unwrap(), (request, Outcome::default()));
            }
            if rng.within(0..12) == 0 && !live.is_empty() {
                let ids: Vec<Id> = live.keys().copied().collect();
                let id = rng.pick(&ids);
                drop(batcher.cancel(id));
                live.remove(&id);
                cancelled += 1;
            }
            for event in batcher.step().unwrap() {
                match event {
                    Event::Token { id, token, log_probs } => {
                        let (_, outcome) = live.get_mut(&id).expect("a live request");
                        outcome.0.push(token);
                        outcome.1.extend(log_probs.map(|log_probs| log_probs.token.to_bits()));
                    }
                    Event::Finished { id, sequence, cached, .. } => {
                        let (request, outcome) = live.remove(&id).expect("a live request");
                        assert!(cached < request.prompt.len() && (request.reuse || cached == 0));
                        let mut batcher = Batcher::new(&mut alone, limits, 1.0);
                        let (tokens, probs, slots, _) = run(&mut batcher, &[request]).remove(0);
                        assert_eq!((outcome.0, outcome.1), (tokens, probs), "{case:?}");
                        assert_eq!(sequence.held().slots, slots, "{case:?}");
                        finished += 1;
                    }
                    Event::Prompt { .. } | Event::Failed { .. } => panic!("nobody asked"),
                }
                let pool = batcher.engine().pool();
                assert!(pool.pages_held() <= limit && pool.pages_in_use() <= pool.pages_held());
            }
            if n >= 60 && batcher.is_idle() {
                break;
            }
        }
        assert!(live.is_empty(), "{live:?}");
        preempted += batcher.preemptions();
        let PrefixStats { queried, hit } = batcher.prefix_stats();
        stats = PrefixStats { queried: stats.queried + queried, hit: stats.hit + hit };
        drop(batcher);
        assert_eq!(engine.pool().pages_in_use(), 0, "{case:?}");
        engine.clear_prefixes();
        assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0), "{case:?}");
    }
    assert!(preempted > 10 && cancelled > 100 && finished > 300, "{preempted}, {cancelled}, {finished}");
    assert!(stats.hit * 10 > stats.queried, "{stats:?}");
}

#[test]
fn a_text_that_is_sent_back_goes_on_where_it_was_if_memory_allows() {
    // Two texts that fold nothing and hold ten pages a head where there are ten and a half; then the first needs one more,
    // and ends.
    let case = (Case::draw(6100).never(), false);
    let mut engine = engine(&case, CacheDType::F32);
    let limit = engine.pool().worst_pages(100) * 3 / 2;
    engine = engine.with_page_limit(limit);
    let requests: Vec<Request> =
        [(0, 22), (1, 40)].map(|(n, new)| greedy(Rng::new(n).tokens(60, case.0.shape.vocab), new)).to_vec();
    let mut passes = Vec::new();
    for most in [0, 100] {
        let settings = PrefixSettings { every: 16, most };
        let mut batcher = Batcher::new(&mut engine, LIMITS, 0.1).with_prefixes(settings);
        for request in &requests {
            batcher.submit(request.clone()).expect("room for one");
        }
        let mut steps = 0;
        while !batcher.is_idle() {
            batcher.step().expect("a plan that holds");
            steps += 1;
        }
        assert!(batcher.preemptions() > 0);
        passes.push(steps);
    }
    assert!(passes[1] < passes[0], "{passes:?}");
}
