//! What the machine can do at best, measured before what is held to it.

use kvfold_kernels::machine::{peak, read_bandwidth};
use kvfold_kernels::ops::Precision;
use kvfold_kernels::simd::Level;
use serde::Serialize;

/// What the machine can do at best.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The instruction set that kernels run with.
    pub level: String,
    /// Threads.
    pub threads: usize,
    /// Floating-point operations per second of f32 products.
    pub peak_f32: f64,
    /// Of bf16 products; f32's where the machine has none of its own.
    pub peak_bf16: f64,
    /// Bytes read per second.
    pub bandwidth: f64,
}

impl Machine {
    /// Measures this machine.
    pub fn measure() -> Self {
        let level = Level::detect();
        Self {
            level: format!("{level:?}"),
            threads: kvfold_kernels::team::threads(),
            peak_f32: peak(level, Precision::F32),
            peak_bf16: peak(level, Precision::Bf16),
            bandwidth: read_bandwidth(),
        }
    }

    /// Floating-point operations per second of products in a precision.
    pub fn peak(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 | Precision::Q8 => self.peak_f32,
            Precision::Bf16 => self.peak_bf16,
        }
    }
}
