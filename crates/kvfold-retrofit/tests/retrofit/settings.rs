//! What defines a run, and what is refused before it starts.

use crate::common::{BORROWED, CONTEXT, HEAD, LENGTH, corpus, dmc, settings, tiny, trainer};
use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::Decision;
use kvfold_kernels::ops::Precision;
use kvfold_model::shape::Shape;
use kvfold_retrofit::settings::{Calibration, Stages, Train, default_rate};
use kvfold_retrofit::{RetrofitError, Settings, Trainer};
use proptest::prelude::*;

/// Asserts that a run changed by `spoil` is refused by a message that names `setting` and says `found`.
#[track_caller]
fn refused(setting: &str, found: &str, spoil: impl Fn(&mut Settings)) {
    let mut run = settings(HEAD, (0, 2, 2));
    spoil(&mut run);
    match run.validate(&Shape::of(&tiny().config)) {
        Err(error @ RetrofitError::Setting { .. }) => {
            let message = error.to_string();
            assert!(message.starts_with(&format!("`{setting}` is {found}; expected ")), "{message}");
        }
        other => panic!("{setting}: {other:?}"),
    }
}

#[test]
fn every_impossible_setting_is_refused_by_name() {
    refused("ratio", "0.5", |s| s.ratio = 0.5);
    refused("ratio", "NaN", |s| s.ratio = f64::NAN);
    refused("ratio", "inf", |s| s.ratio = f64::INFINITY);
    refused("length", "1", |s| s.length = 1);
    refused("length", "0", |s| s.length = 0);
    refused("length", "49", |s| s.length = CONTEXT + 1);
    refused("delay", "24", |s| dmc(s).delay = LENGTH);
    refused("batch", "0", |s| s.batch = 0);
    refused("steps", "0", |s| s.stages = Stages { zeroing: 0, ramp: 0, hold: 0 });
    refused("zeroing steps", "1", |s| s.stages.zeroing = 1);
    refused("pool_window", "0", |s| dmc(s).pool_window = Some(0));
    refused("pool_window", "49", |s| dmc(s).pool_window = Some(CONTEXT + 1));
    refused("precision", "q8", |s| s.precision = Precision::Q8);
    refused("train", "decide", |s| {
        (s.train, dmc(s).decision) = (Train::Decide, BORROWED);
    });
    refused("temperature", "0", |s| s.temperature = 0.0);
    refused("temperature", "-1", |s| s.temperature = -1.0);
    refused("hinge weight", "-1", |s| s.pressure.weight = -1.0);
    refused("margin", "NaN", |s| s.pressure.margin = f64::NAN);
    refused("lr", "-0.1", |s| s.learning.rate = -0.1);
    refused("lr", "inf", |s| s.learning.rate = f64::INFINITY);
    refused("lr floor", "1.5", |s| s.learning.floor = 1.5);
    refused("decision lr factor", "-1", |s| s.learning.decide_factor = -1.0);
    refused("beta1", "1", |s| s.learning.beta1 = 1.0);
    refused("beta2", "NaN", |s| s.learning.beta2 = f64::NAN);
    refused("weight decay", "-1", |s| s.learning.weight_decay = -1.0);
    refused("clip", "0", |s| s.learning.clip = 0.0);
    let fit = |tokens: usize, gain: f64| Some(Calibration { tokens, gain });
    refused("calibrate", "100", |s| s.calibration = fit(100, 1.0));
    let biased = Decision::Head { scale: 1.0, offset: 1.0, bias: true, ahead: false };
    refused("calibrate", "0", |s| (dmc(s).decision, s.calibration) = (biased, fit(0, 1.0)));
    refused("calibration gain", "NaN", |s| (dmc(s).decision, s.calibration) = (biased, fit(9, f64::NAN)));
    refused("decision scale", "0", |s| {
        dmc(s).decision = Decision::Head { scale: 0.0, offset: 1.0, bias: false, ahead: false }
    });
    refused("decision offset", "-inf", |s| {
        dmc(s).decision = Decision::Head { scale: 1.0, offset: f64::NEG_INFINITY, bias: false, ahead: false }
    });
}

#[test]
fn the_highest_ratio_is_the_length_over_the_ring_and_one_slot() {
    let mut run = settings(HEAD, (0, 2, 2));
    for (delay, highest) in [(0, 24.0), (1, 12.0), (3, 6.0), (7, 3.0), (23, 1.0), (24, 1.0), (1000, 1.0)] {
        dmc(&mut run).delay = delay;
        assert_eq!(run.highest_ratio(), highest, "delay {delay}");
    }
    dmc(&mut run).delay = 3;
    run.ratio = 6.0;
    run.validate(&Shape::of(&tiny().config)).unwrap();
    refused("ratio", "6.1", |s| s.ratio = 6.1);
}

#[test]
fn the_highest_ratio_is_what_a_model_that_folds_everything_reaches() {
    let mut run = settings(Decision::Head { scale: 1.0, offset: -1e3, bias: false, ahead: false }, (0, 2, 2));
    run.ratio = run.highest_ratio();
    let report = trainer(&run).step(&corpus(3)).unwrap();
    assert!((report.ratio - 6.0).abs() < 1e-5, "{}", report.ratio);
}

#[test]
fn what_validates_can_be_trained_and_saved() {
    for (delay, window, ratio) in [(0, None, 24.0), (LENGTH - 1, Some(CONTEXT), 1.0), (2, Some(1), 8.0)] {
        let mut run = settings(HEAD, (0, 1, 0));
        (dmc(&mut run).delay, dmc(&mut run).pool_window) = (delay, window);
        run.ratio = ratio;
        let mut trainer = trainer(&run);
        trainer.step(&corpus(3)).unwrap();
        let saved = trainer.checkpoint(&tiny()).unwrap().config.compression.unwrap();
        assert_eq!((saved.dmc, saved.ratio, saved.trained_length), (dmc(&mut run).clone(), ratio, LENGTH));
    }
}

#[test]
fn a_model_that_is_retrofitted_already_is_refused() {
    let run = settings(BORROWED, (1, 1, 1));
    let retrofitted = trainer(&run).checkpoint(&tiny()).unwrap();
    let error = Trainer::new(FastCpu::new(), &retrofitted, run).unwrap_err().to_string();
    assert!(error.starts_with("`model` is tiny, which is retrofitted already"), "{error}");
}

proptest! {
    #[test]
    fn settings_survive_their_json_to_the_last_bit(hidden in 1usize..5000, ratio in 1.0f64..6.0, offset: f64) {
        let mut run = settings(Decision::Borrowed { scale: 0.1 + ratio, offset }, (1, 1, 1));
        run.ratio = ratio;
        run.learning.rate = default_rate(&Shape { hidden, ..Shape::of(&tiny().config) });
        let json = serde_json::to_string(&run).unwrap();
        prop_assert_eq!(serde_json::from_str::<Settings>(&json).unwrap(), run);
    }
}
