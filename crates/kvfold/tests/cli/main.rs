//! The command as people use it: one file per command, each test in a directory of its own.

mod bad_input;
mod bench;
mod chat;
mod common;
mod demo;
mod eval_ppl;
mod generate;
mod help;
mod retrofit;
#[cfg(unix)] // signals
mod runs;
mod scale;
#[cfg(unix)] // signals
mod serve;
