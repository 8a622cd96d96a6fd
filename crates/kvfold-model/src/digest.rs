//! Fingerprints of models.

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

/// Bytes in lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
