//! PyTorch's `.pt` files: a zip archive of one pickle and the storages of its tensors.
//!
//! Written by `torch.save` since version 1.6; older files, which are a pickle as a whole, are refused. The pickle is read
//! by a machine that calls nothing (`pickle.rs` says what it takes). Opening a file reads the pickle alone;
//! [`TorchFile::tensor`] reads one tensor's elements, and takes no memory before it is clear that the file holds them.

use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek};
use std::path::Path;

use zip::ZipArchive;
use zip::result::ZipError;

use crate::error::{self, Error, Result};
use crate::{DType, HostTensor};

mod pickle;

use pickle::Pickle;
pub use pickle::{TensorInfo, Value};

/// The longest pickle that is believed: that of a model of 4096 layers with its settings stays far below.
const MAX_PICKLE: u64 = 64 << 20;

/// An open `.pt` file.
pub struct TorchFile<R = BufReader<File>> {
    file: String,
    archive: ZipArchive<R>,
    /// The directory in the archive that everything lies in, with its separator.
    prefix: String,
    len: u64,
    pickle: Pickle,
}

impl<R> std::fmt::Debug for TorchFile<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TorchFile").field("file", &self.file).finish_non_exhaustive()
    }
}

impl TorchFile {
    /// Opens the file at `path` and reads its pickle.
    pub fn open(path: &Path) -> Result<TorchFile> {
        let (file, len, name) = error::open(path)?;
        Self::new(BufReader::with_capacity(1 << 16, file), len, &name)
    }
}

impl<'a> TorchFile<Cursor<&'a [u8]>> {
    /// Reads the pickle of a file that is in memory already. `name` is what errors call it.
    pub fn from_bytes(bytes: &'a [u8], name: &str) -> Result<Self> {
        Self::new(Cursor::new(bytes), bytes.len() as u64, name)
    }
}

impl<R: Read + Seek> TorchFile<R> {
    fn new(source: R, len: u64, file: &str) -> Result<Self> {
        let refused = |reason: String| Error::Torch { file: file.into(), reason };
        let unreadable = |error: ZipError| match error {
            ZipError::Io(source) => Error::Io { file: file.into(), action: "read", source },
            ZipError::InvalidArchive(_) => refused(format!(
                "{error}; kvfold reads what `torch.save` writes since PyTorch 1.6, an archive: save an older file anew"
            )),
            error => refused(error.to_string()),
        };
        let mut archive = ZipArchive::new(source).map_err(unreadable)?;
        let root = archive.file_names().flatten().find_map(|name| name.strip_suffix("data.pkl").map(str::to_owned));
        let prefix = root.ok_or_else(|| refused("the archive has no data.pkl".into()))?;
        let mut program = Vec::new();
        {
            let entry = archive.by_name(&format!("{prefix}data.pkl")).map_err(unreadable)?;
            let size = entry.size();
            if size > MAX_PICKLE.min(len) {
                return Err(refused(format!(
                    "a data.pkl of {size} bytes is over the limit of {}",
                    MAX_PICKLE.min(len)
                )));
            }
            let io = |source| Error::Io { file: file.into(), action: "read", source };
            entry.take(MAX_PICKLE).read_to_end(&mut program).map_err(io)?;
        }
        let mut order = String::new();
        if let Ok(entry) = archive.by_name(&format!("{prefix}byteorder")) {
            let io = |source| Error::Io { file: file.into(), action: "read", source };
            entry.take(16).read_to_string(&mut order).map_err(io)?;
        }
        if !["", "little"].contains(&order.as_str()) {
            return Err(refused(format!("its numbers are {order}-endian; kvfold reads little-endian files")));
        }
        let pickle = Pickle::read(&program).map_err(|pickle::Refused { offset, reason }| {
            refused(format!("data.pkl, byte {offset}: {reason}; nothing of it was run"))
        })?;
        Ok(TorchFile { file: file.into(), archive, prefix, len, pickle })
    }

    /// What errors call the file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// What was saved.
    pub fn root(&self) -> Value<'_> {
        self.pickle.root()
    }

    /// Reads the elements of a tensor, in the dtype they are stored in. `name` is what errors call it.
    pub fn tensor(&mut self, name: &str, info: &TensorInfo) -> Result<HostTensor> {
        let file = self.file.clone();
        let refused = |reason: String| Error::Tensor { file: file.clone(), tensor: name.into(), reason };
        let dtype = match info.storage.as_str() {
            "DoubleStorage" => DType::F64,
            "FloatStorage" => DType::F32,
            "HalfStorage" => DType::F16,
            "BFloat16Storage" => DType::BF16,
            other => return Err(refused(format!("is stored as {other}; kvfold reads F64, F32, F16 and BF16"))),
        };
        let outside = || refused(format!("shape {:?} does not fit its storage of {} elements", info.shape, info.len));
        let layout = Layout::of(info).ok_or_else(outside)?;
        let bytes = info.len.checked_mul(dtype.size()).filter(|&bytes| bytes as u64 <= self.len).ok_or_else(outside)?;
        let entry = format!("{}data/{}", self.prefix, info.key);
        let unreadable = |error: ZipError| refused(format!("its storage {entry} cannot be read: {error}"));
        let mut entry = self.archive.by_name(&entry).map_err(unreadable)?;
        if entry.size() != bytes as u64 {
            let reason = format!("its storage has {} bytes; {} elements need {bytes}", entry.size(), info.len);
            return Err(refused(reason));
        }
        let io = |source| Error::Io { file: file.clone(), action: "read", source };
        let mut tensor = HostTensor::zeros(dtype, info.shape.as_slice());
        let size = dtype.size();
        if layout.contiguous {
            let skipped = (info.offset * size) as u64;
            std::io::copy(&mut entry.by_ref().take(skipped), &mut std::io::sink()).map_err(io)?;
            entry.read_exact(tensor.bytes_mut()).map_err(io)?;
            return Ok(tensor);
        }
        let mut storage = vec![0; bytes];
        entry.read_exact(&mut storage).map_err(io)?;
        let mut index = vec![0; info.shape.len()];
        for element in tensor.bytes_mut().chunks_exact_mut(size) {
            let at = index.iter().zip(&info.strides).fold(info.offset, |at, (i, stride)| at + i * stride) * size;
            element.copy_from_slice(&storage[at..at + size]);
            // The next index: the innermost that can still grow.
            for (i, &dim) in index.iter_mut().zip(&info.shape).rev() {
                *i += 1;
                if *i < dim {
                    break;
                }
                *i = 0;
            }
        }
        Ok(tensor)
    }
}

/// How a tensor lies in its storage.
struct Layout {
    /// Whether its elements are one piece of the storage, in order.
    contiguous: bool,
}

impl Layout {
    /// `None` when elements lie outside of the storage, or are more than it has.
    fn of(info: &TensorInfo) -> Option<Layout> {
        let elements = info.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?;
        // A view that repeats elements could be larger than the file.
        if elements > info.len || info.offset > info.len {
            return None;
        }
        if elements == 0 {
            return Some(Layout { contiguous: true });
        }
        let spans = info.shape.iter().zip(&info.strides).map(|(&dim, &stride)| (dim - 1).checked_mul(stride));
        let last = spans.into_iter().try_fold(info.offset, |at, span| at.checked_add(span?))?;
        if last >= info.len {
            return None;
        }
        let mut expected = 1;
        let mut contiguous = true;
        for (&dim, &stride) in info.shape.iter().zip(&info.strides).rev() {
            contiguous &= dim == 1 || stride == expected;
            expected *= dim;
        }
        Some(Layout { contiguous })
    }
}
