//! Promises I1 to I4 and I7 of the design on random tiny models: every way through the model folds alike, never folding
//! is the plain model, company changes nothing, every page comes back, and ratios are what the decisions imply.

use crate::common::{Case, Decisions, LAYERS, METHODS, Rng, Trained, cut, serve, train, worst};
use kvfold_engine::{Engine, EngineError, Sequence};
use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::kernel_set::KernelSet;
use kvfold_kernels::ops::{Heads, Spans};
use kvfold_kernels::paged::{CacheDType, PAGE_SLOTS};
use kvfold_kernels::real::Real;
use kvfold_kernels::team::Team;
use kvfold_kernels::{Array, Cpu, FastCpu, Ops, Reference};
use kvfold_model::Loaded;
use kvfold_model::attend::{Fading, Folding, Mode, Plain};
use kvfold_model::block::Attend;
use std::sync::Arc;

/// Whether numbers are the same to the last bit.
fn same<F: Real>(got: &[F], want: &[F]) -> bool {
    got.len() == want.len() && got.iter().zip(want).all(|(g, w)| g.integer_decode() == w.integer_decode())
}

// ---- I1: training, prefill and decode ----

/// What a run over many cases has met.
#[derive(Debug, Default)]
struct Met {
    worst: f64,
    cases: usize,
    /// Cases left out because a decision hangs on rounding.
    unclear: usize,
    /// Sequences with a segment longer than the pooling window, by window.
    beyond_window: [usize; 2],
    /// Sequences with a segment longer than a page.
    beyond_page: usize,
    /// Sequences whose heads hold different numbers of slots.
    uneven: usize,
}

impl Met {
    fn note<F>(&mut self, case: &Case, text: &[u32], trained: &Trained<F>) {
        let longest = trained.decisions.longest(text.len());
        for (met, window) in self.beyond_window.iter_mut().zip([3, 12]) {
            *met += usize::from(case.dmc.pool_window == Some(window) && longest > window);
        }
        self.beyond_page += usize::from(case.dmc.pool_window.is_none() && longest > PAGE_SLOTS);
        let slots = trained.decisions.slots(text.len()).concat();
        self.uneven += usize::from(slots.iter().any(|&s| s != slots[0]));
    }

    fn assert_everything_was_met(&self, method: Method) {
        let Self { beyond_window, beyond_page, uneven, .. } = *self;
        // DMS pools nothing.
        let windows = method == Method::Dms || beyond_window.iter().all(|&n| n >= 5);
        assert!(windows && beyond_page >= 3 && uneven >= 20, "{self:?}");
        assert!(self.unclear * 4 <= self.cases, "{self:?}");
    }
}

/// Trains and serves random cases; panics where decisions or slot counts differ after any token.
fn ways_through_the_model<F: Real, K: KernelSet<F>>(
    ops: &Cpu<F, K>,
    method: Method,
    seeds: std::ops::Range<u64>,
    margin: f64,
) -> Met {
    let mut met = Met::default();
    for seed in seeds {
        let case = Case::draw_of(method, seed);
        let mut rng = Rng::new(seed ^ 0x7E87);
        let mut engine = case.engine(ops.clone());
        let lengths = [rng.within(1..8), rng.within(8..60), rng.within(60..131)];
        let texts: Vec<Vec<u32>> = lengths.iter().map(|&len| rng.tokens(len, case.shape.vocab)).collect();
        met.cases += 1;
        let trained = train(engine.model(), &texts);
        if trained.iter().any(|t| t.margin < margin) {
            met.unclear += 1;
            continue;
        }
        for (text, trained) in texts.iter().zip(&trained) {
            met.note(&case, text, trained);
            let seen = trained.rates.iter().map(|rates| rates.iter().map(|r| text.len() as f64 * (1.0 - r)));
            let slots: Vec<Vec<usize>> = seen.map(|slots| slots.map(|s| s.round() as usize).collect()).collect();
            assert_eq!(slots, trained.decisions.slots(text.len()), "the loss counts other slots, {case:?}");

            let odd = 2 * rng.within(1..20) + 1;
            for sizes in [&[1][..], &[odd], &[16], &[7, 1, 40], &[text.len()]] {
                let logits = serve(&mut engine, text, &cut(text.len(), sizes), |_, sequence| {
                    let want = trained.decisions.slots(sequence.tokens());
                    assert_eq!(sequence.held().slots, want, "slots after {} tokens, {case:?}", sequence.tokens());
                });
                met.worst = met.worst.max(worst(&logits, &trained.logits));
                assert!(met.worst < 1.0, "chunks of {sizes:?}: logits off by {:e}, {case:?}", met.worst);
            }
        }
    }
    met
}

#[test]
fn training_prefill_and_decode_are_one_model() {
    for method in METHODS {
        let met = ways_through_the_model(&Reference::<f64>::reference(), method, 0..100, 0.0);
        met.assert_everything_was_met(method);
        assert!(met.worst < 1e-12, "{met:?}");
    }
}

#[test]
fn training_prefill_and_decode_are_one_model_in_f32() {
    // A decision this close to its threshold may fall either way: the paths round differently.
    for method in METHODS {
        let met = ways_through_the_model(&FastCpu::new(), method, 0..100, 1e-4);
        met.assert_everything_was_met(method);
        assert!(met.worst < 1e-4, "{met:?}");
    }
}

// ---- I2: never folding ----

fn logits<F: Real, K: KernelSet<F>>(
    model: &Loaded<Cpu<F, K>>,
    texts: &[Vec<u32>],
    attend: &mut impl Attend<Cpu<F, K>>,
) -> Array<F> {
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    let spans = Spans::of_lengths(&lengths);
    model.pass(&spans).forward(&model.weights, &texts.concat(), attend)
}

/// Cases that never fold, with texts, on a backend; the test is told the case, its model and the texts.
fn never_folding<F: Real, K: KernelSet<F>>(
    ops: &Cpu<F, K>,
    keep: impl Fn(&Dmc) -> bool,
    mut test: impl FnMut(Case, &Loaded<Cpu<F, K>>, &[Vec<u32>]),
) {
    let cases = |method| {
        let cases = (1000..1200).map(move |seed| Case::draw_of(method, seed).never());
        cases.filter(|case| keep(&case.dmc)).take(20)
    };
    for mut case in METHODS.into_iter().flat_map(cases) {
        let mut rng = Rng::new(case.seed);
        let texts: Vec<Vec<u32>> = [1, 23, 130].iter().map(|&len| rng.tokens(len, case.shape.vocab)).collect();
        // Logs of masses change scores unless all importances are 1, as a head's are before it has learned anything.
        if case.dmc.log_mass {
            case.decide = 0.0;
        }
        test(case.clone(), &case.model(ops.clone()), &texts);
    }
}

fn by_head(dmc: &Dmc) -> bool {
    !dmc.decision.borrows_channel()
}

#[test]
fn a_head_that_never_folds_trains_the_plain_model_to_the_last_bit() {
    never_folding(&Reference::<f64>::reference(), by_head, |case, model, texts| {
        let folding = logits(model, texts, &mut Folding::new(&case.dmc, Mode::Hard));
        assert!(same(folding.data(), logits(model, texts, &mut Plain).data()), "{case:?}");
    });
    never_folding(&Reference::<f32>::reference(), by_head, |case, model, texts| {
        let folding = logits(model, texts, &mut Folding::new(&case.dmc, Mode::Hard));
        assert!(same(folding.data(), logits(model, texts, &mut Plain).data()), "{case:?}");
    });
    // The fast path takes keys in blocks, and where the ring begins a block begins: with a delay, only to rounding.
    never_folding(&FastCpu::new(), by_head, |case, model, texts| {
        let folding = logits(model, texts, &mut Folding::new(&case.dmc, Mode::Hard));
        let plain = logits(model, texts, &mut Plain);
        match case.dmc.delay {
            0 => assert!(same(folding.data(), plain.data()), "{case:?}"),
            _ => assert!(worst(folding.data(), plain.data()) < 1e-4, "{case:?}"),
        }
    });
}

#[test]
fn a_new_head_leaves_the_plain_model_as_it_is() {
    // Zero-initialised, with the offset that a retrofit starts from: not by a huge offset but by the logit's sign.
    let new_head = |mut case: Case| {
        case.dmc.decision =
            Decision::Head { scale: 10.0, offset: 5.0, bias: case.shape.decide_bias, ahead: case.shape.decide_ahead };
        case.decide = 0.0;
        case
    };
    never_folding(&Reference::<f64>::reference(), by_head, |case, _, texts| {
        let case = new_head(case);
        let model = case.model(Reference::<f64>::reference());
        let folding = logits(&model, texts, &mut Folding::new(&case.dmc, Mode::Hard));
        assert!(same(folding.data(), logits(&model, texts, &mut Plain).data()), "{case:?}");
    });
}

#[test]
fn a_borrowed_channel_that_never_folds_is_the_model_without_that_channel_to_the_last_bit() {
    let keep = |dmc: &Dmc| dmc.decision.borrows_channel() && !dmc.log_mass;
    never_folding(&Reference::<f64>::reference(), keep, |case, model, texts| {
        let folding = logits(model, texts, &mut Folding::new(&case.dmc, Mode::Hard));
        let without = logits(model, texts, &mut Fading { borrows: case.dmc.borrows(), factor: 0.0 });
        assert!(same(folding.data(), without.data()), "{case:?}");
        assert!(worst(folding.data(), logits(model, texts, &mut Plain).data()) > 1e-3, "the channel matters, {case:?}");
    });
    let at_once = |dmc: &Dmc| keep(dmc) && dmc.delay == 0;
    never_folding(&FastCpu::new(), at_once, |case, model, texts| {
        let folding = logits(model, texts, &mut Folding::new(&case.dmc, Mode::Hard));
        let without = logits(model, texts, &mut Fading { borrows: case.dmc.borrows(), factor: 0.0 });
        assert!(same(folding.data(), without.data()), "{case:?}");
    });
}

#[test]
fn a_cache_that_never_folds_is_a_full_cache() {
    fn compare<F: Real, K: KernelSet<F>>(ops: &Cpu<F, K>, tolerance: f64) {
        never_folding(ops, by_head, |case, _, texts| {
            let (mut folding, mut dense) = (case.engine(ops.clone()), case.dense_engine(ops.clone()));
            for text in texts {
                let chunks = cut(text.len(), &[1, 9, 30]);
                let got = serve(&mut folding, text, &chunks, |_, sequence| {
                    assert!(sequence.held().slots.iter().flatten().all(|&slots| slots == sequence.tokens()));
                });
                let want = serve(&mut dense, text, &chunks, |_, _| {});
                // A key in the ring is rotated; rotated back and pooled, it has been rounded twice more.
                match case.dmc.delay {
                    0 => assert!(same(&got, &want), "{case:?}"),
                    _ => assert!(worst(&got, &want) < tolerance, "{case:?}"),
                }
            }
        });
    }
    compare(&Reference::<f64>::reference(), 1e-12);
    compare(&FastCpu::new(), 1e-4);
}

// ---- I3: company changes nothing ----

/// A model large enough that products, elementwise kernels and attention really go to several threads.
fn large() -> Case {
    let dmc = Dmc {
        method: Method::Dmc,
        decision: Decision::Head { scale: 1.0, offset: -0.5, bias: false, ahead: false },
        delay: 5,
        sinks: 1,
        pool_window: Some(12),
        log_mass: true,
        share: Share::Head,
    };
    let mut case = Case::new(77, Heads { query: 8, kv: 2, dim: 16 }, dmc);
    case.shape.hidden = 64;
    case.shape.vocab = 2048;
    case
}

/// Texts side by side: each takes a random number of tokens per pass, or none. Returns each one's logits and slots.
fn together<K: KernelSet<f32>>(
    engine: &mut Engine<Cpu<f32, K>>,
    texts: &[Vec<u32>],
    rng: &mut Rng,
) -> Vec<(Vec<f32>, Vec<Vec<usize>>)> {
    let vocab = engine.model().shape.vocab;
    let mut sequences: Vec<(Sequence, Vec<f32>)> = texts.iter().map(|_| (engine.sequence(), Vec::new())).collect();
    while sequences.iter().zip(texts).any(|((sequence, _), text)| sequence.tokens() < text.len()) {
        let most = rng.pick(&[2, 2, 10, 131]);
        let mut outs = Vec::new();
        let mut batch: Vec<(&mut Sequence, &[u32])> = Vec::new();
        for ((sequence, logits), text) in sequences.iter_mut().zip(texts) {
            let at = sequence.tokens();
            let take = rng.within(0..most).min(text.len() - at);
            if take > 0 {
                outs.push((take, logits));
                batch.push((sequence, &text[at..at + take]));
            }
        }
        if batch.is_empty() {
            continue;
        }
        let pass = engine.pass(&mut batch).expect("an unlimited pool");
        let mut rows = pass.data().chunks_exact(vocab);
        outs.into_iter().for_each(|(take, logits)| logits.extend(rows.by_ref().take(take).flatten()));
    }
    sequences.into_iter().map(|(sequence, logits)| (logits, sequence.held().slots)).collect()
}

/// Serves texts alone in one chunk, token by token, and together; panics where a byte differs.
fn company_changes_nothing<K: KernelSet<f32>>(engine: &mut Engine<Cpu<f32, K>>, texts: &[Vec<u32>], rng: &mut Rng) {
    let what = format!("{} in {}", engine.policy().name(), engine.pool().dtype().name());
    let mut alone = |size: usize| -> Vec<_> {
        let serve = |text: &Vec<u32>| {
            let mut slots = Vec::new();
            let chunks = cut(text.len(), &[size]);
            (serve(engine, text, &chunks, |_, sequence| slots = sequence.held().slots), slots)
        };
        texts.iter().map(serve).collect()
    };
    let (whole, by_token) = (alone(usize::MAX), alone(1));
    let check = |found: &[(Vec<f32>, Vec<Vec<usize>>)]| {
        for (n, (found, wanted)) in found.iter().zip(&whole).enumerate() {
            assert_eq!(found.1, wanted.1, "slots of text {n}, {what}");
            assert!(same(&found.0, &wanted.0), "logits of text {n}, {what}");
        }
    };
    check(&by_token);
    for threads in [1, 2, 3] {
        let team = Arc::new(Team::new(threads).expect("threads"));
        check(&team.install(|| together(engine, texts, rng)));
    }
    // The last row alone is the last row of all.
    let mut sequences: Vec<Sequence> = texts.iter().map(|_| engine.sequence()).collect();
    let mut batch: Vec<(&mut Sequence, &[u32])> = sequences.iter_mut().zip(texts.iter().map(|t| &t[..])).collect();
    let last = engine.last_logits(&mut batch).expect("an unlimited pool");
    let vocab = engine.model().shape.vocab;
    let wanted: Vec<f32> = whole.iter().flat_map(|(logits, _)| &logits[logits.len() - vocab..]).copied().collect();
    assert!(same(&last, &wanted), "last logits, {what}");
}

fn any_way_is_the_same_bytes<K: KernelSet<f32>>(ops: &Cpu<f32, K>, dtypes: &[CacheDType]) {
    let drawn = METHODS.into_iter().flat_map(|method| (2001..2004).map(move |seed| Case::draw_of(method, seed)));
    let cases = std::iter::once(large()).chain(drawn);
    for (case, &dtype) in cases.flat_map(|case| dtypes.iter().map(move |dtype| (case.clone(), dtype))) {
        let mut rng = Rng::new(case.seed);
        let texts: Vec<Vec<u32>> = [1, 130, 37, 90, 16].map(|len| rng.tokens(len, case.shape.vocab)).to_vec();
        for engine in [case.engine(ops.clone()), case.dense_engine(ops.clone())] {
            company_changes_nothing(&mut engine.with_cache_dtype(dtype), &texts, &mut rng);
        }
    }
}

#[test]
fn a_sequence_is_the_same_bytes_alone_or_in_any_batch_chunking_and_thread_count() {
    any_way_is_the_same_bytes(&FastCpu::new(), &CacheDType::ALL);
}

/// As machines with tiles compute, by the definition.
#[test]
fn a_sequence_is_the_same_bytes_any_way_in_words() {
    any_way_is_the_same_bytes(&Reference::<f32>::reference(), &[CacheDType::Bf16]);
}

/// Errors relative to the largest logit of a row: the mean, and the largest. Where something may fold, rounding may change
/// what does: nothing does here.
fn errors_of_rounding<K: KernelSet<f32>>(
    ops: &Cpu<f32, K>,
    dtype: CacheDType,
    seeds: std::ops::Range<u64>,
) -> [f64; 2] {
    let mut errors = Vec::new();
    let cases = METHODS.into_iter().flat_map(|method| seeds.clone().map(move |seed| Case::draw_of(method, seed)));
    for case in cases.map(Case::never) {
        let text = Rng::new(case.seed).tokens(130, case.shape.vocab);
        for dense in [true, false] {
            let logits = |dtype| {
                let engine = if dense { case.dense_engine(ops.clone()) } else { case.engine(ops.clone()) };
                serve(&mut engine.with_cache_dtype(dtype), &text, &cut(130, &[50]), |_, _| {})
            };
            let (exact, coarse) = (logits(CacheDType::F32), logits(dtype));
            let vocab = case.shape.vocab;
            for (exact, coarse) in exact.chunks_exact(vocab).zip(coarse.chunks_exact(vocab)) {
                let top = exact.iter().map(|x| x.abs()).fold(0.0, f32::max);
                let error = exact.iter().zip(coarse).map(|(e, c)| (e - c).abs()).fold(0.0, f32::max);
                errors.push(f64::from(error / top));
            }
        }
    }
    [errors.iter().sum::<f64>() / errors.len() as f64, errors.iter().copied().fold(0.0, f64::max)]
}

#[test]
fn coarser_slots_change_logits_by_their_rounding() {
    for (dtype, mean, most) in [(CacheDType::Bf16, 0.01, 0.1), (CacheDType::Int8, 0.02, 0.2)] {
        let [found, worst] = errors_of_rounding(&FastCpu::new(), dtype, 2200..2220);
        assert!(found > 0.0 && found < mean && worst < most, "{dtype:?}: {found} in the mean, {worst} at most");
    }
    let [found, worst] = errors_of_rounding(&Reference::<f32>::reference(), CacheDType::Bf16, 2200..2205);
    assert!(found > 0.0 && found < 0.01 && worst < 0.1, "in words: {found} in the mean, {worst} at most");
}

/// Cases on a backend where token 0 is not a number, with an engine each.
fn poisoned<K: KernelSet<f32>>(
    ops: &Cpu<f32, K>,
    dtypes: &[CacheDType],
    mut test: impl FnMut(&Case, &mut Engine<Cpu<f32, K>>),
) {
    let drawn = |method| (2101..2141).step_by(2).map(move |seed| Case::draw_of(method, seed));
    for case in METHODS.into_iter().flat_map(drawn) {
        let mut model = case.model(ops.clone());
        let mut embed = model.weights.embed.data().to_vec();
        embed[..case.shape.hidden].fill(f32::NAN);
        model.weights.embed = model.ops.tensor(&[case.shape.vocab, case.shape.hidden], &embed);
        let engine = Engine::with_policy(model, kvfold_cache::policy_of(Some(&case.dmc))).with_page_limit(400);
        test(&case, &mut engine.with_cache_dtype(dtypes[case.seed as usize / 2 % dtypes.len()]));
    }
}

fn what_was_left_is_never_seen<K: KernelSet<f32>>(ops: &Cpu<f32, K>, dtypes: &[CacheDType]) {
    poisoned(ops, dtypes, |case, engine| {
        let text: Vec<u32> = Rng::new(case.seed).tokens(70, case.shape.vocab - 1).iter().map(|id| id + 1).collect();
        let whole = cut(text.len(), &[text.len()]);
        let before = serve(engine, &text, &whole, |_, _| {});
        assert!(before.iter().all(|x| x.is_finite()), "{case:?}");
        let poison = serve(engine, &[0; 80], &cut(80, &[80]), |_, _| {});
        assert!(poison.iter().all(|x| x.is_nan()), "{case:?}");
        assert!(same(&before, &serve(engine, &text, &whole, |_, _| {})), "{case:?}");
    });
}

#[test]
fn what_a_finished_sequence_left_in_memory_is_never_seen() {
    what_was_left_is_never_seen(&FastCpu::new(), &CacheDType::ALL);
    what_was_left_is_never_seen(&Reference::<f32>::reference(), &[CacheDType::Bf16]);
}

fn a_token_does_not_touch_those_before_it<K: KernelSet<f32>>(ops: &Cpu<f32, K>, dtypes: &[CacheDType]) {
    poisoned(ops, dtypes, |case, engine| {
        let mut rng = Rng::new(case.seed);
        let mut text: Vec<u32> = rng.tokens(90, case.shape.vocab - 1).iter().map(|id| id + 1).collect();
        let clean = serve(engine, &text, &cut(text.len(), &[1]), |_, _| {});
        let at = rng.within(1..text.len());
        text[at] = 0;
        let before = at * case.shape.vocab;
        for sizes in [&[text.len()][..], &[31], &[1]] {
            let logits = serve(engine, &text, &cut(text.len(), sizes), |_, _| {});
            assert!(same(&logits[..before], &clean[..before]), "token {at} in chunks of {sizes:?}, {case:?}");
            assert!(logits[before..][..case.shape.vocab].iter().all(|x| x.is_nan()), "{case:?}");
        }
    });
}

#[test]
fn what_is_not_a_number_touches_no_token_before_it() {
    a_token_does_not_touch_those_before_it(&FastCpu::new(), &CacheDType::ALL);
    a_token_does_not_touch_those_before_it(&Reference::<f32>::reference(), &[CacheDType::Bf16]);
}

// ---- I4: every page comes back ----

struct Live {
    sequence: Sequence,
    text: Vec<u32>,
    last: Vec<f32>,
}

/// The last logits of a text in an engine of its own.
fn last_alone((case, dtype): (&Case, CacheDType), text: &[u32]) -> Vec<f32> {
    let mut engine = case.engine(FastCpu::new()).with_cache_dtype(dtype);
    let mut sequence = engine.sequence();
    engine.last_logits(&mut [(&mut sequence, text)]).expect("an unlimited pool")
}

/// Pages and states of sequences, by the allocator's own account of each.
fn owned(engine: &Engine<FastCpu>, live: &[Live]) -> (usize, usize) {
    let usages = live.iter().map(|live| engine.usage(&live.sequence));
    usages.fold((0, 0), |(pages, states), u| (pages + u.slot_pages + u.ring_pages, states + u.states))
}

#[test]
fn every_page_comes_back_and_a_refused_batch_changes_nothing() {
    let (mut refused, mut too_long) = (0, 0);
    for (seed, method) in (3000..3012).flat_map(|seed| METHODS.map(|method| (seed, method))) {
        let case = Case::draw_of(method, seed);
        let mut rng = Rng::new(seed);
        let heads = LAYERS * case.shape.heads.kv;
        let limit = heads * (4 + case.dmc.delay.div_ceil(PAGE_SLOTS) + rng.within(0..12));
        let dtype = CacheDType::ALL[seed as usize % 3];
        let engine = case.engine(FastCpu::new()).with_page_limit(limit).with_chunk(rng.pick(&[1, 7, 32, 128]));
        let mut engine = engine.with_cache_dtype(dtype);
        let mut live: Vec<Live> = Vec::new();
        for _ in 0..60 {
            match rng.within(0..10) {
                0..3 => live.push(Live { sequence: engine.sequence(), text: vec![], last: vec![] }),
                // Cancelled, perhaps before its first token.
                3 if !live.is_empty() => drop(live.swap_remove(rng.within(0..live.len()))),
                4 if !live.is_empty() => {
                    let done = live.swap_remove(rng.within(0..live.len()));
                    if !done.text.is_empty() {
                        assert!(same(&done.last, &last_alone((&case, dtype), &done.text)), "{case:?}");
                    }
                }
                _ => {
                    let most = rng.pick(&[2, 2, 30, 100]);
                    let takes: Vec<usize> = live.iter().map(|_| rng.within(0..most)).collect();
                    let new: Vec<Vec<u32>> = takes.iter().map(|&n| rng.tokens(n, case.shape.vocab)).collect();
                    let state = |engine: &Engine<FastCpu>, live: &[Live]| -> Vec<_> {
                        live.iter().map(|l| (l.sequence.held(), engine.usage(&l.sequence))).collect()
                    };
                    let before = state(&engine, &live);
                    let members: Vec<usize> = (0..live.len()).filter(|&n| takes[n] > 0).collect();
                    let mut batch: Vec<(&mut Sequence, &[u32])> = live
                        .iter_mut()
                        .zip(&new)
                        .filter(|(_, new)| !new.is_empty())
                        .map(|(live, new)| (&mut live.sequence, &new[..]))
                        .collect();
                    match engine.last_logits(&mut batch) {
                        Ok(last) => {
                            for (n, last) in members.into_iter().zip(last.chunks_exact(case.shape.vocab)) {
                                live[n].text.extend(&new[n]);
                                live[n].last = last.to_vec();
                            }
                        }
                        Err(error) => {
                            refused += usize::from(matches!(error, EngineError::Cache(_)));
                            too_long += usize::from(matches!(error, EngineError::TooLong { .. }));
                            assert_eq!(state(&engine, &live), before, "{error}, {case:?}");
                        }
                    }
                }
            }
            let (pages, states) = owned(&engine, &live);
            assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (pages, states), "{case:?}");
            assert!(pages <= limit, "{pages} pages of {limit}, {case:?}");
        }
        for live in live.drain(..).filter(|live| !live.text.is_empty()) {
            assert!(same(&live.last, &last_alone((&case, dtype), &live.text)), "{case:?}");
        }
        assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0), "{case:?}");
    }
    assert!(refused >= 20 && too_long >= 5, "{refused} batches refused, {too_long} too long");
}

#[test]
fn a_prompt_that_is_refused_has_taken_nothing_whatever_the_chunks() {
    let case = Case::draw(3100);
    let heads = LAYERS * case.shape.heads.kv;
    let text = Rng::new(1).tokens(case.shape.context + 1, case.shape.vocab);
    for chunk in [1, 16, 200] {
        let pages = 2 + case.dmc.delay.div_ceil(PAGE_SLOTS);
        let mut engine = case.engine(FastCpu::new()).with_page_limit(heads * pages).with_chunk(chunk);
        let mut sequence = engine.sequence();
        // Two pages of slots, the open one, and the ring.
        let room = 2 * PAGE_SLOTS + 1 + case.dmc.delay;
        assert!(matches!(engine.logits(&mut sequence, &text), Err(EngineError::TooLong { .. })));
        assert!(matches!(engine.last_logits(&mut [(&mut sequence, &text)]), Err(EngineError::TooLong { .. })));
        assert!(matches!(engine.logits(&mut sequence, &text[..=room]), Err(EngineError::Cache(_))));
        assert!(matches!(engine.last_logits(&mut [(&mut sequence, &text[..=room])]), Err(EngineError::Cache(_))));
        assert_eq!((sequence.tokens(), engine.pool().pages_held()), (0, 0));
        engine.logits(&mut sequence, &text[..room]).expect("as many tokens as the pool holds even if nothing folds");
    }
}

#[test]
#[should_panic(expected = "another pool")]
fn a_sequence_of_another_engine_is_turned_away() {
    let case = Case::draw(3200);
    let (mut ours, theirs) = (case.engine(FastCpu::new()), case.engine(FastCpu::new()));
    let _ = ours.logits(&mut theirs.sequence(), &[1, 2, 3]);
}

// ---- I7: ratios are what the decisions imply ----

/// What the decisions of the training path say a sequence must hold after `tokens` tokens, counted from scratch.
struct Expected {
    slots: usize,
    slot_pages: usize,
    ring_pages: usize,
    states: usize,
    bytes: usize,
}

fn expected(case: &Case, decisions: &Decisions, tokens: usize) -> Expected {
    let heads = LAYERS * case.shape.heads.kv;
    // The newest slot of each head is in its open state.
    let closed = decisions.closed(tokens).concat();
    let slot_pages = closed.iter().map(|slots| slots.saturating_sub(1).div_ceil(16)).sum();
    let ring_pages = heads * tokens.min(case.dmc.delay).div_ceil(16);
    Expected {
        slots: decisions.slots(tokens).concat().iter().sum(),
        slot_pages,
        ring_pages,
        states: heads,
        bytes: bytes(case, CacheDType::F32, (slot_pages, ring_pages)),
    }
}

/// Bytes of pages of slots, of rings, and of the open states of all heads.
fn bytes(case: &Case, dtype: CacheDType, (slot_pages, ring_pages): (usize, usize)) -> usize {
    let Dmc { method, delay, pool_window, log_mass, .. } = case.dmc;
    let (dim, heads) = (case.shape.heads.dim, LAYERS * case.shape.heads.kv);
    // Sixteen slots of a key, a value and perhaps a mass. The newest tokens are never in 8 bits.
    let page = |dtype| 16 * (slot_bytes(dtype, dim) + 4 * usize::from(log_mass));
    let ring_page = page(if dtype == CacheDType::F32 { dtype } else { CacheDType::Bf16 });
    // The open slot; its segment's sums, mass and length, the importances of the ring, and with a window its weighted
    // tokens. In DMS only what will become of the ring's tokens.
    let state = 4 * match method {
        Method::Dmc => 4 * dim + 2 + delay + pool_window.unwrap_or(0) * (2 * dim + 1),
        Method::Dms => 2 * dim + delay,
    };
    slot_pages * page(dtype) + ring_pages * ring_page + heads * state
}

/// Bytes of a key and a value with their scales.
fn slot_bytes(dtype: CacheDType, dim: usize) -> usize {
    match dtype {
        CacheDType::F32 => 2 * dim * 4,
        CacheDType::Bf16 => 2 * dim * 2,
        CacheDType::Int8 => 2 * (dim + 2),
    }
}

#[test]
fn ratios_are_what_the_decisions_imply_at_every_step() {
    let mut smaller = 0;
    for (seed, method) in (4000..4040).flat_map(|seed| METHODS.map(|method| (seed, method))) {
        let case = Case::draw_of(method, seed);
        let mut rng = Rng::new(seed);
        let (mut engine, mut dense) = (case.engine(FastCpu::new()), case.dense_engine(FastCpu::new()));
        let (dim, heads) = (case.shape.heads.dim, LAYERS * case.shape.heads.kv);
        let text = rng.tokens(130, case.shape.vocab);
        let trained = &train(engine.model(), std::slice::from_ref(&text))[0];
        if trained.margin < 1e-4 {
            continue;
        }
        for sizes in [&[1][..], &[5, 40, 1]] {
            let chunks = cut(text.len(), sizes);
            let mut dense_bytes = Vec::new();
            serve(&mut dense, &text, &chunks, |dense, sequence| {
                let tokens = sequence.tokens();
                assert_eq!(sequence.held().logical_ratio(), 1.0);
                let bytes = heads * tokens.div_ceil(16) * 16 * slot_bytes(CacheDType::F32, dim);
                assert_eq!(dense.usage(sequence).bytes(), bytes, "a full cache of {tokens} tokens, {case:?}");
                dense_bytes.push(bytes);
            });
            let mut dense_bytes = dense_bytes.into_iter();
            serve(&mut engine, &text, &chunks, |engine, sequence| {
                let tokens = sequence.tokens();
                let want = expected(&case, &trained.decisions, tokens);
                let usage = engine.usage(sequence);
                let got = (usage.slot_pages, usage.ring_pages, usage.states, usage.bytes());
                assert_eq!(
                    got,
                    (want.slot_pages, want.ring_pages, want.states, want.bytes),
                    "{tokens} tokens, {case:?}"
                );
                let logical = (tokens * heads) as f64 / want.slots as f64;
                assert!((sequence.held().logical_ratio() - logical).abs() < 1e-12, "{tokens} tokens, {case:?}");
                let physical = dense_bytes.next().expect("as many steps") as f64 / usage.bytes() as f64;
                smaller += usize::from(tokens == 130 && physical > 1.0);
                assert_eq!(engine.pool().pages_held(), want.slot_pages + want.ring_pages);
            });
        }
    }
    assert!(smaller >= 40, "only {smaller} caches were smaller than a full one");
}

#[test]
fn bytes_of_every_type_follow_from_the_slots() {
    let mut smaller = 0;
    let cases = (4100..4112).flat_map(|seed| METHODS.map(|method| Case::draw_of(method, seed)));
    for (case, dtype) in cases.flat_map(|case| CacheDType::ALL.map(|dtype| (case.clone(), dtype))) {
        let mut engine = case.engine(FastCpu::new()).with_cache_dtype(dtype);
        let mut dense = case.dense_engine(FastCpu::new()).with_cache_dtype(dtype);
        let text = Rng::new(case.seed).tokens(130, case.shape.vocab);
        let chunks = cut(text.len(), &[5, 40, 1]);
        let heads = LAYERS * case.shape.heads.kv;
        serve(&mut engine, &text, &chunks, |engine, sequence| {
            let tokens = sequence.tokens();
            let exact = tokens.min(case.dmc.delay);
            let slots = sequence.held().slots.concat();
            let slot_pages: usize = slots.iter().map(|slots| (slots - exact).saturating_sub(1).div_ceil(16)).sum();
            let pages = (slot_pages, heads * exact.div_ceil(16));
            let (usage, full) = (engine.usage(sequence), engine.dense_usage(tokens));
            assert_eq!((usage.slot_pages, usage.ring_pages), pages, "{tokens} tokens, {dtype:?}, {case:?}");
            assert_eq!(usage.bytes(), bytes(&case, dtype, pages), "{tokens} tokens, {dtype:?}, {case:?}");
            smaller += usize::from(tokens == 130 && usage.bytes() < full.bytes());
        });
        serve(&mut dense, &text, &chunks, |dense, sequence| {
            let tokens = sequence.tokens();
            let full = heads * tokens.div_ceil(16) * 16 * slot_bytes(dtype, case.shape.heads.dim);
            assert_eq!(dense.usage(sequence).bytes(), full, "{dtype:?}, {case:?}");
            assert_eq!(engine.dense_usage(tokens).bytes(), full, "counted by a pool that folds, {dtype:?}, {case:?}");
        });
    }
    assert!(smaller >= 5, "only {smaller} caches were smaller than a full one of their type");
}
