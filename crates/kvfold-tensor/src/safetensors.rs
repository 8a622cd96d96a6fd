//! Safetensors files, by the `safetensors` crate: it parses and checks the header, and it lays out what is written.
//!
//! Two things are done here around it. A file is read header first and then tensor by tensor, each straight into
//! [`AlignedBytes`](crate::AlignedBytes), so that a model is in memory once; the crate's own reader wants the whole file in
//! memory beside them, or an `unsafe` map that can change under it. And the few bytes before the header are judged before
//! memory is taken, with sums that cannot overflow, so that a cut-off download is told from a damaged file.
//!
//! A tensor of a dtype that kvfold does not hold does not make its file unreadable: many checkpoints carry an integer
//! buffer that no computation needs. It is left out and listed by name; whoever needs it has to complain.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, SafeTensorError, View};

use crate::error::{self, Error, Result};
use crate::{DType, HostTensor, atomic};

/// The longest header that is read: the limit of the `safetensors` crate, which applies it only where it reads the frame
/// of the file itself.
const MAX_HEADER: u64 = 100_000_000;

/// The entry of the header that is no tensor.
const METADATA: &str = "__metadata__";

/// Bytes of the header length at the start of a file.
const PREFIX: u64 = 8;

/// What a safetensors file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFile {
    /// The tensors by name.
    pub tensors: BTreeMap<String, HostTensor>,
    /// Tensors that are in the file and were not read, because there is no [`DType`] for their elements: name and the name
    /// of that dtype, such as `I64`.
    pub skipped: BTreeMap<String, String>,
    /// Free-form text beside them, such as `format: pt`.
    pub metadata: BTreeMap<String, String>,
}

/// Reads the file at `path` into memory.
pub fn read(path: &Path) -> Result<TensorFile> {
    let (file, len, name) = error::open(path)?;
    read_from(file, len, &name)
}

/// Reads a file that is in memory already. `name` is what errors call it.
pub fn read_bytes(bytes: &[u8], name: &str) -> Result<TensorFile> {
    read_from(Cursor::new(bytes), bytes.len() as u64, name)
}

/// Creates or replaces the file at `path`, in one step: at no moment does it hold half a model.
///
/// Equal tensors give equal bytes as long as `metadata` has no more than one entry. Several are written in the order of a
/// hash map, which differs from run to run.
pub fn write(path: &Path, tensors: &BTreeMap<String, HostTensor>, metadata: &BTreeMap<String, String>) -> Result<()> {
    let file = path.display().to_string();
    if tensors.contains_key(METADATA) {
        let reason = "this name is reserved by the format; give the tensor another one".into();
        return Err(Error::Tensor { file, tensor: METADATA.into(), reason });
    }
    let metadata = (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
    atomic::write_named(path, |temporary| {
        safetensors::serialize_to_file(tensors, metadata, temporary).map_err(|error| match error {
            SafeTensorError::IoError(error) => error,
            error => io::Error::other(error),
        })
    })
    .map_err(|source| Error::Io { file, action: "write", source })
}

/// Reads a file of `len` bytes. No memory is taken that `len` does not account for.
fn read_from(mut source: impl Read + Seek, len: u64, file: &str) -> Result<TensorFile> {
    let truncated = |what, needed| Error::Truncated { file: file.into(), what, needed, found: len };
    let invalid = |reason| Error::Header { file: file.into(), reason };
    let io = |source| Error::Io { file: file.into(), action: "read", source };

    if len < PREFIX {
        return Err(truncated("the header length", PREFIX));
    }
    let mut prefix = [0; PREFIX as usize];
    source.read_exact(&mut prefix).map_err(io)?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER {
        return Err(Error::HeaderTooLarge { file: file.into(), length: header_len, limit: MAX_HEADER });
    }
    let data = PREFIX + header_len;
    if len < data {
        return Err(truncated("the header", data));
    }
    let mut header = vec![0; header_len as usize]; // at most MAX_HEADER
    source.read_exact(&mut header).map_err(io)?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|error| invalid(error.to_string()))?;

    let needed = data.saturating_add(header.data_len() as u64);
    if len < needed {
        return Err(truncated("the data", needed));
    }
    if len > needed {
        return Err(invalid(format!("{} bytes follow the last tensor", len - needed)));
    }

    let mut out = TensorFile::default();
    let mut in_file_order: Vec<_> = header.tensors().into_iter().collect();
    in_file_order.sort_by_key(|(_, info)| info.data_offsets);
    for (name, info) in in_file_order {
        let Some(dtype) = ours(info.dtype) else {
            out.skipped.insert(name, info.dtype.to_string());
            continue;
        };
        let mut tensor = HostTensor::zeros(dtype, info.shape.as_slice());
        source.seek(SeekFrom::Start(data + info.data_offsets.0 as u64)).map_err(io)?;
        source.read_exact(tensor.bytes_mut()).map_err(io)?;
        out.tensors.insert(name, tensor);
    }
    out.metadata.extend(header.metadata().clone().into_iter().flatten());
    Ok(out)
}

/// The crate's name for a dtype.
fn theirs(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

/// The dtype of this name, if kvfold can hold it.
fn ours(dtype: Dtype) -> Option<DType> {
    DType::ALL.into_iter().find(|&ours| theirs(ours) == dtype)
}

impl View for &HostTensor {
    fn dtype(&self) -> Dtype {
        theirs(HostTensor::dtype(self))
    }

    fn shape(&self) -> &[usize] {
        HostTensor::shape(self)
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes().into()
    }

    fn data_len(&self) -> usize {
        self.bytes().len()
    }
}
