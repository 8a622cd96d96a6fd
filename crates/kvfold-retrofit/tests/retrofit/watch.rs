//! Losses that explode, and losses that only look so.

use crate::common::{HEAD, corpus, settings, steps, trainer};
use kvfold_retrofit::{RetrofitError, StepReport, Watch};

/// Reports with these task losses.
fn reports(losses: impl IntoIterator<Item = f64>) -> Vec<StepReport> {
    let settings = settings(HEAD, (0, 1, 0));
    let one = steps(&mut trainer(&settings), &corpus(3), 1)[0];
    losses.into_iter().zip(1..).map(|(task_loss, step)| StepReport { step, task_loss, ..one }).collect()
}

/// The step at which a model of 512 tokens is given up.
fn explodes(losses: impl IntoIterator<Item = f64>) -> Option<u64> {
    let mut watch = Watch::new(512);
    reports(losses).iter().find(|report| watch.exploded(report)).map(|report| report.step)
}

#[test]
fn a_loss_that_stays_high_for_three_steps_has_exploded() {
    let calm = || std::iter::repeat_n(1.5, 40);
    assert_eq!(explodes(calm().chain([20.0, 30.0, 40.0, 50.0])), Some(43));
    assert_eq!(explodes(calm().chain([20.0, 30.0, 1.5, 20.0, 30.0, 1.5])), None);
    assert_eq!(explodes([0.1, 9.0, 9.0, 9.0]), Some(4));
    assert_eq!(explodes(calm()), None);
}

#[test]
fn the_rise_that_compression_brings_is_no_explosion() {
    // From a divergence of nothing to one that is normal, and a loss that grows by a half.
    assert_eq!(explodes((0..60).map(|step| 1e-9 + f64::from(step) * 0.01)), None);
    assert_eq!(explodes((0..60).map(|step| 2.0 + f64::from(step) * 0.02)), None);
    assert_eq!(explodes([0.0, 0.0, 0.0, 1.9, 1.9, 1.9, 1.9]), None, "ln 512 is 6.2");
}

#[test]
fn steps_before_a_resume_count_and_a_suspicious_one_is_known() {
    let all = reports([1.5; 8].into_iter().chain([20.0; 3]));
    let mut watch = Watch::new(512);
    assert!(all[..9].iter().all(|report| !watch.exploded(report)));
    assert!(watch.is_wary());
    let mut resumed = Watch::new(512);
    all[..9].iter().for_each(|report| assert!(!resumed.exploded(report)));
    assert!(!resumed.exploded(&all[9]) && resumed.exploded(&all[10]));
    let settings = settings(HEAD, (0, 20, 0));
    match resumed.error(&all[10], &corpus(3), &settings) {
        RetrofitError::Exploding { step: 11, steps: 3, documents, .. } => assert_eq!(documents, "the text"),
        other => panic!("{other}"),
    }
}
