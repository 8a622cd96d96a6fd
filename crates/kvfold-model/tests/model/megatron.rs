//! Megatron-LM's checkpoints: put together from their ranks, they compute what an independent implementation does.

use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::ops::{Precision, Spans};
use kvfold_kernels::{FastCpu, Reference};
use kvfold_model::attend::{Folding, Mode};
use kvfold_model::import::{Imported, megatron};
use kvfold_model::{Checkpoint, Loaded};
use kvfold_tensor::DType;
use safetensors::SafeTensors;
use std::fs;
use std::path::{Path, PathBuf};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

fn tokenizer() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories260k")
}

fn import(path: &Path, dtype: Option<DType>) -> Result<Imported, String> {
    megatron(path, &tokenizer(), dtype).map_err(|error| error.to_string())
}

#[test]
fn two_ranks_of_a_dmc_model_compute_the_golden_logits() {
    let bytes = fs::read(goldens().join("megatron.safetensors")).expect("a golden");
    let file = SafeTensors::deserialize(&bytes).expect("a golden");
    let integers = |name: &str| -> Vec<usize> {
        let data = file.tensor(name).expect("a tensor").data();
        data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as usize).collect()
    };
    let want: Vec<f32> = file
        .tensor("logits")
        .expect("a tensor")
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")))
        .collect();
    let ids: Vec<u32> = integers("tokens").into_iter().map(|id| id as u32).collect();

    let imported = import(&goldens().join("megatron"), None).expect("a checkpoint");
    assert_eq!((imported.dtype, imported.files.len()), (DType::BF16, 2));
    let compression = imported.checkpoint.config.compression.clone().expect("a DMC model");
    let decision = Decision::Borrowed { scale: 1.0, offset: 5.0 };
    let pool_window = Some(12);
    let settings =
        Dmc { method: Method::Dmc, decision, delay: 0, sinks: 0, pool_window, log_mass: false, share: Share::Head };
    assert_eq!((compression.dmc, compression.ratio, compression.trained_length), (settings.clone(), 4.0, 64));
    assert_eq!(imported.checkpoint.config.eos_token_ids, [2], "from the tokenizer's configuration");

    let spans = Spans::of_lengths(&[ids.len()]);
    let exact = Loaded::with_precision(Reference::<f64>::reference(), &imported.checkpoint, Precision::F32);
    let mut folding = Folding::new(&settings, Mode::Hard);
    let logits = exact.pass(&spans).forward(&exact.weights, &ids, &mut folding);
    let worst = |got: &mut dyn Iterator<Item = f64>| {
        let error = |(g, w): (f64, &f32)| (g - f64::from(*w)).abs() / f64::from(w.abs()).max(1.0);
        got.zip(&want).map(error).fold(0.0, f64::max)
    };
    assert_eq!(logits.data().len(), want.len());
    let error = worst(&mut logits.data().iter().copied());
    assert!(error < 1e-6, "off by {error}");
    let slots: Vec<usize> = folding
        .rates
        .iter()
        .flat_map(|rates| rates.data().to_vec())
        .map(|rate| (ids.len() as f64 * (1.0 - rate)).round() as usize)
        .collect();
    assert_eq!(slots, integers("slots"));

    let fast = Loaded::with_precision(FastCpu::new(), &imported.checkpoint, Precision::F32);
    let logits = fast.pass(&spans).forward(&fast.weights, &ids, &mut Folding::new(&settings, Mode::Hard));
    let error = worst(&mut logits.data().iter().map(|&x| f64::from(x)));
    assert!(error < 1e-4, "f32 is off by {error}");
}

#[test]
fn what_is_imported_can_be_saved_and_opened() {
    let dir = tempfile::tempdir().expect("a directory");
    let imported = import(&goldens().join("megatron/iter_0000100"), Some(DType::F32)).expect("a checkpoint");
    let out = dir.path().join("model");
    imported.checkpoint.save(&out, &[]).expect("a model");
    let opened = Checkpoint::open(&out.display().to_string()).expect("the same model");
    assert_eq!(
        (opened.config.compression, opened.tensors),
        (imported.checkpoint.config.compression, imported.checkpoint.tensors)
    );
}

#[test]
fn checkpoints_that_are_not_whole_say_what_is_missing() {
    let says = |path: &Path, parts: &[&str]| {
        let message = import(path, None).expect_err("a refusal");
        for part in parts {
            assert!(message.contains(part), "expected {part:?} in: {message}");
        }
    };
    let rank = goldens().join("megatron/iter_0000100/mp_rank_00/model_optim_rng.pt");
    says(&rank, &["args.tensor_model_parallel_size", "is 2", "mp_rank_00"]);
    let dir = tempfile::tempdir().expect("a directory");
    says(dir.path(), &["mp_rank_00", "model_optim_rng.pt"]);
    fs::create_dir(dir.path().join("mp_rank_00_000")).expect("a directory");
    says(dir.path(), &["pipeline"]);
    says(&goldens().join("stories260k_greedy.json"), &["stories260k_greedy.json"]);
    let message = megatron(&goldens().join("megatron"), dir.path(), None).expect_err("no tokenizer").to_string();
    assert!(message.contains("tokenizer.json") && message.contains("--tokenizer"), "{message}");
}
