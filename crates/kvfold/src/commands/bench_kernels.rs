//! `kvfold bench kernels`.

use crate::cli::KernelsArgs;
use crate::error::AppError;
use crate::output;
use kvfold_eval::{KERNEL_GROUPS, KernelTime, KernelWork, Machine, kernel_times};
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
    command: String,
}

pub(crate) fn run(args: &KernelsArgs) -> Result<(), AppError> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let shape = Shape::of(&checkpoint.config);
    let bar = output::bar("measuring", KERNEL_GROUPS + 1, "groups", args.json);
    let machine = Machine::measure();
    bar.inc(1);
    let length = shape.context.min(args.tokens as usize);
    let work =
        KernelWork { rows: args.tokens as usize, length, delay: DELAY.min(length), rounds: args.rounds as usize };
    let kernels = kernel_times(&machine, &shape, work, || bar.inc(1));
    bar.finish_and_clear();
    if args.json {
        return output::json(&Output {
            schema: "kvfold.kernels/1",
            kvfold_version: env!("CARGO_PKG_VERSION"),
            commit: output::COMMIT,
            model: &args.model,
            tokens: args.tokens,
            rounds: args.rounds,
            machine: &machine,
            kernels: &kernels,
            command: output::command_line(),
        });
    }
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
        format!("{:<28} {:<34} {:>9} {:>9} {:>6} {:>7}", "kernel", "shape", "ms", "GFLOP/s", "peak", "GB/s"),
    ];
    lines.extend(kernels.iter().map(|k| {
        let speed = match k.of_peak {
            Some(of_peak) => format!("{:>9.1} {:>5.0}%", giga(k.flops / k.seconds), 100.0 * of_peak),
            None => format!("{:>9} {:>6}", "-", "-"),
        };
        let ms = k.seconds * 1e3;
        format!("{:<28} {:<34} {ms:>9.3} {speed} {:>7.1}", k.kernel, k.shape, giga(k.bytes / k.seconds))
    }));
    output::line(&lines.join("\n"))
}
