//! Retrofits at scale: texts of many documents, parts of a model, plans, deltas, and what may go wrong on the way.

use crate::common::{Dir, HELD_OUT, assert_keys, number};
use crate::retrofit::{TINY, tiny_with};
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::Duration;

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../kvfold-retrofit/tests/tables/zstd.parquet");

/// The stories of the held-out text, one each.
fn stories() -> Vec<String> {
    let text = std::fs::read_to_string(HELD_OUT).expect("a text");
    text.split("\n\n").filter(|story| story.len() > 200).map(str::to_owned).collect()
}

/// A folder of documents in every form.
fn folder(dir: &Dir) {
    let stories = stories();
    std::fs::create_dir_all(dir.path("texts/deep")).expect("folders");
    dir.write("texts/a.txt", &stories[0]);
    let lines: Vec<String> =
        stories[1..9].iter().map(|story| serde_json::json!({"story": story, "text": "x"}).to_string()).collect();
    dir.write("texts/deep/b.jsonl", lines.join("\n"));
    dir.write("texts/deep/c.md", &stories[9]);
}

#[test]
fn a_model_trains_on_a_folder_and_goes_on_with_it() {
    let dir = Dir::new();
    folder(&dir);
    let args = tiny_with(&["--text", "texts", "--text-field", "story", "--steps", "12", "--batch", "3"]);
    let curve = |dir: &Dir| dir.json("out/training_curve.json");
    let ran = dir.run_with(&args, &["--json"]).json();
    assert_eq!(number(&ran, "/training/steps"), 12.0);
    let points = curve(&dir)["points"].as_array().expect("points").clone();
    let tokens: Vec<f64> = points.iter().map(|point| number(point, "/tokens")).collect();
    assert_eq!(number(&ran, "/training/tokens"), tokens[11]);
    // Three sequences of at most 64 tokens, most of them full.
    assert!(tokens.windows(2).all(|pair| (120.0..=192.0).contains(&(pair[1] - pair[0]))), "{tokens:?}");
    let whole = dir.read("out/model.safetensors");
    std::fs::remove_dir_all(dir.path("out")).expect("removed");

    // In parts it is the same run but for rounding; as a stream it is another.
    let losses = |points: &[Value]| points.iter().map(|point| number(point, "/loss")).collect::<Vec<_>>();
    dir.run_with(&args, &["--accumulate", "3"]).ok();
    let parts = curve(&dir)["points"].as_array().expect("points").clone();
    assert!(losses(&points).iter().zip(losses(&parts)).all(|(a, b)| (a - b).abs() < 0.02), "{points:?} {parts:?}");
    assert!(dir.read("out/model.safetensors") != whole);
    std::fs::remove_dir_all(dir.path("out")).expect("removed");
    dir.run_with(&args, &["--no-reset"]).ok();
    assert!(losses(curve(&dir)["points"].as_array().expect("points")) != losses(&points));
    std::fs::remove_dir_all(dir.path("out")).expect("removed");

    // A document that changes is another text.
    let broken = [&args[..], &["--lr", "1e30"]].concat();
    dir.run(&broken).fails(4, &["step 2", "texts/"]);
    dir.write("texts/deep/c.md", "another text, and quite a short one");
    dir.run_with(&broken, &["--resume"]).fails(3, &["text of other contents"]);
}

#[test]
fn tables_and_limits() {
    let dir = Dir::new();
    let args = tiny_with(&["--text", TABLE, "--steps", "2", "--length", "32", "--delay", "2", "--ratio", "1.5"]);
    let ran = dir.run_with(&args, &["--max-tokens", "400"]);
    assert!(ran.err.contains("the documents are short"), "{}", ran.err);
    ran.ok();
    let long = [&args[..], &["--text-field", "body"]].concat();
    std::fs::remove_dir_all(dir.path("out")).expect("removed");
    dir.run(&long).fails(3, &["no column `body`", "--text-field"]);
    let deaf = tiny_with(&["--text", TABLE, "--steps", "2", "--length", "64", "--delay", "40", "--ratio", "1.5"]);
    dir.run(&deaf).fails(3, &["nothing is ever folded", "--no-reset"]);
    assert_eq!(dir.list("."), [""; 0]);
}

#[test]
fn what_does_not_train_is_the_base_and_a_delta_says_the_rest() {
    let dir = Dir::new();
    let base = kvfold_model_tensors();
    for (train, parts) in [
        ("qk", &["q_proj", "k_proj", "decide_proj"][..]),
        ("attention", &["q_proj", "k_proj", "v_proj", "o_proj", "decide_proj"]),
    ] {
        dir.run_with(TINY, &["--steps", "8", "--train", train]).ok();
        let tensors = kvfold_tensor::read(&dir.path("out/model.safetensors")).expect("tensors").tensors;
        for (name, tensor) in &tensors {
            let moved = base.get(name).is_none_or(|before| before != tensor);
            assert_eq!(moved, parts.iter().any(|part| name.contains(part)), "{train} {name}");
        }
        let whole = generated(&dir, &["--model", "out"]);
        for dtype in ["f32", "bf16", "int8"] {
            let json = dir.run(&["export", "--delta", "out", "d.safetensors", "--dtype", dtype, "--json"]).json();
            let keys = ["schema", "model", "base", "out", "bytes", "tensors", "relative_error", "largest_error"];
            assert_keys(&json, &keys);
            let bytes = std::fs::metadata(dir.path("d.safetensors")).expect("a file").len();
            assert_eq!(number(&json, "/bytes"), bytes as f64);
            assert!(bytes < std::fs::metadata(dir.path("out/model.safetensors")).expect("a file").len() / 2);
            assert!(number(&json, "/relative_error") < 0.02, "{json}");
            let by_base = generated(&dir, &["--model", "stories260k", "--delta", "d.safetensors"]);
            assert_eq!(by_base, generated(&dir, &["--model", "d.safetensors"]));
            if dtype == "f32" {
                assert_eq!(by_base, whole);
            }
        }
        let evaluated =
            dir.run(&["eval", "ppl", "--model", "d.safetensors", "--text", HELD_OUT, "--limit", "1024", "--json"]);
        assert!(number(&evaluated.json(), "/logical_ratio") > 1.0);
        std::fs::remove_dir_all(dir.path("out")).expect("removed");
    }
    let other = dir.model();
    let path = other.join("config.json");
    std::fs::write(dir.path("junk"), "junk").expect("writable");
    dir.run(&["generate", "--model", "stories260k", "--delta", "junk", "--prompt", "x"])
        .fails(3, &["junk: is no delta"]);
    assert!(path.exists());
    dir.run(&["export", "--delta", "stories260k", "x"])
        .fails(3, &["stories260k: does not say what it was retrofitted from", "--base"]);
}

fn kvfold_model_tensors() -> std::collections::BTreeMap<String, kvfold_tensor::HostTensor> {
    kvfold_model::Checkpoint::open("stories260k").expect("embedded").tensors
}

fn generated(dir: &Dir, model: &[&str]) -> String {
    let args = [&["generate", "--prompt", "Once upon a time", "--max-new-tokens", "80", "--json"], model].concat();
    dir.run(&args).json()["text"].as_str().expect("a text").to_owned()
}

/// The highest memory of a process that is over, and its output. None where /proc does not say.
fn peak(mut command: Command) -> Option<(u64, String)> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the command starts");
    let mut highest = None;
    while child.try_wait().expect("a child").is_none() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
        highest = highest.max(kib);
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("an end");
    assert!(output.status.success());
    highest.map(|kib| (kib * 1024, String::from_utf8(output.stdout).expect("UTF-8")))
}

#[test]
fn a_plan_states_what_a_run_takes_and_its_memory_is_what_is_measured() {
    let dir = Dir::new();
    let args = |extra: &[&'static str]| {
        let all =
            ["retrofit", "--model", "stories260k", "--out", "out", "--ratio", "2", "--text", HELD_OUT, "--steps", "3"];
        [&all[..], &["--batch", "16", "--json"], extra].concat()
    };
    let mut peaks = Vec::new();
    for extra in [&[][..], &["--recompute"], &["--accumulate", "4"], &["--train", "attention", "--loss", "lm"]] {
        let plan = dir.run_with(&args(extra), &["--plan"]).json();
        assert_eq!(dir.list("."), [""; 0], "a plan writes nothing");
        assert_eq!((number(&plan, "/steps"), number(&plan, "/tokens")), (3.0, 3.0 * 16.0 * 512.0));
        assert!(number(&plan, "/hours") > 0.0 && number(&plan, "/tokens_per_second") > 0.0);
        let planned = number(&plan, "/memory/peak");
        let Some((measured, _)) = peak(dir.command(&args(extra))) else { return };
        let measured = measured as f64;
        let off = planned / measured;
        assert!((0.75..1.33).contains(&off), "{extra:?}: planned {planned:e}, measured {measured:e}");
        std::fs::remove_dir_all(dir.path("out")).expect("removed");
        peaks.push(planned);
    }
    assert!(peaks[1] < 0.6 * peaks[0] && peaks[2] < 0.6 * peaks[0] && peaks[3] < peaks[0], "{peaks:?}");
    let said = dir.run(&tiny_with(&["--plan"])).ok();
    for phrase in ["steps", "tokens", "parameters", "activations", "at its highest", "measured on this machine"] {
        assert!(said.contains(phrase), "no {phrase:?} in {said}");
    }
}

#[test]
fn a_loss_that_explodes_is_code_4_and_keeps_a_checkpoint_from_before() {
    let dir = Dir::new();
    let args =
        tiny_with(&["--steps", "40", "--checkpoint-every", "1", "--loss", "lm", "--text", HELD_OUT, "--lr", "0.3"]);
    dir.run(&args).fails(
        4,
        &["step ", "HELD", "last good checkpoint is kept", "lower --lr"].map(|phrase| match phrase {
            "HELD" => "tinystories_heldout.txt",
            phrase => phrase,
        }),
    );
    let kept: Vec<String> = dir.list("out.kvfold-run").into_iter().filter(|name| name.starts_with("step-")).collect();
    assert!(!kept.is_empty(), "{kept:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_code_1_and_loses_nothing() {
    let dir = Dir::new();
    let args = tiny_with(&["--steps", "6", "--checkpoint-every", "2"]);
    dir.run(&args).ok();
    let whole = dir.read("out/model.safetensors");
    std::fs::remove_dir_all(dir.path("out")).expect("removed");
    // Files of at most 512 KiB: the run's small ones fit, its checkpoints do not. The signal that comes with it is ignored,
    // so that writing fails as it does on a full disk.
    let script = "trap '' XFSZ; ulimit -f 1024; exec \"$@\"";
    let mut limited = Command::new("sh");
    let command = dir.command(&args);
    limited.args(["-c", script, "sh"]).arg(command.get_program()).args(command.get_args());
    limited.current_dir(dir.path("")).stdin(Stdio::null());
    let output = limited.output().expect("sh runs");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("step-00000002.safetensors") && err.contains("cannot write"), "{err}");
    assert!(dir.list("out.kvfold-run").iter().all(|name| !name.starts_with('.')), "no half-written file");
    dir.run_with(&args, &["--resume"]).ok();
    assert!(dir.read("out/model.safetensors") == whole, "other weights");
}
