//! Sequences and batches.

use kvfold_retrofit::{Corpus, RetrofitError};
use proptest::prelude::*;

/// A corpus of `len` sequences of 2 tokens.
fn corpus(len: usize) -> Corpus {
    Corpus::cut((0..2 * len as u32).collect(), 2).unwrap()
}

/// The first `places` sequences that training sees, `batch` at a time.
fn seen(corpus: &Corpus, seed: u64, batch: usize, places: usize) -> Vec<usize> {
    let steps = places.div_ceil(batch) as u64;
    let mut seen: Vec<usize> = (0..steps).flat_map(|step| corpus.batch(seed, step, batch)).collect();
    seen.truncate(places);
    seen
}

#[test]
fn a_text_is_cut_into_consecutive_sequences_without_its_incomplete_end() {
    let corpus = Corpus::cut((10..21).collect(), 4).unwrap();
    assert_eq!((corpus.len(), corpus.length(), corpus.is_empty()), (2, 4, false));
    assert_eq!(corpus.sequence(0), [10, 11, 12, 13]);
    assert_eq!(corpus.sequence(1), [14, 15, 16, 17]);
    assert_eq!(corpus.tokens(), (10..18).collect::<Vec<u32>>());
}

#[test]
fn too_little_text_and_sequences_of_nothing_are_errors() {
    let error = Corpus::cut(vec![1, 2], 3).unwrap_err();
    assert!(matches!(error, RetrofitError::TooLittleText { tokens: 2, length: 3 }));
    assert!(matches!(Corpus::cut(vec![], 1).unwrap_err(), RetrofitError::TooLittleText { .. }));
    let error = Corpus::cut(vec![1, 2], 0).unwrap_err();
    assert!(matches!(error, RetrofitError::Setting { setting: "length", .. }));
}

#[test]
fn the_digest_knows_tokens_their_order_and_the_length() {
    let digest = |tokens: &[u32], length| Corpus::cut(tokens.to_vec(), length).unwrap().digest();
    let one = digest(&[1, 2, 3, 4], 2);
    assert_eq!(one, digest(&[1, 2, 3, 4, 9], 2), "what was dropped is not part of it");
    assert!([digest(&[1, 2, 4, 3], 2), digest(&[1, 2, 3, 5], 2), digest(&[1, 2, 3, 4], 4)].iter().all(|d| *d != one));
    assert_eq!(one.len(), 64);
}

#[test]
fn epochs_and_seeds_have_orders_of_their_own() {
    let corpus = corpus(20);
    let epochs = seen(&corpus, 1, 20, 60);
    assert_ne!(epochs[..20], epochs[20..40]);
    assert_ne!(epochs[20..40], epochs[40..]);
    assert_ne!(epochs, seen(&corpus, 2, 20, 60));
    assert_ne!(epochs[..20], (0..20).collect::<Vec<_>>());
}

#[test]
fn a_batch_larger_than_the_corpus_goes_round_it() {
    let mut batch = corpus(3).batch(5, 4, 7);
    batch.sort_unstable();
    // Places 28 to 34: the end of epoch 9, epoch 10, and the beginning of epoch 11.
    assert_eq!(batch.len(), 7);
    assert!((0..3).all(|n| batch.iter().filter(|&&m| m == n).count() >= 1));
    assert_eq!(corpus(1).batch(0, 9, 4), [0; 4]);
}

proptest! {
    #[test]
    fn every_epoch_is_a_permutation_wherever_batches_end(len in 1usize..12, batch in 1usize..30, seed: u64) {
        let corpus = corpus(len);
        let seen = seen(&corpus, seed, batch, 5 * len);
        for epoch in seen.chunks_exact(len) {
            let mut epoch = epoch.to_vec();
            epoch.sort_unstable();
            prop_assert_eq!(epoch, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_batch_depends_on_its_step_alone_and_batch_sizes_only_regroup(len in 1usize..12, seed: u64, step in 0u64..50) {
        let corpus = corpus(len);
        prop_assert_eq!(corpus.batch(seed, step, 4), corpus.batch(seed, step, 4));
        let halves = [corpus.batch(seed, 2 * step, 2), corpus.batch(seed, 2 * step + 1, 2)].concat();
        prop_assert_eq!(corpus.batch(seed, step, 4), halves);
    }
}
