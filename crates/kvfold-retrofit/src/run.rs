//! The directory in which a run survives.
//!
//! A run that will become `OUT` lives in `OUT.kvfold-run` beside it:
//!
//! ```text
//! run.json              settings, base model, digests: what must be the same when the run goes on
//! corpus.u32            the training tokens, little-endian
//! step-00000050.safetensors   weights and moments after 50 steps, with their digest; the two newest are kept
//! curve.jsonl           one report per step
//! model/                the finished model, until it is renamed to OUT
//! ```
//!
//! Every file is written under a temporary name, synced and renamed, so whatever kills the run leaves whole files. A
//! checkpoint whose digest does not fit is passed over for the one before it, and when there is none the run starts over.
//! `run.json` is locked while a process works on the run, and the system lets go of the lock however that process ends.

use crate::corpus::{Corpus, hex};
use crate::error::RetrofitError;
use crate::settings::Settings;
use crate::trainer::{StepReport, Trainer};
use kvfold_kernels::Grad;
use kvfold_model::Checkpoint;
use kvfold_tensor::{HostTensor, atomic, safetensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

const RUN: &str = "run.json";
const CORPUS: &str = "corpus.u32";
const CURVE: &str = "curve.jsonl";
const MODEL: &str = "model";
const VERSION: u32 = 2;

/// Checkpoints that are kept.
const KEPT: usize = 2;

/// What must be the same when a run goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Identity {
    version: u32,
    base_model: String,
    base_config_digest: String,
    base_digest: String,
    corpus_digest: String,
    settings: Settings,
}

/// A run's directory.
#[derive(Debug)]
pub struct RunDir {
    dir: PathBuf,
    lock: OnceCell<File>,
}

/// What goes on after a kill.
#[derive(Debug)]
pub struct Resumed {
    /// The training tokens.
    pub corpus: Corpus,
    /// Reports of the steps done; fewer when the curve is damaged.
    pub reports: Vec<StepReport>,
    /// Checkpoints that were passed over and a curve that is incomplete, and why.
    pub damaged: Vec<String>,
}

impl RunDir {
    /// The run directory of an output directory.
    pub fn of(out: &Path) -> Self {
        // Without a final separator, or the run would lie inside of what does not exist yet.
        let mut name = out.components().as_path().as_os_str().to_owned();
        name.push(".kvfold-run");
        Self { dir: name.into(), lock: OnceCell::new() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Whether a run is there.
    pub fn exists(&self) -> bool {
        self.dir.join(RUN).exists()
    }

    /// Starts a run: refuses if one is there.
    pub fn create(&self, base: &Checkpoint, settings: &Settings, corpus: &Corpus) -> Result<(), RetrofitError> {
        if self.exists() {
            return Err(RetrofitError::Unfinished { dir: self.label() });
        }
        fs::create_dir_all(&self.dir).map_err(|source| self.io("create", "", source))?;
        self.tidy(|name| is_temporary(name) || name == CURVE || step_of(name).is_some())?;
        let bytes: Vec<u8> = corpus.tokens().iter().flat_map(|id| id.to_le_bytes()).collect();
        self.write(CORPUS, &bytes)?;
        let identity = identity(base, settings, corpus.digest());
        let json = serde_json::to_vec_pretty(&identity).map_err(|e| self.io("write", RUN, e.into()))?;
        self.write(RUN, &json)?;
        self.hold()
    }

    /// Goes on with a run: checks that it is the same one, and restores the newest whole checkpoint.
    ///
    /// Without a whole checkpoint the trainer stays at its first step: settings, model and corpus are known to be right,
    /// so all that is lost is time, and the run ends with the same weights. [`Resumed::damaged`] says what was lost.
    pub fn resume<O: Grad + Clone + 'static>(
        &self,
        base: &Checkpoint,
        trainer: &mut Trainer<O>,
    ) -> Result<Resumed, RetrofitError>
    where
        O::Tensor: 'static,
    {
        if !self.exists() {
            return Err(RetrofitError::NothingToResume { dir: self.label() });
        }
        self.hold()?;
        self.tidy(is_temporary)?;
        let corpus = self.same_run(base, trainer.settings())?;

        let mut damaged = Vec::new();
        for step in self.checkpoints()?.into_iter().rev() {
            match self.load(step, trainer) {
                Ok(()) => break,
                Err(error) => damaged.push(error.to_string()),
            }
        }
        let mut reports = Vec::new();
        if self.dir.join(CURVE).exists() {
            let text = String::from_utf8_lossy(&self.read(CURVE)?).into_owned();
            let lines = text.lines().map_while(|line| serde_json::from_str::<StepReport>(line).ok());
            reports.extend(lines.zip(1..=trainer.steps()).map_while(|(r, step)| (r.step == step).then_some(r)));
        }
        if (reports.len() as u64) < trainer.steps() {
            let reason = format!("it tells of {} steps of {}", reports.len(), trainer.steps());
            damaged.push(self.damaged(CURVE, reason).to_string());
        }
        Ok(Resumed { corpus, reports, damaged })
    }

    /// Writes the state of a trainer and all reports so far, and lets older checkpoints go.
    pub fn save<O: Grad + Clone + 'static>(
        &self,
        trainer: &Trainer<O>,
        reports: &[StepReport],
    ) -> Result<(), RetrofitError>
    where
        O::Tensor: 'static,
    {
        let mut lines = Vec::new();
        for report in reports {
            serde_json::to_writer(&mut lines, report).map_err(|e| self.io("write", CURVE, e.into()))?;
            lines.push(b'\n');
        }
        self.write(CURVE, &lines)?;
        let tensors: BTreeMap<String, HostTensor> = trainer.state().into_iter().collect();
        let metadata = BTreeMap::from([("digest".to_owned(), digest(&tensors))]);
        safetensors::write(&self.dir.join(checkpoint_name(trainer.steps())), &tensors, &metadata)?;
        // Checkpoints ahead of this one are damaged ones that were passed over; they must not push out whole ones.
        let (past, ahead): (Vec<_>, Vec<_>) =
            self.checkpoints()?.into_iter().partition(|&step| step <= trainer.steps());
        let old = &past[..past.len().saturating_sub(KEPT)];
        old.iter().chain(&ahead).try_for_each(|&step| self.remove_file(&checkpoint_name(step)))
    }

    /// Removes the directory of a finished run. What makes it a run goes first.
    pub fn remove(mut self) -> Result<(), RetrofitError> {
        drop(self.lock.take());
        self.remove_file(RUN)?;
        fs::remove_dir_all(&self.dir).map_err(|source| self.io("remove", "", source))
    }

    /// The training tokens, if they are those that were written.
    fn corpus(&self, length: usize, digest: &str) -> Result<Corpus, RetrofitError> {
        let bytes = self.read(CORPUS)?;
        let tokens = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let corpus = Corpus::cut(tokens, length).ok().filter(|corpus| corpus.digest() == digest);
        corpus.ok_or_else(|| self.damaged(CORPUS, format!("its tokens do not have the digest that {RUN} states")))
    }

    fn load<O: Grad + Clone + 'static>(&self, step: u64, trainer: &mut Trainer<O>) -> Result<(), RetrofitError>
    where
        O::Tensor: 'static,
    {
        let name = checkpoint_name(step);
        let file = safetensors::read(&self.dir.join(&name))?;
        if file.metadata.get("digest") != Some(&digest(&file.tensors)) {
            return Err(self.damaged(&name, "its tensors do not have the digest that was written with them".into()));
        }
        trainer.restore(step, |tensor, dims| {
            let found = file.tensors.get(tensor).filter(|found| found.shape() == dims);
            found.ok_or_else(|| self.damaged(&name, format!("tensor {tensor} of shape {dims:?} is missing")))
        })
    }

    /// Steps of the checkpoints, ascending.
    fn checkpoints(&self) -> Result<Vec<u64>, RetrofitError> {
        let entries = fs::read_dir(&self.dir).map_err(|source| self.io("read", "", source))?;
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry.map_err(|source| self.io("read", "", source))?.file_name();
            let name = name.to_string_lossy();
            steps.extend(step_of(&name));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Takes the run for this process, until it ends.
    fn hold(&self) -> Result<(), RetrofitError> {
        let file = File::open(self.dir.join(RUN)).map_err(|source| self.io("open", RUN, source))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(RetrofitError::Busy { dir: self.label() }),
            // Some file systems know no locks.
            Ok(()) | Err(TryLockError::Error(_)) => {
                self.lock.get_or_init(|| file);
                Ok(())
            }
        }
    }

    /// Removes what a killed process left behind.
    fn tidy(&self, leftover: impl Fn(&str) -> bool) -> Result<(), RetrofitError> {
        let entries = fs::read_dir(&self.dir).map_err(|source| self.io("read", "", source))?;
        for entry in entries {
            let entry = entry.map_err(|source| self.io("read", "", source))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if leftover(&name) {
                let path = entry.path();
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(|source| self.io("remove", &name, source))?;
            }
        }
        Ok(())
    }

    /// The training tokens, once it is clear that the run was started with this model and these settings.
    fn same_run(&self, base: &Checkpoint, settings: &Settings) -> Result<Corpus, RetrofitError> {
        let json = self.read(RUN)?;
        let found: Value = serde_json::from_slice(&json).map_err(|e| self.damaged(RUN, e.to_string()))?;
        // First of all: the rest of another version may mean something else.
        if let Some(version) = found.get("version").filter(|version| version.is_u64()) {
            self.check_same(version, &VERSION.into(), "version")?;
        }
        let found: Identity = serde_json::from_value(found).map_err(|e| self.damaged(RUN, e.to_string()))?;
        // Named first: a schedule of numbers follows from it.
        let (steps, asked) = (found.settings.stages.total(), settings.stages.total());
        self.check_same(&steps.into(), &asked.into(), "steps")?;
        let wanted = identity(base, settings, found.corpus_digest.clone());
        // Both as they are read, so that a number is compared with itself.
        let read = |identity: &Identity| -> serde_json::Result<Value> {
            serde_json::from_slice(&serde_json::to_vec(identity)?)
        };
        let (found, wanted) = match (read(&found), read(&wanted)) {
            (Ok(found), Ok(wanted)) => (found, wanted),
            (Err(error), _) | (_, Err(error)) => return Err(self.damaged(RUN, error.to_string())),
        };
        // The settings first: another length makes other sequences, and it is the length that should be named.
        self.check_same(&found["settings"], &wanted["settings"], "")?;
        self.check_same(&found, &wanted, "")?;

        let digest = found["corpus_digest"].as_str().unwrap_or_default();
        self.corpus(settings.length, digest)
    }

    /// Where the finished model is put together: whatever kills the process, nothing is left outside of the run.
    pub fn staging(&self) -> PathBuf {
        self.dir.join(MODEL)
    }

    /// Gives the finished model its name, and removes the run.
    pub fn publish(self, out: &Path) -> Result<(), RetrofitError> {
        kvfold_model::ensure_absent(out)?;
        fs::rename(self.staging(), out).map_err(|source| self.io("rename", MODEL, source))?;
        atomic::sync_dir(atomic::parent(out)).map_err(|source| self.io("write", "", source))?;
        self.remove()
    }

    /// Compares two identities leaf by leaf, so that the error names the field.
    fn check_same(&self, found: &Value, wanted: &Value, path: &str) -> Result<(), RetrofitError> {
        if let (Value::Object(found), Value::Object(wanted)) = (found, wanted) {
            let more = found.keys().filter(|key| !wanted.contains_key(*key));
            for key in wanted.keys().chain(more) {
                let at = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                self.check_same(&at(found), &at(wanted), &path)?;
            }
            return Ok(());
        }
        if found == wanted {
            return Ok(());
        }
        Err(RetrofitError::OtherRun {
            dir: self.label(),
            what: path.to_owned(),
            found: found.to_string(),
            wanted: wanted.to_string(),
        })
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, RetrofitError> {
        fs::read(self.dir.join(name)).map_err(|source| self.io("read", name, source))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), RetrofitError> {
        atomic::write(&self.dir.join(name), |w: &mut dyn Write| w.write_all(bytes))
            .map_err(|source| self.io("write", name, source))
    }

    fn remove_file(&self, name: &str) -> Result<(), RetrofitError> {
        fs::remove_file(self.dir.join(name)).map_err(|source| self.io("remove", name, source))
    }

    fn label(&self) -> String {
        self.dir.display().to_string()
    }

    fn io(&self, action: &'static str, name: &str, source: std::io::Error) -> RetrofitError {
        let file = if name.is_empty() { self.label() } else { self.dir.join(name).display().to_string() };
        RetrofitError::Io { file, action, source }
    }

    fn damaged(&self, name: &str, reason: String) -> RetrofitError {
        RetrofitError::Damaged { file: self.dir.join(name).display().to_string(), reason }
    }
}

fn checkpoint_name(step: u64) -> String {
    format!("step-{step:08}.safetensors")
}

/// The step of a checkpoint's file name.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok()?;
    (checkpoint_name(step) == name).then_some(step)
}

/// Whether a file is the unfinished work of a process that was killed.
fn is_temporary(name: &str) -> bool {
    name == MODEL || name.starts_with('.')
}

fn identity(base: &Checkpoint, settings: &Settings, corpus_digest: String) -> Identity {
    Identity {
        version: VERSION,
        base_model: base.source.clone(),
        base_config_digest: hex(&Sha256::digest(base.config.to_json())),
        base_digest: digest(&base.tensors),
        corpus_digest,
        // Recomputation changes no bit of the result, so a run that ran out of memory may go on with it.
        settings: Settings { recompute: false, ..settings.clone() },
    }
}

/// SHA-256 of names, shapes and bytes, in hex.
fn digest(tensors: &BTreeMap<String, HostTensor>) -> String {
    let mut hasher = Sha256::new();
    for (name, tensor) in tensors {
        hasher.update(format!("{name} {:?} {:?}\n", tensor.dtype(), tensor.shape()));
        hasher.update(tensor.bytes());
    }
    hex(&hasher.finalize())
}
