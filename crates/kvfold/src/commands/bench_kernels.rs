//! `kvfold bench kernels`.

use crate::cli::KernelsArgs;
use crate::error::AppError;
use crate::output;
use kvfold_eval::{KernelTime, KernelWork, Load, Machine, Others, kernel_times};
use kvfold_model::Checkpoint;
use kvfold_model::shape::Shape;
use kvfold_retrofit::settings::DELAY;
use serde::Serialize;

#[derive(Serialize)]
struct Output<'a> {
    schema: &'static str,
    kvfold_version: &'static str,
    commit: &'static str,
    model: &'a str,
    tokens: u32,
    rounds: u32,
    machine: &'a Machine,
    kernels: &'a [KernelTime],
    others: Option<Others>,
    command: String,
}

pub(crate) fn run(args: &KernelsArgs) -> Result<(), AppError> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let shape = Shape::of(&checkpoint.config);
    let before = Load::now();
    let bar = output::bar("measuring", 0, "groups", args.json);
    let machine = Machine::measure();
    let length = shape.context.min(args.tokens as usize);
    let work =
        KernelWork { rows: args.tokens as usize, length, delay: DELAY.min(length), rounds: args.rounds as usize };
    let kernels = kernel_times(&machine, &shape, work, &args.only, |done, groups| {
        bar.set_length(groups as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    if kernels.is_empty() {
        let reason = format!("no kernel has {:?} in its name; without --only all are timed", args.only);
        return Err(AppError::Text { file: "--only".into(), reason });
    }
    let others = before.zip(Load::now()).map(|(before, after)| after.others_since(&before));
    if args.json {
        return output::json(&Output {
            schema: "kvfold.kernels/2",
            kvfold_version: env!("CARGO_PKG_VERSION"),
            commit: output::COMMIT,
            model: &args.model,
            tokens: args.tokens,
            rounds: args.rounds,
            machine: &machine,
            kernels: &kernels,
            others,
            command: output::command_line(),
        });
    }
    if let Some(warning) = others.and_then(|others| others.warning()) {
        output::note(&format!("kvfold: {warning}"));
    }
    output::line(&table(&machine, &kernels))
}

fn table(machine: &Machine, kernels: &[KernelTime]) -> String {
    let giga = |x: f64| x / 1e9;
    let mut lines = vec![
        format!(
            "{} on {} threads: {:.0} GFLOP/s f32, {:.0} GFLOP/s bf16, {:.1} GB/s read",
            machine.level,
            machine.threads,
            giga(machine.peak_f32),
            giga(machine.peak_bf16),
            giga(machine.bandwidth)
        ),
        String::new(),
        format!(
            "{:<32} {:<34} {:>9} {:>8} {:>5} {:>6} {:>5}  {}",
            "kernel", "shape", "ms", "GFLOP/s", "peak", "GB/s", "read", "path"
        ),
    ];
    lines.extend(kernels.iter().map(|k| {
        let speed = match k.of_peak {
            Some(of_peak) => format!("{:>8.1} {:>4.0}%", giga(k.flops / k.seconds), 100.0 * of_peak),
            None => format!("{:>8} {:>5}", "-", "-"),
        };
        let (ms, read) = (k.seconds * 1e3, giga(k.bytes / k.seconds));
        let of_read = 100.0 * k.of_bandwidth;
        format!("{:<32} {:<34} {ms:>9.3} {speed} {read:>6.1} {of_read:>4.0}%  {}", k.kernel, k.shape, k.path)
    }));
    lines.join("\n")
}
