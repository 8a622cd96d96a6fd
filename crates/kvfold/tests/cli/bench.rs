//! `kvfold bench`: whole models, and kernels one by one.

use crate::common::{Dir, HELD_OUT, assert_keys, number};
use serde_json::Value;

#[test]
fn every_kernel_has_a_time_beside_the_machines_best() {
    let args = ["bench", "kernels", "--tokens", "40", "--rounds", "1"];
    let dir = Dir::new();
    let json = dir.run_with(&args, &["--json"]).json();
    assert_keys(
        &json,
        &["schema", "kvfold_version", "commit", "model", "tokens", "rounds", "machine", "kernels", "others", "command"],
    );
    for best in ["/machine/peak_f32", "/machine/peak_bf16", "/machine/bandwidth"] {
        assert!(number(&json, best) > 1e8, "{best}");
    }
    let kernels = json["kernels"].as_array().expect("a list");
    for kernel in kernels {
        assert!(number(kernel, "/seconds") > 0.0 && number(kernel, "/bytes") > 0.0, "{kernel}");
        assert_eq!(number(kernel, "/flops") > 0.0, kernel["of_peak"].is_f64(), "{kernel}");
        assert!(kernel["path"].as_str().is_some_and(|path| !path.is_empty()), "{kernel}");
    }
    for name in [
        "linear bf16",
        "linear q8",
        "linear backward w bf16",
        "q, k, v bf16",
        "product onto f32",
        "feed-forward q8",
        "logits f32",
        "KL loss and gradients f32",
        "embed bf16",
        "rms_norm of heads backward",
        "rope",
        "swiglu",
        "head gate",
        "soft decision backward",
        "folding attention backward f32",
        "pool",
        "paged attention f32 prefill",
        "paged attention bf16 decode",
        "paged folding int8 prefill",
        "paged folding f32 decode",
        "paged evicting bf16 decode",
        "adamw",
    ] {
        assert!(kernels.iter().any(|kernel| kernel["kernel"] == name), "no {name}");
    }
    let table = dir.run(&args).ok();
    assert!(table.contains("GFLOP/s bf16") && table.lines().count() == kernels.len() + 3, "{table}");
}

#[test]
fn kernels_are_chosen_by_their_names() {
    let (dir, args) = (Dir::new(), ["bench", "kernels", "--tokens", "40", "--rounds", "1", "--json", "--only"]);
    let json = dir.run_with(&args, &["feed-forward"]).json();
    let names: Vec<&str> = json["kernels"].as_array().unwrap().iter().filter_map(|k| k["kernel"].as_str()).collect();
    assert!(names.len() >= 3 && names.iter().all(|name| name.starts_with("feed-forward")), "{names:?}");
    let ran = dir.run_with(&args, &["feed-backward"]);
    assert_eq!(ran.code, Some(3));
    assert!(ran.err.contains("--only") && ran.err.contains("feed-backward"), "{}", ran.err);
}

#[test]
fn a_batch_of_nothing_is_refused() {
    let ran = Dir::new().run(&["bench", "kernels", "--tokens", "0"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("--tokens"), "{}", ran.err);
}

#[test]
fn batches_are_sequences_by_tokens() {
    let dir = Dir::new();
    for wrong in ["", "8", "x", "8x", "x8", "0x8", "8x-1", "8 x 8", "8x8x8", "9999999x1", "1x99999999"] {
        let ran = dir.run(&["bench", "model", "--decode", wrong]);
        assert!(ran.code == Some(2) && ran.err.contains("such as 8x2048"), "{wrong}: {}", ran.err);
    }
    let ran = dir.run(&["bench", "model", "--prefill", "1x0"]);
    assert!(ran.code == Some(2) && ran.err.contains("at least 1 token"), "{}", ran.err);
}

/// A quick measurement of the embedded model.
const MODEL: [&str; 12] = [
    "bench",
    "model",
    "--model",
    "stories260k",
    "--prefill",
    "2x40",
    "--decode",
    "1x0",
    "3x48",
    "--tokens",
    "4",
    "--rounds=2",
];

fn cells(json: &Value, kind: &str) -> Vec<Value> {
    let rows = json[kind].as_array().expect("rows");
    rows.iter().flat_map(|row| row["models"].as_array().expect("models").clone()).collect()
}

#[test]
fn a_model_is_measured_beside_what_its_bytes_allow() {
    let dir = Dir::new();
    let json = dir.run_with(&MODEL, &["--json"]).json();
    assert_eq!(json["schema"], "kvfold.bench/1");
    let depths: Vec<_> =
        json["decode"].as_array().expect("rows").iter().map(|row| (&row["from"], &row["to"])).collect();
    assert_eq!(depths, [(&0.into(), &8.into()), (&48.into(), &56.into())]);
    let weights = number(&json, "/models/0/weight_bytes");
    let cells = [cells(&json, "prefill"), cells(&json, "decode")].concat();
    assert_eq!(cells.len(), 3);
    for cell in &cells {
        let [median, min, max] =
            ["median", "min", "max"].map(|key| number(&cell["tokens_per_second"], &format!("/{key}")));
        assert!(0.0 < min && min <= median && median <= max, "{cell}");
        assert_eq!(cell["tokens_per_second"]["rounds"].as_array().map(Vec::len), Some(2));
        assert!(number(cell, "/products_of_peak") > 0.0);
        assert_eq!((number(cell, "/logical_ratio"), number(cell, "/physical_ratio")), (1.0, 1.0));
    }
    // Three caches of 48 to 56 tokens in pages of 16: three or four pages of keys and values, 5 layers of 4 heads of 8.
    let page = number(&json, "/models/0/page_bytes");
    assert_eq!((&json["models"][0]["cache"], page), (&"f32".into(), 16.0 * 2.0 * 8.0 * 4.0));
    assert_eq!(number(&cells[2], "/cache_bytes"), 3.0 * 20.0 * page * (3.0 + 4.0 + 4.0 + 4.0) / 4.0);
    let bytes = &cells[2]["bytes"];
    assert_eq!(number(bytes, "/per_step"), weights + number(&cells[2], "/cache_bytes"));
    let ceiling = 3.0 * number(&json, "/machine/bandwidth") / number(bytes, "/per_step");
    assert!((number(bytes, "/ceiling") / ceiling - 1.0).abs() < 1e-9, "{bytes}");
    assert!(bytes.get("speed_up_ceiling").is_none(), "{bytes}");
    assert!(cells[0].get("bytes").is_none());
}

#[test]
fn two_models_take_turns_and_a_compressed_one_states_its_ratios() {
    let dir = Dir::new();
    let retrofit =
        ["retrofit", "--model", "stories260k", "--out", "folded", "--method", "dmc", "--ratio", "2", "--steps", "2"];
    dir.run_with(&retrofit, &["--length", "64", "--batch", "2", "--samples", "8", "--delay", "4"]).ok();
    let extra = ["--text", HELD_OUT, "--against", "folded", "--json"];
    let json = dir.run_with(&MODEL, &extra).json();
    assert_eq!((&json["models"][0]["policy"], &json["models"][1]["policy"]), (&"dense".into(), &"dmc".into()));
    assert_eq!((&json["seed"], &json["text"]), (&Value::Null, &HELD_OUT.into()));
    let row = &json["decode"][1]["models"];
    assert!(row[0]["bytes"].get("speed_up_ceiling").is_none());
    let (bytes, weights) = (&row[1]["bytes"], number(&json, "/models/1/weight_bytes"));
    let held = number(&row[1], "/cache_bytes");
    let dense = held * number(&row[1], "/physical_ratio");
    let ceiling = (weights + dense) / (weights + held);
    assert!((number(bytes, "/speed_up_ceiling") / ceiling - 1.0).abs() < 1e-9, "{bytes}");
    let table = dir.run_with(&MODEL, &["--text", HELD_OUT, "--against", "folded"]).ok();
    for phrase in ["A  stories260k: dense cache", "B  folded: dmc cache", "2 x 40", "3 x 48-56", "<="] {
        assert!(table.contains(phrase), "no {phrase:?} in {table}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused_before_it_is() {
    let dir = Dir::new();
    let model = ["bench", "model", "--model", "stories260k"];
    dir.run_with(&model, &["--prefill", "1x600"]).fails(3, &["600 tokens long", "context is 512"]);
    dir.run_with(&model, &["--decode", "1x500"]).fails(3, &["596 tokens long"]);
    for wrong in ["8", "0x8", "1x0", "ax8"] {
        dir.run_with(&model, &["--prefill", wrong]).fails(2, &["--prefill"]);
    }
    dir.write("short.txt", "Once upon a time");
    dir.run_with(&model, &["--decode", "1x64", "--text", "short.txt"]).fails(3, &["short.txt", "give more text"]);
    dir.run_with(&model, &["--text", "short.txt", "--seed", "1"]).fails(2, &["--seed"]);
}
