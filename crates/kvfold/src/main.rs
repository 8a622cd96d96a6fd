//! The `kvfold` command: parse, run, and say with the exit code how it went.

mod cli;
mod commands;
mod error;
mod interrupt;
mod output;

use clap::Parser;
use cli::{BenchCommand, Cli, Command, EvalCommand};
use error::AppError;
use interrupt::Interrupt;
use kvfold_kernels::team::Team;
use mimalloc::MiMalloc;
use std::process::ExitCode;

/// Threads free what others allocated, in sizes that change with every batch: the system's allocator keeps more and more of
/// that, and takes a tenth of the time of decoding from long caches.
#[global_allocator]
static MEMORY: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that closed the pipe has what it wanted.
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&format!("kvfold: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<(), AppError> {
    if let Some(threads) = cli.threads {
        let team = Team::new(threads.into());
        let team = team.map_err(|error| AppError::Setup { what: "start the threads", reason: error.to_string() })?;
        team.set_global();
    }
    // A server has its own way to be stopped.
    if let Command::Serve(args) = &cli.command {
        return commands::serve::run(args);
    }
    let interrupt = Interrupt::listen()?;
    match &cli.command {
        Command::Demo(args) => commands::demo::run(args),
        Command::Retrofit(args) => commands::retrofit::run(args, &interrupt),
        Command::Import(args) => commands::import::run(args),
        Command::Export(args) => commands::export::run(args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Chat(args) => commands::chat::run(args, &interrupt),
        Command::Serve(args) => commands::serve::run(args),
        Command::Eval { command: EvalCommand::Ppl(args) } => commands::eval_ppl::run(args),
        Command::Bench { command: BenchCommand::Model(args) } => commands::bench_model::run(args),
        Command::Bench { command: BenchCommand::Kernels(args) } => commands::bench_kernels::run(args),
    }
}
