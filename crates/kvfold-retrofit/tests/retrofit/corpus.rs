//! Sequences and batches.

use kvfold_model::Checkpoint;
use kvfold_retrofit::corpus::{Amount, Encoded, encode};
use kvfold_retrofit::documents::Document;
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

/// Documents of these lengths; token n of document d is 1000 d + n.
fn documents(lengths: &[usize]) -> Vec<Encoded> {
    let tokens = |d: usize, len: usize| (0..len).map(|n| (1000 * d + n) as u32).collect();
    lengths.iter().enumerate().map(|(d, &len)| Encoded { source: format!("d{d}"), tokens: tokens(d, len) }).collect()
}

#[test]
fn documents_are_packed_where_they_fit_best_and_long_ones_are_cut() {
    let corpus = Corpus::pack(documents(&[25, 3, 6, 4, 1, 2]), 10).unwrap();
    let layout: Vec<(Vec<usize>, String)> =
        (0..corpus.len()).map(|n| (corpus.lengths(n).collect(), corpus.describe(&[n]))).collect();
    // Parts of 10, 10 and 5 tokens; 3 fits behind the 5; 6 and 4 fill one; 1 predicts nothing; 2 fits behind the 3.
    let expected = [(vec![10], "d0"), (vec![10], "d0"), (vec![5, 3, 2], "d0, d1, d5"), (vec![6, 4], "d2, d3")];
    assert_eq!(layout, expected.map(|(lengths, sources)| (lengths, sources.to_owned())));
    assert_eq!(corpus.sequence(2), [20, 21, 22, 23, 24, 1000, 1001, 1002, 5000, 5001]);
    assert_eq!(corpus.pieces(2).nth(1).unwrap(), [1000, 1001, 1002]);
    let part = corpus.select(&[2, 3]);
    assert_eq!((part.len(), part.sequence(1)), (2, corpus.sequence(3)));
    assert_eq!(part.describe(&[0]), "d0, d1, d5");
}

#[test]
fn a_stream_runs_across_documents() {
    let corpus = Corpus::stream(documents(&[5, 3, 9]), 6).unwrap();
    assert_eq!(corpus.len(), 2);
    assert!((0..2).all(|n| corpus.lengths(n).eq([6])));
    assert_eq!(corpus.sequence(0), [0, 1, 2, 3, 4, 1000]);
    assert_eq!((corpus.describe(&[0]), corpus.describe(&[1])), ("d0".into(), "d1".into()));
}

#[test]
fn the_digest_knows_where_documents_begin() {
    let digest = |lengths: &[usize]| {
        // The same tokens in the same order.
        let mut tokens = (0..10u32).collect::<Vec<_>>();
        let parts = lengths.iter().map(|&len| Encoded { source: "d".into(), tokens: tokens.drain(..len).collect() });
        let corpus = Corpus::pack(parts.collect(), 10).unwrap();
        assert_eq!((corpus.len(), corpus.sequence(0).len()), (1, 10));
        corpus.digest()
    };
    assert!(digest(&[10]) != digest(&[4, 6]) && digest(&[4, 6]) != digest(&[6, 4]));
    assert_eq!(digest(&[4, 6]), digest(&[4, 6]));
}

#[test]
fn texts_are_tokenised_in_order_up_to_a_limit_without_reading_on() {
    let stories = Checkpoint::open("stories260k").unwrap();
    let document = |n: usize| Document { source: n.to_string(), text: format!("Story {n}. ").repeat(1 + n % 9) };
    let texts: Vec<Document> = (0..40_000).map(document).collect();
    let mut read = Vec::new();
    let some =
        encode(&texts, &stories.tokenizer, Amount { tokens: 5000, ..Amount::ALL }, |bytes| read.push(bytes)).unwrap();
    let total: usize = texts.iter().map(|document| document.text.len()).sum();
    assert_eq!(some.iter().map(|document| document.tokens.len()).sum::<usize>(), 5000);
    assert!(read.len() == 1 && read[0] < total / 2, "{read:?} of {total} bytes");
    for (n, document) in some[..some.len() - 1].iter().enumerate() {
        assert_eq!(document.source, n.to_string());
        assert_eq!(document.tokens, stories.tokenizer.encode(&texts[n].text, true).unwrap());
    }

    // One text of which a little is wanted: the same tokens as of the whole.
    let one = [Document { source: "one".into(), text: "Once upon a time there was a dog. ".repeat(3000) }];
    let whole = encode(&one, &stories.tokenizer, Amount::ALL, |_| {}).unwrap();
    let part = encode(&one, &stories.tokenizer, Amount { tokens: 700, ..Amount::ALL }, |_| {}).unwrap();
    assert_eq!(part[0].tokens, whole[0].tokens[..700]);
    let all = stories.tokenizer.encode(&one[0].text, true).unwrap();
    assert_eq!(whole[0].tokens, all);
    assert_eq!(
        encode(&one, &stories.tokenizer, Amount { tokens: usize::MAX - 1, ..Amount::ALL }, |_| {}).unwrap()[0].tokens,
        all
    );
}

#[test]
fn a_little_of_many_documents_is_an_excerpt_of_each() {
    let stories = Checkpoint::open("stories260k").unwrap();
    let document = |n: usize| Document {
        source: n.to_string(),
        text: (0..[3, 4000][n % 2]).map(|m| format!("Once upon a time {n} dogs saw {m} cats. ")).collect(),
    };
    let texts: Vec<Document> = (0..40).map(document).collect();
    let tokens_of = |amount| encode(&texts, &stories.tokenizer, amount, |_| {}).unwrap();
    let excerpts = tokens_of(Amount { tokens: 900, of_each: 64 });
    assert_eq!(excerpts.iter().map(|document| document.tokens.len()).sum::<usize>(), 900);
    assert!(excerpts.iter().all(|document| document.tokens.len() <= 64) && excerpts.len() >= 900 / 64);
    for (n, excerpt) in excerpts[..excerpts.len() - 1].iter().enumerate() {
        let whole = stories.tokenizer.encode(&texts[n].text, true).unwrap();
        assert_eq!(excerpt.source, n.to_string());
        // Of a long text from its inside, and from a short one's beginning.
        let inside = excerpt.tokens[1..] != whole[1..excerpt.tokens.len()];
        assert_eq!(inside, n % 2 == 1, "{n}");
    }
    // Where excerpts are too few, whole documents are taken.
    let wanted = Amount { tokens: 40 * 64 + 1, of_each: 64 };
    assert_eq!(tokens_of(wanted), tokens_of(Amount { of_each: usize::MAX, ..wanted }));
}

proptest! {
    #[test]
    fn packing_loses_nothing_and_tears_nothing_short(lengths in prop::collection::vec(0usize..40, 1..30), length in 2usize..20) {
        prop_assume!(lengths.iter().any(|&len| len > 1));
        let documents = documents(&lengths);
        let corpus = Corpus::pack(documents.clone(), length).unwrap();
        let mut pieces: Vec<Vec<u32>> =
            (0..corpus.len()).flat_map(|n| corpus.pieces(n).map(<[u32]>::to_vec).collect::<Vec<_>>()).collect();
        let mut expected: Vec<Vec<u32>> = documents
            .iter()
            .flat_map(|document| document.tokens.chunks(length).filter(|piece| piece.len() > 1).map(<[u32]>::to_vec))
            .collect();
        pieces.sort();
        expected.sort();
        prop_assert_eq!(pieces, expected);
        for n in 0..corpus.len() {
            let len: usize = corpus.lengths(n).sum();
            prop_assert!(len <= length && len == corpus.sequence(n).len());
        }
        // Best fit leaves at most one sequence that is no more than half full.
        let half = (0..corpus.len()).filter(|&n| corpus.sequence(n).len() * 2 <= length).count();
        prop_assert!(half <= 1, "{half} sequences could be joined");
    }

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
