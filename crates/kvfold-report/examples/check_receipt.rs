//! Holds a receipt to the promises of the README; CI runs it on the demo's.
//!
//! `cargo run -p kvfold-report --example check_receipt -- receipt.json`
//!
//! Exits with 0 if every promise is kept, 1 if one is broken, and 2 if there is
//! no readable receipt.

use std::process::ExitCode;

use kvfold_report::{Receipt, format};

/// Tokens seen over slots held, at the model's full context.
const LOGICAL_RATIO: f64 = 4.0;
/// Dense bytes over bytes held, at the model's full context.
const PHYSICAL_RATIO: f64 = 3.5;
/// How much perplexity may rise.
const PERPLEXITY_RISE: f64 = 0.10;

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: check_receipt RECEIPT.json");
        return ExitCode::from(2);
    };
    let read = std::fs::read_to_string(&path)
        .map_err(|error| error.to_string())
        .and_then(|json| Receipt::from_json(&json).map_err(|error| error.to_string()));
    let receipt = match read {
        Ok(receipt) => receipt,
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::from(2);
        }
    };
    let broken = broken_promises(&receipt);
    for promise in &broken {
        eprintln!("{path}: {promise}");
    }
    if !broken.is_empty() {
        return ExitCode::FAILURE;
    }
    println!(
        "{path}: logical {}, physical {}, perplexity {}: every promise kept",
        format::ratio(receipt.memory.logical_ratio),
        format::ratio(receipt.memory.physical_ratio),
        format::change(receipt.quality.perplexity.rise())
    );
    ExitCode::SUCCESS
}

fn broken_promises(receipt: &Receipt) -> Vec<String> {
    let mut broken = receipt.contradictions();
    let (memory, rise) = (&receipt.memory, receipt.quality.perplexity.rise());
    for (name, ratio, promised) in [
        ("logical_ratio", memory.logical_ratio, LOGICAL_RATIO),
        ("physical_ratio", memory.physical_ratio, PHYSICAL_RATIO),
    ] {
        // NaN compares as false, and so breaks the promise.
        let kept = ratio >= promised;
        if !kept {
            broken.push(format!("{name} is {ratio}, below {promised}"));
        }
    }
    let kept = rise <= PERPLEXITY_RISE;
    if !kept {
        let (rise, most) = (format::change(rise), format::change(PERPLEXITY_RISE));
        broken.push(format!("perplexity changed by {rise}, more than {most}"));
    }
    broken
}
