//! Safetensors files: eight bytes of header length, a JSON header, and the elements of all tensors without a gap.
//!
//! The format is small enough that this module parses it itself. The `safetensors` crate is a fine reader of memory maps,
//! but three things matter here that it does not give: an error that names the tensor, whatever is wrong with it; elements
//! read from the file straight into [`AlignedBytes`], so that a model is in memory once and no `unsafe` map can change
//! under it; and output bytes that depend on the input alone (the crate writes the metadata in hash-map order), because two
//! runs that should be bit-identical are compared by the hashes of their files. It is the referee in the tests instead:
//! each side reads what the other has written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::host::byte_len;
use crate::{AlignedBytes, DType, HostTensor, atomic};

/// The longest header that is read or written. The same limit as the reference implementation's; a model of a hundred
/// thousand tensors stays well below it.
pub const MAX_HEADER: u64 = 100_000_000;

/// The entry of the header that is no tensor.
const METADATA: &str = "__metadata__";

/// Bytes of the header length at the start of a file.
const PREFIX: u64 = 8;

/// What a safetensors file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFile {
    /// The tensors by name.
    pub tensors: BTreeMap<String, HostTensor>,
    /// Free-form text beside them, such as `format: pt`.
    pub metadata: BTreeMap<String, String>,
}

/// Reads the file at `path` into memory.
pub fn read(path: &Path) -> Result<TensorFile> {
    let name = path.display().to_string();
    let io = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::NotFound { file: name.clone() },
        _ => Error::Io { file: name.clone(), action: "read", source },
    };
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    read_from(file, len, &name)
}

/// Reads a file that is in memory already. `name` is what errors call it.
pub fn read_bytes(bytes: &[u8], name: &str) -> Result<TensorFile> {
    read_from(bytes, bytes.len() as u64, name)
}

/// Creates or replaces the file at `path`, in one step: at no moment does it hold half a model.
///
/// Equal tensors and metadata give equal bytes.
pub fn write(path: &Path, tensors: &BTreeMap<String, HostTensor>, metadata: &BTreeMap<String, String>) -> Result<()> {
    let file = path.display().to_string();
    let order = in_file_order(tensors);
    let header = header(&file, &order, metadata)?;
    atomic::write(path, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(&header)?;
        order.iter().try_for_each(|(_, tensor)| w.write_all(tensor.bytes()))
    })
    .map_err(|source| Error::Io { file, action: "write", source })
}

/// One tensor's entry in the header.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// Reads a file of `len` bytes. No memory is taken that `len` does not account for.
fn read_from(mut source: impl Read, len: u64, file: &str) -> Result<TensorFile> {
    let truncated = |what, needed| Error::Truncated { file: file.into(), what, needed, found: len };
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
    if len - PREFIX < header_len {
        return Err(truncated("the header", PREFIX + header_len));
    }
    let mut header = vec![0; header_len as usize]; // at most MAX_HEADER
    source.read_exact(&mut header).map_err(io)?;
    let (entries, metadata) = parse_header(&header, file)?;

    let data_len = entries.last().map_or(0, |(_, entry)| entry.data_offsets.1) as u64;
    let needed = (PREFIX + header_len).saturating_add(data_len);
    if len < needed {
        return Err(truncated("the data", needed));
    }
    if len > needed {
        let reason = format!("{} bytes follow the last tensor; the file is damaged", len - needed);
        return Err(Error::Header { file: file.into(), reason });
    }

    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let Some(dtype) = DType::from_name(&entry.dtype) else {
            return Err(Error::UnsupportedDType { file: file.into(), tensor: name, dtype: entry.dtype });
        };
        let stored = entry.data_offsets.1 - entry.data_offsets.0;
        if byte_len(dtype, &entry.shape) != Some(stored) {
            let reason = format!("shape {:?} in {dtype} does not take the {stored} bytes of its place", entry.shape);
            return Err(Error::Tensor { file: file.into(), tensor: name, reason });
        }
        let mut tensor = HostTensor::zeros(dtype, entry.shape);
        source.read_exact(tensor.bytes_mut()).map_err(io)?;
        tensors.insert(name, tensor);
    }
    Ok(TensorFile { tensors, metadata })
}

type Header = (Vec<(String, Entry)>, BTreeMap<String, String>);

/// The header's tensors in the order of their places in the file, each starting where the one before it ends.
fn parse_header(header: &[u8], file: &str) -> Result<Header> {
    let invalid = |reason: String| Error::Header { file: file.into(), reason };
    let map: Map<String, Value> = serde_json::from_slice(header).map_err(|error| invalid(error.to_string()))?;

    let mut metadata = BTreeMap::new();
    let mut entries = Vec::with_capacity(map.len());
    for (name, value) in map {
        if name == METADATA {
            metadata = serde_json::from_value(value).map_err(|error| invalid(format!("`{METADATA}`: {error}")))?;
            continue;
        }
        match Entry::deserialize(value) {
            Ok(entry) => entries.push((name, entry)),
            Err(error) => {
                return Err(Error::Tensor {
                    file: file.into(),
                    tensor: name,
                    reason: format!("invalid header entry: {error}"),
                });
            }
        }
    }
    entries.sort_by_key(|(_, entry)| entry.data_offsets);

    let mut end = 0;
    for (name, entry) in &entries {
        let (from, to) = entry.data_offsets;
        if from != end || to < from {
            let reason = format!(
                "its bytes {from}..{to} should start at {end}, where the tensor before it ends; the file is damaged"
            );
            return Err(Error::Tensor { file: file.into(), tensor: name.clone(), reason });
        }
        end = to;
    }
    Ok((entries, metadata))
}

/// Wide elements first, then by name: the order of the reference implementation, which keeps each tensor aligned to its
/// element size.
fn in_file_order(tensors: &BTreeMap<String, HostTensor>) -> Vec<(&String, &HostTensor)> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype().size()));
    order
}

/// The header, padded with spaces so that the data starts on a cache line even for a reader that maps the file.
fn header(file: &str, order: &[(&String, &HostTensor)], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        map.insert(METADATA.into(), json!(metadata));
    }
    let mut start = 0;
    for &(name, tensor) in order {
        if name == METADATA {
            let reason = "this name is reserved by the format; give the tensor another one".into();
            return Err(Error::Tensor { file: file.into(), tensor: name.clone(), reason });
        }
        let end = start + tensor.bytes().len();
        let entry = json!({ "dtype": tensor.dtype().name(), "shape": tensor.shape(), "data_offsets": [start, end] });
        map.insert(name.clone(), entry);
        start = end;
    }
    let mut header = Value::Object(map).to_string().into_bytes();
    let end = (PREFIX as usize + header.len()).next_multiple_of(AlignedBytes::ALIGN);
    header.resize(end - PREFIX as usize, b' ');
    match header.len() as u64 {
        length if length > MAX_HEADER => Err(Error::HeaderTooLarge { file: file.into(), length, limit: MAX_HEADER }),
        _ => Ok(header),
    }
}
