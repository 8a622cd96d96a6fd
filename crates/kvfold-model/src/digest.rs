//! Fingerprints of models.

use crate::Loaded;
use kvfold_kernels::Ops;
use kvfold_tensor::HostTensor;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// SHA-256 of the names, dtypes, shapes and bytes of tensors, in hex.
pub fn of_tensors(tensors: &BTreeMap<String, HostTensor>) -> String {
    let mut hasher = Sha256::new();
    for (name, tensor) in tensors {
        hasher.update(format!("{name} {:?} {:?}\n", tensor.dtype(), tensor.shape()));
        hasher.update(tensor.bytes());
    }
    hex(&hasher.finalize())
}

/// SHA-256 of a model's sizes, of how it compresses, and of its weights as the backend holds them, in hex.
pub fn of_loaded<O: Ops>(model: &Loaded<O>) -> String {
    let mut hasher = Sha256::new();
    hasher.update(format!("{:?}\n{:?}\n", model.shape, model.dmc));
    for weight in model.weights.list() {
        hasher.update(bytemuck::cast_slice::<f32, u8>(&model.ops.to_host(weight)));
    }
    hex(&hasher.finalize())
}

/// Bytes in lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
