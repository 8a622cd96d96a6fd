//! `kvfold chat`, with lines from a file instead of a keyboard.

use crate::common::Dir;

/// A template, for the embedded model, which has none.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:";

#[test]
fn a_conversation_says_what_the_cache_holds_of_it() {
    let dir = Dir::new();
    dir.model();
    dir.write("model/chat_template.jinja", TEMPLATE);
    let ran = dir.run_on(
        &["chat", "--model", "model", "--max-new-tokens", "6"],
        "Once upon a time\n\nAnd then?\n/full\n/nothing\n/new\nOnce upon a time\n/quit\nnever said\n",
    );
    let statuses: Vec<&str> = ran.err.lines().filter(|line| line.starts_with('[')).collect();
    let tokens = |line: &&str| line[1..].split(' ').next().and_then(|n| n.parse::<usize>().ok()).expect("a number");
    let seen: Vec<usize> = statuses.iter().map(tokens).collect();
    assert!(seen.len() == 3 && seen[1] > seen[0] + 6 && seen[2] == seen[0], "{}", ran.err);
    assert!(statuses.iter().all(|line| line.contains("slots") && line.contains("KiB")), "{}", ran.err);
    assert!(ran.err.contains("the full cache") && ran.err.contains("there is no /nothing"), "{}", ran.err);
    // The embedded model compresses nothing, so what follows the same words is the same.
    let said: Vec<&str> = ran.out.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(said.first(), said.last(), "{}", ran.out);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
}

#[test]
fn a_conversation_goes_on_after_the_program_has_ended() {
    let dir = Dir::new();
    dir.model();
    dir.write("model/chat_template.jinja", TEMPLATE);
    // Long enough to be kept for what follows: shorter beginnings are read again.
    let long = "Once upon a time there was a little girl who had a red ball and a big dog. ".repeat(8);
    let chat = |input: &str, more: &[&str]| {
        dir.run_on(&[&["chat", "--model", "model", "--max-new-tokens", "6"], more].concat(), input)
    };
    let whole = chat(&format!("{long}\nAnd then?\n"), &[]);
    assert_eq!(chat(&long, &["--session", "talk.kv"]).code, Some(0));
    let kept = dir.read("talk.kv");
    let rest = chat("And then?\n", &["--session", "talk.kv"]);
    assert!(rest.err.contains("going on after 2 messages"), "{}", rest.err);
    assert!(!rest.out.trim().is_empty() && whole.out.trim().ends_with(rest.out.trim()), "{} {}", whole.out, rest.out);
    let last = |err: &str| err.lines().rfind(|line| line.starts_with('[')).expect("a status").to_owned();
    let until_rate = |line: String| line.rsplit_once("; ").expect("a rate").0.to_owned();
    let (rest, whole) = (until_rate(last(&rest.err)), until_rate(last(&whole.err)));
    assert_eq!(rest, whole);
    let from_before = rest.rsplit_once("; ").and_then(|(_, kept)| kept.split(' ').next()?.parse().ok());
    assert!(from_before.is_some_and(|tokens: usize| tokens > 128), "{rest}");
    assert_ne!(dir.read("talk.kv"), kept, "the second answer is kept, too");

    // What is no conversation of this model is refused, and stays.
    dir.write("other.kv", "no safetensors");
    chat("Hello\n", &["--session", "other.kv"]).fails(3, &["other.kv"]);
    chat("Hello\n", &["--session", "talk.kv", "--cache", "int8"]).fails(3, &["talk.kv", "`cache`"]);
    assert_eq!(dir.read("other.kv"), b"no safetensors");
    // Where it cannot be kept it goes on.
    let ran = chat("Hello\n", &["--session", "no/such/folder/talk.kv"]);
    assert!(ran.code == Some(0) && ran.err.contains("no/such/folder/talk.kv"), "{}", ran.err);
}

#[test]
fn a_model_without_a_template_cannot_chat() {
    let dir = Dir::new();
    dir.run(&["chat", "--model", "stories260k"]).fails(3, &["stories260k", "chat template"]);
}
