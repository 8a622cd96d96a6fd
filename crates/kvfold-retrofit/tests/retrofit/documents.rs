//! Texts from files and folders.

use kvfold_retrofit::RetrofitError;
use kvfold_retrofit::documents::{Document, digest, read, shuffle};
use std::path::{Path, PathBuf};

/// Written by pyarrow, see `oracle/parquet_documents.py`.
const TABLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tables");

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    fn write_zst(&self, name: &str, content: &[u8]) -> PathBuf {
        self.write(name, zstd::encode_all(content, 3).unwrap())
    }

    /// What is read from these: sources without the directory, and texts.
    fn read(&self, paths: &[PathBuf], field: &str) -> Vec<(String, String)> {
        let prefix = format!("{}/", self.0.path().display());
        let documents = read(paths, field).unwrap();
        documents.into_iter().map(|d| (d.source.replace(&prefix, ""), d.text)).collect()
    }
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|&(source, text)| (source.into(), text.into())).collect()
}

#[track_caller]
fn fails(paths: &[&Path], field: &str, phrases: &[&str]) {
    let paths: Vec<PathBuf> = paths.iter().map(|path| path.to_path_buf()).collect();
    let error = read(&paths, field).unwrap_err();
    assert!(matches!(error, RetrofitError::Text { .. } | RetrofitError::Io { .. }), "{error:?}");
    phrases.iter().for_each(|phrase| assert!(error.to_string().contains(phrase), "no {phrase:?} in: {error}"));
}

#[test]
fn a_folder_is_read_with_its_folders_in_the_order_of_names() {
    let dir = Dir::new();
    dir.write("b.txt", "b");
    dir.write("a/z.md", "a z");
    dir.write("a/deep/c.txt", "a deep c");
    dir.write_zst("c.txt.zst", b"c, compressed");
    dir.write("D.TXT", "an ending in capitals");
    dir.write("empty.txt", " \n");
    dir.write(".hidden.txt", "hidden");
    dir.write("code.rs", "fn main() {}");
    dir.write("lines.jsonl", "{\"text\": \"one\"}\n\n{\"text\": \"three\"}\n");
    let expected = pairs(&[
        ("D.TXT", "an ending in capitals"),
        ("a/deep/c.txt", "a deep c"),
        ("a/z.md", "a z"),
        ("b.txt", "b"),
        ("c.txt.zst", "c, compressed"),
        ("lines.jsonl:1", "one"),
        ("lines.jsonl:3", "three"),
    ]);
    assert_eq!(dir.read(&[dir.path("")], "text"), expected);
    // Named files come in the order given, whatever their ending.
    let named = [dir.path("code.rs"), dir.path("b.txt")];
    assert_eq!(dir.read(&named, "text"), pairs(&[("code.rs", "fn main() {}"), ("b.txt", "b")]));
}

#[test]
fn jsonl_has_a_field_or_a_pair_and_a_bad_line_is_named() {
    let dir = Dir::new();
    let lines = dir.write(
        "x.jsonl",
        "{\"story\": \"once\", \"id\": 7}\n{\"prompt\": \"Who?\", \"response\": \"Me.\"}\n{\"story\": \"\"}\n\
         {\"prompt\": \"p\", \"completion\": \"c\"}",
    );
    let expected = pairs(&[("x.jsonl:1", "once"), ("x.jsonl:2", "Who?\nMe."), ("x.jsonl:4", "p\nc")]);
    assert_eq!(dir.read(std::slice::from_ref(&lines), "story"), expected);
    fails(&[&lines], "text", &["x.jsonl:1: no text in field `text`", "the fields are story, id", "--text-field"]);

    for (content, phrases) in [
        ("{\"text\": \"a\"}\n{\"text\": \"b\"\n", ["bad.jsonl:2", "not a JSON object"]),
        ("[1, 2]\n", ["bad.jsonl:1", "not a JSON object"]),
        ("{\"text\": 5}\n", ["bad.jsonl:1", "no text in field `text`"]),
        ("{}\n", ["bad.jsonl:1", "no text"]),
    ] {
        fails(&[&dir.write("bad.jsonl", content)], "text", &phrases);
    }
    fails(&[&dir.write("latin1.jsonl", b"{\"text\": \"caf\xe9\"}")], "text", &["latin1.jsonl:1"]);
    let compressed = dir.write_zst("y.jsonl.zst", b"{\"text\": \"t\"}\n");
    assert_eq!(dir.read(&[compressed], "text"), pairs(&[("y.jsonl.zst:1", "t")]));
}

#[test]
fn tables_hold_a_document_per_row_whatever_their_codec() {
    let dir = Dir::new();
    // 1200 rows in row groups of 500; every seventh text is null.
    for codec in ["snappy", "zstd", "gzip", "none"] {
        let path = Path::new(TABLES).join(format!("{codec}.parquet"));
        let documents = read(std::slice::from_ref(&path), "text").unwrap();
        let rows: Vec<usize> = (1..=1200).filter(|row| row % 7 != 0).collect();
        assert_eq!(documents.len(), rows.len(), "{codec}");
        for (document, row) in documents.iter().zip(rows) {
            assert_eq!(document.text, format!("Tale {row}: é."), "{codec}");
            assert_eq!(document.source, format!("{}:row {row}", path.display()));
        }
        let packed = dir.write_zst("t.parquet.zst", &std::fs::read(&path).unwrap());
        let texts = |documents: Vec<Document>| documents.into_iter().map(|d| d.text).collect::<Vec<_>>();
        assert_eq!(texts(read(&[packed], "text").unwrap()), texts(documents), "{codec}");
    }
    let table = Path::new(TABLES).join("none.parquet");
    let required = read(std::slice::from_ref(&table), "title").unwrap();
    assert_eq!((required.len(), required[6].text.as_str()), (1200, "Title 7"));
    fails(&[&table], "body", &["no column `body`", "the columns are id, title, text", "--text-field"]);
    fails(&[&table], "id", &["`id` does not hold one text per row"]);
    fails(&[&table], "tags.list.element", &["does not hold one text per row"]);
    let whole = std::fs::read(&table).unwrap();
    for damaged in [&whole[..whole.len() / 2], &whole[..10], b"PAR1"] {
        fails(&[&dir.write("damaged.parquet", damaged)], "text", &["damaged.parquet", "cannot be read as Parquet"]);
    }
}

#[test]
fn what_is_no_text_is_named() {
    let dir = Dir::new();
    fails(&[&dir.path("none.txt")], "text", &["none.txt", "cannot read"]);
    fails(&[&dir.write("empty.txt", "")], "text", &["empty.txt", "no text"]);
    fails(&[&dir.write("latin1.txt", b"caf\xe9")], "text", &["latin1.txt", "not UTF-8", "byte at 3"]);
    fails(&[&dir.write("fake.txt.zst", "not compressed")], "text", &["fake.txt.zst", "cannot read"]);
    let whole = std::fs::read(dir.write_zst("whole.txt.zst", "abcdefgh".repeat(1000).as_bytes())).unwrap();
    fails(&[&dir.write("half.txt.zst", &whole[..whole.len() - 4])], "text", &["half.txt.zst", "cannot read"]);
    dir.write("folder/code.rs", "fn main() {}");
    fails(&[&dir.path("folder")], "text", &["no text in this folder", "0 files"]);
}

#[test]
fn the_order_is_the_seeds_and_the_digest_knows_boundaries_and_order() {
    let document = |text: &str| Document { source: "s".into(), text: text.into() };
    let numbered: Vec<Document> = (0..50).map(|n| document(&n.to_string())).collect();
    let shuffled = |seed| {
        let mut documents = numbered.clone();
        shuffle(&mut documents, seed);
        documents
    };
    assert_eq!(shuffled(1), shuffled(1));
    assert!(shuffled(1) != shuffled(2) && shuffled(1) != numbered);
    let mut sorted = shuffled(3);
    sorted.sort_by_key(|document| document.text.parse::<usize>().unwrap());
    assert_eq!(sorted, numbered);

    let of = |texts: &[&str]| digest(&texts.iter().map(|text| document(text)).collect::<Vec<_>>());
    let all = [of(&["ab", "c"]), of(&["a", "bc"]), of(&["abc"]), of(&["c", "ab"]), of(&["ab", "c", ""])];
    assert!((0..all.len()).all(|i| (0..i).all(|j| all[i] != all[j])));
    assert_eq!(of(&["ab", "c"]), digest(&[Document { source: "other".into(), ..document("ab") }, document("c")]));
}
