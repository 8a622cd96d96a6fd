//! Runs that are killed, damaged and resumed (promise I5).

use crate::common::{BORROWED, HEAD, LENGTH, bits, corpus, dmc, settings, steps, tiny, trainer};
use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::Decision;
use kvfold_model::{Checkpoint, Config};
use kvfold_retrofit::{Corpus, RetrofitError, RunDir, Settings, StepReport, Trainer};
use kvfold_tensor::HostTensor;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A run and where it lives.
struct Run {
    home: TempDir,
    settings: Settings,
    corpus: Corpus,
}

/// A run's end: reports, and weights and moments to the bit.
type End = (Vec<StepReport>, Vec<(String, Vec<u32>)>);

impl Run {
    fn new(decision: Decision, stages: (u64, u64, u64)) -> Self {
        Self { home: tempfile::tempdir().unwrap(), settings: settings(decision, stages), corpus: corpus(4) }
    }

    fn dir(&self) -> RunDir {
        RunDir::of(&self.home.path().join("out"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir().path().join(name)
    }

    fn checkpoint(&self, step: u64) -> PathBuf {
        self.file(&format!("step-{step:08}.safetensors"))
    }

    fn total(&self) -> u64 {
        self.settings.stages.total()
    }

    fn create(&self) {
        self.dir().create(&tiny(), &self.settings, &self.corpus).unwrap();
    }

    /// Starts the run, saves after each of these steps and is killed after the last.
    fn killed_after(&self, saves: &[u64]) {
        self.create();
        let mut trainer = trainer(&self.settings);
        let mut reports = Vec::new();
        for &step in saves {
            reports.extend(steps(&mut trainer, &self.corpus, step));
            self.dir().save(&trainer, &reports).unwrap();
        }
    }

    fn resume(&self) -> (Trainer<FastCpu>, kvfold_retrofit::run::Resumed) {
        let mut trainer = trainer(&self.settings);
        let resumed = self.dir().resume(&tiny(), &mut trainer).unwrap();
        assert_eq!(resumed.corpus, self.corpus);
        (trainer, resumed)
    }

    fn refused(&self, base: &Checkpoint, settings: &Settings) -> RetrofitError {
        let mut trainer = Trainer::new(FastCpu::new(), base, settings.clone()).unwrap();
        self.dir().resume(base, &mut trainer).unwrap_err()
    }

    /// Resumes, which must start after `step` and pass over `damaged` files, and trains to the end.
    #[track_caller]
    fn finishes_from(&self, step: u64, damaged: &[&str]) {
        let (mut trainer, resumed) = self.resume();
        assert_eq!(trainer.steps(), step);
        assert_eq!(resumed.damaged.len(), damaged.len(), "{:?}", resumed.damaged);
        for (reason, file) in resumed.damaged.iter().zip(damaged) {
            assert!(reason.contains(file), "{file} in: {reason}");
        }
        let mut reports = resumed.reports;
        assert_eq!(reports.len() as u64, step);
        reports.extend(steps(&mut trainer, &self.corpus, self.total()));
        assert_eq!((reports, bits(&trainer)), self.uninterrupted());
    }

    fn uninterrupted(&self) -> End {
        let mut trainer = trainer(&self.settings);
        let reports = steps(&mut trainer, &self.corpus, self.total());
        (reports, bits(&trainer))
    }

    /// The names in the run's directory, sorted.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir().path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// What may befall a file.
type Damage = fn(&mut Vec<u8>);

fn change(path: &Path, f: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    f(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_run_killed_after_any_step_ends_as_if_it_had_not_been() {
    // Borrowed: zeroing is 2 steps, so kills fall before, at and after the end of zeroing.
    for (decision, stages) in [(BORROWED, (2, 2, 1)), (BORROWED, (0, 2, 1)), (HEAD, (0, 2, 2))] {
        for killed in 0..=stages.0 + stages.1 + stages.2 {
            let run = Run::new(decision, stages);
            run.killed_after(if killed == 0 { &[] } else { std::slice::from_ref(&killed) });
            run.finishes_from(killed, &[]);
        }
    }
}

#[test]
fn a_run_killed_after_every_step_ends_as_if_it_had_not_been() {
    let run = Run::new(BORROWED, (2, 2, 2));
    run.create();
    for step in 1..=run.total() {
        let (mut trainer, resumed) = run.resume();
        let mut reports = resumed.reports;
        assert_eq!(trainer.steps() + 1, step);
        reports.push(trainer.step(&resumed.corpus).unwrap());
        run.dir().save(&trainer, &reports).unwrap();
    }
    let (trainer, resumed) = run.resume();
    assert!(trainer.finished());
    assert_eq!((resumed.reports, bits(&trainer)), run.uninterrupted());
}

#[test]
fn the_two_newest_checkpoints_are_kept_and_nothing_else_is_left() {
    let run = Run::new(HEAD, (0, 3, 3));
    run.killed_after(&[1, 2, 3, 5]);
    let checkpoints = ["step-00000003.safetensors", "step-00000005.safetensors"];
    assert_eq!(run.names(), [&["corpus.json", "corpus.u32", "curve.jsonl", "run.json"][..], &checkpoints].concat());
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before_it() {
    let damages: [(&str, Damage); 6] = [
        ("a byte of a weight", |b| {
            let at = b.len() - 5;
            b[at] ^= 0x10;
        }),
        ("a byte of the header", |b| b[40] ^= 1),
        ("a byte of the header's length", |b| b[1] ^= 1),
        ("cut off", |b| b.truncate(b.len() / 2)),
        ("cut off by a byte", |b| b.truncate(b.len() - 1)),
        ("empty", Vec::clear),
    ];
    for (what, damage) in damages {
        let run = Run::new(BORROWED, (2, 2, 1));
        run.killed_after(&[1, 3]);
        change(&run.checkpoint(3), damage);
        println!("{what}"); // names the case if it fails
        run.finishes_from(1, &["step-00000003.safetensors"]);
    }
}

#[test]
fn every_byte_of_a_checkpoint_counts() {
    let run = Run::new(HEAD, (0, 2, 2));
    run.killed_after(&[1]);
    let whole = fs::read(run.checkpoint(1)).unwrap();
    for at in (0..whole.len()).step_by(whole.len() / 60) {
        change(&run.checkpoint(1), |bytes| bytes[at] ^= 4);
        let (trainer, resumed) = run.resume();
        assert_eq!((trainer.steps(), resumed.damaged.len()), (0, 1), "byte {at} of {}", whole.len());
        fs::write(run.checkpoint(1), &whole).unwrap();
    }
    assert_eq!(run.resume().0.steps(), 1);
}

#[test]
fn without_a_whole_checkpoint_the_run_starts_over_and_says_so() {
    let run = Run::new(BORROWED, (2, 2, 1));
    run.killed_after(&[2, 4]);
    change(&run.checkpoint(2), |bytes| bytes.truncate(100));
    change(&run.checkpoint(4), Vec::clear);
    run.finishes_from(0, &["step-00000004.safetensors", "step-00000002.safetensors"]);
}

#[test]
fn damaged_checkpoints_do_not_push_out_whole_ones() {
    let run = Run::new(HEAD, (0, 3, 3));
    run.killed_after(&[3, 4]);
    change(&run.checkpoint(3), Vec::clear);
    change(&run.checkpoint(4), Vec::clear);
    let (mut trainer, resumed) = run.resume();
    let mut reports = resumed.reports;
    reports.extend(steps(&mut trainer, &run.corpus, 1));
    run.dir().save(&trainer, &reports).unwrap();
    run.finishes_from(1, &[]);
}

#[test]
fn another_run_is_refused_by_the_field_that_differs() {
    let run = Run::new(HEAD, (0, 3, 3));
    run.killed_after(&[1]);
    let other = |what: &str, base: &Checkpoint, spoil: &dyn Fn(&mut Settings)| {
        let mut settings = run.settings.clone();
        spoil(&mut settings);
        match run.refused(base, &settings) {
            RetrofitError::OtherRun { what: field, found, wanted, .. } => {
                assert_eq!(field, what);
                assert_ne!(found, wanted);
            }
            other => panic!("{what}: {other}"),
        }
    };
    let base = tiny();
    other("seed", &base, &|s| s.seed = 12);
    other("ratio", &base, &|s| s.ratio = 2.5);
    other("length", &base, &|s| s.length = LENGTH / 2);
    other("length", &base, &|s| s.length = 2 * LENGTH);
    other("method.dynamic.delay", &base, &|s| dmc(s).delay = 4);
    other("method.dynamic.pool_window", &base, &|s| dmc(s).pool_window = None);
    other("method.dynamic.decision.offset", &base, &|s| {
        dmc(s).decision = Decision::Head { scale: 4.0, offset: 2.0, bias: false, ahead: false }
    });
    other("steps", &base, &|s| s.stages.hold = 4);
    other("learning.rate", &base, &|s| s.learning.rate = 1e-3);

    other("base_model", &Checkpoint { source: "other".into(), ..tiny() }, &|_| {});
    let mut weights = tiny();
    let (name, tensor) = weights.tensors.pop_last().unwrap();
    let mut values = tensor.to_f32();
    values[0] += 1e-3;
    weights.tensors.insert(name, HostTensor::from_f32(tensor.shape(), &values));
    other("base_digest", &weights, &|_| {});
    let mut config: serde_json::Value = serde_json::from_str(&base.config.to_json()).unwrap();
    config["rope_theta"] = 500.0.into();
    let config = Config::parse(config.to_string().as_bytes(), "config.json").unwrap();
    other("base_config_digest", &Checkpoint { config, ..tiny() }, &|_| {});

    change(&run.file("run.json"), |json| {
        *json = String::from_utf8_lossy(json).replace("\"version\": 2", "\"version\": 3").into_bytes();
    });
    other("version", &base, &|s| s.seed = 12);
}

#[test]
fn a_run_may_go_on_with_recomputation() {
    let mut run = Run::new(HEAD, (0, 3, 3));
    run.killed_after(&[2]);
    run.settings.recompute = true;
    run.finishes_from(2, &[]);
}

#[test]
fn a_damaged_corpus_or_run_file_is_an_error_that_names_it() {
    let damages: [(&str, Damage); 6] = [
        ("corpus.u32", |b| b[20] ^= 1),
        ("corpus.json", |b| b.truncate(9)),
        ("corpus.u32", |b| b.truncate(4 * LENGTH)),
        ("corpus.u32", Vec::clear),
        ("run.json", |b| b.truncate(30)),
        ("run.json", |b| *b = b"[]".to_vec()),
    ];
    for (file, damage) in damages {
        let run = Run::new(HEAD, (0, 3, 3));
        run.killed_after(&[1]);
        change(&run.file(file), damage);
        match run.refused(&tiny(), &run.settings) {
            RetrofitError::Damaged { file: found, .. } => assert!(found.ends_with(file), "{found}"),
            other => panic!("{file}: {other}"),
        }
    }
    let run = Run::new(HEAD, (0, 3, 3));
    run.killed_after(&[1]);
    fs::remove_file(run.file("corpus.u32")).unwrap();
    let error = run.refused(&tiny(), &run.settings);
    assert!(matches!(error, RetrofitError::Io { .. }) && error.to_string().contains("corpus.u32"), "{error}");
}

#[test]
fn what_a_kill_between_writes_leaves_is_whole() {
    // A save is a curve, then a checkpoint, then removals, each a rename; a write that was cut off is a temporary name.
    let run = Run::new(BORROWED, (2, 2, 1));
    run.killed_after(&[1, 2]);
    let two = fs::read(run.checkpoint(2)).unwrap();
    let one = fs::read(run.checkpoint(1)).unwrap();
    run.resume_and_save(3);
    // After the curve of step 3, before its checkpoint.
    fs::remove_file(run.checkpoint(3)).unwrap();
    fs::write(run.checkpoint(1), one).unwrap();
    fs::write(run.file(".kvfold-Xy12Zq.tmp"), &two[..two.len() / 2]).unwrap();
    fs::write(run.file("step-00000009.safetensors.part"), b"x").unwrap();
    fs::write(run.file("step-9.safetensors"), b"x").unwrap();
    run.finishes_from(2, &[]);
    // After the checkpoint, before the removals.
    run.resume_and_save(3);
    fs::write(run.checkpoint(1), b"old").unwrap();
    run.finishes_from(3, &[]);
    run.resume_and_save(4);
    assert!(!run.checkpoint(1).exists() && !run.checkpoint(2).exists(), "what a removal left is removed by the next");
}

impl Run {
    /// Resumes, trains until `step` steps are done and saves.
    fn resume_and_save(&self, step: u64) {
        let (mut trainer, resumed) = self.resume();
        let mut reports = resumed.reports;
        reports.extend(steps(&mut trainer, &self.corpus, step));
        self.dir().save(&trainer, &reports).unwrap();
    }
}

#[test]
fn an_incomplete_curve_is_reported_and_a_longer_one_is_cut() {
    let run = Run::new(HEAD, (0, 3, 3));
    run.killed_after(&[2, 4]);
    fs::remove_file(run.checkpoint(4)).unwrap();
    run.finishes_from(2, &[]);

    change(&run.file("curve.jsonl"), |b| b[5] = b'!');
    let (trainer, resumed) = run.resume();
    assert_eq!((trainer.steps(), resumed.reports.len(), resumed.damaged.len()), (2, 0, 1));
    assert!(resumed.damaged[0].contains("curve.jsonl"), "{:?}", resumed.damaged);
    fs::remove_file(run.file("curve.jsonl")).unwrap();
    assert_eq!(run.resume().1.damaged.len(), 1);
}

#[test]
fn a_run_in_the_way_is_refused_and_a_removed_one_leaves_nothing() {
    let run = Run::new(HEAD, (0, 3, 3));
    let mut resuming = trainer(&run.settings);
    let nothing = run.dir().resume(&tiny(), &mut resuming).unwrap_err();
    assert!(matches!(nothing, RetrofitError::NothingToResume { .. }));
    assert!(!run.dir().exists());

    run.killed_after(&[1]);
    assert!(run.dir().exists());
    let again = run.dir().create(&tiny(), &run.settings, &run.corpus).unwrap_err();
    assert!(matches!(again, RetrofitError::Unfinished { .. }));
    run.finishes_from(1, &[]);

    run.dir().remove().unwrap();
    assert_eq!(fs::read_dir(run.home.path()).unwrap().count(), 0);
}

#[test]
fn a_removal_that_was_cut_short_leaves_nothing_to_the_next_run() {
    let mut run = Run::new(HEAD, (0, 3, 3));
    run.killed_after(&[2, 4]);
    // `run.json` goes first.
    fs::remove_file(run.file("run.json")).unwrap();
    assert!(!run.dir().exists());
    run.settings.seed = 5;
    run.create();
    assert_eq!(run.names(), ["corpus.json", "corpus.u32", "run.json"]);
    run.finishes_from(0, &[]);
}

#[test]
fn a_run_lies_beside_its_output_however_that_is_spelt() {
    for out in ["a/out", "a/out/", "a/out/."] {
        assert_eq!(RunDir::of(Path::new(out)).path(), Path::new("a/out.kvfold-run"), "{out}");
    }
    assert_eq!(RunDir::of(Path::new("out")).path(), Path::new("out.kvfold-run"));
}
