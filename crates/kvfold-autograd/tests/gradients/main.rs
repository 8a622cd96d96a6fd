//! Every adjoint against differences of its op in f64 (promise I6), and checkpoint segments against plain tapes.

mod check;
mod gates;
mod layers;
mod memory;
mod segments;
