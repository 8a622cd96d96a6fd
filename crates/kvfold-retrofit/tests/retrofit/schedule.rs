//! Stages, targets and learning rates by step.

use crate::common::{BORROWED, HEAD, settings, tiny};
use kvfold_model::shape::Shape;
use kvfold_retrofit::Settings;
use kvfold_retrofit::schedule::{Stage, place};
use proptest::prelude::*;

/// The stages of a run's steps, counted.
fn counted(settings: &Settings) -> [u64; 3] {
    let mut counts = [0; 3];
    for step in 0..settings.stages.total() {
        counts[place(settings, step).stage as usize] += 1;
    }
    counts
}

#[test]
fn the_channel_fades_linearly_and_is_gone_at_four_fifths_of_its_stage() {
    let run = settings(BORROWED, (250, 10, 10));
    for (step, left) in [(0, 1.0), (50, 0.75), (100, 0.5), (199, 0.005), (200, 0.0), (249, 0.0), (250, 0.0)] {
        let found = place(&run, step).channel;
        assert!((found - left).abs() < 1e-12, "step {step}: {found}, not {left}");
    }
    assert_eq!(place(&run, 249).stage, Stage::Zeroing);
    assert_eq!(place(&run, 249).ratio, 1.0);
    assert_eq!(place(&run, 250).stage, Stage::Ramp);
}

#[test]
fn the_target_rises_linearly_reaches_its_height_at_the_last_step_of_the_ramp_and_stays() {
    let mut run = settings(BORROWED, (4, 6, 3));
    run.ratio = 4.0;
    let ratios: Vec<f64> = (0..13).map(|step| place(&run, step).ratio).collect();
    assert_eq!(ratios, [1.0, 1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0, 4.0, 4.0]);
    assert_eq!(place(&run, 9).stage, Stage::Ramp);
    assert_eq!(place(&run, 10).stage, Stage::Hold);
    run.pressure.margin = 0.25;
    assert_eq!(place(&run, 9).ratio, 5.0, "the margin is part of the target");
    run.pressure.margin = 100.0;
    assert_eq!(place(&run, 12).ratio, run.highest_ratio(), "and never beyond what is possible");
}

#[test]
fn the_rate_warms_up_linearly_and_falls_as_a_cosine_to_its_floor() {
    let mut run = settings(HEAD, (0, 50, 50));
    (run.learning.rate, run.learning.warmup, run.learning.floor) = (1.0, 10, 0.2);
    let cosine = |done: f64| 0.2 + 0.8 * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    for (step, rate) in [(0, 0.1), (4, 0.5 * cosine(0.04)), (9, cosine(0.09)), (10, cosine(0.1)), (50, 0.6), (100, 0.2)]
    {
        let found = place(&run, step).rate;
        assert!((found - rate).abs() < 1e-12, "step {step}: {found}, not {rate}");
    }
    assert_eq!(place(&run, 1000).rate, place(&run, 100).rate, "beyond its end the rate stays");
    (run.learning.floor, run.learning.warmup) = (1.0, 0);
    assert_eq!((0..100).map(|step| place(&run, step).rate).sum::<f64>(), 100.0, "a floor of 1 is a constant rate");
}

#[test]
fn a_recipe_fades_a_borrowed_channel_and_nothing_for_a_head() {
    let shape = Shape::of(&tiny().config);
    let recipe = |decision| Settings::recipe(&shape, settings(decision, (0, 1, 1)).method, 2.0, 200);
    assert_eq!(counted(&recipe(HEAD)), [0, 120, 80]);
    assert_eq!(counted(&recipe(BORROWED)), [30, 90, 80]);
}

proptest! {
    #[test]
    fn a_recipe_of_any_number_of_steps_has_those_steps_and_ends_at_its_target(steps in 1u64..60, borrows: bool) {
        let decision = if borrows { BORROWED } else { HEAD };
        let shape = Shape::of(&tiny().config);
        let run = Settings::recipe(&shape, settings(decision, (0, 1, 1)).method, 2.0, steps);
        run.validate(&shape).unwrap();
        prop_assert_eq!(run.stages.total(), steps);
        prop_assert_eq!(place(&run, steps - 1).ratio, run.target_ratio());
    }

    #[test]
    fn no_schedule_of_any_stages_leaves_its_bounds(
        stages in (0u64..5, 0u64..5, 0u64..5).prop_filter("a step", |s| s.0 + s.1 + s.2 > 0),
        warmup in 0u64..5,
    ) {
        let mut run = settings(BORROWED, stages);
        run.learning.warmup = warmup;
        prop_assert_eq!(counted(&run), [stages.0, stages.1, stages.2]);
        let places: Vec<_> = (0..run.stages.total() + 2).map(|step| place(&run, step)).collect();
        for at in &places {
            prop_assert!((0.0..=1.0).contains(&at.channel) && (1.0..=2.0).contains(&at.ratio));
            prop_assert!(at.rate > 0.0 && at.rate <= run.learning.rate);
        }
        for pair in places.windows(2) {
            prop_assert!(pair[0].channel >= pair[1].channel && pair[0].ratio <= pair[1].ratio);
        }
    }
}
