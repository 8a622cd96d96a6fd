//! Sessions in files: they go on with the same bytes, or say what is wrong.

use crate::common::{Case, Rng};
use crate::prefixes::{LIMITS, cases, engine, greedy, rest, run};
use kvfold_engine::{Batcher, Engine, PrefixSettings, Session, SessionError};
use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::Dmc;
use kvfold_kernels::paged::CacheDType;
use kvfold_model::digest::of_tensors;
use kvfold_tensor::{DType, HostTensor};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// A text of 60 tokens, saved after 41 of them.
fn saved(case: &(Case, bool), dtype: CacheDType) -> (tempfile::TempDir, PathBuf, Engine<FastCpu>, Vec<u32>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("text.kv");
    let text = Rng::new(case.0.seed).tokens(60, case.0.shape.vocab);
    let mut engine = engine(case, dtype);
    let mut sequence = engine.sequence();
    engine.logits(&mut sequence, &text[..41]).expect("room");
    engine.save(&sequence, &text[..41], "a note", &path).expect("a file");
    (dir, path, engine, text)
}

#[test]
fn a_session_goes_on_with_the_same_bytes() {
    for (case, dtype) in cases().into_iter().flat_map(|case| CacheDType::ALL.map(|dtype| (case.clone(), dtype))) {
        let (_dir, path, mut engine, text) = saved(&case, dtype);
        let mut whole = engine.sequence();
        engine.logits(&mut whole, &text[..41]).expect("room");
        let (held, usage) = (whole.held(), engine.usage(&whole));
        let wanted = rest(&mut engine, &mut whole, &text, 7);
        // Pages that another text has filled and left.
        drop(whole);
        // Another process would have another engine.
        for engine in [&mut engine, &mut self::engine(&case, dtype)] {
            let Session { tokens, mut sequence, note } = engine.load(&path).expect("a session");
            assert_eq!((&tokens[..], &note[..]), (&text[..41], "a note"));
            assert_eq!((sequence.held(), engine.usage(&sequence)), (held.clone(), usage), "{case:?}");
            // What is saved again is the same file.
            let again = path.with_extension("again");
            engine.save(&sequence, &tokens, &note, &again).expect("a file");
            assert_eq!(fs::read(&path).unwrap(), fs::read(&again).unwrap(), "{case:?}");
            assert_eq!(rest(engine, &mut sequence, &text, 1), wanted, "{dtype:?}, {case:?}");
            drop(sequence);
            assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0), "{case:?}");
        }
    }
}

#[test]
fn requests_begin_where_a_session_ends() {
    for case in cases() {
        let (_dir, path, mut engine, text) = saved(&case, CacheDType::Bf16);
        let missed = run(&mut Batcher::new(&mut engine, LIMITS, 1.0), &[greedy(text.clone(), 5)]).remove(0);
        let mut batcher = Batcher::new(&mut engine, LIMITS, 1.0).with_prefixes(PrefixSettings::default());
        let Session { tokens, sequence, .. } = batcher.engine_mut().load(&path).expect("a session");
        batcher.engine_mut().keep_prefix(&tokens, sequence);
        let hit = run(&mut batcher, &[greedy(text, 5)]).remove(0);
        assert_eq!((&hit.0, &hit.1, &hit.2, hit.3), (&missed.0, &missed.1, &missed.2, 41), "{case:?}");
    }
}

#[test]
fn a_file_has_nothing_of_texts_that_held_its_pages_before() {
    for case in cases() {
        let (_dir, path, mut engine, text) = saved(&case, CacheDType::F32);
        let fresh = fs::read(&path).unwrap();
        let other = Rng::new(99).tokens(150, case.0.shape.vocab);
        for _ in 0..2 {
            engine.logits(&mut engine.sequence(), &other).expect("room");
            let mut sequence = engine.sequence();
            engine.logits(&mut sequence, &text[..41]).expect("room");
            engine.save(&sequence, &text[..41], "a note", &path).expect("a file");
            assert!(fs::read(&path).unwrap() == fresh, "{case:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let case = &cases()[1];
    let (_dir, path, mut engine, text) = saved(case, CacheDType::Bf16);
    let refused = |engine: &mut Engine<FastCpu>, field: &str| {
        let error = engine.load(&path).expect_err(field);
        let text = error.to_string();
        assert!(text.contains("text.kv") && text.contains(field), "{field}: {text}");
        assert_eq!(engine.pool().pages_held(), 0, "{field}");
        error
    };
    let mismatch = |error| assert!(matches!(error, SessionError::Mismatch { .. }), "{error}");
    mismatch(refused(&mut self::engine(case, CacheDType::Int8), "`cache`"));
    let other = |change: &dyn Fn(&mut Case)| {
        let mut case = case.0.clone();
        change(&mut case);
        self::engine(&(case, true), CacheDType::Bf16)
    };
    mismatch(refused(&mut other(&|case| case.seed += 100), "`model`"));
    mismatch(refused(&mut other(&|case| case.shape.norm_eps = 1e-6), "`model`"));
    mismatch(refused(&mut other(&|case| case.dmc = Dmc { delay: 6, ..case.dmc.clone() }), "`model`"));
    mismatch(refused(&mut self::engine(&(case.0.clone(), false), CacheDType::Bf16), "`rule`"));
    let small = self::engine(case, CacheDType::Bf16).with_page_limit(3);
    assert!(matches!(refused(&mut { small }, "allow more memory"), SessionError::Cache { .. }));
    assert!(matches!(engine.save(&engine.sequence(), &text[..41], "", &path), Err(SessionError::Tokens { .. })));
    assert!(matches!(engine.load(&path.with_extension("none")), Err(SessionError::File(_))));

    // Tensors and metadata of a file's own making.
    let file = kvfold_tensor::read(&path).expect("a safetensors file");
    let header = file.metadata["kvfold"].clone();
    let mut with = |field: &str, tensors, header: Option<String>| {
        let metadata = header.map(|header| ("kvfold".to_owned(), header));
        kvfold_tensor::write(&path, &tensors, &metadata.into_iter().collect()).expect("a file");
        refused(&mut engine, field)
    };
    assert!(matches!(with("no saved session", file.tensors.clone(), None), SessionError::NotASession { .. }));
    let older = header.replace("\"version\":2", "\"version\":1");
    assert!(matches!(with("`version` is 1", file.tensors.clone(), Some(older)), SessionError::Version { .. }));
    let unknown = header.replace("\"version\":2", "\"version\":2,\"more\":1");
    assert!(matches!(with("more", file.tensors.clone(), Some(unknown)), SessionError::Field { .. }));
    assert!(matches!(with("kvfold", file.tensors.clone(), Some("{}".into())), SessionError::Field { .. }));
    let mut changed = file.tensors.clone();
    changed.get_mut("pages").expect("pages").bytes_mut()[70] ^= 1;
    assert!(matches!(with("digest", changed, Some(header.clone())), SessionError::Damaged { .. }));
    // With a digest that was made to fit, what is not possible is still found.
    let digest = of_tensors(&file.tensors);
    let mut forged = |field: &str, change: &dyn Fn(&mut BTreeMap<String, HostTensor>)| {
        let mut tensors = file.tensors.clone();
        change(&mut tensors);
        let header = header.replace(&digest, &of_tensors(&tensors));
        assert!(matches!(with(field, tensors, Some(header)), SessionError::Field { .. }), "{field}");
    };
    for name in ["tokens", "slots", "ahead", "pages", "rings", "states"] {
        forged(name, &|tensors| drop(tensors.remove(name)));
        forged(name, &|tensors| drop(tensors.insert(name.into(), HostTensor::zeros(DType::F16, [3]))));
        if name == "tokens" {
            continue;
        }
        forged(name, &|tensors| {
            let half = tensors[name].to_f64();
            let dtype = tensors[name].dtype();
            let half = HostTensor::from_f64([half.len() / 2], &half[..half.len() / 2]).to_dtype(dtype);
            tensors.insert(name.into(), half);
        });
    }
    for bad in [-1.0, 0.5, 37.0, 1e300, f64::NAN, f64::INFINITY] {
        forged("tokens", &|tensors| drop(tensors.insert("tokens".into(), HostTensor::from_f64([41], &[bad; 41]))));
        forged("slots", &|tensors| drop(tensors.insert("slots".into(), HostTensor::from_f64([2, 2], &[bad; 4]))));
    }
    let long = HostTensor::from_f64([161], &[1.0; 161]);
    forged("tokens", &|tensors| drop(tensors.insert("tokens".into(), long.clone())));
}

#[test]
fn no_bytes_make_it_panic() {
    let case = &cases()[2];
    let (_dir, path, mut engine, _) = saved(case, CacheDType::Int8);
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for len in (0..whole.len()).step_by(97).chain(0..20).chain(header - 2..header + 2).chain([whole.len() - 1]) {
        fs::write(&path, &whole[..len]).unwrap();
        let error = engine.load(&path).expect_err("a part of a file").to_string();
        assert!(error.contains("text.kv"), "{len}: {error}");
    }
    let mut rng = Rng::new(5);
    for n in 0..header + 200 {
        let mut bytes = whole.clone();
        bytes[if n < header { n } else { rng.within(header..whole.len()) }] ^= 1 << rng.within(0..8);
        fs::write(&path, &bytes).unwrap();
        // A flipped bit of the header may leave it as it was, in the case of a letter or in white space.
        if let Err(error) = engine.load(&path) {
            assert!(error.to_string().contains("text.kv"), "{n}: {error}");
        } else {
            assert!(n < header, "a flipped bit in the tensors, which have a digest");
        }
    }
    assert_eq!((engine.pool().pages_held(), engine.pool().states_held()), (0, 0));
}
