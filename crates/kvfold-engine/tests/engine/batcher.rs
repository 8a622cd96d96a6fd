//! Many requests on one engine: the same bytes, whatever happens beside them (I3), and every page comes back (I4).

use crate::common::{Case, LAYERS, METHODS, Rng};
use kvfold_engine::scheduler::{Id, Limits};
use kvfold_engine::{Batcher, Engine, EngineError, Event, Options, Request, Sampler, Stop, generate};
use kvfold_kernels::FastCpu;
use kvfold_kernels::paged::{CacheDType, PAGE_SLOTS};
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// A request of any kind.
fn request(case: &Case, rng: &mut Rng) -> Request {
    let prompt = rng.within(1..60);
    let room = case.shape.context - prompt;
    Request {
        prompt: rng.tokens(prompt, case.shape.vocab),
        options: Options {
            sampler: Sampler {
                temperature: rng.pick(&[0.0, 0.8, 2.0]),
                seed: rng.within(0..3) as u64,
                top_k: rng.pick(&[0, 0, 7]),
                repetition_penalty: rng.pick(&[1.0, 1.0, 1.3]),
                frequency_penalty: rng.pick(&[0.0, 0.0, 0.4]),
                ..Sampler::GREEDY
            },
            stop: Stop { max_new_tokens: rng.within(0..room.min(60)), at: (0..rng.pick(&[0, 1, 3])).collect() },
        },
        stream: 0,
        log_probs: None,
        reuse: false,
    }
}

/// What a request comes to when nothing runs beside it.
fn alone((case, dtype): (&Case, CacheDType), request: &Request) -> (Vec<u32>, bool, Vec<Vec<usize>>) {
    let mut engine = case.engine(FastCpu::new()).with_cache_dtype(dtype);
    let done = generate(&mut engine, &request.prompt, &request.options, |_| ControlFlow::Continue(())).unwrap();
    (done.tokens, done.stopped, done.sequence.held().slots)
}

#[test]
fn a_request_is_the_same_bytes_among_others_that_come_go_and_are_preempted() {
    let (mut preempted, mut cancelled, mut finished) = (0, 0, 0);
    for (seed, method) in (5000..5030).flat_map(|seed| METHODS.map(|method| (seed, method))) {
        let case = Case::draw_of(method, seed);
        let mut rng = Rng::new(seed);
        let dtype = CacheDType::ALL[seed as usize % 3];
        // Memory for the longest request, and not for two.
        let heads = LAYERS * case.shape.heads.kv;
        let whole = case.shape.context.div_ceil(PAGE_SLOTS) + case.dmc.delay.div_ceil(PAGE_SLOTS) + 1;
        let limits = Limits { tokens: rng.pick(&[3, 16, 64]), running: rng.pick(&[4, 33]) };
        let engine = case.engine(FastCpu::new()).with_cache_dtype(dtype).with_page_limit(heads * whole);
        let mut engine = engine.with_chunk(rng.pick(&[1, 7, 128]));
        // A guess that is too good, so that some lose their caches.
        let mut batcher = Batcher::new(&mut engine, limits, 0.1);
        let mut live: BTreeMap<Id, (Request, Vec<u32>)> = BTreeMap::new();
        for n in 0.. {
            if n < 33 || n < 60 && rng.within(0..3) == 0 {
                let request = request(&case, &mut rng);
                live.insert(batcher.submit(request.clone()).unwrap(), (request, Vec::new()));
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
                    Event::Token { id, token, .. } => live.get_mut(&id).expect("a live request").1.push(token),
                    Event::Finished { id, stopped, sequence, .. } => {
                        let (request, tokens) = live.remove(&id).expect("a live request");
                        let expected = alone((&case, dtype), &request);
                        assert_eq!((tokens, stopped, sequence.held().slots), expected, "{request:?}, {case:?}");
                        finished += 1;
                    }
                }
            }
            if n >= 60 && batcher.is_idle() {
                break;
            }
        }
        assert!(live.is_empty(), "{live:?}");
        preempted += batcher.preemptions();
        drop(batcher);
        assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0), "{case:?}");
    }
    assert!(preempted > 20 && cancelled > 200 && finished > 500, "{preempted}, {cancelled}, {finished}");
}

#[test]
fn threads_change_nothing() {
    use kvfold_kernels::team::Team;
    use std::sync::Arc;
    let case = Case::draw(5100);
    let run = |threads: usize| {
        Arc::new(Team::new(threads).unwrap()).install(|| {
            let mut rng = Rng::new(1);
            let mut engine = case.engine(FastCpu::new());
            let mut batcher = Batcher::new(&mut engine, Limits { tokens: 20, running: 16 }, 1.0);
            (0..20).for_each(|_| drop(batcher.submit(request(&case, &mut rng))));
            let mut tokens = Vec::new();
            while !batcher.is_idle() {
                tokens.extend(batcher.step().unwrap().into_iter().filter_map(|event| match event {
                    Event::Token { id, token, .. } => Some((id, token)),
                    Event::Finished { .. } => None,
                }));
            }
            tokens
        })
    };
    assert_eq!(run(1), run(2));
}

/// Memory for one and a half requests, and twenty of a model that folds nothing.
#[test]
fn requests_that_refuse_to_fold_all_end_with_the_same_bytes() {
    let case = Case::draw(5200).never();
    let heads = LAYERS * case.shape.heads.kv;
    let mut rng = Rng::new(2);
    let options = Options { sampler: Sampler::GREEDY, stop: Stop { max_new_tokens: 40, at: vec![] } };
    let requests: Vec<Request> = (0..20)
        .map(|_| Request {
            prompt: rng.tokens(50, case.shape.vocab),
            options: options.clone(),
            stream: 0,
            log_probs: None,
            reuse: false,
        })
        .collect();
    let whole = case.engine(FastCpu::new()).pool().worst_pages(89);
    assert!(whole >= heads * 5, "{whole}");
    let mut engine = case.engine(FastCpu::new()).with_page_limit(whole * 3 / 2);
    let mut batcher = Batcher::new(&mut engine, Limits { tokens: 32, running: 20 }, 0.2);
    let ids: Vec<Id> = requests.iter().map(|request| batcher.submit(request.clone()).unwrap()).collect();
    let mut texts: BTreeMap<Id, Vec<u32>> = BTreeMap::new();
    while !batcher.is_idle() {
        for event in batcher.step().unwrap() {
            if let Event::Token { id, token, .. } = event {
                texts.entry(id).or_default().push(token);
            }
        }
    }
    for (id, request) in ids.iter().zip(&requests) {
        assert_eq!(texts[id], alone((&case, CacheDType::F32), request).0);
    }
    drop(batcher);
    assert_eq!(engine.pool().pages_held(), 0);
}

#[test]
fn a_request_that_could_never_run_is_refused_when_it_comes() {
    let case = Case::draw(5300);
    let limit = case.engine(FastCpu::new()).pool().worst_pages(60);
    let mut engine: Engine<FastCpu> = case.engine(FastCpu::new()).with_page_limit(limit);
    let mut batcher = Batcher::new(&mut engine, Limits { tokens: 32, running: 4 }, 0.2);
    let of = |prompt: usize, new: usize| Request {
        prompt: vec![1; prompt],
        options: Options { sampler: Sampler::GREEDY, stop: Stop { max_new_tokens: new, at: vec![] } },
        stream: 0,
        log_probs: None,
        reuse: false,
    };
    assert!(matches!(batcher.submit(of(0, 3)), Err(EngineError::EmptyPrompt)));
    assert!(matches!(batcher.submit(of(100, 100)), Err(EngineError::TooLong { .. })));
    let error = batcher.submit(of(80, 40)).unwrap_err();
    assert!(matches!(error, EngineError::TooLarge(_)), "{error:?}");
    assert!(error.to_string().contains("119 tokens") && error.to_string().contains("allow more memory"), "{error}");
    assert!(batcher.is_idle());
    let id = batcher.submit(of(40, 21)).expect("60 tokens, since the last new one is never read");
    assert!(!batcher.is_idle());
    batcher.cancel(id);
    assert!(batcher.is_idle() && batcher.step().unwrap().is_empty());
}
