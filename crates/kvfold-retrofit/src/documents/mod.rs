//! Texts from files and folders: plain text, JSONL, Parquet, and any of them compressed with zstd.
//!
//! The ending of a file's name says what it is: `.jsonl` and `.parquet` hold many documents, everything else is one. A
//! folder is read with its folders, files sorted by name, so that the same files are the same documents on any machine;
//! what a folder holds beside `.txt`, `.md`, `.jsonl` and `.parquet` (or these with `.zst`) is passed over. Texts are held
//! in memory.

mod jsonl;
mod table;

use crate::error::RetrofitError;
use kvfold_kernels::noise::hash;
use kvfold_model::digest::hex;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// A text, and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// `FILE`, or `FILE:LINE` (JSONL) or `FILE:row N` (Parquet), both counted from 1.
    pub source: String,
    /// The text.
    pub text: String,
}

/// What a file holds, by its name without `.zst`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Plain,
    Jsonl,
    Parquet,
}

/// The format that a name's ending states, and whether the file is compressed; `None` for other endings.
fn format(path: &Path) -> (Option<Format>, bool) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (name, compressed) = match name.strip_suffix(".zst") {
        Some(name) => (name, true),
        None => (name.as_str(), false),
    };
    let format = match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("txt" | "md") => Some(Format::Plain),
        Some("jsonl") => Some(Format::Jsonl),
        Some("parquet") => Some(Format::Parquet),
        _ => None,
    };
    (format, compressed)
}

/// Reads the documents of files and folders, in the order given. `field` is the name of the text in JSON objects and of the
/// column in tables. Empty documents of a file that holds many are passed over; no document at all is an error.
pub fn read(paths: &[PathBuf], field: &str) -> Result<Vec<Document>, RetrofitError> {
    let mut documents = Vec::new();
    for path in paths {
        let before = documents.len();
        let mut files = Vec::new();
        let named = !fs::metadata(path).map_err(|source| unreadable(path, source))?.is_dir();
        if named {
            files.push(path.clone());
        } else {
            walk(path, &mut files)?;
        }
        for file in &files {
            read_file(file, field, &mut documents)?;
        }
        if documents.len() == before {
            let reason = match named {
                true => "no text in it".into(),
                false => format!(
                    "no text in this folder: of its {} files that end in .txt, .md, .jsonl or .parquet, with or without \
                     .zst, none holds any",
                    files.len()
                ),
            };
            return Err(wrong(path, reason));
        }
    }
    Ok(documents)
}

/// Puts the documents in an order that depends on nothing but the seed and their number.
pub fn shuffle(documents: &mut Vec<Document>, seed: u64) {
    let mut keyed: Vec<(u64, Document)> =
        documents.drain(..).enumerate().map(|(n, document)| (hash(&[seed, n as u64]), document)).collect();
    keyed.sort_by_key(|(key, _)| *key);
    documents.extend(keyed.into_iter().map(|(_, document)| document));
}

/// SHA-256 of the documents and their boundaries, in hex; where they came from does not count.
pub fn digest(documents: &[Document]) -> String {
    let mut hasher = Sha256::new();
    for document in documents {
        hasher.update((document.text.len() as u64).to_le_bytes());
        hasher.update(document.text.as_bytes());
    }
    hex(&hasher.finalize())
}

/// The files of a folder and its folders, sorted by name; hidden ones and other formats are left out.
fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), RetrofitError> {
    let failed = |source| unreadable(dir, source);
    let mut entries = fs::read_dir(dir).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        // A link to a folder is not followed: it may lead back here.
        if entry.file_type().map_err(failed)?.is_dir() {
            walk(&path, files)?;
        } else if format(&path).0.is_some() && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn read_file(path: &Path, field: &str, documents: &mut Vec<Document>) -> Result<(), RetrofitError> {
    let (format, compressed) = format(path);
    match format.unwrap_or(Format::Plain) {
        Format::Plain => {
            let text = utf8(bytes(path, compressed)?, path)?;
            if !text.trim().is_empty() {
                documents.push(Document { source: path.display().to_string(), text });
            }
            Ok(())
        }
        Format::Jsonl => jsonl::read(reader(path, compressed)?, path, field, documents),
        Format::Parquet if compressed => table::read(bytes::Bytes::from(bytes(path, true)?), path, field, documents),
        Format::Parquet => {
            let file = File::open(path).map_err(|source| unreadable(path, source))?;
            table::read(file, path, field, documents)
        }
    }
}

/// The content of a file, decompressed.
fn reader(path: &Path, compressed: bool) -> Result<Box<dyn Read>, RetrofitError> {
    let failed = |source| unreadable(path, source);
    let file = File::open(path).map_err(failed)?;
    Ok(match compressed {
        true => Box::new(zstd::Decoder::new(file).map_err(failed)?),
        false => Box::new(file),
    })
}

fn bytes(path: &Path, compressed: bool) -> Result<Vec<u8>, RetrofitError> {
    let mut bytes = Vec::new();
    reader(path, compressed)?.read_to_end(&mut bytes).map_err(|source| unreadable(path, source))?;
    Ok(bytes)
}

fn utf8(bytes: Vec<u8>, path: &Path) -> Result<String, RetrofitError> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        wrong(path, format!("not UTF-8 text: the byte at {at} does not belong there"))
    })
}

fn unreadable(path: &Path, source: io::Error) -> RetrofitError {
    RetrofitError::Io { file: path.display().to_string(), action: "read", source }
}

fn wrong(path: &Path, reason: String) -> RetrofitError {
    RetrofitError::Text { place: path.display().to_string(), reason }
}
