//! `kvfold eval ppl`.

use crate::common::{Dir, HELD_OUT, assert_keys, golden, number};
use serde_json::Value;

fn args<'a>(text: &'a str, extra: &[&'a str]) -> Vec<&'a str> {
    [&["eval", "ppl", "--model", "stories260k", "--text", text], extra].concat()
}

fn windows(json: &Value) -> [u64; 3] {
    ["window", "windows", "tokens"].map(|key| json[key].as_u64().expect("a count"))
}

#[test]
fn perplexity_is_the_golden_one_and_a_plain_model_keeps_everything() {
    let golden = golden();
    let golden = &golden["perplexity"];
    let window = golden["window"].to_string();
    let json = Dir::new().run(&args(HELD_OUT, &["--window", &window, "--limit", "4096", "--json"])).json();
    let (found, wanted) = (number(&json, "/perplexity"), number(golden, "/value"));
    assert!((found / wanted - 1.0).abs() < 1e-4, "{found}, not {wanted}");
    assert_eq!(windows(&json), [256, 16, 16 * 255]);
    assert_eq!((number(&json, "/logical_ratio"), number(&json, "/physical_ratio")), (1.0, 1.0));
    assert_eq!(json["cache"], "f32");
    let keys = "schema model text cache perplexity tokens windows window logical_ratio physical_ratio";
    assert_keys(&json, &keys.split(' ').collect::<Vec<_>>());
}

#[test]
fn coarser_caches_are_full_caches_of_their_type_and_cost_little() {
    let dir = Dir::new();
    let json = |cache| dir.run(&args(HELD_OUT, &["--limit", "2048", "--json", "--cache", cache])).json();
    let exact = number(&json("f32"), "/perplexity");
    for (cache, most) in [("bf16", 0.002), ("int8", 0.005)] {
        let json = json(cache);
        assert_eq!((&json["cache"], number(&json, "/physical_ratio")), (&Value::from(cache), 1.0));
        let change = number(&json, "/perplexity") / exact - 1.0;
        assert!(change != 0.0 && change.abs() < most, "{cache}: {change}");
    }
}

#[test]
fn the_table_says_what_the_json_says() {
    let dir = Dir::new();
    let args = args(HELD_OUT, &["--window", "64", "--limit", "640"]);
    let json = dir.run_with(&args, &["--json"]).json();
    let table = dir.run(&args).ok();
    for part in [format!("{:.4}", number(&json, "/perplexity")), "630 predicted, in 10 windows of 64".into()] {
        assert!(table.contains(&part), "no {part:?} in {table}");
    }
}

#[test]
fn windows_are_as_long_as_the_context_and_the_last_incomplete_one_is_dropped() {
    let dir = Dir::new();
    let json = |extra: &[&str]| windows(&dir.run(&args(HELD_OUT, &[extra, &["--json"]].concat())).json());
    assert_eq!(json(&["--limit", "1024"]), [512, 2, 2 * 511]);
    assert_eq!(json(&["--limit", "1535"]), [512, 2, 2 * 511]);
    assert_eq!(json(&["--limit", "1536"]), [512, 3, 3 * 511]);
    assert_eq!(json(&["--limit", "7", "--window", "2"]), [2, 3, 3]);

    // Tokens of a text, neither more nor fewer: a window of all of them fits, and one of one more does not.
    dir.write("short.txt", "Once upon a time");
    let short = |window| dir.run(&args("short.txt", &["--json", "--window", window]));
    assert_eq!(windows(&short("4").json()), [4, 1, 3]);
    short("5").fails(3, &["the text has 4 tokens", "one window takes 5"]);
}

#[test]
fn impossible_windows_are_refused() {
    let dir = Dir::new();
    dir.run(&args(HELD_OUT, &["--window", "513"])).fails(3, &["513", "2 to 512, the model's context"]);
    dir.run(&args(HELD_OUT, &["--window", "1"])).fails(3, &["window of 1 ", "2 to 512"]);
    dir.run(&args(HELD_OUT, &["--window", "0"])).fails(3, &["window of 0 "]);
    dir.run(&args(HELD_OUT, &["--limit", "100"]))
        .fails(3, &["a limit of 100 tokens", "one window, 512", "raise --limit"]);
    dir.run(&args(HELD_OUT, &["--limit", "0"])).fails(3, &["a limit of 0 "]);
}

#[test]
fn texts_that_are_none_are_refused_by_name() {
    let dir = Dir::new();
    dir.write("empty.txt", "");
    dir.write("blank.txt", " \n\t\n");
    dir.write("latin1.txt", b"caf\xe9 au lait");
    dir.write("short.txt", "Hello");
    dir.run(&args("empty.txt", &[])).fails(3, &["empty.txt", "no text"]);
    dir.run(&args("blank.txt", &[])).fails(3, &["blank.txt", "no text"]);
    dir.run(&args("latin1.txt", &[])).fails(3, &["latin1.txt", "not UTF-8", "byte at 3"]);
    dir.run(&args("short.txt", &[])).fails(3, &["one window takes 512", "give more text or a smaller --window"]);
    dir.run(&args("none.txt", &[])).fails(3, &["none.txt", "cannot read"]);
    dir.run(&args(".", &[])).fails(3, &["cannot read"]);
}
