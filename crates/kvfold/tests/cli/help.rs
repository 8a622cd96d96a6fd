//! What a newcomer reads.

use crate::common::Dir;

fn help(args: &[&str]) -> String {
    // Wrapped lines are joined, so that a phrase is found wherever it breaks.
    Dir::new().run(args).ok().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn assert_says(text: &str, phrases: &[&str]) {
    for phrase in phrases {
        assert!(text.contains(phrase), "no {phrase:?} in: {text}");
    }
}

#[test]
fn without_arguments_the_help_is_shown_and_the_code_says_that_this_was_not_it() {
    let ran = Dir::new().run(&[]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""));
    assert_says(&ran.err, &["Usage: kvfold", "demo", "retrofit", "generate", "eval"]);
}

#[test]
fn the_help_states_commands_models_and_exit_codes() {
    let text = help(&["--help"]);
    assert_says(&text, &["demo", "retrofit", "generate", "eval", "Hugging Face directory", "stories260k"]);
    assert_says(&text, &["Exit codes:", "0 done", "1 the machine failed", "2 the arguments are wrong"]);
    assert_says(&text, &["3 the input cannot be used", "4 training failed", "130 interrupted"]);
    assert_says(&text, &["--threads", "[default: one per core]"]);
}

#[test]
fn every_command_states_units_and_defaults() {
    assert_says(&help(&["demo", "--help"]), &["receipt", "--json <FILE>", "--seed <N>", "[default: 0]", "--out <DIR>"]);
    assert_says(
        &help(&["generate", "--help"]),
        &["--prompt <TEXT>", "[default: 256, or what the model's context leaves]", "0 takes the most likely token"],
    );
    assert_says(&help(&["bench", "kernels", "--help"]), &["--tokens <N>", "[default: 1024]", "per second from memory"]);
    assert_says(
        &help(&["bench", "model", "--help"]),
        &["--against <MODEL>", "SxN", "[default: random tokens]", "byte ceiling", "[default: 32]"],
    );
    assert_says(&help(&["eval", "--help"]), &["ppl"]);
    assert_says(
        &help(&["eval", "ppl", "--help"]),
        &[
            "consecutive windows",
            "a last incomplete one is dropped",
            "[default: 1024, or the model's context if shorter]",
        ],
    );
    assert_says(
        &help(&["retrofit", "--help"]),
        &[
            "tokens seen per slot held",
            "4 keeps a quarter",
            "[default: distill]",
            "[default: head]",
            "[default: 120]",
            "[default: 512, or the model's context if shorter]",
            "[default: 1e-3 * (64 / hidden size)^0.75, a tenth of it after a fit]",
            "[default: the model writes its own]",
            "--resume",
            "How to compress",
            "How to train",
            "files or folders",
            "--plan",
            "Queries and keys, and the decision heads",
            "[default: what the steps take]",
        ],
    );
    assert_says(&help(&["export", "--help"]), &["what it changed of its base", "--delta", "[default: bf16]"]);
}

#[test]
fn the_version_names_the_commit() {
    let text = help(&["--version"]);
    let commit = text.strip_prefix("kvfold 0.1.0 (").and_then(|rest| rest.strip_suffix(')'));
    let commit = commit.unwrap_or_else(|| panic!("{text}"));
    let hash = commit.strip_suffix("-dirty").unwrap_or(commit);
    let is_hash = hash.len() >= 7 && hash.chars().all(|c| c.is_ascii_hexdigit());
    assert!(is_hash || commit == "unknown", "{text}");
}

#[test]
fn wrong_arguments_are_code_2_and_named() {
    let dir = Dir::new();
    for (args, phrase) in [
        (&["fold"][..], "'fold'"),
        (&["generate", "--model", "stories260k"], "--prompt <TEXT>"),
        (&["generate", "--model", "m", "--prompt", "x", "--temperature", "NaN"], "at least 0"),
        (&["generate", "--model", "m", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (&["generate", "--model", "m", "--prompt", "x", "--max-new-tokens", "many"], "--max-new-tokens"),
        (&["generate", "--model", "m", "--prompt", "x", "--threads", "0"], "1..=1024"),
        (&["generate", "--model", "m", "--prompt", "x", "--threads", "100000"], "1..=1024"),
        (&["retrofit", "--model", "stories260k", "--out", "m"], "--ratio <R>"),
        (&["retrofit", "--model", "stories260k", "--out", "m", "--ratio", "four"], "--ratio"),
        (&["retrofit", "--model", "stories260k", "--out", "m", "--ratio", "4", "--loss", "mse"], "distill"),
    ] {
        dir.run(args).fails(2, &[phrase]);
    }
    assert_eq!(dir.list("."), [""; 0]);
}
