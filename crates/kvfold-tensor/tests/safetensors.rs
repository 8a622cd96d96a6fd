//! Safetensors files: round trips, files as other programs write and read them, and hostile input.

use std::collections::{BTreeMap, HashMap};

use kvfold_tensor::{DType, Error, HostTensor, read, read_bytes, write};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

type Tensors = BTreeMap<String, HostTensor>;

/// The bytes of a file with this header and data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// The message for a file that must not be read.
fn refused(bytes: &[u8]) -> String {
    let message = read_bytes(bytes, "evil.safetensors").expect_err("a hostile file was read").to_string();
    assert!(message.starts_with("evil.safetensors: "), "the file is not named: {message}");
    message
}

/// Asserts that `message` contains each of `parts`.
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

fn tensors() -> impl Strategy<Value = Tensors> {
    let dtype = prop::sample::select(DType::ALL.to_vec());
    let tensor = (dtype, prop::collection::vec(0usize..5, 0..4), any::<u8>()).prop_map(|(dtype, shape, seed)| {
        let mut tensor = HostTensor::zeros(dtype, shape);
        tensor
            .bytes_mut()
            .iter_mut()
            .enumerate()
            .for_each(|(i, byte)| *byte = seed.wrapping_mul(31).wrapping_add(i as u8));
        tensor
    });
    prop::collection::btree_map("[a-z.\"\\\\é]{0,12}", tensor, 0..6)
}

fn theirs(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        tensors in tensors(),
        metadata in prop::collection::btree_map("[a-z]{1,5}", ".{0,9}", 0..4),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        write(&path, &tensors, &metadata).unwrap();
        let back = read(&path).unwrap();
        prop_assert_eq!(&back.tensors, &tensors);
        prop_assert_eq!(&back.metadata, &metadata);

        let bytes = std::fs::read(&path).unwrap();
        let others = SafeTensors::deserialize(&bytes).unwrap();
        prop_assert_eq!(others.len(), tensors.len());
        for (name, tensor) in &tensors {
            let view = others.tensor(name).unwrap();
            prop_assert_eq!(view.dtype(), theirs(tensor.dtype()));
            prop_assert_eq!(view.shape(), tensor.shape());
            prop_assert_eq!(view.data(), tensor.bytes());
        }

        write(&path, &tensors, &metadata).unwrap();
        if metadata.len() < 2 {
            prop_assert_eq!(std::fs::read(&path).unwrap(), bytes, "equal input gave different bytes");
        }
        prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left behind");
    }

    #[test]
    fn what_others_write_is_read(tensors in tensors()) {
        let views = tensors.iter().map(|(name, tensor)| {
            (name, TensorView::new(theirs(tensor.dtype()), tensor.shape().to_vec(), tensor.bytes()).unwrap())
        });
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let bytes = safetensors::serialize(views, Some(metadata)).unwrap();
        let ours = read_bytes(&bytes, "theirs").unwrap();
        prop_assert_eq!(ours.tensors, tensors);
        prop_assert!(ours.skipped.is_empty());
        prop_assert_eq!(&ours.metadata["format"], "pt");
    }

    #[test]
    fn no_byte_can_be_changed_into_a_panic(at in 0usize..200, byte in any::<u8>()) {
        let mut bytes = small();
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = read_bytes(&bytes, "mutated");
    }

    #[test]
    fn no_bytes_at_all_are_a_panic(header in ".{0,80}", data in prop::collection::vec(any::<u8>(), 0..32)) {
        let _ = read_bytes(&file(&header, &data), "noise");
        let _ = read_bytes(&data, "noise");
    }
}

/// A valid file of two tensors.
fn small() -> Vec<u8> {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]}}"#;
    file(header, &[0; 14])
}

#[test]
fn every_prefix_of_a_file_is_called_truncated() {
    let bytes = small();
    read_bytes(&bytes, "whole").unwrap();
    for len in 0..bytes.len() {
        let error = read_bytes(&bytes[..len], "cut").unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "at {len} bytes: {error}");
        says(&error.to_string(), &["cut: truncated", &format!("the file has {len};"), "fetch the file again"]);
    }
}

#[test]
fn bytes_after_the_data_are_refused() {
    let bytes = [small(), vec![0; 3]].concat();
    says(&refused(&bytes), &["3 bytes follow the last tensor"]);
}

#[test]
fn an_absurd_header_length_is_refused_before_memory_is_taken_for_it() {
    for length in [u64::MAX, 1 << 40, 100_000_001] {
        let bytes = [&length.to_le_bytes()[..], b"{}"].concat();
        says(&refused(&bytes), &[&length.to_string(), "over the limit of 100000000"]);
    }
    let bytes = [&100_000_000u64.to_le_bytes()[..], b"{}"].concat();
    says(&refused(&bytes), &["truncated: the header needs 100000008 bytes and the file has 10"]);
}

#[test]
fn a_git_lfs_pointer_is_recognised_for_what_it_is() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1\n";
    says(&refused(pointer), &["git-lfs"]);
}

#[test]
fn a_header_that_is_no_json_object_is_refused() {
    for header in ["", "[]", "{", "null", "\u{7f}", "{\"a\":}"] {
        says(&refused(&file(header, &[])), &["invalid safetensors header"]);
    }
    let mut not_utf8 = file("{\"aa\":1}", &[]);
    not_utf8[10] = 0xff;
    says(&refused(&not_utf8), &["invalid safetensors header"]);
    says(&refused(&file(&"[".repeat(5000), &[])), &["invalid safetensors header"]);
    says(&refused(&file(r#"{"__metadata__":{"a":1}}"#, &[])), &["expected a string", "fetch the file again"]);
}

#[test]
fn an_entry_that_cannot_be_true_is_refused() {
    let entry = |entry: &str| refused(&file(&format!("{{\"w.weight\":{entry}}}"), &[0; 8]));
    says(&entry("7"), &["invalid safetensors header"]);
    says(&entry(r#"{"dtype":"F32","shape":[2]}"#), &["data_offsets"]);
    says(&entry(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#), &["-2"]);
    says(&entry(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), &["invalid shape"]);
    says(&entry(r#"{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,8]}"#), &["overflow"]);
    says(&entry(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), &["offset for tensor `w.weight`"]);
    says(&entry(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}"#), &["invalid shape"]);
    says(&entry(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#), &["byte boundary"]);
    says(&entry(r#"{"dtype":"Q4_FROM_THE_FUTURE","shape":[4],"data_offsets":[0,8]}"#), &["Q4_FROM_THE_FUTURE"]);
}

#[test]
fn tensors_that_fill_the_address_space_are_called_truncated() {
    // Each is as long as a shape may be, and with the last one the data end where 64 bits do.
    let long = (1u64 << 61) - 1;
    let mut entries: Vec<_> = (0..8)
        .map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[{long}],"data_offsets":[{},{}]}}"#, i * long, (i + 1) * long))
        .collect();
    entries.push(format!(r#""8":{{"dtype":"U8","shape":[7],"data_offsets":[{},{}]}}"#, 8 * long, u64::MAX));
    for entries in [&entries[..8], &entries[..]] {
        let header = format!("{{{}}}", entries.join(","));
        says(&refused(&file(&header, &[])), &["truncated: the data needs 18446744073709551615 bytes"]);
    }
}

#[test]
fn tensors_may_neither_overlap_nor_leave_a_hole() {
    let two = |a: (usize, usize), b: (usize, usize)| {
        let entry =
            |(from, to): (usize, usize)| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":[{from},{to}]}}"#);
        refused(&file(&format!(r#"{{"a":{},"b":{}}}"#, entry(a), entry(b)), &[0; 16]))
    };
    says(&two((0, 8), (4, 12)), &["invalid offset for tensor `b`"]);
    says(&two((0, 8), (0, 8)), &["invalid offset for tensor `"]);
    says(&two((0, 8), (12, 20)), &["invalid offset for tensor `b`"]);
    says(&two((4, 12), (12, 20)), &["invalid offset for tensor `a`"]);
}

#[test]
fn tensors_of_other_dtypes_are_skipped_and_listed() {
    for (dtype, size) in [("BOOL", 1), ("I8", 1), ("U8", 1), ("F8_E4M3", 1), ("I16", 2), ("U32", 4), ("I64", 8)] {
        let end = 4 + 3 * size;
        let header = format!(
            r#"{{"z":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},
                "ids":{{"dtype":"{dtype}","shape":[3],"data_offsets":[4,{end}]}},
                "a":{{"dtype":"F32","shape":[1],"data_offsets":[{end},{}]}}}}"#,
            end + 4
        );
        let data = [&1f32.to_le_bytes()[..], &vec![0xff; 3 * size], &2f32.to_le_bytes()].concat();
        let bytes = file(&header, &data);
        let read = read_bytes(&bytes, "mixed").unwrap();
        assert_eq!(read.skipped, BTreeMap::from([("ids".to_string(), dtype.to_string())]));
        let floats = [("a", 2.0), ("z", 1.0)].map(|(name, x)| (name.to_string(), HostTensor::from_f32([1], &[x])));
        assert_eq!(read.tensors, BTreeMap::from(floats));
        // What is not read is checked all the same.
        let error = read_bytes(&bytes[..bytes.len() - 1], "cut").unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{error}");
    }
}

#[test]
fn a_missing_file_and_a_directory_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.safetensors");
    let error = read(&path).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }));
    says(&error.to_string(), &["none.safetensors: no such file"]);
    assert!(read(dir.path()).unwrap_err().to_string().contains(&dir.path().display().to_string()));
}

#[test]
fn a_tensor_may_not_take_the_reserved_name() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = Tensors::from([("__metadata__".to_string(), HostTensor::zeros(DType::F32, [1]))]);
    let error = write(&dir.path().join("x"), &tensors, &BTreeMap::new()).unwrap_err();
    says(&error.to_string(), &["tensor `__metadata__`", "reserved"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn writing_into_a_missing_directory_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let error = write(&dir.path().join("no/x.safetensors"), &Tensors::new(), &BTreeMap::new()).unwrap_err();
    says(&error.to_string(), &["no/x.safetensors: cannot write"]);
}
