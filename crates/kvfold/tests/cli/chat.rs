//! `kvfold chat`, with lines from a file instead of a keyboard.

use crate::common::Dir;

/// A template, for the embedded model, which has none.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";

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
fn a_model_without_a_template_cannot_chat() {
    let dir = Dir::new();
    dir.run(&["chat", "--model", "stories260k"]).fails(3, &["stories260k", "chat template"]);
}
