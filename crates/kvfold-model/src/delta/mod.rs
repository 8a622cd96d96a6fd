//! A retrofitted model as what it changed of its base.
//!
//! A delta is one safetensors file. It holds the tensors that differ, as differences or as new values, whichever comes
//! closer at the precision asked for, and in its metadata the new configuration and the digest of the base's tensors.
//! Opening it reads the base, applies the delta by name and gives the whole model; another base is refused.
//!
//! ```text
//! metadata "kvfold_delta": { "version": 1, "base": "...", "base_digest": "...", "config": "...",
//!                            "tensors": { NAME: { "holds": "difference" | "value", "dtype": "F32" } } }
//! NAME            F32, F16 or BF16, in the tensor's shape; or I8, with
//! NAME.scales     BF16, one for 64 numbers in row-major order (see `int8.rs`)
//! ```
//!
//! Vectors and tensors that the base lacks (decision heads) are small and stored as they are. Of merged KV heads (GQA) the
//! new values are stored, since there is nothing of their shape to differ from.

mod int8;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;

use bytemuck::{cast_slice, pod_collect_to_vec};
use half::bf16;
use kvfold_tensor::{DType, HostTensor, atomic};
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView, View};
use serde::{Deserialize, Serialize};

use crate::error::{ModelError, Result};
use crate::{Checkpoint, Config, digest};

/// The file of a delta that is a directory.
pub const FILE: &str = "delta.safetensors";

const METADATA: &str = "kvfold_delta";
const VERSION: u64 = 1;

/// How precisely matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits, 11 of them precision.
    F16,
    /// 16 bits, 8 of them precision.
    Bf16,
    /// 8.25 bits: blocks of 64 share a scale.
    Int8,
}

/// What a written delta is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Written {
    /// Bytes of the file.
    pub bytes: u64,
    /// Tensors that differ from the base's.
    pub tensors: usize,
    /// Norm of what the delta gets wrong over the norm of the change.
    pub relative_error: f64,
    /// The largest error of a weight.
    pub largest_error: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    version: u64,
    base: String,
    base_digest: String,
    config: String,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Holds {
    Difference,
    Value,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    holds: Holds,
    /// The dtype of the whole tensor.
    dtype: String,
}

/// A tensor as it stands in the file.
#[derive(Debug)]
enum Stored {
    Float(HostTensor),
    Int8 { shape: Vec<usize>, quantised: int8::Quantised },
}

impl Stored {
    fn new(shape: &[usize], values: &[f32], precision: Precision) -> Self {
        let float = |dtype| Stored::Float(HostTensor::from_f32(shape, values).to_dtype(dtype));
        match precision {
            Precision::F32 => float(DType::F32),
            Precision::F16 => float(DType::F16),
            Precision::Bf16 => float(DType::BF16),
            Precision::Int8 => Stored::Int8 { shape: shape.to_vec(), quantised: int8::quantise(values) },
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Stored::Float(tensor) => tensor.shape(),
            Stored::Int8 { shape, .. } => shape,
        }
    }

    fn values(&self) -> Vec<f32> {
        match self {
            Stored::Float(tensor) => tensor.to_f32(),
            Stored::Int8 { quantised, .. } => int8::dequantise(&quantised.numbers, &quantised.scales),
        }
    }

    /// The whole tensor.
    fn resolve(&self, base: Option<&HostTensor>, holds: Holds, dtype: DType) -> HostTensor {
        match (self, holds, base) {
            (Stored::Float(tensor), Holds::Value, _) => tensor.to_dtype(dtype),
            (_, Holds::Difference, Some(base)) => {
                let sums: Vec<f32> = base.to_f32().iter().zip(self.values()).map(|(base, d)| base + d).collect();
                HostTensor::from_f32(self.shape(), &sums).to_dtype(dtype)
            }
            _ => HostTensor::from_f32(self.shape(), &self.values()).to_dtype(dtype),
        }
    }
}

/// Writes what `model` changed of `base` to a file.
pub fn write(path: &Path, model: &Checkpoint, base: &Checkpoint, precision: Precision) -> Result<Written> {
    let file = path.display().to_string();
    let wrong = |reason: String| ModelError::Delta { file: file.clone(), reason };
    if model.tokenizer.json() != base.tokenizer.json() {
        return Err(wrong(format!(
            "{} and {} have different tokenizers; name the right --base",
            model.source, base.source
        )));
    }
    let (mut stored, mut entries) = (BTreeMap::new(), BTreeMap::new());
    let (mut missed, mut changed, mut largest_error) = (0.0, 0.0, 0f64);
    for (name, tensor) in &model.tensors {
        let before = base.tensors.get(name);
        if before == Some(tensor) {
            continue;
        }
        let merged = before.is_some_and(|before| before.shape() != tensor.shape());
        if merged && !before.is_some_and(|before| merges_heads((base, before), (model, tensor))) {
            return Err(wrong(format!("tensor `{name}` has another shape in {}; name the right --base", base.source)));
        }
        // Of heads that were merged there is no difference to take.
        let before = before.filter(|_| !merged);
        let (holds, kept) = match before {
            Some(before) if tensor.shape().len() > 1 => closest(before, tensor, precision),
            None if merged && tensor.shape().len() > 1 => {
                (Holds::Value, Stored::new(tensor.shape(), &tensor.to_f32(), precision))
            }
            _ => (Holds::Value, Stored::Float(tensor.clone())),
        };
        let decoded = kept.resolve(before, holds, tensor.dtype());
        let (error, largest) = distance(&decoded, tensor);
        if !error.is_finite() {
            return Err(wrong(format!("tensor `{name}` does not fit; choose another --dtype")));
        }
        missed += error;
        largest_error = largest_error.max(largest);
        changed += before.map_or_else(
            || distance(tensor, &HostTensor::zeros(DType::F32, tensor.shape())).0,
            |before| distance(before, tensor).0,
        );
        entries.insert(name.clone(), Entry { holds, dtype: tensor.dtype().name().to_owned() });
        stored.insert(name.clone(), kept);
    }
    let header = Header {
        version: VERSION,
        base: base.source.clone(),
        base_digest: digest::of_tensors(&base.tensors),
        config: model.config.to_json(),
        tensors: entries,
    };
    let header = serde_json::to_string(&header).map_err(|error| wrong(error.to_string()))?;
    let views = stored.iter().flat_map(|(name, stored)| stored.views(name)).collect::<Vec<_>>();
    atomic::write_named(path, |temporary| {
        let metadata = HashMap::from([(METADATA.to_owned(), header)]);
        safetensors::serialize_to_file(views, Some(metadata), temporary).map_err(|error| match error {
            SafeTensorError::IoError(error) => error,
            error => io::Error::other(error),
        })
    })
    .map_err(|source| ModelError::Io { file: file.clone(), action: "write", source })?;
    let bytes =
        std::fs::metadata(path).map_err(|source| ModelError::Io { file: file.clone(), action: "read", source })?;
    Ok(Written {
        bytes: bytes.len(),
        tensors: stored.len(),
        relative_error: if changed > 0.0 { (missed / changed).sqrt() } else { 0.0 },
        largest_error,
    })
}

/// Whether a tensor has its rows for fewer KV heads than before, as in a model whose heads were merged (GQA).
fn merges_heads((base, before): (&Checkpoint, &HostTensor), (model, after): (&Checkpoint, &HostTensor)) -> bool {
    let (all, left) = (base.config.num_key_value_heads, model.config.num_key_value_heads);
    let [(rows, columns), (fewer, same)] = [before, after].map(|tensor| tensor.shape().split_at(1));
    left < all && columns == same && rows[0] * left == fewer[0] * all
}

/// Difference or value, whichever comes closer.
fn closest(before: &HostTensor, tensor: &HostTensor, precision: Precision) -> (Holds, Stored) {
    let values = tensor.to_f32();
    let difference: Vec<f32> = values.iter().zip(before.to_f32()).map(|(new, old)| new - old).collect();
    let candidates = [(Holds::Value, values), (Holds::Difference, difference)];
    let [value, difference] = candidates.map(|(holds, numbers)| {
        let stored = Stored::new(tensor.shape(), &numbers, precision);
        let error = distance(&stored.resolve(Some(before), holds, tensor.dtype()), tensor).0;
        (error, (holds, stored))
    });
    // An error that is no number loses.
    if value.0 <= difference.0 || difference.0.is_nan() { value.1 } else { difference.1 }
}

/// The sum of squared differences, and the largest.
fn distance(a: &HostTensor, b: &HostTensor) -> (f64, f64) {
    let apart = a.to_f32().into_iter().zip(b.to_f32()).map(|(a, b)| (f64::from(a) - f64::from(b)).abs());
    apart.fold((0.0, 0.0), |(sum, largest), d| (sum + d * d, if d > largest { d } else { largest }))
}

/// Opens a delta on the base it names, or on `base`.
pub fn open(path: &Path, base: Option<&Checkpoint>) -> Result<Checkpoint> {
    let path = if path.is_dir() { path.join(FILE) } else { path.to_path_buf() };
    let file = path.display().to_string();
    let wrong = |reason: String| ModelError::Delta { file: file.clone(), reason };
    let bytes = std::fs::read(&path).map_err(|source| ModelError::Io { file: file.clone(), action: "read", source })?;
    let damaged = |error: SafeTensorError| wrong(format!("is no delta that can be read: {error}"));
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(damaged)?;
    let header = metadata.metadata().as_ref().and_then(|metadata| metadata.get(METADATA));
    let Some(header) = header else {
        return Err(wrong("is no delta: `kvfold export --delta` writes one".into()));
    };
    let version: serde_json::Value = serde_json::from_str(header).map_err(|error| wrong(error.to_string()))?;
    if version["version"] != VERSION {
        let found = &version["version"];
        return Err(wrong(format!("is of version {found}; this build reads {VERSION}: use the kvfold that wrote it")));
    }
    let header: Header = serde_json::from_str(header).map_err(|error| wrong(error.to_string()))?;

    let named;
    let base = match base {
        Some(base) => base,
        None => {
            named = open_base(&header.base, &path).map_err(|error| {
                wrong(format!("its base model cannot be opened ({error}); name it: --model BASE --delta {file}"))
            })?;
            &named
        }
    };
    let found = digest::of_tensors(&base.tensors);
    if found != header.base_digest {
        return Err(ModelError::OtherBase {
            file,
            base: header.base,
            wanted: header.base_digest,
            given: base.source.clone(),
            found,
        });
    }

    let mut model = base.clone();
    model.config = Config::parse(header.config.as_bytes(), &format!("{file}: config"))?;
    model.source = file.clone();
    for (name, Entry { holds, dtype }) in header.tensors {
        let bad = |reason: &str| wrong(format!("tensor `{name}` {reason}"));
        let dtype =
            DType::ALL.into_iter().find(|known| known.name() == dtype).ok_or_else(|| bad("has no known dtype"))?;
        let stored = read(&tensors, &name).ok_or_else(|| bad("is missing or not what was written"))?;
        let before = base.tensors.get(&name);
        if holds == Holds::Difference && before.is_none_or(|before| before.shape() != stored.shape()) {
            return Err(bad("is a difference, and the base has no tensor of its shape"));
        }
        model.tensors.insert(name, stored.resolve(before, holds, dtype));
    }
    model.check(&file)?;
    Ok(model)
}

/// The base model by its name; a path that leads nowhere from here may do so from beside the delta.
fn open_base(name: &str, delta: &Path) -> Result<Checkpoint> {
    let beside = atomic::parent(delta).join(name);
    match Checkpoint::open_whole(name) {
        Err(ModelError::NoModel { .. }) if beside.is_dir() => Checkpoint::open_whole(&beside.display().to_string()),
        result => result,
    }
}

/// A tensor of the file, if it is whole and of a kind that is written.
fn read(tensors: &SafeTensors<'_>, name: &str) -> Option<Stored> {
    let view = tensors.tensor(name).ok()?;
    let float = |view: &TensorView<'_>, dtype| {
        let mut tensor = HostTensor::zeros(dtype, view.shape());
        tensor.bytes_mut().copy_from_slice(view.data());
        tensor
    };
    match view.dtype() {
        Dtype::I8 => {
            let scales = tensors.tensor(&scales_of(name)).ok()?;
            let numbers: Vec<i8> = cast_slice(view.data()).to_vec();
            let fits = scales.dtype() == Dtype::BF16 && scales.shape() == [numbers.len().div_ceil(int8::BLOCK)];
            let scales: Vec<bf16> = pod_collect_to_vec(scales.data());
            fits.then(|| Stored::Int8 { shape: view.shape().to_vec(), quantised: int8::Quantised { numbers, scales } })
        }
        dtype => DType::ALL
            .into_iter()
            .find(|ours| format!("{dtype:?}") == ours.name())
            .map(|ours| Stored::Float(float(&view, ours))),
    }
}

fn scales_of(name: &str) -> String {
    format!("{name}.scales")
}

/// Bytes for the file.
struct Raw<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: &'a [u8],
}

impl Stored {
    fn views(&self, name: &str) -> Vec<(String, Raw<'_>)> {
        match self {
            Stored::Float(tensor) => {
                let dtype = match tensor.dtype() {
                    DType::F64 => Dtype::F64,
                    DType::F32 => Dtype::F32,
                    DType::F16 => Dtype::F16,
                    DType::BF16 => Dtype::BF16,
                };
                vec![(name.to_owned(), Raw { dtype, shape: tensor.shape().to_vec(), bytes: tensor.bytes() })]
            }
            Stored::Int8 { shape, quantised: int8::Quantised { numbers, scales } } => vec![
                (name.to_owned(), Raw { dtype: Dtype::I8, shape: shape.clone(), bytes: cast_slice(numbers) }),
                (scales_of(name), Raw { dtype: Dtype::BF16, shape: vec![scales.len()], bytes: cast_slice(scales) }),
            ],
        }
    }
}

impl View for Raw<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes.into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
