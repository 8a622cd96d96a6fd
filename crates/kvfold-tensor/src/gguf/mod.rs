//! GGUF files, the format of llama.cpp: metadata and tensors, many of them quantised.
//!
//! Versions 2 and 3, little-endian, are read; nothing is written. A file is a header of two counts, that many keys with
//! typed values, that many tensor descriptions, padding, and then the tensors' bytes, each at an offset of its own.
//!
//! The same two rules hold as for safetensors. *Hostile until checked*: counts and lengths have limits and must fit what is
//! left of the file before memory is taken for them, sums cannot overflow, and every tensor of a known type lies inside the
//! file before the first is read. *In memory once*: opening reads the header alone, and [`Gguf::tensor`] dequantises a piece
//! at a time straight into the tensor it returns.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{self, Error, Result};
use crate::{DType, HostTensor};

mod dequantize;
mod kind;
mod parse;
mod value;

pub use kind::Kind;
pub use value::Value;

/// Bytes of blocks that are read and dequantised at a time.
const PIECE: usize = 1 << 20;

/// What a file says about a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The length of each dimension, outermost first: GGUF lists them the other way round.
    pub shape: Vec<usize>,
    /// How its elements are stored.
    pub kind: Kind,
    /// Where it starts, from the beginning of the file.
    start: u64,
}

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf<R = BufReader<File>> {
    file: String,
    source: R,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Opens the file at `path` and reads its header.
    pub fn open(path: &Path) -> Result<Gguf> {
        let (file, len, name) = error::open(path)?;
        Self::new(BufReader::with_capacity(1 << 16, file), len, &name)
    }
}

impl<'a> Gguf<Cursor<&'a [u8]>> {
    /// Reads the header of a file that is in memory already. `name` is what errors call it.
    pub fn from_bytes(bytes: &'a [u8], name: &str) -> Result<Self> {
        Self::new(Cursor::new(bytes), bytes.len() as u64, name)
    }
}

impl<R: Read + Seek> Gguf<R> {
    fn new(mut source: R, len: u64, file: &str) -> Result<Self> {
        let parse::Header { metadata, tensors } = parse::header(&mut source, len, file)?;
        Ok(Gguf { file: file.into(), source, metadata, tensors })
    }

    /// What errors call the file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The metadata by key, such as `general.architecture`.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensors by name, such as `blk.0.attn_q.weight`.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Reads a tensor as `F32`: exact from the float types, dequantised from the others.
    pub fn tensor(&mut self, name: &str) -> Result<HostTensor> {
        let refused = |reason: String| Error::Tensor { file: self.file.clone(), tensor: name.into(), reason };
        let Some(info) = self.tensors.get(name) else {
            return Err(refused("there is no tensor of this name".into()));
        };
        let Some(blocks) = info.kind.blocks() else {
            let reason = format!("is stored as {}; kvfold reads {}", info.kind, Kind::readable());
            return Err(refused(reason));
        };
        let io = |source| Error::Io { file: self.file.clone(), action: "read", source };
        self.source.seek(SeekFrom::Start(info.start)).map_err(io)?;
        let mut tensor = HostTensor::zeros(DType::F32, info.shape.as_slice());
        let values: &mut [f32] = bytemuck::cast_slice_mut(tensor.bytes_mut());
        let per_piece = PIECE / blocks.bytes;
        let mut piece = vec![0; per_piece.min(values.len() / blocks.values) * blocks.bytes];
        for values in values.chunks_mut(per_piece * blocks.values) {
            let piece = &mut piece[..values.len() / blocks.values * blocks.bytes];
            self.source.read_exact(piece).map_err(io)?;
            (blocks.dequantize)(piece, values);
        }
        Ok(tensor)
    }
}
