//! Steps: where they start from, what they change, and that nothing but their place in the run decides it.

use crate::common::{BORROWED, CONTEXT, HEAD, LENGTH, bits, corpus, dmc, settings, steps, tensor, tiny, trainer};
use kvfold_engine::Engine;
use kvfold_kernels::dmc::{Borrows, Decision, Share};
use kvfold_kernels::ops::{Exempt, KlDirection, MIN_IMPORTANCE, Over, Pull, Scope, Spans};
use kvfold_kernels::team::Team;
use kvfold_kernels::{FastCpu, Ops};
use kvfold_model::attend::{Fading, Folding, Gated, Mode, Plain, gated};
use kvfold_model::block::{Attend, Pass, Projected};
use kvfold_model::{Checkpoint, Loaded};
use kvfold_retrofit::corpus::Encoded;
use kvfold_retrofit::schedule::Stage;
use kvfold_retrofit::settings::{Loss, Train};
use kvfold_retrofit::{Corpus, RetrofitError, Settings, StepReport, Trainer};
use kvfold_tensor::{DType, HostTensor};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

type Array = <FastCpu as Ops>::Tensor;

/// Decisions that never fold: at temperature 0.1 and with any noise, their chance is 0 in f32.
const NEVER: Decision = Decision::Head { scale: 4.0, offset: 1e4, bias: false, ahead: false };

/// A batch's ids and spans.
fn batch(corpus: &Corpus, run: &Settings, step: u64) -> (Vec<u32>, Spans) {
    let sequences = corpus.batch(run.seed, step, run.batch);
    let ids = sequences.iter().flat_map(|&n| corpus.sequence(n)).copied().collect();
    (ids, Spans::of_lengths(&vec![corpus.length(); sequences.len()]))
}

/// A model's logits for a batch.
fn logits(model: &Loaded<FastCpu>, (ids, spans): &(Vec<u32>, Spans), attend: &mut impl Attend<FastCpu>) -> Array {
    model.pass(spans).forward(&model.weights, ids, attend)
}

/// Log-probabilities of row t of `rows` rows of logits, in f64.
fn log_softmax(logits: &[f32], rows: usize, t: usize) -> Vec<f64> {
    let vocab = logits.len() / rows;
    let row: Vec<f64> = logits[t * vocab..][..vocab].iter().map(|&x| f64::from(x)).collect();
    let total = row.iter().map(|x| x.exp()).sum::<f64>().ln();
    row.into_iter().map(|x| x - total).collect()
}

/// Cross-entropy of some rows by its definition.
fn cross_entropy_of(logits: &[f32], ids: &[u32], rows: impl Iterator<Item = usize>) -> f64 {
    let nll: Vec<f64> = rows.map(|t| -log_softmax(logits, ids.len(), t)[ids[t + 1] as usize]).collect();
    nll.iter().sum::<f64>() / nll.len() as f64
}

/// Cross-entropy of the rows that have a next token in their sequence.
fn cross_entropy(logits: &[f32], (ids, spans): &(Vec<u32>, Spans)) -> f64 {
    cross_entropy_of(logits, ids, spans.iter().flat_map(|span| span.start..span.start + span.len - 1))
}

/// KL(teacher || student) by its definition, the mean over rows.
fn kl(student: &[f32], teacher: &[f32], rows: usize) -> f64 {
    let row = |t: usize| {
        let pairs = log_softmax(teacher, rows, t).into_iter().zip(log_softmax(student, rows, t));
        pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    };
    (0..rows).map(row).sum::<f64>() / rows as f64
}

fn largest(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// A weight's moment `m`, row by row.
fn moment_rows(trainer: &Trainer<FastCpu>, layer: usize, part: &str) -> Vec<Vec<f32>> {
    rows(&tensor(trainer, &format!("m.model.layers.{layer}.self_attn.{part}.weight")))
}

fn rows(tensor: &HostTensor) -> Vec<Vec<f32>> {
    tensor.to_f32().chunks_exact(tensor.shape()[1]).map(<[f32]>::to_vec).collect()
}

#[test]
fn a_head_that_never_folds_starts_as_the_original_model() {
    let corpus = corpus(5);
    let variants = [(0, None, false), (0, Some(3), true), (4, Some(3), true), (16, None, false)];
    for (delay, pool_window, log_mass) in variants {
        for share in [Share::Head, Share::Layer] {
            let mut run = settings(NEVER, (0, 2, 0));
            let how = dmc(&mut run);
            (how.delay, how.pool_window, how.log_mass, how.share) = (delay, pool_window, log_mass, share);
            run.ratio = 1.4;
            run.temperature = 0.1;
            for direction in [KlDirection::Forward, KlDirection::Reverse] {
                run.loss = Loss::Distill { direction };
                let report = trainer(&run).step(&corpus).unwrap();
                assert!(report.task_loss.abs() < 1e-6, "{delay} {log_mass} {direction:?}: {}", report.task_loss);
                assert_eq!(report.ratio, 1.0);
            }
            run.loss = Loss::Lm;
            let report = trainer(&run).step(&corpus).unwrap();
            let batch = batch(&corpus, &run, 0);
            let original = Loaded::new(FastCpu::new(), &tiny());
            let wanted = cross_entropy(logits(&original, &batch, &mut Plain).data(), &batch);
            assert!((report.task_loss - wanted).abs() < 1e-5, "{} {wanted}", report.task_loss);
        }
    }
}

#[test]
fn both_divergences_from_the_original_are_those_of_their_definition() {
    let corpus = corpus(5);
    let run = settings(BORROWED, (4, 1, 1));
    let mut zeroed = trainer(&settings(BORROWED, (0, 1, 1)));
    let original = Loaded::new(FastCpu::new(), &tiny());
    let batch_0 = batch(&corpus, &run, 0);
    let p = logits(&original, &batch_0, &mut Plain);
    let vocab = p.shape()[1];
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let total = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        row.iter().map(|&x| f64::from(x) - total).collect()
    };
    // A model whose divergence is not 0: the original after a few steps with another loss.
    let mut student = run.clone();
    student.loss = Loss::Lm;
    let mut student = trainer(&student);
    steps(&mut student, &corpus, 3);
    let weights: BTreeMap<String, HostTensor> = student.state().into_iter().collect();
    for direction in [KlDirection::Forward, KlDirection::Reverse] {
        let mut run = run.clone();
        run.loss = Loss::Distill { direction };
        let mut trainer = trainer(&run);
        trainer.restore(0, |name, _| Ok(&weights[name])).unwrap();
        let report = trainer.step(&corpus).unwrap();
        assert_eq!(report.stage, Stage::Zeroing);
        let model = Loaded::new(FastCpu::new(), &Checkpoint { tensors: plain(&weights), ..tiny() });
        let q = logits(&model, &batch_0, &mut Fading { borrows: Borrows::KeysAndQueries, factor: 1.0 });
        let wanted: f64 = p
            .data()
            .chunks_exact(vocab)
            .zip(q.data().chunks_exact(vocab))
            .map(|(p, q)| {
                let (p, q) = (log_softmax(p), log_softmax(q));
                let (of, to) = if direction == KlDirection::Forward { (p, q) } else { (q, p) };
                of.iter().zip(&to).map(|(x, y)| x.exp() * (x - y)).sum::<f64>()
            })
            .sum::<f64>()
            / batch_0.0.len() as f64;
        assert!(wanted > 1e-4, "the two models are the same");
        assert!((report.task_loss - wanted).abs() < 1e-5 + 1e-3 * wanted, "{} {wanted}", report.task_loss);
    }
    // And a channel that is zeroed but was not faded is a divergence from the start.
    assert!(zeroed.step(&corpus).unwrap().task_loss > 1e-4);
}

/// A state's weights without moments.
fn plain(state: &BTreeMap<String, HostTensor>) -> BTreeMap<String, HostTensor> {
    let moment = |name: &str| name.starts_with("m.") || name.starts_with("v.");
    state.iter().filter(|(name, _)| !moment(name)).map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
}

#[test]
fn recomputing_blocks_changes_no_bit() {
    // The same ops run on the same numbers, and every gradient is summed in the same order.
    let corpus = corpus(5);
    for (decision, stages) in [(HEAD, (0, 2, 2)), (BORROWED, (2, 2, 1))] {
        for loss in [Loss::Lm, Loss::Distill { direction: KlDirection::Reverse }] {
            let run = |recompute| {
                let mut run = settings(decision, stages);
                (run.recompute, run.loss) = (recompute, loss);
                let mut trainer = trainer(&run);
                let reports = steps(&mut trainer, &corpus, run.stages.total());
                (reports, bits(&trainer))
            };
            assert_eq!(run(false), run(true), "{decision:?} {loss:?}");
        }
    }
}

#[test]
fn a_run_is_a_function_of_its_settings_whatever_the_threads() {
    let corpus = corpus(5);
    let run = |seed, threads| {
        let mut run = settings(BORROWED, (2, 2, 1));
        run.seed = seed;
        let team = Arc::new(Team::new(threads).unwrap());
        team.install(|| {
            let mut trainer = trainer(&run);
            let reports = steps(&mut trainer, &corpus, 5);
            (reports, bits(&trainer))
        })
    };
    let once = run(1, 1);
    assert_eq!(once, run(1, 1));
    assert_eq!(once, run(1, 3));
    assert_ne!(once.0, run(2, 1).0);
}

/// Checks that the channel's rows of queries and keys are 0 in a model, and that its rest is not.
fn assert_rows_are_zero(model: &Checkpoint) {
    let dim = model.config.head_dim;
    for layer in 0..model.config.num_hidden_layers {
        for part in ["q_proj", "k_proj"] {
            for (n, row) in
                rows(&model.tensors[&format!("model.layers.{layer}.self_attn.{part}.weight")]).iter().enumerate()
            {
                assert_eq!(row.iter().all(|&w| w == 0.0), n % dim == dim - 1, "layer {layer} {part} row {n}");
            }
        }
    }
}

/// Folding attention that keeps what the gates said.
struct Watched {
    folding: Folding<Array>,
    gates: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Attend<FastCpu> for Watched {
    fn attend(&mut self, layer: usize, pass: &Pass<'_, FastCpu>, p: Projected<Array>) -> Array {
        let Gated { logit, omega, .. } = gated(pass, &self.folding.dmc, p.clone());
        self.gates.push((logit.data().to_vec(), omega.expect("DMC averages").data().to_vec()));
        self.folding.attend(layer, pass, p)
    }
}

#[test]
fn when_zeroing_ends_the_rows_are_zero_and_the_model_is_the_one_without_the_channel() {
    let corpus = corpus(5);
    let (scale, offset) = (4.0, 30.0);
    let mut run = settings(Decision::Borrowed { scale, offset }, (5, 3, 0));
    let mut trainer = trainer(&run);
    let reports = steps(&mut trainer, &corpus, 4);
    assert!(reports.iter().all(|r| r.stage == Stage::Zeroing && r.ratio == 1.0 && r.hinge == 0.0));
    let channel = |rows: Vec<Vec<f32>>| rows.into_iter().skip(7).step_by(8).flatten().collect::<Vec<_>>();
    let k_before = rows(&tensor(&trainer, "model.layers.0.self_attn.k_proj.weight"));
    assert!(channel(k_before).iter().any(|&w| w != 0.0), "the weights are not touched before the end");
    steps(&mut trainer, &corpus, 5);

    let model = trainer.checkpoint(&tiny()).unwrap();
    assert_rows_are_zero(&model);
    for part in ["q_proj", "k_proj"] {
        assert!(channel(moment_rows(&trainer, 0, part)).iter().all(|&m| m == 0.0), "moments of another channel");
    }

    // Not the checkpoint, whose MLP is rounded to the base's bf16.
    let state: BTreeMap<String, HostTensor> = trainer.state().into_iter().collect();
    let loaded = Loaded::new(FastCpu::new(), &Checkpoint { tensors: plain(&state), ..tiny() });
    let batch = batch(&corpus, &run, 5);
    let without = logits(&loaded, &batch, &mut Fading { borrows: Borrows::KeysAndQueries, factor: 0.0 });
    let mut watched = Watched { folding: Folding::new(dmc(&mut run), Mode::Hard), gates: Vec::new() };
    let folding = logits(&loaded, &batch, &mut watched);
    for (logit, omega) in &watched.gates {
        assert!(logit.iter().all(|&a| a == -(offset as f32)), "every logit starts at -offset");
        let importance = (1.0 / (1.0 + (-offset).exp()) + MIN_IMPORTANCE) as f32;
        assert!(omega.iter().all(|&o| (o - importance).abs() < 1e-6));
    }
    // Masses of 1 + eps instead of 1 shift all scores alike, to rounding.
    let difference = largest(without.data(), folding.data());
    assert!(difference < 1e-4, "{difference}");

    // The first folding step sees that model: nothing folds yet, and the loss is its loss.
    let report = trainer.step(&corpus).unwrap();
    assert_eq!((report.stage, report.ratio), (Stage::Ramp, 1.0));
    let original = logits(&Loaded::new(FastCpu::new(), &tiny()), &batch, &mut Plain);
    let wanted = kl(without.data(), original.data(), batch.0.len());
    assert!((report.task_loss - wanted).abs() < 1e-5, "{} {wanted}", report.task_loss);
}

#[test]
fn a_channel_that_is_faded_out_no_longer_touches_the_model() {
    // At the last zeroing step the factor is 0 already: rows of any content give the model with rows of zeros.
    let corpus = corpus(5);
    let run = settings(BORROWED, (5, 1, 0));
    let batch = batch(&corpus, &run, 0);
    let zeroed = trainer(&settings(BORROWED, (0, 1, 0))).checkpoint(&tiny()).unwrap();
    assert_rows_are_zero(&zeroed);
    let faded = |model: &Checkpoint, factor| {
        logits(&Loaded::new(FastCpu::new(), model), &batch, &mut Fading { borrows: Borrows::KeysAndQueries, factor })
            .data()
            .to_vec()
    };
    assert_eq!(faded(&tiny(), 0.0), faded(&zeroed, 0.0));
    assert_ne!(faded(&tiny(), 1.0), faded(&zeroed, 1.0));
    assert!(
        largest(&faded(&tiny(), 1.0), logits(&Loaded::new(FastCpu::new(), &tiny()), &batch, &mut Plain).data()) == 0.0
    );
}

#[test]
fn gradients_reach_every_decision() {
    let corpus = corpus(5);
    let mut head = trainer(&settings(HEAD, (0, 2, 2)));
    steps(&mut head, &corpus, 1);
    let nothing = |row: &[f32]| row.iter().all(|&m| m == 0.0);
    for layer in 0..2 {
        let rows = moment_rows(&head, layer, "decide_proj");
        assert_eq!(rows.len(), 4);
        assert!(!rows.iter().any(|row| nothing(row)), "layer {layer}: {rows:?}");
    }
    let mut borrowed = trainer(&settings(BORROWED, (0, 2, 2)));
    steps(&mut borrowed, &corpus, 1);
    for layer in 0..2 {
        for (part, count) in [("q_proj", 4), ("k_proj", 2)] {
            let channels: Vec<_> = moment_rows(&borrowed, layer, part).into_iter().skip(7).step_by(8).collect();
            assert_eq!(channels.len(), count);
            assert!(!channels.iter().any(|row| nothing(row)), "layer {layer} {part}");
        }
    }
}

#[test]
fn noise_is_drawn_anew_at_every_step_and_for_every_seed() {
    // One sequence and no learning: nothing but the noise can change the ratio.
    let corpus = corpus(1);
    let ratios = |seed| {
        let mut run = settings(HEAD, (0, 1, 5));
        (run.learning.rate, run.seed) = (0.0, seed);
        steps(&mut trainer(&run), &corpus, 6).iter().map(|r| (r.ratio * 1e6) as u64).collect::<Vec<_>>()
    };
    let distinct = |ratios: &[u64]| ratios.iter().collect::<BTreeSet<_>>().len();
    assert!(distinct(&ratios(1)) >= 4, "{:?}", ratios(1));
    assert_ne!(ratios(1), ratios(2));
}

#[test]
fn decision_heads_learn_at_a_rate_of_their_own() {
    let moved = |factor| {
        let mut run = settings(HEAD, (0, 1, 0));
        run.learning.decide_factor = factor;
        let mut trainer = trainer(&run);
        let before = plain(&trainer.state().into_iter().collect());
        steps(&mut trainer, &corpus(5), 1);
        let after = plain(&trainer.state().into_iter().collect());
        let moved = |name: &str| largest(&before[name].to_f32(), &after[name].to_f32());
        (moved("model.layers.1.self_attn.decide_proj.weight"), moved("model.layers.1.self_attn.o_proj.weight"))
    };
    let (head, rest) = moved(0.0);
    assert!(head == 0.0 && rest > 0.0);
    // AdamW's first step moves a weight by its rate.
    let (once, same) = moved(1.0);
    let (tenfold, _) = moved(10.0);
    assert!((tenfold / once - 10.0).abs() < 0.1, "{once} {tenfold}");
    assert_eq!(rest, same);
}

#[test]
fn a_step_that_is_not_finite_is_an_error_that_changes_nothing() {
    let corpus = corpus(5);
    let mut trainer = trainer(&settings(HEAD, (0, 5, 2)));
    steps(&mut trainer, &corpus, 2);
    let mut state: BTreeMap<String, HostTensor> = trainer.state().into_iter().collect();
    let name = "model.layers.1.self_attn.o_proj.weight";
    let mut values = state[name].to_f32();
    values[3] = f32::NAN;
    state.insert(name.into(), HostTensor::from_f32(state[name].shape(), &values));
    trainer.restore(2, |name, _| Ok(&state[name])).unwrap();
    let before = bits(&trainer);
    match trainer.step(&corpus).unwrap_err() {
        RetrofitError::NotFinite { step, what, value, sequences, .. } => {
            assert_eq!((step, what, sequences), (3, "the loss", corpus.batch(11, 2, 3)));
            assert!(value.is_nan());
        }
        other => panic!("{other}"),
    }
    assert_eq!(bits(&trainer), before);
    assert_eq!(trainer.steps(), 2);
}

#[test]
fn a_gradient_that_overflows_is_an_error_that_changes_nothing() {
    let mut run = settings(Decision::Head { scale: 3e38, offset: 0.5, bias: false, ahead: false }, (0, 1, 2));
    run.pressure.weight = 1e6;
    let mut trainer = trainer(&run);
    let before = bits(&trainer);
    let error = trainer.step(&corpus(5)).unwrap_err();
    assert!(matches!(error, RetrofitError::NotFinite { step: 1, what: "the gradient norm", .. }), "{error}");
    assert_eq!(bits(&trainer), before);
    assert_eq!(trainer.steps(), 0);
}

#[test]
fn a_state_that_lacks_a_tensor_changes_nothing() {
    let mut trainer = trainer(&settings(HEAD, (0, 5, 2)));
    let before = bits(&trainer);
    let state: BTreeMap<String, HostTensor> = trainer.state().into_iter().collect();
    steps(&mut trainer, &corpus(5), 1);
    let after = bits(&trainer);
    let missing = trainer.restore(0, |name, _| match name {
        "v.model.norm.weight" => Err(RetrofitError::Damaged { file: "f".into(), reason: "r".into() }),
        _ => Ok(&state[name]),
    });
    assert!(missing.is_err());
    assert_eq!((bits(&trainer), trainer.steps()), (after, 1));
    trainer.restore(0, |name, _| Ok(&state[name])).unwrap();
    assert_eq!((bits(&trainer), trainer.steps()), (before, 0));
}

fn mean(reports: &[StepReport], of: impl Fn(&StepReport) -> f64) -> f64 {
    reports.iter().map(of).sum::<f64>() / reports.len() as f64
}

#[test]
fn the_loss_falls_on_a_text_that_repeats_itself() {
    let text = (0..12 * LENGTH as u32).map(|n| n * n % 7).collect();
    let corpus = Corpus::cut(text, LENGTH).unwrap();
    for (decision, stages) in [(HEAD, (0, 1, 24)), (BORROWED, (6, 1, 18))] {
        let mut run = settings(decision, stages);
        (run.loss, run.ratio, run.learning.rate) = (Loss::Lm, 1.2, 1e-2);
        let reports = steps(&mut trainer(&run), &corpus, 25);
        let (first, last) = (reports[0].task_loss, mean(&reports[20..], |r| r.task_loss));
        assert!(last < 0.5 * first, "{decision:?}: {first} -> {last}");
    }
}

#[test]
fn the_ratio_follows_its_target_and_serving_folds_as_training_did() {
    let stories = Checkpoint::open("stories260k").unwrap();
    let text = "Once upon a time, there was a little girl named Lily. She loved to play in the park with her dog. ";
    let length = 64;
    let corpus = Corpus::cut(stories.tokenizer.encode(&text.repeat(40), false).unwrap(), length).unwrap();
    for (decision, stages) in [
        (Decision::Head { scale: 4.0, offset: 5.0, bias: false, ahead: false }, (0, 40, 20)),
        (Decision::Borrowed { scale: 10.0, offset: 5.0 }, (10, 40, 20)),
    ] {
        let mut run = settings(decision, stages);
        dmc(&mut run).delay = 8;
        (run.length, run.batch, run.temperature) = (length, 4, 0.1);
        run.learning.decide_factor = 10.0;
        let mut trainer = Trainer::new(FastCpu::new(), &stories, run.clone()).unwrap();
        let reports = steps(&mut trainer, &corpus, run.stages.total());
        let begins = stages.0 as usize;
        let late = mean(&reports[begins + 50..], |r| r.ratio);
        let begun = reports[begins].ratio;
        assert!(begun < 1.05, "{decision:?} begins at {begun}");
        // The hinge is one-sided: nothing pulls back what overshoots.
        assert!((1.9..3.2).contains(&late), "{decision:?} trained towards 2, at {late}");
        assert!(mean(&reports[begins + 50..], |r| r.hinge) < 0.02);

        let mut engine = Engine::new(FastCpu::new(), &trainer.checkpoint(&stories).unwrap());
        let mut held = |n: usize| {
            let mut sequence = engine.sequence();
            engine.logits(&mut sequence, corpus.sequence(n)).unwrap();
            sequence.held().slots.concat()
        };
        let slots: Vec<usize> = (0..8).flat_map(&mut held).collect();
        let hard = (length * slots.len()) as f64 / slots.iter().sum::<usize>() as f64;
        assert!((hard / late - 1.0).abs() < 0.25, "{decision:?} trained at {late}, served at {hard}");
    }
}

/// The first report of a run with this pressure.
fn first(scope: Scope, over: Over, share: Share, ratio: f64) -> StepReport {
    let mut run = settings(Decision::Head { scale: 4.0, offset: 0.3, bias: false, ahead: false }, (0, 1, 0));
    (run.pressure.scope, run.pressure.over, run.ratio) = (scope, over, ratio);
    dmc(&mut run).share = share;
    trainer(&run).step(&corpus(5)).unwrap()
}

#[test]
fn the_hinge_is_what_is_missing_and_finer_scopes_miss_more() {
    let at = |scope, over| first(scope, over, Share::Head, 1.6);
    let paper = at(Scope::Global, Over::Batch);
    let missing = ((1.0 - 1.0 / 1.6) - (1.0 - 1.0 / paper.ratio)).max(0.0);
    assert!((paper.hinge - missing).abs() < 1e-6, "{} {missing}", paper.hinge);
    assert!((paper.loss - (paper.task_loss + 2.0 * paper.hinge)).abs() < 1e-5);
    for over in [Over::Batch, Over::Sequence] {
        let [global, layer, head] = [Scope::Global, Scope::Layer, Scope::Head].map(|scope| at(scope, over).hinge);
        assert!(global <= layer + 1e-7 && layer <= head + 1e-7, "{global} {layer} {head}");
        assert!(head > 0.0);
    }
    for scope in [Scope::Global, Scope::Layer, Scope::Head] {
        assert!(at(scope, Over::Batch).hinge <= at(scope, Over::Sequence).hinge + 1e-7);
    }
    assert!(at(Scope::Head, Over::Sequence).hinge > paper.hinge + 1e-4, "sequences and heads differ");
}

#[test]
fn a_target_that_is_reached_costs_nothing() {
    let report = first(Scope::Global, Over::Batch, Share::Head, 1.05);
    assert!(report.ratio > 1.05);
    assert_eq!((report.hinge, report.loss), (0.0, report.task_loss));
}

#[test]
fn pulled_on_both_sides_the_model_ends_at_the_target_and_not_above() {
    let corpus = corpus(5);
    let ratio_under = |pull| {
        let mut run = settings(HEAD, (0, 0, 60));
        (run.pressure.pull, run.ratio) = (pull, 1.2);
        run.learning.rate = 3e-2;
        let mut trainer = trainer(&run);
        let reports = (0..60).map(|_| trainer.step(&corpus).unwrap()).collect::<Vec<_>>();
        let first = &reports[0];
        assert!(first.ratio > 1.3, "begins above: {}", first.ratio);
        assert_eq!(first.hinge > 0.0, pull == Pull::Both);
        reports[40..].iter().map(|report| report.ratio).sum::<f64>() / 20.0
    };
    let [up, both] = [Pull::Up, Pull::Both].map(ratio_under);
    assert!((both / 1.2 - 1.0).abs() < 0.03 && up > both, "{up} one-sided, {both} two-sided");
}

#[test]
fn heads_that_share_decide_alike() {
    // With decisions shared, the heads of a layer miss what the layer misses.
    for over in [Over::Batch, Over::Sequence] {
        let [head, layer] = [Scope::Head, Scope::Layer].map(|scope| first(scope, over, Share::Layer, 1.6).hinge);
        assert!(head > 0.0 && (head - layer).abs() < 1e-7, "{head} {layer}");
        let [head, layer] = [Scope::Head, Scope::Layer].map(|scope| first(scope, over, Share::Head, 1.6).hinge);
        assert!((head - layer).abs() > 1e-7, "{head} {layer}");
    }
    let corpus = corpus(5);
    for decision in [HEAD, Decision::Borrowed { scale: 4.0, offset: -0.5 }] {
        let slots = |share| {
            let mut run = settings(decision, (0, 1, 12));
            dmc(&mut run).share = share;
            run.learning.rate = 3e-2;
            let mut trainer = trainer(&run);
            steps(&mut trainer, &corpus, 13);
            let mut engine = Engine::new(FastCpu::new(), &trainer.checkpoint(&tiny()).unwrap());
            let mut sequence = engine.sequence();
            engine.logits(&mut sequence, &corpus.tokens()[..CONTEXT]).unwrap();
            sequence.held().slots
        };
        let shared = slots(Share::Layer);
        assert!(shared.iter().all(|heads| heads.iter().all(|n| *n == heads[0])), "{shared:?}");
        assert!(shared.iter().flatten().any(|&n| n < CONTEXT), "something folded: {shared:?}");
        let alone = slots(Share::Head);
        assert!(alone.iter().any(|heads| heads[0] != heads[1]), "{alone:?}");
    }
}

#[test]
fn a_trained_model_keeps_its_dtypes_and_says_how_it_compresses() {
    for decision in [HEAD, BORROWED] {
        let mut run = settings(decision, (0, 1, 1));
        let mut trainer = trainer(&run);
        steps(&mut trainer, &corpus(5), 2);
        let model = trainer.checkpoint(&tiny()).unwrap();
        for (name, tensor) in &model.tensors {
            let wanted = if name.contains("mlp") { DType::BF16 } else { DType::F32 };
            assert_eq!(tensor.dtype(), wanted, "{name}");
        }
        let heads = model.tensors.keys().filter(|name| name.contains("decide_proj")).count();
        assert_eq!(heads, if decision.borrows_channel() { 0 } else { 2 });
        let section = model.config.compression.clone().unwrap();
        assert_eq!((section.dmc, section.ratio, section.base_model.as_str()), (dmc(&mut run).clone(), 2.0, "tiny"));
        assert_eq!(model.config.architecture(), "KvfoldLlamaForCausalLM");
        let mut engine = Engine::new(FastCpu::new(), &model);
        let mut sequence = engine.sequence();
        assert!(engine.logits(&mut sequence, &[1, 2, 3]).unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn the_lm_loss_predicts_no_token_of_the_next_sequence() {
    // The last token of each sequence has no target: with one swapped, only what it is predicted from changes.
    let run = Settings { loss: Loss::Lm, ..settings(NEVER, (0, 1, 0)) };
    let corpus = corpus(3);
    let batch = batch(&corpus, &run, 0);
    let model = Loaded::new(FastCpu::new(), &tiny());
    let logits = logits(&model, &batch, &mut Plain);
    let leaking = cross_entropy_of(logits.data(), &batch.0, 0..batch.0.len() - 1);
    let report = trainer(&run).step(&corpus).unwrap();
    assert!((report.task_loss - cross_entropy(logits.data(), &batch)).abs() < 1e-5);
    assert!((report.task_loss - leaking).abs() > 1e-4, "the two could not be told apart");
}

/// Texts of these lengths, packed.
fn packed(lengths: &[usize]) -> Corpus {
    let token = |d: usize, n: usize| ((d * 31 + n * n * 7 + n) % crate::common::VOCAB) as u32;
    let document = |(d, &len): (usize, &usize)| Encoded {
        source: format!("d{d}"),
        tokens: (0..len).map(|n| token(d, n)).collect(),
    };
    Corpus::pack(lengths.iter().enumerate().map(document).collect(), LENGTH).unwrap()
}

#[test]
fn documents_in_a_pack_know_nothing_of_each_other() {
    // The loss over packed documents is that over documents alone, weighted by their predictions.
    let corpus = packed(&[14, 10, 9, 9, 6, 17, 7]);
    assert!((0..corpus.len()).any(|n| corpus.lengths(n).count() > 1), "nothing is packed");
    let run = Settings { loss: Loss::Lm, batch: corpus.len(), ..settings(NEVER, (0, 1, 0)) };
    let report = trainer(&run).step(&corpus).unwrap();
    let model = Loaded::new(FastCpu::new(), &tiny());
    let (mut nll, mut count) = (0.0, 0);
    for piece in (0..corpus.len()).flat_map(|n| corpus.pieces(n)) {
        let alone = (piece.to_vec(), Spans::of_lengths(&[piece.len()]));
        let predicted = piece.len() - 1;
        nll += predicted as f64 * cross_entropy(logits(&model, &alone, &mut Plain).data(), &alone);
        count += predicted;
    }
    assert!((report.task_loss - nll / count as f64).abs() < 1e-5, "{} {}", report.task_loss, nll / count as f64);
    assert_eq!(report.tokens, 72);
}

#[test]
fn the_ratio_of_packed_documents_is_tokens_over_slots() {
    // Everything that may fold does: of a document of T tokens with delay 3, T - 4 fold.
    let all = Decision::Head { scale: 4.0, offset: -1e4, bias: false, ahead: false };
    let lengths = [14, 10, 9, 9, 6, 17, 3, 4];
    let corpus = packed(&lengths);
    let run = Settings { batch: corpus.len(), ..settings(all, (0, 0, 1)) };
    let mut trainer = trainer(&run);
    let report = trainer.step(&corpus).unwrap();
    let (tokens, slots): (usize, usize) = lengths.iter().fold((0, 0), |(t, s), &len| (t + len, s + len.min(4)));
    let expected = tokens as f64 / slots as f64;
    assert!((report.ratio - expected).abs() < 1e-5, "{} {expected}", report.ratio);
    assert!(trainer.heads().iter().flatten().all(|ratio| (ratio - expected).abs() < 1e-5));
    // 2x of 24 tokens is 12 of the 20 that may fold; of each document as large a share is asked.
    let folds: f64 = lengths.iter().map(|&len| 12.0 / 20.0 * len.saturating_sub(4) as f64).sum();
    let asked = tokens as f64 / (tokens as f64 - folds);
    assert!((report.ratio_target - asked).abs() < 1e-9, "{} {asked}", report.ratio_target);
    assert_eq!(report.hinge, 0.0);
    assert!((run.ratio_on(lengths.iter().copied()).unwrap() - asked).abs() < 1e-9);
    assert!(matches!(
        run.ratio_on([3, 4].into_iter()),
        Err(RetrofitError::ShortDocuments { longest: 4, exempt: Exempt { sinks: 0, delay: 3 } })
    ));

    // With nothing folded, what is missing is what is asked.
    for (over, expected) in [
        (Over::Batch, folds / tokens as f64),
        (Over::Sequence, {
            let each = |&len: &usize| 12.0 / 20.0 * len.saturating_sub(4) as f64 / len as f64;
            lengths.iter().map(each).sum::<f64>() / lengths.len() as f64
        }),
    ] {
        let mut never = Settings { batch: corpus.len(), ..settings(NEVER, (0, 0, 1)) };
        never.pressure.over = over;
        let report = crate::common::trainer(&never).step(&corpus).unwrap();
        assert!((report.hinge - expected).abs() < 1e-6, "{over:?}: {} {expected}", report.hinge);
    }
}

#[test]
fn a_batch_in_parts_is_the_batch_up_to_rounding() {
    let corpus = packed(&[14, 10, 9, 9, 6, 17, 7, 24, 24, 3, 20, 11]);
    for (decision, stages) in [(HEAD, (0, 2, 2)), (BORROWED, (2, 2, 1))] {
        for (loss, scope, over) in [
            (Loss::Lm, Scope::Global, Over::Batch),
            (Loss::Distill { direction: KlDirection::Forward }, Scope::Layer, Over::Batch),
            (Loss::Distill { direction: KlDirection::Reverse }, Scope::Head, Over::Sequence),
        ] {
            let run = |accumulate| {
                let mut run = Settings { batch: 5, accumulate, loss, ..settings(decision, stages) };
                (run.pressure.scope, run.pressure.over) = (scope, over);
                // Far enough that the hinge presses in some steps and not in others.
                run.ratio = 1.3;
                // AdamW takes a whole step on a gradient that is nothing but rounding, as the first of a distillation is.
                run.learning.rate = 1e-6;
                let mut trainer = trainer(&run);
                let reports = steps(&mut trainer, &corpus, run.stages.total());
                (reports, trainer.state().into_iter().collect::<BTreeMap<_, _>>())
            };
            let (whole, weights) = run(1);
            for accumulate in [2, 3, 5] {
                let (parts, others) = run(accumulate);
                for (whole, part) in whole.iter().zip(&parts) {
                    assert_eq!((whole.tokens, whole.ratio_target), (part.tokens, part.ratio_target));
                    assert!((whole.ratio - part.ratio).abs() < 1e-6, "{accumulate}: {whole:?} {part:?}");
                    assert!((whole.loss - part.loss).abs() < 1e-4, "{accumulate}: {whole:?} {part:?}");
                    let apart = (whole.grad_norm - part.grad_norm).abs();
                    assert!(apart <= 1e-3 * whole.grad_norm + 1e-6, "{accumulate}: {whole:?} {part:?}");
                }
                for (name, tensor) in weights.iter().filter(|(name, _)| name.starts_with("m.")) {
                    let (a, b) = (tensor.to_f32(), others[name].to_f32());
                    let scale = a.iter().map(|x| x.abs()).fold(1e-4, f32::max);
                    assert!(largest(&a, &b) < 2e-2 * scale, "{decision:?} {accumulate} {name}: {}", largest(&a, &b));
                }
            }
        }
    }
}

#[test]
fn frozen_weights_stay_and_the_others_move_as_they_would() {
    let corpus = corpus(5);
    let base = tiny();
    for decision in [HEAD, BORROWED] {
        for recompute in [false, true] {
            let run = |train| {
                let run = Settings { train, recompute, ..settings(decision, (0, 1, 2)) };
                let mut trainer = trainer(&run);
                let first = trainer.step(&corpus).unwrap();
                steps(&mut trainer, &corpus, 3);
                (trainer, first)
            };
            let (all, _) = run(Train::All);
            let heads = (decision == HEAD).then_some((Train::Decide, &["decide_proj"][..]));
            for (train, parts) in heads.into_iter().chain([
                (Train::Qk, &["q_proj", "k_proj", "decide_proj"][..]),
                (Train::Attention, &["q_proj", "k_proj", "v_proj", "o_proj", "decide_proj"]),
            ]) {
                let (trainer, first) = run(train);
                let state: BTreeMap<String, HostTensor> = trainer.state().into_iter().collect();
                let trains = |name: &str| parts.iter().any(|part| name.contains(part));
                assert!(state.keys().all(|name| trains(name)), "{:?}", state.keys());
                let expected = all.state().iter().filter(|(name, _)| trains(name)).count();
                assert_eq!(state.len(), expected, "{train:?}");
                let model = trainer.checkpoint(&base).unwrap();
                for (name, tensor) in &model.tensors {
                    let moved = base.tensors.get(name).is_none_or(|before| before != tensor);
                    assert_eq!(moved, trains(name), "{train:?} {name}");
                }
                // A gradient does not depend on which others are taken: the first moments after one step are the same.
                let once = |train| {
                    let run = Settings { train, recompute, ..settings(decision, (0, 1, 2)) };
                    let run =
                        Settings { learning: kvfold_retrofit::settings::Learning { clip: 1e9, ..run.learning }, ..run };
                    let mut trainer = crate::common::trainer(&run);
                    steps(&mut trainer, &corpus, 1);
                    trainer.state().into_iter().collect::<BTreeMap<_, _>>()
                };
                let (some, every) = (once(train), once(Train::All));
                for (name, tensor) in some.iter().filter(|(name, _)| name.starts_with("m.")) {
                    assert_eq!(tensor, &every[name], "{train:?} {name}");
                }
                assert!(first.grad_norm > 0.0);
            }
        }
    }
}
