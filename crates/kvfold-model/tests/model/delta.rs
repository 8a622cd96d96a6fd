//! Models as what they changed of their bases.

use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::noise::{hash, unit};
use kvfold_model::delta::{self, Precision};
use kvfold_model::shape::Shape;
use kvfold_model::weights::Weights;
use kvfold_model::{Checkpoint, Compression, ModelError};
use kvfold_tensor::{DType, HostTensor};
use std::path::Path;

const ALL: [Precision; 4] = [Precision::F32, Precision::F16, Precision::Bf16, Precision::Int8];

fn base() -> Checkpoint {
    Checkpoint::open("stories260k").unwrap()
}

/// `base` with attention weights that moved by about `by`, and decision heads.
fn retrofitted(base: &Checkpoint, by: f32) -> Checkpoint {
    let compression = Compression {
        dmc: Dmc {
            method: Method::Dmc,
            decision: Decision::Head { scale: 4.0, offset: 3.0, bias: false, ahead: false },
            delay: 32,
            sinks: 1,
            pool_window: None,
            log_mass: false,
            share: Share::Head,
        },
        ratio: 4.0,
        trained_length: 512,
        base_model: base.source.clone(),
    };
    let config = base.config.with_compression(compression).unwrap();
    let random = |name: &str, i: usize| 2.0 * unit(hash(&[name.len() as u64, i as u64])) as f32 - 1.0;
    let tensors = Weights::<()>::expected(&Shape::of(&config)).into_iter().map(|(name, dims)| {
        let Some(before) = base.tensors.get(&name) else {
            let len = dims.iter().product();
            let values: Vec<f32> = (0..len).map(|i| random(&name, i)).collect();
            return (name, HostTensor::from_f32(dims, &values));
        };
        let moves = name.contains("self_attn") || name == "model.norm.weight";
        let values: Vec<f32> = before.to_f32().iter().enumerate().map(|(i, x)| x + by * random(&name, i)).collect();
        let after = if moves { HostTensor::from_f32(dims, &values).to_dtype(before.dtype()) } else { before.clone() };
        (name, after)
    });
    Checkpoint { tensors: tensors.collect(), config, source: "retrofitted".into(), ..base.clone() }
}

fn in_dtype(model: &Checkpoint, dtype: DType) -> Checkpoint {
    let tensors = model.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.to_dtype(dtype)));
    Checkpoint { tensors: tensors.collect(), ..model.clone() }
}

#[test]
fn a_delta_is_the_model_again_up_to_its_precision() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.safetensors");
    let base = base();
    let model = retrofitted(&base, 0.01);
    let all: usize = model.tensors.values().map(|tensor| tensor.bytes().len()).sum();
    let mut sizes = Vec::new();
    for precision in ALL {
        let written = delta::write(&path, &model, &base, precision).unwrap();
        // Differences of 0.01 at most: half a step of 1 / 127, or of the type's last bit.
        let limit = match precision {
            Precision::F32 => 1e-7,
            Precision::F16 => 1e-5,
            Precision::Bf16 => 4e-5,
            Precision::Int8 => 5e-5,
        };
        assert!(written.largest_error <= limit, "{precision:?} {written:?}");
        assert!(written.relative_error <= 0.006 && (written.relative_error > 0.0 || precision == Precision::F32));
        assert_eq!(written.bytes, std::fs::metadata(&path).unwrap().len());
        sizes.push(written.bytes);

        let again = delta::open(&path, Some(&base)).unwrap();
        assert_eq!((&again.config, again.tokenizer.json()), (&model.config, model.tokenizer.json()));
        assert_eq!(again.tensors.len(), model.tensors.len());
        let mut largest = 0f32;
        for (name, tensor) in &model.tensors {
            let found = &again.tensors[name];
            assert_eq!((found.dtype(), found.shape()), (tensor.dtype(), tensor.shape()));
            for (a, b) in found.to_f32().iter().zip(tensor.to_f32()) {
                largest = largest.max((a - b).abs());
            }
            if name.contains("decide") || name.contains("norm") || name.contains("mlp") {
                assert_eq!(found, tensor, "{name} is exact");
            }
        }
        assert_eq!(f64::from(largest), written.largest_error, "what is reported is what is read");
        // Written twice, it is the same file.
        let first = std::fs::read(&path).unwrap();
        delta::write(&path, &model, &base, precision).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first);
    }
    assert!(
        sizes[0] < all as u64 && sizes[1].abs_diff(sizes[2]) < 64 && sizes[3] < sizes[2] && sizes[2] < sizes[0],
        "{sizes:?}"
    );
}

#[test]
fn values_are_stored_where_they_come_closer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.safetensors");
    // A base in bf16 gives a model in bf16, of which the new values are exact and the differences are not.
    let base = in_dtype(&base(), DType::BF16);
    let model = retrofitted(&base, 0.3);
    let written = delta::write(&path, &model, &base, Precision::Bf16).unwrap();
    assert_eq!((written.relative_error, written.largest_error), (0.0, 0.0));
    assert_eq!(delta::open(&path, Some(&base)).unwrap().tensors, model.tensors);
}

/// `base` with `kv_heads` KV heads, whose keys and values are the first rows of its own.
fn merged(base: &Checkpoint, kv_heads: usize) -> Checkpoint {
    let config = base.config.with_kv_heads(kv_heads).unwrap();
    let tensors = Weights::<()>::expected(&Shape::of(&config)).into_iter().map(|(name, dims)| {
        let before = &base.tensors[&name];
        let values = &before.to_f32()[..dims.iter().product()];
        (name, HostTensor::from_f32(dims, values).to_dtype(before.dtype()))
    });
    Checkpoint { tensors: tensors.collect(), config, source: "merged".into(), ..base.clone() }
}

#[test]
fn a_model_with_merged_heads_has_a_delta_of_its_keys_and_values() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.safetensors");
    let base = base();
    let model = merged(&base, 2);
    let mut sizes = Vec::new();
    for precision in ALL {
        let written = delta::write(&path, &model, &base, precision).unwrap();
        assert_eq!(written.tensors, 2 * base.config.num_hidden_layers);
        let limit = match precision {
            Precision::F32 => 0.0,
            Precision::F16 => 1e-3,
            Precision::Bf16 | Precision::Int8 => 1e-2,
        };
        assert!(written.relative_error <= limit, "{precision:?} {written:?}");
        assert!(written.relative_error > 0.0 || precision == Precision::F32);
        sizes.push(written.bytes);
        let again = delta::open(&path, Some(&base)).unwrap();
        assert_eq!(again.config, model.config);
        for (name, tensor) in &model.tensors {
            let found = &again.tensors[name];
            assert_eq!((found.dtype(), found.shape()), (tensor.dtype(), tensor.shape()));
            assert!(found == tensor || precision != Precision::F32 && tensor.shape() != base.tensors[name].shape());
        }
    }
    assert!(sizes[0] > sizes[1] && sizes[2] > sizes[3], "{sizes:?}");

    // More heads than the base has are no merged ones.
    let error = delta::write(&path, &base, &model, Precision::F32).unwrap_err().to_string();
    assert!(error.contains("another shape in merged") && error.contains("--base"), "{error}");
}

#[test]
fn another_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.safetensors");
    let base = base();
    delta::write(&path, &retrofitted(&base, 0.01), &base, Precision::Int8).unwrap();
    let mut other = base.clone();
    let (name, tensor) = other.tensors.pop_last().unwrap();
    let mut values = tensor.to_f32();
    values[0] += 1e-3;
    other.tensors.insert(name, HostTensor::from_f32(tensor.shape(), &values));
    for other in [other, in_dtype(&base, DType::F16)] {
        let error = delta::open(&path, Some(&other)).unwrap_err();
        assert!(matches!(error, ModelError::OtherBase { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("made over stories260k") && text.contains("another base"), "{text}");
    }
}

#[test]
fn a_delta_opens_like_a_model_wherever_its_base_is() {
    let dir = tempfile::tempdir().unwrap();
    let name = |path: &Path| path.display().to_string();
    let base = base();
    let file = dir.path().join("d.safetensors");
    let model = retrofitted(&base, 0.01);
    delta::write(&file, &model, &base, Precision::F32).unwrap();
    assert_eq!(Checkpoint::open(&name(&file)).unwrap().config, model.config);

    // A directory beside the delta, which is a directory itself.
    base.save(&dir.path().join("base"), &[]).unwrap();
    let home = dir.path().join("home");
    std::fs::create_dir(&home).unwrap();
    let beside = Checkpoint { source: "../base".into(), ..base.clone() };
    delta::write(&home.join(delta::FILE), &model, &beside, Precision::F32).unwrap();
    let opened = Checkpoint::open(&name(&home)).unwrap();
    assert_eq!((opened.config, opened.tensors.len()), (model.config.clone(), model.tensors.len()));
    std::fs::remove_dir_all(dir.path().join("base")).unwrap();
    let error = Checkpoint::open(&name(&home)).unwrap_err().to_string();
    assert!(error.contains("base model cannot be opened") && error.contains("--delta"), "{error}");
    Checkpoint::open_delta("stories260k", &home).unwrap();

    // What a delta is over is whole, so a delta over itself ends.
    let own = dir.path().join("own.safetensors");
    let itself = Checkpoint { source: name(&own), ..base };
    delta::write(&own, &model, &itself, Precision::F32).unwrap();
    assert!(matches!(Checkpoint::open(&name(&own)), Err(ModelError::Delta { .. })));
}

#[test]
fn damage_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.safetensors");
    let base = base();
    delta::write(&path, &retrofitted(&base, 0.01), &base, Precision::Int8).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for len in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(delta::open(&path, Some(&base)), Err(ModelError::Delta { .. })), "{len} bytes");
    }
    let with = |from: &str, to: &str| {
        let text = latin1(&whole).replacen(from, to, 1);
        assert_eq!(text.chars().count(), whole.len(), "headers have a length");
        std::fs::write(&path, text.chars().map(|c| c as u8).collect::<Vec<_>>()).unwrap();
        delta::open(&path, Some(&base)).unwrap_err().to_string()
    };
    assert!(with(r#"{\"version\":1"#, r#"{\"version\":7"#).contains("is of version 7"));
    assert!(
        with(r#"q_proj.weight.scales":{"dtype":"BF16"#, r#"q_proj.weight.scaled":{"dtype":"BF16"#).contains("q_proj")
    );
    assert!(with("kvfold_delta", "other_delta!").contains("is no delta"));
    // A plain model's file is none either.
    let plain = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories260k/model.safetensors");
    assert!(delta::open(&plain, Some(&base)).unwrap_err().to_string().contains("is no delta"));
}

/// Bytes as characters of the same number, so that a header can be searched.
fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|&b| char::from(b)).collect()
}
