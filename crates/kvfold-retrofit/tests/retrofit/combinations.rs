//! Every method with everything a run can be: frozen weights, packed documents, batches in parts, and a resume.

use crate::common::{BORROWED, HEAD, LENGTH, VOCAB, bits, settings, steps, tiny, trainer};
use kvfold_kernels::dmc::{self, Decision, Dmc};
use kvfold_kernels::noise::hash;
use kvfold_model::shape::Shape;
use kvfold_retrofit::corpus::Encoded;
use kvfold_retrofit::plan::Plan;
use kvfold_retrofit::schedule::Stage;
use kvfold_retrofit::settings::{Loss, Method, Train};
use kvfold_retrofit::{Corpus, RetrofitError, RunDir, Settings, StepReport, Trainer};
use kvfold_tensor::HostTensor;
use std::collections::BTreeMap;

const STEPS: u64 = 4;

/// Documents of several lengths, some of which share a sequence.
fn documents() -> Corpus {
    let token = |document: u64| move |n: u64| (hash(&[9, document, n]) % VOCAB as u64) as u32;
    let encoded = [15, 9, 20, 4, 24, 12, 11, 24, 7, 16].into_iter().zip(0..).map(|(length, document)| Encoded {
        tokens: (0..length).map(token(document)).collect(),
        source: format!("document {document}"),
    });
    Corpus::pack(encoded.collect(), LENGTH).unwrap()
}

/// Attention alone trains, in two parts.
fn run_of(method: Method, zeroing: u64) -> Settings {
    let ratio = if method.dynamic().is_some() { 1.6 } else { 2.0 };
    let stages = settings(HEAD, (zeroing, 1, STEPS - zeroing - 1)).stages;
    Settings { method, ratio, stages, train: Train::Attention, accumulate: 2, ..settings(HEAD, (0, 1, 1)) }
}

/// DMC and DMS by both sources of decisions, and GQA.
fn runs() -> Vec<Settings> {
    let mut runs = vec![run_of(Method::Gqa { kv_heads: 1 }, 0)];
    for method in [dmc::Method::Dmc, dmc::Method::Dms] {
        for (decision, zeroing) in [(HEAD, 0), (BORROWED, 1), (BORROWED, 0)] {
            let averages = method == dmc::Method::Dmc;
            let window = averages.then_some(5);
            let how = Dmc {
                method,
                decision,
                delay: 3,
                sinks: 1,
                pool_window: window,
                log_mass: averages,
                share: Default::default(),
            };
            runs.push(run_of(how.into(), zeroing));
        }
    }
    runs
}

fn named(run: &Settings) -> String {
    let borrowed = matches!(run.method.dynamic().map(|dmc| dmc.decision), Some(Decision::Borrowed { .. }));
    format!("{}, borrowed: {borrowed}, {:?}", run.method.name(), run.stages)
}

#[test]
fn every_method_trains_attention_on_packed_documents_in_parts_and_resumes_to_the_same_bytes() {
    let corpus = documents();
    for run in runs() {
        let name = named(&run);
        let mut whole = trainer(&run);
        let before = bits(&whole);
        let reports = steps(&mut whole, &corpus, STEPS);
        // Before anything has faded the student is its teacher, and nothing pulls at it.
        let pulled = |report: &StepReport| report.stage == Stage::Zeroing || report.grad_norm > 0.0;
        assert!(reports.iter().all(|report| report.loss.is_finite() && pulled(report)), "{name}: {reports:?}");
        assert!(reports.iter().any(|report| report.tokens < (run.batch * LENGTH) as u64), "documents leave gaps");
        assert!(before.iter().all(|(tensor, _)| tensor.contains(".self_attn.")), "{name}");
        assert!(before.iter().zip(bits(&whole)).all(|(before, after)| *before != after), "{name}: all of it moves");

        let dir = tempfile::tempdir().unwrap();
        let stopped = RunDir::of(&dir.path().join("out"));
        let mut first = trainer(&run);
        stopped.create(&tiny(), &run, &corpus).unwrap();
        let until_then = steps(&mut first, &corpus, 2);
        stopped.save(&first, &until_then).unwrap();
        drop((first, stopped));
        let mut second = trainer(&run);
        let resumed = RunDir::of(&dir.path().join("out")).resume(&tiny(), &mut second).unwrap();
        assert_eq!((second.steps(), &resumed.reports, &resumed.damaged), (2, &until_then, &Vec::new()), "{name}");
        let rest = steps(&mut second, &resumed.corpus, STEPS);
        assert_eq!(rest, reports[2..], "{name}");
        assert_eq!(bits(&second), bits(&whole), "{name}");
        let [a, b] = [&whole, &second].map(|trainer| trainer.checkpoint(&tiny()).unwrap());
        assert_eq!((a.config, &a.tensors), (b.config, &b.tensors), "{name}");

        // What does not train is the original's, where it has the original's shape.
        let base = tiny();
        let frozen: Vec<_> = a.tensors.iter().filter(|(tensor, _)| !tensor.contains(".self_attn.")).collect();
        assert!(frozen.len() > 5 && frozen.iter().all(|&(tensor, values)| base.tensors[tensor] == *values), "{name}");
    }
}

#[test]
fn a_batch_in_parts_is_the_batch_whatever_the_method() {
    let corpus = documents();
    for run in runs() {
        let mut whole = trainer(&Settings { accumulate: 1, ..run.clone() });
        let mut parts = trainer(&run);
        for step in 1..=STEPS {
            let [a, b] = [&mut whole, &mut parts].map(|trainer| steps(trainer, &corpus, step)[0]);
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-3 * a.abs().max(1e-3);
            let same = [(a.task_loss, b.task_loss), (a.hinge, b.hinge), (a.ratio, b.ratio), (a.grad_norm, b.grad_norm)];
            assert!(same.iter().all(|&(a, b)| close(a, b)), "{}: {a:?} {b:?}", named(&run));
            assert_eq!((a.ratio_target, a.tokens), (b.ratio_target, b.tokens));
        }
    }
}

#[test]
fn merged_heads_are_under_no_pressure_and_as_many_as_they_are_on_documents_of_any_length() {
    let run = run_of(Method::Gqa { kv_heads: 1 }, 0);
    assert_eq!(run.ratio_on([2, 1].into_iter()).unwrap(), 2.0);
    assert_eq!((run.highest_ratio(), run.target_ratio()), (2.0, 2.0));
    let mut trainer = trainer(&run);
    let report = trainer.step(&documents()).unwrap();
    assert_eq!((report.ratio, report.ratio_target, report.hinge, report.loss), (2.0, 2.0, 0.0, report.task_loss));
    assert!(report.task_loss > 1e-3, "means are not the original: {}", report.task_loss);
    assert!(trainer.heads().is_empty(), "nothing is decided");
    assert_eq!(trainer.shape(), &run.shape(&Shape::of(&tiny().config)));
    assert_eq!((trainer.shape().heads.kv, trainer.shape().decide_outputs), (1, 0));
}

#[test]
fn a_loss_that_is_no_number_stops_every_method_before_it_changes_anything() {
    let corpus = documents();
    for run in runs() {
        let mut broken = trainer(&run);
        let mut state: BTreeMap<String, HostTensor> = broken.state().into_iter().collect();
        let o = state.get_mut("model.layers.0.self_attn.o_proj.weight").unwrap();
        let mut values = o.to_f32();
        values[0] = f32::NAN;
        *o = HostTensor::from_f32(o.shape(), &values);
        broken.restore(1, |name, _| Ok(&state[name])).unwrap();
        let before = bits(&broken);
        let error = broken.step(&corpus).unwrap_err();
        assert!(matches!(error, RetrofitError::NotFinite { step: 2, .. }), "{}: {error}", named(&run));
        assert_eq!((bits(&broken), broken.steps()), (before, 1));
    }
}

#[test]
fn a_plan_counts_the_model_that_is_trained() {
    let base = tiny();
    let parameters =
        |run: &Settings| Trainer::new(kvfold_kernels::FastCpu::new(), &base, run.clone()).unwrap().shape().parameters();
    for run in runs() {
        for loss in [run.loss, Loss::Lm] {
            let run = Settings { loss, ..run.clone() };
            let plan = Plan::new(&base, &run);
            assert_eq!(plan.parameters, parameters(&run) as u64, "{}", named(&run));
            let trained: usize = trainer(&run).state().iter().map(|(_, tensor)| tensor.to_f32().len()).sum();
            assert_eq!(3 * plan.trained_parameters, trained as u64, "{}", named(&run));
            // Two layers of keys and values, twice as many rows in the teacher, are the teacher's own in GQA even if
            // nothing of them trains.
            let teacher = plan.memory.weights / 4 - plan.parameters;
            let attention = 2 * (2 * 32 * 16 + 2 * 16 * 16);
            let own = if loss == Loss::Lm { 0 } else { attention };
            assert_eq!(teacher, own, "{}", named(&run));
        }
    }
}
