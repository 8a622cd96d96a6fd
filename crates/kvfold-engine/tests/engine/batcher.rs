//! Many requests on one engine: the same bytes, whatever happens beside them (I3), and every page comes back (I4).

use crate::common::{Case, LAYERS, METHODS, Rng, train};
use kvfold_engine::scheduler::{Id, Limits};
use kvfold_engine::{
    Batcher, Constraint, Engine, EngineError, Event, Kind, LogProbs, Options, Request, Sampler, Stop, Trace,
};
use kvfold_kernels::paged::{CacheDType, PAGE_SLOTS};
use kvfold_kernels::{CacheOps, FastCpu};
use std::collections::BTreeMap;

/// Texts of even tokens, up to a length.
#[derive(Clone, Debug)]
struct Even {
    left: usize,
}

impl Constraint for Even {
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String> {
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
        Ok(())
    }

    fn take(&mut self, token: u32) -> Result<bool, String> {
        if !token.is_multiple_of(2) {
            return Err(format!("{token} is odd"));
        }
        self.left -= 1;
        Ok(self.left == 0)
    }

    fn copy(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// A request of any kind.
fn request(case: &Case, rng: &mut Rng) -> Request {
    let prompt = rng.within(1..60);
    let room = case.shape.context - prompt;
    let sampler = Sampler {
        temperature: rng.pick(&[0.0, 0.8, 2.0]),
        seed: rng.within(0..3) as u64,
        top_k: rng.pick(&[0, 0, 7]),
        repetition_penalty: rng.pick(&[1.0, 1.0, 1.3]),
        frequency_penalty: rng.pick(&[0.0, 0.0, 0.4]),
        ..Sampler::GREEDY
    };
    let max_new_tokens = rng.within(0..room.min(60));
    let min_new_tokens = rng.pick(&[0, 0, 5]);
    let stop = Stop { max_new_tokens, min_new_tokens, at: (0..rng.pick(&[0, 1, 3])).collect() };
    let constraint = rng.pick(&[false, false, true]).then(|| Box::new(Even { left: rng.within(1..30) }));
    Request {
        log_probs: rng.pick(&[None, Some(2)]),
        prompt_log_probs: rng.pick(&[None, None, Some(1)]),
        kind: Kind { full: rng.pick(&[false, false, true]), trace: rng.pick(&[false, true]) },
        constraint: constraint.map(|even| even as Box<dyn Constraint>),
        ..Request::new(rng.tokens(prompt, case.shape.vocab), Options { sampler, stop })
    }
}

/// What a request comes to.
#[derive(Clone, Debug, Default, PartialEq)]
struct Outcome {
    prompt: Option<Vec<LogProbs>>,
    tokens: Vec<u32>,
    log_probs: Vec<Option<LogProbs>>,
    stopped: bool,
    stop: Option<(u32, Option<LogProbs>)>,
    slots: Vec<Vec<usize>>,
    trace: Option<Trace>,
}

/// Requests on their way, and what they came to so far.
#[derive(Debug, Default)]
struct Log {
    live: BTreeMap<Id, Outcome>,
    done: BTreeMap<Id, Outcome>,
}

impl Log {
    fn step<O: CacheOps>(&mut self, batcher: &mut Batcher<'_, O>) {
        for event in batcher.step().unwrap() {
            match event {
                Event::Prompt { id, log_probs } => {
                    let known = self.live.get_mut(&id).expect("a live request").prompt.replace(log_probs);
                    assert_eq!(known, None, "told once");
                }
                Event::Token { id, token, log_probs } => {
                    let outcome = self.live.get_mut(&id).expect("a live request");
                    outcome.tokens.push(token);
                    outcome.log_probs.push(log_probs);
                }
                Event::Finished { id, stopped, stop, sequence, .. } => {
                    let outcome = self.live.remove(&id).expect("a live request");
                    let (slots, trace) = (sequence.held().slots, sequence.trace().cloned());
                    self.done.insert(id, Outcome { stopped, stop, slots, trace, ..outcome });
                }
                Event::Failed { reason, .. } => panic!("{reason}"),
            }
        }
    }
}

/// What a request comes to when nothing runs beside it.
fn alone((case, dtype): (&Case, CacheDType), request: &Request) -> Outcome {
    let mut engine = case.engine(FastCpu::new()).with_cache_dtype(dtype);
    let mut batcher = Batcher::new(&mut engine, Limits { tokens: 1000, running: 1 }, 1.0);
    let mut log = Log::default();
    let id = batcher.submit(request.clone()).unwrap();
    log.live.insert(id, Outcome::default());
    while !batcher.is_idle() {
        log.step(&mut batcher);
    }
    log.done.remove(&id).expect("a request that ended")
}

#[test]
fn a_request_is_the_same_bytes_among_others_that_come_go_and_are_preempted() {
    let (mut preempted, mut cancelled, mut finished) = (0, 0, 0);
    for (seed, method) in (5000..5050).flat_map(|seed| METHODS.map(|method| (seed, method))) {
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
        let mut requests: BTreeMap<Id, Request> = BTreeMap::new();
        let mut log = Log::default();
        for n in 0.. {
            if n < 33 || n < 60 && rng.within(0..3) == 0 {
                let request = request(&case, &mut rng);
                let id = batcher.submit(request.clone()).unwrap();
                log.live.insert(id, Outcome::default());
                requests.insert(id, request);
            }
            if rng.within(0..12) == 0 && !log.live.is_empty() {
                let ids: Vec<Id> = log.live.keys().copied().collect();
                let id = rng.pick(&ids);
                drop(batcher.cancel(id));
                log.live.remove(&id);
                cancelled += 1;
            }
            log.step(&mut batcher);
            for (id, outcome) in std::mem::take(&mut log.done) {
                let request = &requests[&id];
                assert_eq!(outcome, alone((&case, dtype), request), "{request:?}, {case:?}");
                finished += 1;
            }
            if n >= 60 && batcher.is_idle() {
                break;
            }
        }
        assert!(log.live.is_empty(), "{log:?}");
        preempted += batcher.preemptions();
        drop(batcher);
        assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0), "{case:?}");
    }
    assert!(preempted > 20 && cancelled > 200 && finished > 500, "{preempted}, {cancelled}, {finished}");
}

/// A request for the likeliest tokens.
fn greedy(prompt: Vec<u32>, new: usize) -> Request {
    let stop = Stop { max_new_tokens: new, ..Stop::default() };
    Request::new(prompt, Options { sampler: Sampler::GREEDY, stop })
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
            let mut log = Log::default();
            for _ in 0..20 {
                log.live.insert(batcher.submit(request(&case, &mut rng)).unwrap(), Outcome::default());
            }
            while !batcher.is_idle() {
                log.step(&mut batcher);
            }
            log.done
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
    let requests: Vec<Request> = (0..20).map(|_| greedy(rng.tokens(50, case.shape.vocab), 40)).collect();
    let whole = case.engine(FastCpu::new()).pool().worst_pages(89);
    assert!(whole >= heads * 5, "{whole}");
    let mut engine = case.engine(FastCpu::new()).with_page_limit(whole * 3 / 2);
    let mut batcher = Batcher::new(&mut engine, Limits { tokens: 32, running: 20 }, 0.2);
    let ids: Vec<Id> = requests.iter().map(|request| batcher.submit(request.clone()).unwrap()).collect();
    let mut log = Log { live: ids.iter().map(|&id| (id, Outcome::default())).collect(), ..Log::default() };
    while !batcher.is_idle() {
        log.step(&mut batcher);
    }
    for (id, request) in ids.iter().zip(&requests) {
        assert_eq!(log.done[id], alone((&case, CacheDType::F32), request));
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
    let of = |prompt: usize, new: usize| greedy(vec![1; prompt], new);
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

/// The training path says what decisions and probabilities are; a text's new tokens are given as a prompt there.
#[test]
fn traces_and_probabilities_are_those_of_training() {
    for (seed, method) in (5400..5412).flat_map(|seed| METHODS.map(|method| (seed, method))) {
        let case = Case::draw_of(method, seed);
        let mut rng = Rng::new(seed);
        let prompt = rng.tokens(70, case.shape.vocab);
        let kind = Kind { trace: true, ..Kind::default() };
        let wishes = Request { log_probs: Some(0), prompt_log_probs: Some(0), kind, ..greedy(prompt.clone(), 20) };
        let outcome = alone((&case, CacheDType::F32), &wishes);
        // The last new token is never read.
        let text = [&prompt[..], &outcome.tokens[..19]].concat();
        let trained = train(&case.model(FastCpu::new()), &[text]).remove(0);
        if trained.margin < 1e-4 {
            continue;
        }
        assert_eq!(outcome.trace.expect("a trace").folds(), trained.decisions.folds(), "{case:?}");
        let said: Vec<f64> =
            outcome.prompt.iter().flatten().chain(outcome.log_probs.iter().flatten()).map(|p| p.token).collect();
        let next = [&prompt[1..], &outcome.tokens].concat();
        assert_eq!(said.len(), next.len());
        for ((said, logits), token) in said.iter().zip(trained.logits.chunks_exact(case.shape.vocab)).zip(next) {
            let wanted = LogProbs::of(logits, token, 0).token;
            assert!((said - wanted).abs() < 1e-3, "{said}, {wanted}, {case:?}");
        }
    }
}

/// A prompt that nothing is added to can be scored.
#[test]
fn a_prompt_can_be_scored_alone() {
    let case = Case::draw(5500);
    let mut rng = Rng::new(3);
    let prompt = rng.tokens(40, case.shape.vocab);
    let scored = |new| {
        let wishes = Request { prompt_log_probs: Some(3), ..greedy(prompt.clone(), new) };
        alone((&case, CacheDType::F32), &wishes)
    };
    let (none, some) = (scored(0), scored(4));
    assert_eq!((none.tokens.len(), some.tokens.len()), (0, 4));
    assert_eq!(none.prompt.as_ref().map(Vec::len), Some(39));
    assert_eq!(none.prompt, some.prompt);
}

/// What never folds by request is what the model would say if it never chose to.
#[test]
fn a_full_cache_by_request_folds_nothing() {
    for (seed, method) in (5600..5610).flat_map(|seed| METHODS.map(|method| (seed, method))) {
        let mut case = Case::draw_of(method, seed);
        // The offset by which `never` closes decisions is importance's as well, which masses count.
        case.dmc.log_mass = false;
        let mut rng = Rng::new(seed);
        let kind = Kind { full: true, trace: true };
        let wishes = Request { kind, ..greedy(rng.tokens(60, case.shape.vocab), 30) };
        let full = alone((&case, CacheDType::F32), &wishes);
        assert!(full.slots.iter().flatten().all(|&slots| slots == 89), "{full:?}");
        assert!(full.trace.as_ref().is_some_and(|trace| trace.folds().iter().flatten().flatten().all(|&folds| !folds)));
        let Outcome { tokens, slots, .. } =
            alone((&case.clone().never(), CacheDType::F32), &Request { kind: Kind::default(), ..wishes });
        assert_eq!((full.tokens, full.slots), (tokens, slots), "{case:?}");
    }
}

/// An end that is asked for too early does not come, and a constraint's end does.
#[test]
fn texts_end_when_they_may() {
    let case = Case::draw(5700);
    let of = |at: Vec<u32>, min_new_tokens, left| {
        let stop = Stop { max_new_tokens: 30, min_new_tokens, at };
        let constraint = Some(Box::new(Even { left }) as Box<dyn Constraint>);
        Request { constraint, ..Request::new(vec![1, 2, 3], Options { sampler: Sampler::GREEDY, stop }) }
    };
    let alone = |request: &Request| alone((&case, CacheDType::F32), request);
    let even: Vec<u32> = (0..case.shape.vocab as u32).step_by(2).collect();
    let Outcome { tokens, stopped, .. } = alone(&of(vec![], 0, 12));
    assert!(stopped && tokens.len() == 12 && tokens.iter().all(|token| token % 2 == 0), "{tokens:?}");
    let Outcome { tokens, stopped, .. } = alone(&of(vec![], 0, 99));
    assert!(!stopped && tokens.len() == 30);
    let ends = even[..even.len() - 1].to_vec();
    let Outcome { tokens, stopped, .. } = alone(&of(ends.clone(), 0, 99));
    let Outcome { tokens: later, .. } = alone(&of(ends, 7, 99));
    assert!(stopped && tokens.len() < 30 && later.len() >= 7, "{tokens:?}, {later:?}");
    assert!(later[..7].iter().all(|&token| token == even[even.len() - 1]));
}
