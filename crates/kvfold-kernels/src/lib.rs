//! How each op is computed, forward and backward side by side.
//!
//! [`ops`] is the seam between kvfold and the machine: above it, nobody touches a number. The CPU backend ([`cpu`]) has
//! two kernel sets: the scalar reference, generic over f32 and f64, which is the definition that gradients and fast
//! kernels are checked against; and f32 with the vectors the machine has. One kernel, one file, its backward beside it:
//!
//! | file | op |
//! |---|---|
//! | `simd.rs` | instruction sets, the matrix product's register tile, a vectorisable exponential |
//! | `bf16.rs`, `pack.rs` | the tile of bf16 products, and packing for it |
//! | `amx.rs` | the same products on the tile registers of AMX |
//! | `q8/` | 8-bit weights, and their products with integers |
//! | `norm.rs`, `rope.rs`, `loss.rs` | RMS norm, rotary embedding, cross-entropy and KL |
//! | `gate.rs` | decisions and importances, their relaxation, the hinge |
//! | `pool.rs` | running weighted means |
//! | `attention/` | attention over exact keys and pooled states |
//! | `paged/` | attention over a paged cache, appending or folding |
//! | `machine.rs` | the speeds that kernels are judged by |
//! | `noise.rs` | counter-based noise |

mod aligned;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
pub mod bf16;
pub mod cpu;
pub mod dmc;
mod gate;
pub mod kernel_set;
mod loss;
pub mod machine;
pub mod noise;
mod norm;
pub mod ops;
mod pack;
pub mod paged;
mod pool;
mod q8;
pub mod real;
mod rope;
pub mod simd;
mod stored;
pub mod team;

pub use cpu::{Array, Cpu, FastCpu, Reference};
pub use ops::{CacheOps, Grad, Ops};
