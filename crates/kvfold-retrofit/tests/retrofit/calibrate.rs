//! Decision heads that are fitted to what folding costs.

use crate::common::{CONTEXT, VOCAB, dmc, settings, trainer};
use kvfold_kernels::dmc::{Decision, Method, Share};
use kvfold_kernels::noise::hash;
use kvfold_kernels::ops::Scope;
use kvfold_model::names;
use kvfold_retrofit::settings::{Calibration, Train};
use kvfold_retrofit::{Corpus, Fit, RetrofitError, Settings, Trainer};
use kvfold_tensor::HostTensor;

/// Sequences that decisions are fitted on.
const READ: usize = 300;

/// A run whose decisions are fitted, with next to no noise on them.
fn fitted() -> Settings {
    let mut run = settings(Decision::Head { scale: 4.0, offset: 1.0, bias: true, ahead: true }, (0, 0, 2));
    run.length = CONTEXT;
    run.calibration = Some(Calibration { tokens: READ * CONTEXT, gain: 1e4 });
    run.learning.rate = 0.0;
    run.batch = 32;
    run
}

/// Text in which some tokens are far more frequent than others.
fn text(length: usize) -> Corpus {
    let token = |n: usize| (hash(&[5, n as u64]) % VOCAB as u64).min(hash(&[6, n as u64]) % VOCAB as u64) as u32;
    Corpus::cut((0..320 * length).map(token).collect(), length).unwrap()
}

fn calibrate(trainer: &mut Trainer<kvfold_kernels::FastCpu>) -> Fit {
    let mut done = Vec::new();
    let fit = trainer.calibrate(&text(CONTEXT), |layer| done.push(layer)).unwrap();
    assert_eq!(done, [1, 2]);
    fit.expect("the settings ask for it")
}

#[test]
fn fitted_heads_choose_cheaper_folds_than_chance() {
    for method in [Method::Dmc, Method::Dms] {
        let mut run = fitted();
        let rules = dmc(&mut run);
        (rules.method, rules.pool_window, rules.log_mass) = (method, None, false);
        let Fit { tokens, chosen, random, best } = calibrate(&mut trainer(&run));
        assert_eq!(tokens, READ * CONTEXT);
        assert!(best < chosen && chosen < 0.9 * random, "{method:?}: {chosen}, {random} at random, {best} at best");
    }
}

/// An eviction is decided by the token after, and says nothing of the one that goes unless decisions look back.
#[test]
fn decisions_that_look_back_choose_cheaper_folds() {
    for method in [Method::Dmc, Method::Dms] {
        let [alone, back] = [false, true].map(|looks_back| {
            let mut run = fitted();
            let rules = dmc(&mut run);
            (rules.method, rules.pool_window, rules.log_mass) = (method, None, false);
            rules.decision = Decision::Head { scale: 4.0, offset: 1.0, bias: true, ahead: looks_back };
            let Fit { chosen, random, .. } = calibrate(&mut trainer(&run));
            chosen / random
        });
        assert!(back < 0.97 * alone, "{method:?}: {back} of what random folds cost, {alone} without looking back");
    }
}

#[test]
fn a_fitted_run_begins_at_the_ratio_that_it_asks_for() {
    for scope in [Scope::Global, Scope::Layer, Scope::Head] {
        for share in [Share::Head, Share::Layer] {
            for ratio in [1.3, 2.0, 3.0] {
                let mut run = Settings { ratio, ..fitted() };
                run.pressure.scope = scope;
                dmc(&mut run).share = share;
                let mut trainer = trainer(&run);
                calibrate(&mut trainer);
                let report = trainer.step(&text(CONTEXT)).unwrap();
                let off = (report.ratio / ratio - 1.0).abs();
                assert!(off < 0.1, "{scope:?}, {share:?}: {} instead of {ratio}", report.ratio);
                if scope == Scope::Head && share == Share::Head {
                    let heads: Vec<f64> = trainer.heads().iter().flatten().copied().collect();
                    assert!(heads.iter().all(|head| (head / ratio - 1.0).abs() < 0.25), "{ratio}: {heads:?}");
                }
            }
        }
    }
}

#[test]
fn a_fit_depends_on_nothing_but_the_run() {
    let decisions = |trainer: &Trainer<_>| {
        let state: Vec<(String, HostTensor)> = trainer.state();
        state.into_iter().filter(|(name, _)| name.contains(names::DECIDE)).collect::<Vec<_>>()
    };
    let run = Settings { train: Train::Decide, ..fitted() };
    let (mut one, mut other) = (trainer(&run), trainer(&run));
    let before = decisions(&one);
    calibrate(&mut one);
    calibrate(&mut other);
    assert_ne!(decisions(&one), before);
    assert_eq!(decisions(&one), decisions(&other));

    // What a run has learned is never fitted over.
    one.step(&text(CONTEXT)).unwrap();
    let learned = decisions(&one);
    assert_eq!(one.calibrate(&text(CONTEXT), |_| panic!("nothing is fitted")).unwrap(), None);
    assert_eq!(decisions(&one), learned);
}

#[test]
fn a_run_that_does_not_ask_for_it_begins_as_before() {
    let mut trainer = trainer(&Settings { calibration: None, ..fitted() });
    assert_eq!(trainer.calibrate(&text(CONTEXT), |_| panic!("nothing is fitted")).unwrap(), None);
}

#[test]
fn documents_that_show_nothing_are_an_error_that_says_how_long_they_must_be() {
    let at = |length: usize| trainer(&Settings { length, ratio: 1.0, ..fitted() }).calibrate(&text(length), |_| ());
    let error = at(4).unwrap_err();
    assert!(matches!(error, RetrofitError::NothingToCalibrate { longest: 4, needed: 5 }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains("4 tokens, and 5 are needed") && message.contains("--calibrate 0"), "{message}");
    at(5).unwrap();
}
