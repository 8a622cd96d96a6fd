//! Perplexity of models whose answers are known, windows, and what caches held.

use crate::common::{CONTEXT, VOCAB, broken, dmc, engine, lookup, model, near, random, text};
use kvfold_eval::{EvalError, Perplexity, cut, perplexity};
use kvfold_kernels::dmc::Dmc;

/// Perplexity of a text in windows.
fn evaluate(checkpoint: &kvfold_model::Checkpoint, text: &[u32], window: usize) -> Perplexity {
    perplexity(&mut engine(checkpoint), &cut(text, window, None).unwrap(), |_| ()).unwrap()
}

#[test]
fn a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() {
    let result = evaluate(&lookup(|_, _| 0.0), &text(40), 10);
    near(result.value(), VOCAB as f64, 1e-6);
    assert_eq!(result.predicted, 36, "the first token of each window is given");
}

#[test]
fn known_logits_give_known_perplexity() {
    // From token t, t + 1 has logit ln 5 and the 15 others 0: probabilities 5/20 and 1/20.
    let successor = lookup(|t, k| if k == (t + 1) % VOCAB { 5f32.ln() } else { 0.0 });
    let counting: Vec<u32> = (0..20).map(|n| n % VOCAB as u32).collect();
    near(evaluate(&successor, &counting, 5).value(), 4.0, 1e-5);
    near(evaluate(&successor, &[3; 10], 5).value(), 20.0, 1e-5);
    // Two windows of 3: 0 -> 1 -> 2 and 2 -> 2 -> 3: three successors, one other. What joins windows counts for nothing.
    let result = evaluate(&successor, &[0, 1, 2, 2, 2, 3], 3);
    near(result.nll, 3.0 * 4f64.ln() + 20f64.ln(), 1e-5);
    assert_eq!(result.predicted, 4);
}

#[test]
fn large_logits_do_not_overflow() {
    let sure = lookup(|t, k| if k == (t + 1) % VOCAB { 3e4 } else { -3e4 });
    let counting: Vec<u32> = (0..10).collect();
    near(evaluate(&sure, &counting, 10).value(), 1.0, 1e-9);
    near(evaluate(&sure, &[4, 4], 2).nll, 6e4, 1e-4);
}

#[test]
fn a_model_that_is_not_a_number_has_no_perplexity() {
    assert!(evaluate(&broken(), &[1, 2, 3, 4], 4).value().is_nan());
    near(evaluate(&broken(), &[1, 3, 3, 4], 4).value(), VOCAB as f64, 1e-6);
}

#[test]
fn text_is_cut_into_consecutive_windows_without_an_incomplete_last_one() {
    let tokens: Vec<u32> = (0..11).collect();
    assert_eq!(cut(&tokens, 4, None).unwrap(), [&[0, 1, 2, 3][..], &[4, 5, 6, 7]]);
    assert_eq!(cut(&tokens, 4, Some(100)).unwrap().len(), 2);
    assert_eq!(cut(&tokens, 4, Some(7)).unwrap(), [&[0, 1, 2, 3]]);
    assert_eq!(cut(&tokens, 11, Some(11)).unwrap(), [&tokens[..]]);
    assert!(matches!(cut(&tokens, 12, None), Err(EvalError::TooLittleText { tokens: 11, window: 12 })));
    assert!(matches!(cut(&tokens, 4, Some(3)), Err(EvalError::Limit { limit: 3, window: 4 })));
    assert!(matches!(cut(&[], 2, None), Err(EvalError::TooLittleText { tokens: 0, window: 2 })));
    for window in [0, 1] {
        let error = cut(&tokens, window, None).unwrap_err();
        assert!(matches!(error, EvalError::SmallWindow { window: w } if w == window), "{error}");
    }
}

#[test]
fn a_window_beyond_the_context_is_refused_and_nothing_is_held() {
    let mut engine = engine(&lookup(|_, _| 0.0));
    let long = text(CONTEXT + 1);
    let error = perplexity(&mut engine, &[&long], |_| ()).unwrap_err();
    assert!(matches!(error, EvalError::Window { window: 129, context: CONTEXT }), "{error}");
    assert!(perplexity(&mut engine, &[&long[..1]], |_| ()).is_err());
    perplexity(&mut engine, &[&long[..CONTEXT]], |_| ()).unwrap();
    assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0));
}

#[test]
fn progress_counts_windows() {
    let mut seen = Vec::new();
    let text = text(30);
    perplexity(&mut engine(&lookup(|_, _| 0.0)), &cut(&text, 10, None).unwrap(), |n| seen.push(n)).unwrap();
    assert_eq!(seen, [1, 2, 3]);
}

#[test]
fn ratios_are_tokens_and_bytes_over_what_sequences_held() {
    let compressed = model(Some(dmc(0.2)), random);
    let text = text(3 * 50);
    let windows = cut(&text, 50, None).unwrap();
    let measured = evaluate(&compressed, &text, 50).measured;

    // By hand, from sequences of the same engine.
    let mut engine = engine(&compressed);
    let (mut slots, mut bytes, mut states) = (vec![vec![0; 2]; 2], 0, 0);
    for window in &windows {
        let mut sequence = engine.sequence();
        engine.logits(&mut sequence, window).unwrap();
        for (sums, held) in slots.iter_mut().zip(sequence.held().slots) {
            sums.iter_mut().zip(held).for_each(|(sum, n)| *sum += n);
        }
        let usage = engine.usage(&sequence);
        bytes += usage.bytes();
        states += usage.states * usage.state_bytes;
    }
    let total: usize = slots.iter().flatten().sum();
    assert!(total < 500, "something folded: {slots:?}");
    near(measured.logical_ratio(), 600.0 / total as f64, 1e-12);
    for (found, slots) in measured.heads().iter().flatten().zip(slots.iter().flatten()) {
        near(*found, 150.0 / *slots as f64, 1e-12);
    }
    // A full cache of 50 tokens: 4 pages of 16 slots in each of 4 heads, keys and values of 4 channels, 4 bytes each.
    let dense = 4 * 4 * 16 * 2 * 4 * 4;
    near(measured.physical_ratio(), (3 * dense) as f64 / bytes as f64, 1e-12);
    near(measured.mean_bytes(|u| u.bytes()), bytes as f64 / 3.0, 1e-12);
    near(measured.mean_bytes(|u| u.states * u.state_bytes), states as f64 / 3.0, 1e-12);
}

#[test]
fn ratios_of_models_that_fold_nothing_or_everything_are_known() {
    let at = |offset| evaluate(&model(Some(dmc(offset)), random), &text(2 * 48), 48).measured;
    assert_eq!(at(1e4).logical_ratio(), 1.0);
    // The ring of 5 and one slot.
    assert_eq!(at(-1e4).logical_ratio(), 8.0);
    assert!(at(-1e4).heads().iter().flatten().all(|&ratio| ratio == 8.0));
    let plain = evaluate(&model(None, random), &text(2 * 48), 48).measured;
    assert_eq!((plain.logical_ratio(), plain.physical_ratio()), (1.0, 1.0));
    assert!(at(1e4).physical_ratio() < 1.0, "open states and a ring are not free");
}

#[test]
fn a_full_cache_is_counted_as_a_full_cache_counts_itself() {
    let mut dense = engine(&model(None, random));
    let compressed = engine(&model(Some(dmc(0.2)), random));
    let masses = engine(&model(Some(Dmc { delay: 0, log_mass: false, ..dmc(0.2) }), random));
    for len in [1, 15, 16, 17, 100] {
        let mut sequence = dense.sequence();
        dense.logits(&mut sequence, &text(len)).unwrap();
        let real = dense.usage(&sequence);
        assert_eq!(dense.dense_usage(len).bytes(), real.bytes(), "{len}");
        assert_eq!(dense.dense_usage(len).slot_pages, real.slot_pages, "{len}");
        assert_eq!(compressed.dense_usage(len).bytes(), real.bytes(), "{len}, counted by a pool that folds");
        assert_eq!(masses.dense_usage(len).bytes(), real.bytes(), "{len}, counted by a pool without masses");
    }
}
