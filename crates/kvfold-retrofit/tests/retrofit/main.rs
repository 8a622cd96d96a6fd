//! The tests of the crate, in one binary: each would be linked, and its generics compiled, anew.

mod calibrate;
mod combinations;
mod common;
mod corpus;
mod documents;
mod families;
mod methods;
mod origin;
mod run;
mod schedule;
mod settings;
mod settle;
mod trainer;
mod watch;
