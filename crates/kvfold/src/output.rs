//! What commands print: progress on standard error, results on standard output, JSON where asked.

use crate::error::AppError;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvfold_report::Style;
use kvfold_report::receipt::Machine;
use kvfold_report::text::clean;
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::LazyLock;

/// All progress bars, so that a line between them is not written over. Hidden where standard error is no terminal.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// A progress bar on standard error, hidden when that is no terminal or `quiet`.
pub(crate) fn bar(label: &'static str, length: usize, unit: &str, quiet: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length as u64), ProgressDrawTarget::hidden());
    let bar = if quiet { bar } else { BARS.add(bar) };
    let template =
        format!("{{prefix:<22}} {{bar:28}} {{human_pos}}/{{human_len}} {unit}  {{elapsed}}, {{eta}} left  {{msg}}");
    bar.set_style(ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(label);
    bar
}

/// A progress bar with room for what else there is to see, below it.
pub(crate) fn panel(label: &'static str, length: u64, unit: &str, quiet: bool) -> ProgressBar {
    let panel = bar(label, 0, unit, quiet);
    panel.set_length(length);
    let template =
        format!("{{prefix:<22}} {{bar:28}} {{human_pos}}/{{human_len}} {unit}  {{elapsed}}, {{eta}} left\n{{msg}}");
    panel.set_style(ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    panel
}

/// This build: version and commit.
pub(crate) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("KVFOLD_COMMIT"), ")");

/// The commit of this build: a short hash, `-dirty` after it if the sources differ, or `unknown`.
pub(crate) const COMMIT: &str = env!("KVFOLD_COMMIT");

/// Prints a line of results.
pub(crate) fn line(text: &str) -> Result<(), AppError> {
    piece(&format!("{text}\n"))
}

/// Prints a part of a line, now. A terminal does not get the control characters that a model may write; a file or a pipe
/// gets the text as it is.
pub(crate) fn piece(text: &str) -> Result<(), AppError> {
    let mut out = std::io::stdout().lock();
    match out.is_terminal() {
        true => out.write_all(clean(text).as_bytes())?,
        false => out.write_all(text.as_bytes())?,
    }
    Ok(out.flush()?)
}

/// Prints a line for the person at the terminal, on standard error, without control characters that names in a file may
/// hold. If nobody is there, nothing is lost.
pub(crate) fn note(text: &str) {
    BARS.suspend(|| {
        let _ = writeln!(std::io::stderr().lock(), "{}", clean(text));
    });
}

/// Prints a result as one JSON document.
pub(crate) fn json(value: &impl Serialize) -> Result<(), AppError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| AppError::Output(error.into()))?;
    line(&text)
}

/// Checks that a file can be written there, before any work is done for it.
pub(crate) fn ensure_writable(path: &Path) -> Result<(), AppError> {
    let wrong = |reason: &str| Err(AppError::Text { file: path.display().to_string(), reason: reason.into() });
    if path.is_dir() || path.file_name().is_none() {
        return wrong("is a directory; a file is to be written there");
    }
    if !kvfold_tensor::atomic::parent(path).is_dir() {
        return wrong("lies in a directory that does not exist; create that first");
    }
    Ok(())
}

/// Writes a file that the user asked for, under a temporary name and renamed.
pub(crate) fn file(path: &Path, text: &str) -> Result<(), AppError> {
    kvfold_tensor::atomic::write(path, |w: &mut dyn Write| w.write_all(text.as_bytes()))
        .map_err(|source| AppError::File { file: path.display().to_string(), action: "write", source })
}

/// How to render for this terminal: colour only where somebody looks at it and has not said no.
pub(crate) fn style() -> Style {
    let terminal = std::io::stdout().is_terminal();
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let width = terminal_size::terminal_size().filter(|_| terminal).map_or(100, |(width, _)| usize::from(width.0));
    Style { color: terminal && !refused, width }
}

/// The same for standard error, and its rows; none where it is no terminal.
pub(crate) fn error_style() -> (Style, usize) {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    match terminal_size::terminal_size_of(std::io::stderr()) {
        Some((width, height)) => (Style { color: !refused, width: width.0.into() }, height.0.into()),
        None => (Style { color: false, width: 100 }, 0),
    }
}

/// The command line as the user typed it, without --resume: with that it could not be run again.
pub(crate) fn command_line() -> String {
    let quoted = |arg: String| match arg.is_empty() || arg.contains(|c: char| c.is_whitespace() || "'\"$\\".contains(c))
    {
        true => format!("'{}'", arg.replace('\'', r"'\''")),
        false => arg,
    };
    let mut args = std::env::args();
    args.next();
    let args = args.filter(|arg| arg != "--resume");
    std::iter::once("kvfold".to_owned()).chain(args.map(quoted)).collect::<Vec<_>>().join(" ")
}

/// This machine, for receipts.
pub(crate) fn machine() -> Machine {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
    };
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kib = memory.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    Machine {
        cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".into()),
        cores: std::thread::available_parallelism().map_or(0, |n| n.get() as u64),
        memory_bytes: kib.unwrap_or(0) * 1024,
        os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    }
}

/// Now, in ISO 8601.
pub(crate) fn now() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}
