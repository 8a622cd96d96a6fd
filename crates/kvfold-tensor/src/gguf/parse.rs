//! The header of a GGUF file, checked.

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::{Kind, TensorInfo, Value};
use crate::error::{Error, Result};

/// The most keys, and the most tensors, that are believed.
const MAX_ENTRIES: u64 = 1 << 16;
/// The longest key or tensor name, bytes.
const MAX_NAME: u64 = 1 << 10;
/// The longest text: a licence or a chat template.
const MAX_TEXT: u64 = 1 << 24;
/// The longest list: a vocabulary or its merges.
const MAX_LIST: u64 = 1 << 24;
/// Dimensions of a tensor at most, by the format.
const MAX_DIMS: u32 = 4;
/// The largest alignment that is believed.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// The alignment of a file that does not name one.
const ALIGNMENT: u64 = 32;

/// What stands before the data.
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

/// Reads the header of a file of `len` bytes.
pub(super) fn header(source: &mut impl Read, len: u64, file: &str) -> Result<Header> {
    let mut reader = Reader { source, at: 0, len, file, part: "the header" };
    reader.magic()?;
    let tensor_count = reader.count("tensors")?;
    let key_count = reader.count("keys")?;

    reader.part = "the metadata";
    let mut metadata = BTreeMap::new();
    for _ in 0..key_count {
        let key = reader.text(MAX_NAME, |reason| invalid(file, format!("a key {reason}")))?;
        let value = reader.value(&key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(bad_key(file, &key, "is there twice"));
        }
    }
    let alignment = alignment(&metadata, file)?;

    reader.part = "the list of tensors";
    let mut tensors = BTreeMap::new();
    for _ in 0..tensor_count {
        let name = reader.text(MAX_NAME, |reason| invalid(file, format!("the name of a tensor {reason}")))?;
        let info = reader.info(&name)?;
        if tensors.insert(name.clone(), info).is_some() {
            return Err(bad_tensor(file, &name, "is there twice"));
        }
    }

    // `at` is at most the length of a file, so this cannot overflow.
    let data = reader.at.next_multiple_of(alignment);
    for (name, info) in &mut tensors {
        place(info, data, alignment, len).map_err(|fault| match fault {
            Fault::Reason(reason) => bad_tensor(file, name, reason),
            Fault::Short(needed) => Error::Truncated { file: file.into(), what: "a tensor", needed, found: len },
        })?;
    }
    Ok(Header { metadata, tensors })
}

fn alignment(metadata: &BTreeMap<String, Value>, file: &str) -> Result<u64> {
    const KEY: &str = "general.alignment";
    let Some(value) = metadata.get(KEY) else {
        return Ok(ALIGNMENT);
    };
    value.as_unsigned().filter(|&n| n.is_power_of_two() && n <= MAX_ALIGNMENT).ok_or_else(|| {
        bad_key(file, KEY, format!("is {}; expected a power of two up to {MAX_ALIGNMENT}", value.brief()))
    })
}

enum Fault {
    Reason(String),
    /// The file would have to have this many bytes.
    Short(u64),
}

/// Turns a tensor's offset into its place in the file, and checks that all of it lies there.
fn place(info: &mut TensorInfo, data: u64, alignment: u64, len: u64) -> Result<(), Fault> {
    if !info.start.is_multiple_of(alignment) {
        return Err(Fault::Reason(format!("starts at {}, no multiple of the alignment, {alignment}", info.start)));
    }
    let too_large = || Fault::Reason(format!("of shape {:?} fits no file", info.shape));
    let Some(blocks) = info.kind.blocks() else {
        return Ok(()); // refused when somebody asks for it
    };
    let count = info.shape.iter().try_fold(1, |n: usize, &dim| n.checked_mul(dim)).ok_or_else(too_large)?;
    // Four bytes each as f32, in an address space that ends at isize::MAX.
    if count > isize::MAX as usize / 16 {
        return Err(too_large());
    }
    if !info.shape.last().is_none_or(|row| row.is_multiple_of(blocks.values)) || !count.is_multiple_of(blocks.values) {
        let reason = format!("has rows that are no multiple of the {} values of a {} block", blocks.values, info.kind);
        return Err(Fault::Reason(format!("of shape {:?} {reason}", info.shape)));
    }
    let bytes = (count / blocks.values * blocks.bytes) as u64;
    let start = data.checked_add(info.start).ok_or_else(too_large)?;
    let end = start.checked_add(bytes).ok_or_else(too_large)?;
    if end > len {
        return Err(Fault::Short(end));
    }
    info.start = start;
    Ok(())
}

/// The part of a file that has not been read.
struct Reader<'a, R> {
    source: &'a mut R,
    at: u64,
    len: u64,
    file: &'a str,
    /// What is being read, for errors.
    part: &'static str,
}

impl<R: Read> Reader<'_, R> {
    fn magic(&mut self) -> Result<()> {
        let magic: [u8; 4] = self.bytes()?;
        if &magic != b"GGUF" {
            return Err(invalid(
                self.file,
                "the file does not start with the letters GGUF, so it is another kind of file",
            ));
        }
        match u32::from_le_bytes(self.bytes()?) {
            2 | 3 => Ok(()),
            version if (2..=3).contains(&version.swap_bytes()) => {
                Err(invalid(self.file, "the file is big-endian; convert it to little-endian"))
            }
            version => Err(invalid(self.file, format!("version {version} is not supported; 2 and 3 are"))),
        }
    }

    fn count(&mut self, what: &str) -> Result<u64> {
        match u64::from_le_bytes(self.bytes()?) {
            n if n > MAX_ENTRIES => Err(invalid(self.file, format!("{n} {what} are over the limit of {MAX_ENTRIES}"))),
            n => Ok(n),
        }
    }

    /// Makes sure that the file has `n` more bytes.
    fn need(&self, n: u64) -> Result<()> {
        let needed = self.at.saturating_add(n);
        match needed <= self.len {
            true => Ok(()),
            false => Err(Error::Truncated { file: self.file.into(), what: self.part, needed, found: self.len }),
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.need(bytes.len() as u64)?;
        let io = |source: io::Error| Error::Io { file: self.file.into(), action: "read", source };
        self.source.read_exact(bytes).map_err(io)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// A text of at most `limit` bytes; `wrong` makes an error of what is wrong with it.
    fn text(&mut self, limit: u64, wrong: impl Fn(&str) -> Error) -> Result<String> {
        let len = u64::from_le_bytes(self.bytes()?);
        if len > limit {
            return Err(wrong(&format!("of {len} bytes is over the limit of {limit}")));
        }
        self.need(len)?;
        let mut bytes = vec![0; len as usize]; // at most MAX_TEXT
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| wrong("is not UTF-8"))
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        const LIST: u32 = 9;
        match u32::from_le_bytes(self.bytes()?) {
            LIST => self.list(key),
            kind => self.single(kind, key),
        }
    }

    fn single(&mut self, kind: u32, key: &str) -> Result<Value> {
        let file = self.file;
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.bytes()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Unsigned(u32::from_le_bytes(self.bytes()?).into()),
            5 => Value::Signed(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => match self.bytes()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [byte] => return Err(bad_key(file, key, format!("is neither true nor false but {byte}"))),
            },
            8 => {
                Value::String(self.text(MAX_TEXT, |reason| bad_key(file, key, format!("holds a text that {reason}")))?)
            }
            10 => Value::Unsigned(u64::from_le_bytes(self.bytes()?)),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            kind => return Err(bad_key(file, key, format!("is of the unknown type {kind}"))),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let kind = u32::from_le_bytes(self.bytes()?);
        let count = u64::from_le_bytes(self.bytes()?);
        // The fewest bytes an element can take; a text has its length.
        let (least, mut list) = match kind {
            0 | 1 => (1, Value::Integers(Vec::new())),
            2 | 3 => (2, Value::Integers(Vec::new())),
            4 | 5 => (4, Value::Integers(Vec::new())),
            10 | 11 => (8, Value::Integers(Vec::new())),
            6 => (4, Value::Floats(Vec::new())),
            12 => (8, Value::Floats(Vec::new())),
            7 => (1, Value::Bools(Vec::new())),
            8 => (8, Value::Strings(Vec::new())),
            9 => return Err(bad_key(self.file, key, "is a list of lists, which no model has a use for")),
            kind => return Err(bad_key(self.file, key, format!("is a list of the unknown type {kind}"))),
        };
        if count > MAX_LIST {
            return Err(bad_key(self.file, key, format!("is a list of {count}, over the limit of {MAX_LIST}")));
        }
        self.need(count * least)?;
        for _ in 0..count {
            match (&mut list, self.single(kind, key)?) {
                (Value::Integers(list), Value::Signed(n)) => list.push(n),
                (Value::Integers(list), Value::Unsigned(n)) => match i64::try_from(n) {
                    Ok(n) => list.push(n),
                    Err(_) => return Err(bad_key(self.file, key, format!("lists {n}, which is too large"))),
                },
                (Value::Floats(list), Value::F32(x)) => list.push(x.into()),
                (Value::Floats(list), Value::F64(x)) => list.push(x),
                (Value::Bools(list), Value::Bool(value)) => list.push(value),
                (Value::Strings(list), Value::String(text)) => list.push(text),
                _ => unreachable!("`single` gives the variant that `list` was made for"),
            }
        }
        Ok(list)
    }

    /// A tensor's description. Its `start` is still relative to the data.
    fn info(&mut self, name: &str) -> Result<TensorInfo> {
        let dims = u32::from_le_bytes(self.bytes()?);
        if dims > MAX_DIMS {
            return Err(bad_tensor(self.file, name, format!("has {dims} dimensions; {MAX_DIMS} is the most")));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let dim = u64::from_le_bytes(self.bytes()?);
            match usize::try_from(dim) {
                Ok(dim) if dim > 0 => shape.push(dim),
                _ => return Err(bad_tensor(self.file, name, format!("has a dimension of {dim}"))),
            }
        }
        shape.reverse();
        let kind = Kind::of(u32::from_le_bytes(self.bytes()?));
        let start = u64::from_le_bytes(self.bytes()?);
        Ok(TensorInfo { shape, kind, start })
    }
}

fn invalid(file: &str, reason: impl Into<String>) -> Error {
    Error::Gguf { file: file.into(), reason: reason.into() }
}

fn bad_key(file: &str, key: &str, reason: impl Into<String>) -> Error {
    Error::GgufKey { file: file.into(), key: key.into(), reason: reason.into() }
}

fn bad_tensor(file: &str, tensor: &str, reason: impl Into<String>) -> Error {
    Error::Tensor { file: file.into(), tensor: tensor.into(), reason: reason.into() }
}
