//! Eight-bit numbers in blocks that share a scale: 8.25 bits each.
//!
//! A block is 64 consecutive numbers; one is `q * scale` with a whole `q` of -127 to 127. The scale is a bfloat16, rounded
//! up, so that the largest number of a block always fits.

use half::bf16;

/// Numbers that share a scale.
pub(super) const BLOCK: usize = 64;

const MOST: f32 = 127.0;

/// Quantised numbers and the scales of their blocks.
#[derive(Debug, PartialEq)]
pub(super) struct Quantised {
    pub(super) numbers: Vec<i8>,
    pub(super) scales: Vec<bf16>,
}

/// Rounds every number to the nearest that its block can hold.
pub(super) fn quantise(values: &[f32]) -> Quantised {
    let (mut numbers, mut scales) = (Vec::with_capacity(values.len()), Vec::new());
    for block in values.chunks(BLOCK) {
        let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let scale = up(largest / MOST);
        scales.push(scale);
        let scale = scale.to_f32();
        numbers.extend(block.iter().map(|x| match scale > 0.0 {
            true => (x / scale).round().clamp(-MOST, MOST) as i8,
            false => 0,
        }));
    }
    Quantised { numbers, scales }
}

/// The smallest bfloat16 that is at least `x`, which is not negative.
fn up(x: f32) -> bf16 {
    let near = bf16::from_f32(x);
    if near.to_f32() >= x { near } else { bf16::from_bits(near.to_bits() + 1) }
}

/// The numbers again; there is a scale for every block.
pub(super) fn dequantise(numbers: &[i8], scales: &[bf16]) -> Vec<f32> {
    let blocks = numbers.chunks(BLOCK).zip(scales);
    blocks.flat_map(|(block, scale)| block.iter().map(|&q| f32::from(q) * scale.to_f32())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_number_is_off_by_more_than_half_a_step(
            values in prop::collection::vec(-1.0f32..1.0, 0..200),
            exponent in -30i32..30,
        ) {
            let values: Vec<f32> = values.into_iter().map(|x| x * 2f32.powi(exponent)).collect();
            let Quantised { numbers, scales } = quantise(&values);
            prop_assert_eq!(scales.len(), values.len().div_ceil(BLOCK));
            let again = dequantise(&numbers, &scales);
            prop_assert_eq!(again.len(), values.len());
            for (block, (values, again)) in values.chunks(BLOCK).zip(again.chunks(BLOCK)).enumerate() {
                let largest = values.iter().fold(0f32, |l, x| l.max(x.abs()));
                // A bfloat16 is rounded up by at most 1 in 128.
                prop_assert!(scales[block].to_f32() <= largest / MOST * (1.0 + 1.0 / 127.0));
                for (x, y) in values.iter().zip(again) {
                    prop_assert!((x - y).abs() <= 0.5001 * scales[block].to_f32(), "{} {}", x, y);
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let quantised = quantise(&[0.0; 70]);
        assert_eq!(dequantise(&quantised.numbers, &quantised.scales), [0.0; 70]);
    }
}
