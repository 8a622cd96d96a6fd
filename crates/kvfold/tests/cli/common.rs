//! A directory per test, and a command that runs in it.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The sources of the embedded model, to be damaged.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../kvfold-model/models/stories260k");

/// The text of `data/`, which nobody trained on.
pub(crate) const HELD_OUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/tinystories_heldout.txt");

/// What the independent implementation computed.
pub(crate) fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../kvfold-model/tests/goldens/stories260k_greedy.json");
    serde_json::from_slice(&std::fs::read(path).expect("a golden")).expect("JSON")
}

/// A directory of one test's own, removed at its end.
pub(crate) struct Dir(tempfile::TempDir);

impl Dir {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).expect("writable");
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Names in a directory, hidden ones included, in order.
    pub(crate) fn list(&self, name: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let name = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("an entry").file_name();
        let mut names: Vec<String> = entries.map(|entry| name(entry).to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// A copy of the embedded model's directory, called `model`.
    pub(crate) fn model(&self) -> PathBuf {
        let copy = self.path("model");
        std::fs::create_dir(&copy).expect("a new directory");
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            std::fs::copy(Path::new(MODEL).join(name), copy.join(name)).expect("a copy");
        }
        copy
    }

    /// The command, to be run in this directory.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvfold"));
        command.current_dir(self.0.path()).args(args).stdin(Stdio::null());
        // A backtrace would hide what matters in the message of a failed test.
        command.env_remove("RUST_BACKTRACE");
        command
    }

    /// Runs the command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        self.run_on(args, "")
    }

    /// Runs the command to its end, with this to read on standard input.
    pub(crate) fn run_on(&self, args: &[&str], input: &str) -> Ran {
        let mut command = assert_cmd::Command::from_std(self.command(args));
        let output = command.write_stdin(input).timeout(Duration::from_secs(120)).output();
        let output = output.expect("the command starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let ran = Ran {
            args: args.join(" "),
            code: output.status.code(),
            out: text(output.stdout),
            err: text(output.stderr),
        };
        assert!(!ran.err.contains("panicked at"), "{ran:?}");
        ran
    }

    /// Runs the command with `extra` after `args`.
    pub(crate) fn run_with(&self, args: &[&str], extra: &[&str]) -> Ran {
        self.run(&[args, extra].concat())
    }
}

/// How a command went.
#[derive(Debug)]
pub(crate) struct Ran {
    args: String,
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// Asserts success, and that standard error has no more than what people are told; gives standard output.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "kvfold {}\n{}", self.args, self.err);
        assert!(!self.err.contains("\x1b["), "a progress bar where there is no terminal: {:?}", self.err);
        self.out
    }

    /// The one JSON document on standard output of a command that succeeds and says nothing else.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let out = self.ok();
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error} in {out}"))
    }

    /// Asserts a failure with this exit code, nothing on standard output, and one line that says all of `phrases`.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, phrases: &[&str]) {
        let Self { args, out, err, .. } = &self;
        assert_eq!(self.code, Some(code), "kvfold {args}\n{err}");
        assert_eq!(out, "", "kvfold {args}");
        if code != 2 {
            assert!(err.starts_with("kvfold: ") && err.trim_end().lines().count() == 1, "kvfold {args}\n{err}");
        }
        for phrase in phrases {
            assert!(err.contains(phrase), "kvfold {args}\nno {phrase:?} in: {err}");
        }
    }
}

/// Checks that an object has these keys and no others.
#[track_caller]
pub(crate) fn assert_keys(value: &Value, keys: &[&str]) {
    let mut found: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    let mut keys = keys.to_vec();
    found.sort_unstable();
    keys.sort_unstable();
    assert_eq!(found, keys);
}

/// The number at a path of keys.
#[track_caller]
pub(crate) fn number(value: &Value, pointer: &str) -> f64 {
    let found = value.pointer(pointer).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("no number at {pointer} of {value}"))
}
