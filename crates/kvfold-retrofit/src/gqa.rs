//! Grouped-query attention out of more heads (Ainslie et al. 2023, arXiv 2305.13245; spec 3.2).
//!
//! Consecutive KV heads become one, whose key and value projections are the means of theirs; queries stay as they are
//! and share the new head. What the means cost is then trained back, as for the other methods, so that they can be
//! compared at equal tokens and equal bytes.

use kvfold_model::{Checkpoint, names};
use kvfold_tensor::HostTensor;
use std::collections::BTreeMap;

/// What a model with `kv_heads` KV heads, each the mean of those it stands for, has other than `base`.
pub fn mean_pooled(base: &Checkpoint, kv_heads: usize) -> BTreeMap<String, HostTensor> {
    let before = base.config.num_key_value_heads;
    let theirs = base.tensors.iter().filter(|(name, _)| per_kv_head(name));
    theirs.map(|(name, tensor)| (name.clone(), pooled(tensor, (before, kv_heads)))).collect()
}

/// Whether a tensor has rows for every KV head: the projections of keys and values and their biases. Qwen3's norm of keys
/// has one gain for all heads.
fn per_kv_head(name: &str) -> bool {
    [names::K_PROJ, names::V_PROJ, names::K_BIAS, names::V_BIAS].iter().any(|part| name.ends_with(part))
}

/// Means over consecutive heads: `[before*D, ...] -> [after*D, ...]`, added up in f64, in the tensor's own dtype.
fn pooled(tensor: &HostTensor, (before, after): (usize, usize)) -> HostTensor {
    let values = tensor.to_f32();
    let (head, group) = (values.len() / before, before / after);
    let mut means = Vec::with_capacity(after * head);
    for heads in values.chunks_exact(group * head) {
        means.extend((0..head).map(|at| {
            let sum: f64 = heads[at..].iter().step_by(head).map(|&x| f64::from(x)).sum();
            (sum / group as f64) as f32
        }));
    }
    let mut shape = tensor.shape().to_vec();
    shape[0] = shape[0] / before * after;
    HostTensor::from_f32(shape, &means).to_dtype(tensor.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvfold_tensor::DType;

    #[test]
    fn consecutive_heads_become_their_mean_row_by_row() {
        // Four heads of two rows of three columns.
        let values: Vec<f32> = (0..24).map(|n| (n * n) as f32).collect();
        let two = pooled(&HostTensor::from_f32(vec![8, 3], &values), (4, 2));
        assert_eq!(two.shape(), [4, 3]);
        let mean = |new: usize, at: usize| (values[12 * new + at] + values[12 * new + 6 + at]) / 2.0;
        let want: Vec<f32> = (0..2).flat_map(|new| (0..6).map(move |at| mean(new, at))).collect();
        assert_eq!(two.to_f32(), want);
    }

    #[test]
    fn biases_and_gains_pool_alike_and_dtypes_stay() {
        let bias = HostTensor::from_f32(vec![4], &[1.0, 2.0, 5.0, 8.0]).to_dtype(DType::BF16);
        let one = pooled(&bias, (2, 1));
        assert_eq!((one.dtype(), one.shape(), one.to_f32()), (DType::BF16, &[2][..], vec![3.0, 5.0]));
    }
}
