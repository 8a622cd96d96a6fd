//! GGUF files: what is read, against an independent implementation, and what is refused.

use kvfold_tensor::gguf::{Kind, Value};
use kvfold_tensor::{DType, Error, Gguf};
use proptest::prelude::*;

/// A file, put together by hand.
#[derive(Clone, Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn header(version: u32, tensors: u64, keys: u64) -> Self {
        Bytes(b"GGUF".to_vec()).u32(version).u64(tensors).u64(keys)
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn u32(self, n: u32) -> Self {
        self.raw(&n.to_le_bytes())
    }

    fn u64(self, n: u64) -> Self {
        self.raw(&n.to_le_bytes())
    }

    fn text(self, text: &str) -> Self {
        self.u64(text.len() as u64).raw(text.as_bytes())
    }

    /// A key with the number of its type; the value follows.
    fn key(self, key: &str, kind: u32) -> Self {
        self.text(key).u32(kind)
    }

    /// A tensor's description, dimensions innermost first as in the file.
    fn info(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let start = self.text(name).u32(dims.len() as u32);
        dims.iter().fold(start, |bytes, &dim| bytes.u64(dim)).u32(kind).u64(offset)
    }

    fn pad(mut self, alignment: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(alignment), 0);
        self
    }

    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        let message = Gguf::from_bytes(&self.0, "x.gguf").expect_err("a bad file was opened").to_string();
        assert!(message.starts_with("x.gguf: "), "{message}");
        for part in parts {
            assert!(message.contains(part), "expected {part:?} in: {message}");
        }
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Every type of value, two tensors.
fn sample(version: u32) -> Bytes {
    let keys = Bytes::header(version, 2, 16)
        .key("general.alignment", 4)
        .u32(64)
        .key("u8", 0)
        .raw(&[200])
        .key("i8", 1)
        .raw(&[0x80])
        .key("u16", 2)
        .raw(&[1, 2])
        .key("i16", 3)
        .raw(&[0xff, 0xff])
        .key("i32", 5)
        .raw(&(-7_i32).to_le_bytes())
        .key("f32", 6)
        .raw(&1e-5_f32.to_le_bytes())
        .key("bool", 7)
        .raw(&[1])
        .key("text", 8)
        .text("naïve ▁")
        .key("u64", 10)
        .u64(u64::MAX)
        .key("i64", 11)
        .raw(&i64::MIN.to_le_bytes())
        .key("f64", 12)
        .raw(&0.1_f64.to_le_bytes())
        .key("texts", 9)
        .u32(8)
        .u64(2)
        .text("a")
        .text("")
        .key("ints", 9)
        .u32(5)
        .u64(2)
        .raw(&(-1_i32).to_le_bytes())
        .u32(3)
        .key("floats", 9)
        .u32(6)
        .u64(1)
        .raw(&0.5_f32.to_le_bytes())
        .key("bools", 9)
        .u32(7)
        .u64(2)
        .raw(&[0, 1]);
    keys.info("matrix", &[3, 2], 0, 64)
        .info("vector", &[4], 30, 0)
        .pad(64)
        .raw(&[0x80, 0x3f, 0, 0, 0, 0xc0, 0x40, 0x40])
        .pad(64)
        .raw(&floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
}

#[test]
fn every_type_of_value_is_read() {
    for version in [2, 3] {
        let bytes = sample(version);
        let mut file = Gguf::from_bytes(&bytes.0, "x.gguf").unwrap();
        let get = |key: &str| file.metadata()[key].clone();
        assert_eq!(get("u8"), Value::Unsigned(200));
        assert_eq!(get("i8"), Value::Signed(-128));
        assert_eq!(get("u16"), Value::Unsigned(513));
        assert_eq!(get("i16"), Value::Signed(-1));
        assert_eq!(get("i32"), Value::Signed(-7));
        assert_eq!(get("f32").as_float(), Some(1e-5));
        assert_eq!(get("bool").as_bool(), Some(true));
        assert_eq!(get("text").as_str(), Some("naïve ▁"));
        assert_eq!(get("u64").as_unsigned(), Some(u64::MAX));
        assert_eq!(get("i64"), Value::Signed(i64::MIN));
        assert_eq!(get("f64"), Value::F64(0.1));
        assert_eq!(get("texts"), Value::Strings(vec!["a".into(), String::new()]));
        assert_eq!(get("ints"), Value::Integers(vec![-1, 3]));
        assert_eq!(get("floats"), Value::Floats(vec![0.5]));
        assert_eq!(get("bools"), Value::Bools(vec![false, true]));

        assert_eq!(file.tensors()["matrix"].shape, [2, 3]);
        assert_eq!(file.tensors()["vector"].kind, Kind::BF16);
        let matrix = file.tensor("matrix").unwrap();
        assert_eq!((matrix.dtype(), matrix.shape()), (DType::F32, &[2, 3][..]));
        assert_eq!(matrix.to_f32(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(file.tensor("vector").unwrap().to_f32(), [1.0, 0.0, -2.0, 3.0]);
        assert!(file.tensor("none").is_err());
    }
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn quantised_blocks_have_the_golden_values_bit_by_bit() {
    let golden = include_str!("goldens/gguf_blocks.json");
    let golden: serde_json::Map<String, serde_json::Value> = serde_json::from_str(golden).unwrap();
    assert_eq!(golden.len(), 10);
    for (name, golden) in golden {
        let (blocks, want) = (unhex(golden["blocks"].as_str().unwrap()), unhex(golden["values"].as_str().unwrap()));
        let number = golden["number"].as_u64().unwrap() as u32;
        assert_eq!(Kind::of(number).to_string(), name);
        let count = want.len() as u64 / 4;
        // Twice, once behind more rows than are read at a time, so that the cuts between pieces are seen.
        for rows in [1, 1 + (3 << 20) / blocks.len() as u64] {
            let bytes = Bytes::header(3, 1, 0).info("w", &[count, rows], number, 0).pad(32);
            let bytes = bytes.raw(&blocks.repeat(rows as usize));
            let got = Gguf::from_bytes(&bytes.0, "x.gguf").unwrap().tensor("w").unwrap();
            assert!(got.bytes() == want.repeat(rows as usize), "{name}, {rows} rows");
        }
    }
}

#[test]
fn half_precision_is_exact() {
    let bytes = Bytes::header(3, 1, 0).info("w", &[3], 1, 0).pad(32).raw(&[0x00, 0x3c, 0x01, 0x00, 0xff, 0xfb]);
    let got = Gguf::from_bytes(&bytes.0, "x.gguf").unwrap().tensor("w").unwrap().to_f32();
    assert_eq!(got, [1.0, 2.0_f32.powi(-24), -65504.0]);
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let whole = sample(3).0;
    for len in 0..whole.len() {
        match Gguf::from_bytes(&whole[..len], "x.gguf") {
            Err(Error::Truncated { needed, found, .. }) => assert!(found == len as u64 && needed > found),
            other => panic!("{len} bytes: {other:?}"),
        }
    }
}

#[test]
fn other_files_are_refused() {
    Bytes(b"PK\x03\x04 a zip file".to_vec()).refused(&["another kind of file"]);
    Bytes::header(1, 0, 0).refused(&["version 1"]);
    Bytes::header(3_u32.swap_bytes(), 0, 0).refused(&["big-endian"]);
    Bytes::header(u32::MAX, 0, 0).refused(&["version 4294967295"]);
}

#[test]
fn absurd_counts_are_refused_before_memory_is_taken() {
    Bytes::header(3, u64::MAX, 0).refused(&["tensors", "limit"]);
    Bytes::header(3, 0, u64::MAX).refused(&["keys", "limit"]);
    Bytes::header(3, 0, 1).u64(u64::MAX).refused(&["a key of 18446744073709551615 bytes"]);
    Bytes::header(3, 0, 1).key("k", 8).u64(u64::MAX).refused(&["`k`", "limit"]);
    Bytes::header(3, 0, 1).key("k", 8).u64(1 << 20).refused(&["truncated"]);
    Bytes::header(3, 0, 1).key("k", 9).u32(8).u64(u64::MAX).refused(&["`k`", "limit"]);
    Bytes::header(3, 0, 1).key("k", 9).u32(10).u64(1 << 24).refused(&["truncated"]);
    let dims = Bytes::header(3, 1, 0).text("w").u32(u32::MAX);
    dims.refused(&["`w`", "4294967295 dimensions"]);
    Bytes::header(3, 1, 0).info("w", &[u64::MAX, 2], 0, 0).refused(&["`w`", "fits no file"]);
    Bytes::header(3, 1, 0).info("w", &[1 << 40, 1 << 40, 1 << 40], 0, 0).refused(&["`w`", "fits no file"]);
    Bytes::header(3, 1, 0).info("w", &[1 << 40], 0, 0).refused(&["truncated"]);
}

#[test]
fn nested_and_unknown_values_are_refused() {
    let nested = (0..1000).fold(Bytes::header(3, 0, 1).key("k", 9), |bytes, _| bytes.u32(9).u64(1));
    nested.refused(&["`k`", "list of lists"]);
    Bytes::header(3, 0, 1).key("k", 13).refused(&["`k`", "unknown type 13"]);
    Bytes::header(3, 0, 1).key("k", 9).u32(77).u64(0).refused(&["`k`", "unknown type 77"]);
    Bytes::header(3, 0, 1).key("k", 7).raw(&[2]).refused(&["`k`", "neither true nor false"]);
    Bytes::header(3, 0, 1).key("k", 8).u64(1).raw(&[0xff]).refused(&["`k`", "UTF-8"]);
    Bytes::header(3, 0, 1).key("k", 9).u32(10).u64(1).u64(u64::MAX).refused(&["`k`", "too large"]);
}

#[test]
fn duplicates_are_refused() {
    Bytes::header(3, 0, 2).key("k", 0).raw(&[1]).key("k", 0).raw(&[1]).refused(&["`k`", "twice"]);
    let twice = Bytes::header(3, 2, 0).info("w", &[1], 0, 0).info("w", &[1], 0, 32).pad(32).raw(&[0; 64]);
    twice.refused(&["`w`", "twice"]);
}

#[test]
fn tensors_must_lie_in_the_file() {
    let file = |dims: &[u64], kind, offset| Bytes::header(3, 1, 0).info("w", dims, kind, offset).pad(32).raw(&[0; 64]);
    assert!(Gguf::from_bytes(&file(&[16], 0, 0).0, "x.gguf").is_ok());
    file(&[17], 0, 0).refused(&["truncated"]);
    file(&[16], 0, 32).refused(&["truncated"]);
    file(&[16], 0, 1).refused(&["`w`", "alignment"]);
    file(&[16], 0, u64::MAX - 31).refused(&["`w`", "fits no file"]);
    file(&[0], 0, 0).refused(&["`w`", "dimension of 0"]);
    file(&[16], 2, 0).refused(&["`w`", "32 values of a Q4_0 block"]);
    for alignment in [0, 3, 1 << 31] {
        Bytes::header(3, 0, 1).key("general.alignment", 4).u32(alignment).refused(&["`general.alignment`"]);
    }
}

#[test]
fn a_type_that_is_not_read_is_refused_by_name_when_it_is_asked_for() {
    let bytes = Bytes::header(3, 1, 0).info("w", &[256], 16, 0).pad(32).raw(&[0; 66]);
    let mut file = Gguf::from_bytes(&bytes.0, "x.gguf").unwrap();
    let message = file.tensor("w").unwrap_err().to_string();
    assert!(message.contains("`w`") && message.contains("ggml type 16") && message.contains("Q6_K"), "{message}");
}

proptest! {
    #[test]
    fn no_byte_makes_it_panic(at in 0_usize..800, byte in any::<u8>()) {
        let mut bytes = sample(3).0;
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(mut file) = Gguf::from_bytes(&bytes, "x.gguf") {
            for name in file.tensors().keys().cloned().collect::<Vec<_>>() {
                let _ = file.tensor(&name);
            }
        }
    }
}
