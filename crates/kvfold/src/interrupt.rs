//! Ctrl-C: at once where there is nothing to save, after the step where there is.

use crate::error::{AppError, INTERRUPTED};
use crate::output;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Ctrl-C ends the program.
const AT_ONCE: u8 = 0;
/// Ctrl-C is noted down.
const DEFERRED: u8 = 1;
/// It was; the next one ends the program.
const ASKED: u8 = 2;

/// What Ctrl-C does. SIGTERM and SIGHUP are left alone: a run in the background outlives its terminal by `nohup`, and a run
/// that is killed goes on from its last checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt {
    state: Arc<AtomicU8>,
    farewell: Arc<Mutex<String>>,
}

impl Interrupt {
    /// Takes over Ctrl-C.
    pub(crate) fn listen() -> Result<Self, AppError> {
        let this = Self { state: Arc::default(), farewell: Arc::new(Mutex::new("interrupted".into())) };
        let Self { state, farewell } = this.clone();
        ctrlc::set_handler(move || {
            if state.compare_exchange(DEFERRED, ASKED, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                output::note("kvfold: stopping after this step; Ctrl-C again stops at once");
                return;
            }
            output::note(&format!("kvfold: {}", farewell.lock().unwrap_or_else(PoisonError::into_inner)));
            std::process::exit(INTERRUPTED.into());
        })
        .map_err(|error| AppError::Setup { what: "listen for Ctrl-C", reason: error.to_string() })?;
        Ok(this)
    }

    /// What to say when Ctrl-C ends the program.
    pub(crate) fn farewell(&self, text: &str) {
        *self.farewell.lock().unwrap_or_else(PoisonError::into_inner) = text.to_owned();
    }

    /// Runs `work` with Ctrl-C noted down instead of carried out; `work` has to ask.
    pub(crate) fn deferred<T>(&self, work: impl FnOnce(&dyn Fn() -> bool) -> T) -> T {
        self.state.store(DEFERRED, Ordering::SeqCst);
        let result = work(&|| self.state.load(Ordering::SeqCst) == ASKED);
        self.state.store(AT_ONCE, Ordering::SeqCst);
        result
    }
}
