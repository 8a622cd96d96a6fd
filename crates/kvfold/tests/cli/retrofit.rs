//! `kvfold retrofit`: what it writes, and what it refuses. How it survives is in `runs.rs`.

use crate::common::{Dir, HELD_OUT, assert_keys, number};
use serde_json::Value;

/// The smallest retrofit that folds.
pub(crate) const TINY: &[&str] = &[
    "retrofit",
    "--model",
    "stories260k",
    "--out",
    "out",
    "--ratio",
    "2",
    "--method",
    "dmc",
    "--length",
    "64",
    "--delay",
    "4",
    "--batch",
    "2",
    "--samples",
    "6",
];

/// TINY with these arguments instead of its own.
pub(crate) fn tiny_with<'a>(extra: &[&'a str]) -> Vec<&'a str> {
    let kept = TINY[1..].chunks(2).filter(|pair| !extra.contains(&pair[0])).flatten().copied();
    std::iter::once("retrofit").chain(kept).chain(extra.iter().copied()).collect()
}

/// Generation and evaluation run on the model `out`, and its cache is smaller.
fn assert_serves(dir: &Dir) {
    let generated =
        dir.run(&["generate", "--model", "out", "--prompt", "Once upon a time", "--max-new-tokens", "200", "--json"]);
    let generated = generated.json();
    let evaluated = dir.run(&["eval", "ppl", "--model", "out", "--text", HELD_OUT, "--limit", "1024", "--json"]).json();
    for json in [generated, evaluated] {
        let (logical, physical) = (number(&json, "/logical_ratio"), number(&json, "/physical_ratio"));
        assert!(logical > 1.05 && physical > 1.05 && physical < logical, "{json}");
    }
}

#[test]
fn the_directory_is_a_complete_model_with_its_papers() {
    let dir = Dir::new();
    let json = dir.run_with(TINY, &["--steps", "20", "--json"]).json();
    assert_keys(
        &json,
        &[
            "schema",
            "kvfold_version",
            "commit",
            "out",
            "model",
            "method",
            "delay",
            "ratio_asked",
            "context_tokens",
            "logical_ratio",
            "physical_ratio",
            "kv_bytes",
            "dense_kv_bytes",
            "kv_bytes_detail",
            "heads",
            "evaluated_tokens",
            "perplexity",
            "kl",
            "top1_agreement",
            "training",
            "calibration",
            "settled",
            "command",
        ],
    );
    assert_eq!((number(&json, "/ratio_asked"), number(&json, "/training/steps")), (2.0, 20.0));
    assert_eq!(number(&json, "/evaluated_tokens"), 63.0, "one of six texts is kept from training");

    assert_eq!(dir.list("."), ["out"], "no run, no temporary directory");
    let files = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "training_curve.json"];
    let found = dir.list("out");
    assert!(files.iter().all(|file| found.iter().any(|found| found == file)), "{found:?}");
    assert!(!found.iter().any(|name| name.starts_with('.')), "{found:?}");

    let config = dir.json("out/config.json");
    assert_eq!(config["architectures"], Value::from(vec!["KvfoldLlamaForCausalLM"]));
    assert_eq!((&config["model_type"], &config["kvfold"]["version"]), (&"kvfold_llama".into(), &2.into()));
    assert_eq!((number(&config, "/kvfold/ratio"), number(&config, "/kvfold/cache/delay")), (2.0, 4.0));

    let card = String::from_utf8(dir.read("out/README.md")).expect("UTF-8");
    for part in
        ["# out\n", "6 texts that the model wrote itself", "kvfold retrofit --model stories260k", "With kvfold 0.1.0 ("]
    {
        assert!(card.contains(part), "no {part:?} in {card}");
    }
    let curve = dir.json("out/training_curve.json");
    let points = curve["points"].as_array().expect("points");
    assert_eq!((&curve["schema"], points.len()), (&"kvfold.curve/1".into(), 20));
    assert!(points.iter().all(|point| point["loss"].as_f64().is_some_and(f64::is_finite)), "{curve}");
    assert_serves(&dir);
}

#[test]
fn decisions_that_are_fitted_need_no_training() {
    for method in ["dmc", "dms"] {
        let dir = Dir::new();
        let fit = ["--method", method, "--steps", "0", "--samples", "40", "--calibrate", "2000"];
        let args = tiny_with(&fit);
        let json = dir.run_with(&args, &["--json"]).json();
        assert_eq!((number(&json, "/training/steps"), number(&json, "/training/tokens")), (0.0, 0.0));
        let at = |field: &str| number(&json, &format!("/calibration/{field}"));
        assert_eq!(at("tokens"), 2048.0, "whole sequences");
        assert!(at("best") < at("chosen") && at("chosen") < 0.8 * at("random"), "{json}");
        let settled = number(&json, "/settled/after");
        assert!((settled / 2.06 - 1.0).abs() <= 0.005, "the margin of 3 % counted: {json}");
        assert!((1.8..2.2).contains(&number(&json, "/logical_ratio")), "{json}");
        assert!(number(&json, "/kl/mean") < 0.1, "{json}");
        let cache = &dir.json("out/config.json")["kvfold"]["cache"];
        assert_eq!((&cache["decision"]["bias"], &cache["decision"]["ahead"]), (&true.into(), &true.into()));
        assert_eq!(cache["log_mass"], method == "dmc");
        let card = String::from_utf8(dir.read("out/README.md")).expect("UTF-8");
        for part in [
            "which also reads the token before",
            "a fit to what folding costs, on 2,000 tokens",
            "| logical ratio at the end of training | not trained |",
        ] {
            assert!(card.contains(part), "no {part:?} in {card}");
        }
        assert_serves(&dir);
        let moved = ["retrofit", "--model", "stories260k", "--from", "out", "--out", "moved", "--ratio", "1.5"];
        let json =
            dir.run(&[&moved[..], &["--steps", "0", "--length", "64", "--samples", "40", "--json"]].concat()).json();
        assert_eq!(json.get("calibration"), None, "{json}");
        assert!((1.4..1.7).contains(&number(&json, "/logical_ratio")), "{json}");
        let delta = ["export", "--delta", "out", "d.safetensors", "--json"];
        assert!(number(&dir.run(&delta).json(), "/bytes") < 20_000.0, "decision heads alone");

        // The same run without them begins at the original.
        let dir = Dir::new();
        let zero = tiny_with(&["--method", method, "--steps", "1", "--samples", "40", "--calibrate", "0"]);
        let json = dir.run_with(&zero, &["--json"]).json();
        assert_eq!(json.get("calibration"), None, "{json}");
        assert!(number(&json, "/logical_ratio") < 1.1, "{json}");
        let cache = &dir.json("out/config.json")["kvfold"]["cache"];
        assert_eq!((cache["decision"].get("bias"), &cache["log_mass"]), (None, &false.into()));
    }
}

#[test]
fn dms_evicts_and_its_papers_say_so() {
    for decision in ["head", "borrowed"] {
        let dir = Dir::new();
        let dms = tiny_with(&["--method", "dms"]);
        let json = dir.run_with(&dms, &["--steps", "20", "--decision", decision, "--json"]).json();
        assert_eq!((&json["method"], number(&json, "/delay")), (&"dms".into(), 4.0));
        let cache = &dir.json("out/config.json")["kvfold"]["cache"];
        assert_eq!((&cache["method"], &cache["decision"]["source"]), (&"dms".into(), &decision.into()));
        let card = String::from_utf8(dir.read("out/README.md")).expect("UTF-8");
        for part in ["Dynamic Memory Sparsification (DMS)", "| method | Dynamic Memory Sparsification |", "evicted"] {
            assert!(card.contains(part), "no {part:?} in {card}");
        }
        if decision == "head" {
            assert_serves(&dir);
        }
    }
    let dms = tiny_with(&["--method", "dms"]);
    Dir::new().run_with(&dms, &["--pool-window", "3"]).fails(3, &["`pool_window` is 3", "DMS"]);
    Dir::new().run_with(&dms, &["--log-mass"]).fails(3, &["`log_mass` is true", "DMS"]);
}

#[test]
fn gqa_leaves_a_plain_model_of_fewer_heads() {
    let dir = Dir::new();
    let gqa =
        ["retrofit", "--model", "stories260k", "--out", "out", "--length", "64", "--batch", "2", "--samples", "6"];
    let gqa = [&gqa[..], &["--method", "gqa", "--kv-heads", "2"]].concat();
    let json = dir.run_with(&gqa, &["--steps", "3", "--json"]).json();
    assert_eq!((&json["method"], number(&json, "/kv_heads")), (&"gqa".into(), 2.0));
    assert!(json.get("delay").is_none(), "{json}");
    for pointer in ["/ratio_asked", "/logical_ratio", "/physical_ratio", "/heads/0/0"] {
        assert_eq!(number(&json, pointer), 2.0, "{pointer} of {json}");
    }
    assert_eq!(2.0 * number(&json, "/kv_bytes"), number(&json, "/dense_kv_bytes"));
    let config = dir.json("out/config.json");
    assert_eq!(config["architectures"], Value::from(vec!["LlamaForCausalLM"]));
    assert_eq!((number(&config, "/num_key_value_heads"), config.get("kvfold")), (2.0, None));
    let card = String::from_utf8(dir.read("out/README.md")).expect("UTF-8");
    for part in ["up-trained to grouped-query attention", "plain `LlamaForCausalLM`", "| decision | none"] {
        assert!(card.contains(part), "no {part:?} in {card}");
    }
    dir.run(&["generate", "--model", "out", "--prompt", "Once", "--max-new-tokens", "5"]).ok();

    let dir = Dir::new();
    dir.run_with(&gqa, &["--ratio", "2"]).fails(2, &["--ratio", "--kv-heads"]);
    dir.run_with(&gqa, &["--delay", "4"]).fails(2, &["--delay", "--kv-heads"]);
    dir.run(&["retrofit", "--model", "stories260k", "--out", "out", "--method", "gqa", "--ratio", "2"])
        .fails(2, &["--kv-heads"]);
    let other = ["retrofit", "--model", "stories260k", "--out", "out", "--method", "dms", "--kv-heads", "2"];
    dir.run(&other).fails(3, &["`method` is dms; expected gqa"]);
    let three = ["retrofit", "--model", "stories260k", "--out", "out", "--method", "gqa", "--kv-heads", "3"];
    dir.run(&three).fails(3, &["`kv_heads` is 3; expected a divisor of 4"]);
}

#[test]
fn the_model_trains_on_texts_and_the_report_is_a_map_and_a_line() {
    let dir = Dir::new();
    let text = std::fs::read_to_string(HELD_OUT).expect("a text");
    dir.write("a.txt", &text[..2000]);
    dir.write("b.txt", &text[2000..4000]);
    let ran = dir.run_with(TINY, &["--steps", "20", "--loss", "lm", "--text", "a.txt", "b.txt"]);
    assert_eq!(ran.err, "", "no terminal, no progress");
    let report = ran.ok();
    let (map, line) = report.trim_end().rsplit_once("\n\n").unwrap_or_else(|| panic!("{report}"));
    assert!((0..5).all(|layer| map.contains(&format!("L{layer} "))), "{map}");
    assert!(line.starts_with("out: ") && line.contains(" logical, ") && line.lines().count() == 1, "{line}");
    let card = String::from_utf8(dir.read("out/README.md")).expect("UTF-8");
    assert!(card.contains("| a.txt, b.txt |") && card.contains("| loss | lm |"), "{card}");
    assert_serves(&dir);
}

#[test]
fn a_borrowed_channel_is_zeroed_and_compresses() {
    for steps in ["20", "1"] {
        let dir = Dir::new();
        dir.run_with(TINY, &["--steps", steps, "--decision", "borrowed"]).ok();
        let config = dir.json("out/config.json");
        assert_eq!(config["kvfold"]["cache"]["decision"]["source"], "borrowed");
        let tensors = kvfold_tensor::read(&dir.path("out/model.safetensors")).expect("tensors").tensors;
        assert!(!tensors.keys().any(|name| name.contains("decide")), "no head of its own: {:?}", tensors.keys());
        let k = &tensors["model.layers.0.self_attn.k_proj.weight"];
        let [width, columns] = k.shape() else { panic!("{:?}", k.shape()) };
        let head_dim = config["head_dim"].as_u64().expect("a width") as usize;
        let values = k.to_f32();
        let row = |row: usize| values[row * columns..][..*columns].iter().map(|x| x.abs()).sum::<f32>();
        // The rows were 0 when the channel began to decide; training has moved them a little since.
        for head in 0..width / head_dim {
            let (borrowed, kept) = (row((head + 1) * head_dim - 1), row(head * head_dim));
            assert!(borrowed > 0.0 && borrowed < kept, "{borrowed} {kept}");
        }
        if steps == "20" {
            assert_serves(&dir);
        }
    }
}

#[test]
fn every_choice_gives_a_model_that_opens() {
    for extra in [
        &["--share", "layer", "--pool-window", "12", "--log-mass"][..],
        &["--delay", "0", "--kl", "reverse", "--scope", "head", "--over", "sequence"],
        &["--decision-scale", "1", "--decision-offset", "-1", "--scope", "layer", "--pull", "both"],
        &["--ratio", "1"],
        &["--lr", "0"],
    ] {
        let dir = Dir::new();
        // The defaults of TINY that `extra` replaces are left out: an argument may be given once.
        let kept = TINY[1..].chunks(2).filter(|pair| !extra.contains(&pair[0])).flatten().copied();
        let args: Vec<&str> =
            ["retrofit", "--steps", "2"].into_iter().chain(kept).chain(extra.iter().copied()).collect();
        dir.run(&args).ok();
        dir.run(&["generate", "--model", "out", "--prompt", "Once", "--max-new-tokens", "40"]).ok();
    }
}

#[test]
fn an_output_that_exists_is_refused_before_any_work() {
    let dir = Dir::new();
    dir.write("out", "precious");
    // Not even the model is looked at.
    for model in ["stories260k", "no-such-model"] {
        dir.run(&["retrofit", "--model", model, "--out", "out", "--ratio", "2"]).fails(3, &["out: already exists"]);
    }
    dir.run(&["retrofit", "--model", "stories260k", "--out", ".", "--ratio", "2"]).fails(3, &["already exists"]);
    dir.run(&["retrofit", "--model", "stories260k", "--out", "a/b", "--ratio", "2"]).fails(3, &["create that first"]);
    assert_eq!((dir.list("."), dir.read("out")), (vec!["out".to_owned()], b"precious".to_vec()));
}

#[test]
fn a_final_slash_means_nothing() {
    let dir = Dir::new();
    let args: Vec<&str> = TINY.iter().map(|&arg| if arg == "out" { "./out/" } else { arg }).collect();
    dir.run_with(&args, &["--steps", "2"]).ok();
    assert_eq!(dir.list("."), ["out"]);
    assert!(!dir.list("out").iter().any(|name| name.starts_with('.')));
}

/// Settings that cannot be, and what is said about them.
const IMPOSSIBLE: &[(&[&str], &[&str])] = &[
    (&["--ratio", "0.5"], &["`ratio` is 0.5", "at least 1"]),
    (&["--ratio", "-2"], &["`ratio` is -2", "at least 1"]),
    (&["--ratio", "NaN"], &["`ratio` is NaN"]),
    (&["--ratio", "inf"], &["`ratio` is inf"]),
    (&["--ratio", "10.7"], &["`ratio` is 10.7", "at most 10.66", "4 stay exact and 2 have slots"]),
    (&["--steps", "0", "--calibrate", "0"], &["`steps` is 0", "--calibrate"]),
    (&["--calibrate", "100", "--decision", "borrowed"], &["`calibrate` is 100", "decision heads with biases"]),
    (&["--batch", "0"], &["`batch` is 0"]),
    (&["--accumulate", "0"], &["`accumulate` is 0", "1 to 2, the sequences of a step"]),
    (&["--accumulate", "3"], &["`accumulate` is 3", "1 to 2"]),
    (&["--batch", "1000000000000"], &["`batch` is 1000000000000"]),
    (&["--samples", "1"], &["`samples` is 1", "one to measure on"]),
    (&["--samples", "18446744073709551615"], &["`samples` is"]),
    (&["--length", "513"], &["`length` is 513", "2 to 512, the model's context"]),
    (&["--length", "1"], &["`length` is 1"]),
    (&["--delay", "64"], &["`delay` is 64", "less than 64"]),
    (&["--delay", "18446744073709551615"], &["`delay` is"]),
    (&["--sinks", "60"], &["`sinks` is 60", "less than 60"]),
    (&["--sinks", "18446744073709551615"], &["`sinks` is"]),
    (&["--pool-window", "513"], &["`pool_window` is 513", "1 to 512"]),
    (&["--lr", "-1"], &["`lr` is -1"]),
    (&["--lr", "NaN"], &["`lr` is NaN"]),
    (&["--decision-scale", "0"], &["`decision scale` is 0"]),
    (&["--decision-offset", "inf"], &["`decision offset` is inf"]),
    (&["--checkpoint-every", "0"], &["`checkpoint_every` is 0"]),
];

#[test]
fn impossible_settings_are_refused_and_leave_nothing() {
    let dir = Dir::new();
    for (setting, phrases) in IMPOSSIBLE {
        let kept = TINY[1..].chunks(2).filter(|pair| pair[0] != setting[0]).flatten().copied();
        let args: Vec<&str> = std::iter::once("retrofit").chain(kept).chain(setting.iter().copied()).collect();
        dir.run(&args).fails(3, phrases);
        assert_eq!(dir.list("."), [""; 0], "{setting:?}");
    }
}

#[test]
fn the_highest_ratio_that_is_stated_is_accepted() {
    let dir = Dir::new();
    let args: Vec<&str> = TINY.iter().map(|&arg| if arg == "2" { "10.66" } else { arg }).collect();
    // The batch is `2` as well, and cannot be 10.66.
    let batch = args.iter().position(|&arg| arg == "--batch").expect("a batch");
    let args = [&args[..=batch], &["2"], &args[batch + 2..]].concat();
    dir.run_with(&args, &["--steps", "1"]).ok();
}

#[test]
fn texts_that_are_none_are_refused_and_leave_nothing() {
    let dir = Dir::new();
    let story = std::fs::read_to_string(HELD_OUT).expect("a text");
    for (name, content, phrases) in [
        ("empty.txt", &b""[..], &["empty.txt", "no text"][..]),
        ("latin1.txt", b"caf\xe9", &["latin1.txt", "not UTF-8", "byte at 3"]),
        ("short.txt", b"Once upon a time", &["two are needed", "one to measure on", "smaller --length"]),
        ("single.txt", &story.as_bytes()[..100], &["two are needed", "one to measure on", "smaller --length"]),
    ] {
        dir.write(name, content);
        dir.run_with(TINY, &["--text", name]).fails(3, phrases);
        // One bad text spoils the others.
        if name != "short.txt" && name != "single.txt" {
            dir.run_with(TINY, &["--text", HELD_OUT, name]).fails(3, phrases);
        }
        std::fs::remove_file(dir.path(name)).expect("removed");
        assert_eq!(dir.list("."), [""; 0], "{name}");
    }
    dir.run_with(TINY, &["--text", "none.txt"]).fails(3, &["none.txt", "cannot read"]);
    assert_eq!(dir.list("."), [""; 0]);
}

#[test]
fn a_retrofitted_model_is_not_retrofitted_again() {
    let dir = Dir::new();
    dir.run_with(TINY, &["--steps", "1"]).ok();
    let again = ["retrofit", "--model", "out", "--out", "again", "--ratio", "2"];
    dir.run(&again).fails(3, &["out, which is retrofitted already", "a plain model"]);
    assert_eq!(dir.list("."), ["out"]);
}

#[test]
fn a_loss_that_is_no_number_is_code_4() {
    let dir = Dir::new();
    let args = [TINY, &["--steps", "4", "--lr", "1e30"]].concat();
    dir.run(&args).fails(4, &["step 2", "NaN", "try a lower --lr"]);
    assert_eq!(dir.list("."), ["out.kvfold-run"]);
}

#[test]
fn a_run_goes_on_from_another_towards_a_higher_ratio() {
    let dir = Dir::new();
    dir.run_with(TINY, &["--steps", "4", "--train", "decide"]).ok();
    dir.run(&["export", "--delta", "out", "out.safetensors"]).ok();
    let onward = ["retrofit", "--model", "stories260k", "--out", "further", "--ratio", "4", "--length", "64"];
    let sizes = ["--steps", "3", "--batch", "2", "--samples", "6", "--json"];
    let json = dir.run(&[&onward[..], &sizes, &["--from", "out.safetensors"]].concat()).json();
    assert_eq!((number(&json, "/ratio_asked"), number(&json, "/delay")), (4.0, 4.0));
    assert!(number(&json, "/calibration/tokens") > 0.0, "decisions for a higher ratio are fitted again: {json}");
    let config = dir.json("further/config.json");
    assert_eq!(config["kvfold"]["cache"], dir.json("out/config.json")["kvfold"]["cache"]);
    let plain = ["retrofit", "--model", "stories260k", "--from", "stories260k", "--out", "no", "--ratio", "4"];
    dir.run(&plain).fails(3, &["`from` is stories260k, a plain model"]);
    dir.run(&[&plain[..], &["--delay", "8"]].concat()).fails(2, &["--from", "--delay"]);
}
