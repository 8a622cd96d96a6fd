//! Two models on the same text, and how fast they decode.

use crate::common::{VOCAB, broken, dmc, engine, lookup, model, near, random, text};
use kvfold_engine::Engine;
use kvfold_eval::{Comparison, EvalError, Workload, compare, cut, decode_speed, perplexity};
use kvfold_kernels::FastCpu;
use kvfold_model::Checkpoint;

fn comparison(original: &Checkpoint, compressed: &Checkpoint, text: &[u32], window: usize) -> Comparison {
    let (mut original, mut compressed) = (engine(original), engine(compressed));
    let result = compare((&mut original, &mut compressed), &cut(text, window, None).unwrap(), |_| ()).unwrap();
    for engine in [&original, &compressed] {
        assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0));
    }
    result
}

#[test]
fn a_model_agrees_with_itself() {
    for model in [model(None, random), model(Some(dmc(0.2)), random)] {
        let result = comparison(&model, &model, &text(60), 20);
        assert_eq!(result.kl, vec![0.0; 57]);
        assert_eq!((result.agreed, result.top1_agreement()), (57, 1.0));
        assert_eq!(result.original.value(), result.compressed.value());
        assert_eq!(result.original.predicted, 57);
        assert_eq!(result.original.measured.logical_ratio(), result.compressed.measured.logical_ratio());
    }
    let plain = model(None, random);
    let measured = comparison(&plain, &plain, &text(60), 20).compressed.measured;
    assert_eq!((measured.logical_ratio(), measured.physical_ratio()), (1.0, 1.0));
}

#[test]
fn a_comparison_has_the_perplexities_of_its_models() {
    let (plain, folding) = (model(None, random), model(Some(dmc(0.2)), random));
    let text = text(90);
    let result = comparison(&plain, &folding, &text, 30);
    for (found, model) in [(&result.original, &plain), (&result.compressed, &folding)] {
        let alone = perplexity(&mut engine(model), &cut(&text, 30, None).unwrap(), |_| ()).unwrap();
        near(found.nll, alone.nll, 1e-9);
        assert_eq!(found.predicted, alone.predicted);
        assert_eq!(found.measured.logical_ratio(), alone.measured.logical_ratio());
    }
    assert!(result.compressed.measured.logical_ratio() > 1.1);
    assert!(result.kl.iter().all(|&kl| kl >= 0.0) && result.kl.iter().any(|&kl| kl > 1e-4));
}

#[test]
fn known_logits_give_known_divergence_and_agreement() {
    // The original gives a token's successor 5/20 and others 1/20; the other model knows nothing after odd tokens.
    let knows = |t: usize, k: usize| if k == (t + 1) % VOCAB { 5f32.ln() } else { 0.0 };
    let original = lookup(knows);
    let half = lookup(|t, k| if t % 2 == 1 { 0.0 } else { knows(t, k) });
    let counting: Vec<u32> = (0..9).collect();
    let result = comparison(&original, &half, &counting, 9);
    // KL(original || compressed), not the other way round: ln 16 minus the entropy.
    let entropy = 0.25 * 4f64.ln() + 0.75 * 20f64.ln();
    for (t, &kl) in result.kl.iter().enumerate() {
        near(kl, if t % 2 == 1 { 16f64.ln() - entropy } else { 0.0 }, 1e-4);
    }
    assert_eq!((result.kl.len(), result.agreed), (8, 4));
    near(result.original.value(), 4.0, 1e-5);
    near(result.compressed.value(), 8.0, 1e-5);
    let backwards = comparison(&half, &original, &counting, 9);
    near(backwards.kl[1], (16.0 * 20.0f64.ln() - 5f64.ln()) / 16.0 - 16f64.ln(), 1e-4);
}

#[test]
fn what_is_not_a_number_does_not_agree() {
    let fine = lookup(|_, _| 0.0);
    for result in [comparison(&fine, &broken(), &[1, 2, 3, 4], 4), comparison(&broken(), &broken(), &[1, 2, 3, 4], 4)] {
        // NaN spreads from token 2 over what attends to it, and no place after it counts as perfect.
        assert!(result.kl[0] == 0.0 && result.kl[1..].iter().all(|kl| kl.is_nan()), "{:?}", result.kl);
        assert_eq!(result.agreed, 1);
        assert!(result.compressed.value().is_nan());
    }
}

#[test]
fn decoding_is_timed_and_gives_everything_back() {
    let mut plain: Engine<FastCpu> = engine(&model(None, random));
    let mut folding = engine(&model(Some(dmc(0.2)), random));
    let text = text(60);
    let windows = cut(&text, 20, None).unwrap();
    for rounds in [1, 2, 3] {
        let mut runs = 0;
        let work = Workload { prompt: 5, decode: 15, rounds };
        let rates = decode_speed(&mut [&mut plain, &mut folding], &windows, work, || runs += 1).unwrap();
        assert_eq!((rates.len(), runs), (2, 2 * rounds));
        assert!(rates.iter().all(|rate| rate.is_finite() && *rate > 0.0), "{rates:?}");
    }
    for engine in [&plain, &folding] {
        assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0));
    }
}

#[test]
fn nothing_to_time_is_an_error() {
    let mut plain = engine(&model(None, random));
    let text = text(20);
    let mut refused = |windows: &[&[u32]], (prompt, decode, rounds)| {
        let error = decode_speed(&mut [&mut plain], windows, Workload { prompt, decode, rounds }, || ()).unwrap_err();
        assert!(matches!(error, EvalError::Workload { .. }), "{error}");
    };
    refused(&[], (5, 5, 1));
    refused(&[&text], (5, 0, 1));
    refused(&[&text], (0, 5, 1));
    refused(&[&text], (5, 5, 0));
    refused(&[&text, &text[..9]], (5, 5, 1));
}

#[test]
fn an_engine_out_of_pages_fails_and_gives_everything_back() {
    let mut small = engine(&model(None, random)).with_page_limit(6);
    let text = text(40);
    let windows = cut(&text, 20, None).unwrap();
    let work = Workload { prompt: 10, decode: 10, rounds: 1 };
    let error = decode_speed(&mut [&mut small], &windows, work, || ()).unwrap_err();
    assert!(matches!(error, EvalError::Engine(_)), "{error}");
    assert_eq!(small.pool().pages_held(), 0);
}
