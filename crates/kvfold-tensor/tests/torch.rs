//! PyTorch files: what `torch.save` writes is read to the bit, and a pickle that wants to do anything is refused.

use kvfold_tensor::{Error, TorchFile};
use proptest::prelude::*;
use std::io::{Cursor, Write};

const REAL: &[u8] = include_bytes!("goldens/torch_tensors.pt");

fn golden() -> kvfold_tensor::TensorFile {
    let bytes = include_bytes!("goldens/torch_tensors.safetensors");
    kvfold_tensor::read_bytes(bytes, "golden").expect("a golden")
}

/// An archive of stored entries.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        zip.start_file(*name, stored).expect("an entry");
        zip.write_all(bytes).expect("an entry");
    }
    zip.finish().expect("an archive").into_inner()
}

fn open(program: &[u8]) -> Result<TorchFile<Cursor<&'static [u8]>>, Error> {
    let bytes = archive(&[("archive/data.pkl", program), ("archive/data/0", &[0; 16])]);
    TorchFile::from_bytes(Box::leak(bytes.into_boxed_slice()), "x.pt")
}

/// Asserts that a program is refused by a message with all of `parts`.
#[track_caller]
fn refused(program: &[u8], parts: &[&str]) {
    let message = open(program).expect_err("a refusal").to_string();
    for part in parts.iter().chain(&["x.pt", "byte "]) {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

#[test]
fn every_layout_and_dtype_comes_back_to_the_bit() {
    let golden = golden();
    let mut file = TorchFile::from_bytes(REAL, "real").expect("a file of torch.save");
    let infos: Vec<_> = {
        let model = file.root().get("model").expect("a model");
        model.entries().map(|(name, value)| (name.to_owned(), value.tensor().expect("a tensor").clone())).collect()
    };
    assert_eq!(infos.len(), golden.tensors.len());
    for (name, info) in &infos {
        assert_eq!(file.tensor(name, info).unwrap_or_else(|e| panic!("{e}")), golden.tensors[name], "{name}");
    }
    let root = file.root();
    assert_eq!(root.get("when").and_then(|n| n.integer()), Some(3));
    assert!(root.get("nothing").expect("an entry").is_none());
    assert!(root.get("absent").is_none());
    let integers = root.get("integers").and_then(|t| t.tensor()).expect("a tensor").clone();
    let message = file.tensor("integers", &integers).expect_err("no float").to_string();
    assert!(message.contains("LongStorage") && message.contains("`integers`"), "{message}");
}

#[test]
fn nothing_that_a_pickle_names_is_called() {
    let target = std::env::temp_dir().join(format!("kvfold-pickle-{}", std::process::id()));
    let command = format!("touch {}", target.display());
    let call = |module: &str| {
        let mut program = format!("\x01(c{module}\n").into_bytes();
        program.splice(..2, [0x80, 2]);
        program.extend_from_slice(b"X");
        program.extend_from_slice(&(command.len() as u32).to_le_bytes());
        program.extend_from_slice(command.as_bytes());
        program.extend_from_slice(b"\x85R.");
        program
    };
    refused(&call("os\nsystem"), &["`os.system`", "byte 2", "nothing of it was run"]);
    for name in [
        "posix\nsystem",
        "nt\nsystem",
        "subprocess\nPopen",
        "builtins\neval",
        "__builtin__\neval",
        "builtins\nexec",
        "builtins\ngetattr",
        "runpy\n_run_code",
        "operator\nattrgetter",
        "webbrowser\nopen",
        "torch_evil\nrun",
        "megatronx\nrun",
    ] {
        refused(&call(name), &[&name.replace('\n', ".")]);
    }
    // The same by the instruction of later protocols.
    refused(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", &["`os.system`", "byte 14"]);
    // Inside of an argument of something harmless.
    refused(b"\x80\x02ccollections\nOrderedDict\n(cposix\nsystem\nX\x02\0\0\0id\x85RtR.", &["`posix.system`"]);
    // A name of an allowed library is a name: what it makes is inert, whatever the arguments.
    let program = b"\x80\x02}X\x01\0\0\0aK\x07X\x01\0\0\0bctorch.hub\nload\nX\x02\0\0\0id\x85Rs.";
    assert!(open(program).is_err(), "two values and one key");
    let file = open(b"\x80\x02}(X\x01\0\0\0aK\x07X\x01\0\0\0bctorch.hub\nload\nX\x02\0\0\0id\x85Ru.").expect("inert");
    assert_eq!(file.root().get("a").and_then(|a| a.integer()), Some(7));
    assert!(file.root().get("b").is_some_and(|b| b.tensor().is_none() && b.text().is_none()));
    assert!(!target.exists(), "something ran");
}

#[test]
fn instructions_that_no_dictionary_of_tensors_needs_are_refused_by_number() {
    let others: [(&[u8], &str); 7] = [
        (b"\x80\x02(ios\nsystem\n.", "0x69"),
        (b"\x80\x02(cos\nsystem\no.", "`os.system`"),
        (b"\x80\x02(K\x01o.", "0x6f"),
        (b"\x80\x02\x82\x01.", "0x82"),
        (b"\x80\x02Pid\n.", "0x50"),
        (b"\x80\x02S'text'\n.", "0x53"),
        (b"\x80\x02I1\n.", "0x49"),
    ];
    for (program, what) in others {
        refused(program, &[what]);
    }
    refused(b"\x80\x01.", &["protocol 1"]);
    refused(b"\x80\x02", &["ends"]);
    refused(b"\x80\x02K", &["ends"]);
    refused(b"\x80\x02X\xff\xff\xff\xffa.", &["ends"]);
    refused(b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.", &["ends"]);
    refused(b"\x80\x02.", &["empty stack"]);
    refused(b"\x80\x02K\x01(0.", &["empty stack"]);
    refused(b"\x80\x02t.", &["no mark"]);
    refused(b"\x80\x02h\x05.", &["memo 5"]);
    refused(b"\x80\x02K\x01K\x02a.", &["no list"]);
    refused(b"\x80\x02K\x01)R.", &["no name"]);
    refused(b"\x80\x02K\x01Q.", &["no storage"]);
    refused(b"\x80\x02X\x01\0\0\0\xff.", &["UTF-8"]);
}

#[test]
fn values_within_themselves_and_deep_ones_are_no_danger() {
    // A dictionary whose entry is itself.
    let file = open(b"\x80\x02}q\0X\x01\0\0\0ah\0s.").expect("a cycle");
    let mut value = file.root();
    for _ in 0..100 {
        value = value.get("a").expect("itself");
    }
    // A million lists, one inside the other.
    let mut deep = b"\x80\x02".to_vec();
    deep.resize(1_000_002, b']');
    deep.resize(2_000_001, b'a');
    deep.push(b'.');
    assert!(open(&deep).expect("a list").root().tensor().is_none());
}

/// A tensor of `torch._utils._rebuild_tensor_v2` with these numbers, as the only value.
fn tensor(len: i32, offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    let mut program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n".to_vec();
    let number = |program: &mut Vec<u8>, n: i32| {
        program.push(b'J');
        program.extend_from_slice(&n.to_le_bytes());
    };
    program.extend_from_slice(b"X\x01\0\0\x000X\x03\0\0\0cpu");
    number(&mut program, len);
    program.extend_from_slice(b"tQ");
    number(&mut program, offset);
    for sizes in [shape, strides] {
        program.push(b'(');
        sizes.iter().for_each(|&n| number(&mut program, n));
        program.push(b't');
    }
    program.extend_from_slice(b"\x89NtR.");
    program
}

#[test]
fn tensors_outside_of_their_storage_take_no_memory() {
    let read = |program: &[u8]| {
        let mut file = open(program)?;
        let info = file.root().tensor().expect("a tensor").clone();
        file.tensor("w", &info)
    };
    assert_eq!(read(&tensor(4, 0, &[2, 2], &[2, 1])).expect("four zeros").to_f32(), [0.0; 4]);
    assert_eq!(read(&tensor(4, 1, &[3], &[1])).expect("three").shape(), [3]);
    for (program, part) in [
        (tensor(4, 1, &[4], &[1]), "does not fit its storage of 4"),
        (tensor(4, 5, &[0], &[1]), "does not fit"),
        (tensor(4, 0, &[2, 2], &[3, 1]), "does not fit"),
        (tensor(4, 0, &[i32::MAX, i32::MAX, i32::MAX], &[0, 0, 0]), "does not fit"),
        (tensor(4, 0, &[i32::MAX], &[0]), "does not fit"),
        (tensor(4, 0, &[2, 2], &[i32::MAX, i32::MAX]), "does not fit"),
        (tensor(i32::MAX, 0, &[i32::MAX], &[1]), "does not fit"),
        (tensor(3, 0, &[3], &[1]), "has 16 bytes; 3 elements need 12"),
        (tensor(-4, 0, &[2], &[1]), "no storage"),
        (tensor(4, -1, &[2], &[1]), "an offset"),
        (tensor(4, 0, &[-2], &[1]), "shape"),
        (tensor(4, 0, &[2, 2], &[1]), "strides"),
    ] {
        let message = read(&program).expect_err(part).to_string();
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

#[test]
fn archives_that_torch_did_not_write_say_what_is_wrong() {
    let fails = |bytes: &[u8], part: &str| {
        let message = TorchFile::from_bytes(bytes, "x.pt").expect_err(part).to_string();
        assert!(message.contains(part) && message.contains("x.pt"), "expected {part:?} in: {message}");
    };
    fails(b"", "archive");
    fails(b"\x80\x02}q\0.", "save an older file anew");
    fails(&archive(&[("archive/other", b"")]), "no data.pkl");
    fails(&archive(&[("a/data.pkl", b"\x80\x02N."), ("a/byteorder", b"big")]), "big-endian");
    assert!(TorchFile::from_bytes(&archive(&[("a/data.pkl", b"\x80\x02N.")]), "x").expect("None").root().is_none());
}

/// Reads all there is; every way that a damaged file ends is fine, but a panic.
fn read_all(bytes: &[u8]) {
    let Ok(mut file) = TorchFile::from_bytes(bytes, "damaged") else { return };
    let mut infos = Vec::new();
    if let Some(model) = file.root().get("model") {
        infos.extend(model.entries().filter_map(|(name, value)| Some((name.to_owned(), value.tensor()?.clone()))));
    }
    for (name, info) in infos {
        let _ = file.tensor(&name, &info);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut in any::<Option<prop::sample::Index>>()) {
        let mut bytes = REAL.to_vec();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        read_all(&bytes);
    }

    #[test]
    fn damaged_programs_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        // The program alone, in an archive that is whole, so that what is damaged is what the machine runs.
        let mut zip = zip::ZipArchive::new(Cursor::new(REAL)).expect("an archive");
        let mut entries = Vec::new();
        for n in 0..zip.len() {
            let mut entry = zip.by_index(n).expect("an entry");
            let mut bytes = Vec::new();
            std::io::copy(&mut entry, &mut bytes).expect("its bytes");
            entries.push((entry.name().expect("a name").into_owned(), bytes));
        }
        let (_, program) = entries.iter_mut().find(|(name, _)| name.ends_with("data.pkl")).expect("the program");
        for (at, byte) in changes {
            let at = at.index(program.len());
            program[at] = byte;
        }
        let entries: Vec<(&str, &[u8])> = entries.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
        read_all(&archive(&entries));
    }

    #[test]
    fn random_programs_never_panic(program in prop::collection::vec(prop::sample::select(&b".(01NJKMGX]})aestuhqrcRbQ\x80\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x81\x8f\x90\0\x01\x02\n"[..]), 0..60)) {
        let _ = open(&program);
    }
}
