//! A retrofit that is repeated, interrupted, killed, damaged or misused ends with the same weights, or says why not.

use crate::common::{Dir, Ran};
use crate::retrofit::TINY;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

const RUN: &str = "out.kvfold-run";

/// Enough steps that a signal finds the run at work.
const STEPS: &[&str] = &["--steps", "48", "--checkpoint-every", "3"];

/// The weights of a run that nobody disturbed.
static UNDISTURBED: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dir = Dir::new();
    retrofit(&dir, &[]).ok();
    dir.read("out/model.safetensors")
});

fn retrofit(dir: &Dir, extra: &[&str]) -> Ran {
    dir.run(&[TINY, STEPS, extra].concat())
}

#[track_caller]
fn assert_undisturbed(dir: &Dir) {
    assert!(dir.read("out/model.safetensors") == *UNDISTURBED, "other weights");
    assert_eq!(dir.list("."), ["out"], "no run, no temporary directory");
    assert_eq!(dir.json("out/training_curve.json")["points"].as_array().map(Vec::len), Some(48));
}

/// A run that got a signal, `INT` or `KILL`, once it had written `count` checkpoints: its exit code and what it said.
fn stopped(dir: &Dir, signal: &str, count: usize) -> (Option<i32>, String) {
    for _ in 0..5 {
        let mut child = dir.command(&[TINY, STEPS].concat());
        let child = child.stderr(Stdio::piped()).spawn().expect("the command starts");
        wait_for_checkpoints(dir, count);
        send(signal, &child);
        let output = child.wait_with_output().expect("an end");
        if !dir.path("out").exists() {
            return (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned());
        }
        // On a busy machine the signal can come too late.
        std::fs::remove_dir_all(dir.path("out")).expect("removed");
    }
    panic!("five runs were through before the signal came");
}

fn killed(dir: &Dir) {
    assert_eq!(stopped(dir, "KILL", 2).0, None);
}

fn send(signal: &str, child: &Child) {
    let sent = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

fn checkpoints(dir: &Dir) -> Vec<String> {
    let names = if dir.path(RUN).exists() { dir.list(RUN) } else { Vec::new() };
    names.into_iter().filter(|name| name.starts_with("step-")).collect()
}

fn wait_for_checkpoints(dir: &Dir, count: usize) {
    let started = Instant::now();
    while checkpoints(dir).len() < count {
        assert!(started.elapsed() < Duration::from_secs(60), "no checkpoint in a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_same_command_gives_the_same_bytes_on_any_number_of_threads() {
    for threads in ["1", "2", "3"] {
        let dir = Dir::new();
        retrofit(&dir, &["--threads", threads]).ok();
        assert_undisturbed(&dir);
    }
    let dir = Dir::new();
    retrofit(&dir, &["--seed", "1"]).ok();
    assert!(dir.read("out/model.safetensors") != *UNDISTURBED, "the seed makes no difference");
}

#[test]
fn recomputing_costs_time_and_changes_nothing() {
    let dir = Dir::new();
    retrofit(&dir, &["--recompute"]).ok();
    assert_undisturbed(&dir);
}

#[test]
fn whenever_it_is_killed_the_weights_are_the_same() {
    for attempt in 0..2 {
        let dir = Dir::new();
        let mut delays = Vec::new();
        // The clock is the die; what it showed is in the message.
        while !dir.path("out").exists() && delays.len() < 6 {
            let clock = std::time::UNIX_EPOCH.elapsed().expect("a clock").subsec_nanos();
            let delay = Duration::from_millis(20 + u64::from(clock / 1000 % 400));
            let resume: &[&str] = if dir.path(RUN).join("run.json").exists() { &["--resume"] } else { &[] };
            let mut child = dir.command(&[TINY, STEPS, resume].concat());
            let mut child = child.stderr(Stdio::null()).spawn().expect("the command starts");
            std::thread::sleep(delay);
            child.kill().expect("killed");
            child.wait().expect("an end");
            delays.push((delay, checkpoints(&dir)));
        }
        if !dir.path("out").exists() {
            let resume: &[&str] = if dir.path(RUN).join("run.json").exists() { &["--resume"] } else { &[] };
            let ran = retrofit(&dir, resume);
            assert_eq!(ran.code, Some(0), "attempt {attempt}, {delays:?}: {}", ran.err);
        }
        assert!(dir.read("out/model.safetensors") == *UNDISTURBED, "attempt {attempt}: killed after {delays:?}");
    }
}

#[test]
fn ctrl_c_saves_the_run() {
    let dir = Dir::new();
    let (code, err) = stopped(&dir, "INT", 1);
    assert_eq!(code, Some(130), "{err}");
    assert!(err.contains("stopping after this step"), "{err}");
    let step = err.split("interrupted after step ").nth(1).and_then(|rest| rest.split(';').next());
    let step: u64 = step.and_then(|step| step.parse().ok()).unwrap_or_else(|| panic!("{err}"));
    assert!(err.contains("go on with --resume"), "{err}");
    assert!(checkpoints(&dir).contains(&format!("step-{step:08}.safetensors")), "{err}");
    assert!(!dir.path("out").exists());

    let resumed = retrofit(&dir, &["--resume"]);
    assert!(resumed.err.contains(&format!("going on after step {step} of 48")), "{}", resumed.err);
    resumed.ok();
    assert_undisturbed(&dir);
    let card = String::from_utf8(dir.read("out/README.md")).expect("UTF-8");
    assert!(!card.contains("--resume"), "that command would not make the model again: {card}");
}

#[test]
fn ctrl_c_with_nothing_to_save_is_obeyed_at_once() {
    let dir = Dir::new();
    let mut child = dir.command(&["demo", "--out", "out"]).stderr(Stdio::piped()).spawn().expect("a start");
    let mut err = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut line = String::new();
    err.read_line(&mut line).expect("its first word");
    assert!(line.contains("retrofitting to 4x"), "{line}");
    send("INT", &child);
    line.clear();
    err.read_to_string(&mut line).expect("its last word");
    assert_eq!((child.wait().expect("an end").code(), line.as_str()), (Some(130), "kvfold: interrupted\n"));
    assert_eq!(dir.list("."), [""; 0]);
}

#[test]
fn a_run_goes_on_as_it_began_or_not_at_all() {
    let dir = Dir::new();
    killed(&dir);
    retrofit(&dir, &[]).fails(3, &[RUN, "unfinished run", "--resume"]);
    let resume = |replaced: &[&str]| {
        let all = [TINY, STEPS].concat();
        let kept = all[1..].chunks(2).filter(|pair| !replaced.contains(&pair[0])).flatten().copied();
        dir.run(&["retrofit", "--resume"].into_iter().chain(kept).chain(replaced.iter().copied()).collect::<Vec<_>>())
    };
    for (setting, phrases) in [
        (&["--ratio", "3"][..], &["ratio 2.0, not 3.0"][..]),
        (&["--seed", "7"], &["seed 0, not 7"]),
        (&["--length", "32"], &["length 64, not 32"]),
        (&["--delay", "5"], &["method.dynamic.delay 4, not 5"]),
        (&["--steps", "50"], &["steps 48, not 50"]),
        (&["--loss", "lm"], &["loss."]),
        (&["--decision", "borrowed"], &["method.dynamic.decision."]),
        (&["--samples", "7"], &["text.samples 6, not 7"]),
    ] {
        resume(setting).fails(3, &[&[RUN, "the run was started with"], phrases].concat());
    }
    let model = dir.model();
    resume(&["--model", model.to_str().expect("UTF-8")]).fails(3, &["the run was started with base_model"]);
    std::fs::remove_dir_all(model).expect("removed");
    // What changes no weight may change.
    retrofit(&dir, &["--resume", "--threads", "1", "--recompute"]).ok();
    assert_undisturbed(&dir);
}

#[test]
fn a_run_goes_on_with_the_text_it_began_with() {
    let dir = Dir::new();
    let text = std::fs::read_to_string(crate::common::HELD_OUT).expect("a text");
    dir.write("a.txt", &text[..4000]);
    let args = [TINY, &["--steps", "3", "--checkpoint-every", "1", "--text", "a.txt"]].concat();
    // Diverges in its second step, so a run is left.
    dir.run_with(&args, &["--lr", "1e30"]).fails(4, &["step 2"]);
    dir.write("a.txt", &text[100..4100]);
    dir.run_with(&args, &["--lr", "1e30", "--resume"]).fails(3, &[RUN, "text of other contents", "--text hold now"]);
    let own = [TINY, &["--steps", "3", "--lr", "1e30", "--resume"]].concat();
    dir.run(&own).fails(3, &["the run was started with text."]);
}

#[test]
fn there_must_be_a_run_to_go_on_with() {
    let dir = Dir::new();
    retrofit(&dir, &["--resume"]).fails(3, &[RUN, "no run to resume", "without --resume"]);
    assert_eq!(dir.list("."), [""; 0]);
}

#[test]
fn two_processes_do_not_share_a_run() {
    let dir = Dir::new();
    let endless = [TINY, &["--steps", "100000", "--checkpoint-every", "1"]].concat();
    let mut child = dir.command(&endless).spawn().expect("the command starts");
    wait_for_checkpoints(&dir, 1);
    let second = dir.run_with(&endless, &["--resume"]);
    child.kill().expect("killed");
    child.wait().expect("an end");
    second.fails(3, &[RUN, "another process works on this run"]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let dir = Dir::new();
    killed(&dir);
    let found = checkpoints(&dir);
    let [older, newest] = found.as_slice() else { panic!("two are kept: {found:?}") };
    let path = dir.path(RUN).join(newest);
    let mut bytes = std::fs::read(&path).expect("a checkpoint");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&path, bytes).expect("damaged");

    let resumed = retrofit(&dir, &["--resume"]);
    let step: u64 = older["step-".len()..][..8].parse().expect("a step");
    assert!(resumed.err.contains(newest) && resumed.err.contains("is damaged"), "{}", resumed.err);
    assert!(resumed.err.contains(&format!("going on after step {step} of 48")), "{}", resumed.err);
    resumed.ok();
    assert_undisturbed(&dir);
}

#[test]
fn a_run_without_a_whole_checkpoint_begins_again() {
    let dir = Dir::new();
    killed(&dir);
    for name in checkpoints(&dir) {
        let path = dir.path(RUN).join(name);
        let bytes = std::fs::read(&path).expect("a checkpoint");
        std::fs::write(&path, &bytes[..bytes.len() / 3]).expect("cut off");
    }
    // What a killed process leaves of an unfinished file or model.
    std::fs::write(dir.path(RUN).join(".kvfold-x.tmp"), "half").expect("writable");
    std::fs::create_dir(dir.path(RUN).join("model")).expect("a directory");
    let resumed = retrofit(&dir, &["--resume"]);
    assert!(resumed.err.contains("truncated") && resumed.err.contains("going on after step 0"), "{}", resumed.err);
    resumed.ok();
    assert_undisturbed(&dir);
}

#[test]
fn damaged_papers_of_a_run_are_named() {
    for (name, content) in [("run.json", &b"{"[..]), ("run.json", b"{}"), ("corpus.u32", b"1234"), ("corpus.u32", b"")]
    {
        let dir = Dir::new();
        dir.run_with(TINY, &["--steps", "2", "--lr", "1e30"]).fails(4, &[]);
        std::fs::write(dir.path(RUN).join(name), content).expect("writable");
        dir.run_with(TINY, &["--steps", "2", "--lr", "1e30", "--resume"]).fails(3, &[name, "is damaged"]);
    }
}

#[test]
fn a_new_run_takes_nothing_from_an_old_one() {
    let dir = Dir::new();
    // As if the removal of an old run had been cut short: a checkpoint is there, its identity is gone.
    std::fs::create_dir(dir.path(RUN)).expect("a directory");
    dir.write(&format!("{RUN}/step-00000999.safetensors"), "of another run");
    killed(&dir);
    assert!(checkpoints(&dir).iter().all(|name| !name.contains("999")), "{:?}", checkpoints(&dir));
    retrofit(&dir, &["--resume"]).ok();
    assert_undisturbed(&dir);
}
