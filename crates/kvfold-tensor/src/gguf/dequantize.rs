//! From stored blocks to `f32`, one function a type, as ggml defines them.
//!
//! Each takes whole blocks and the values they stand for. A block of the small types is 32 values with one scale `d` and
//! perhaps a minimum `m`; a block of the K types is 256 values in groups of 16 or 32, whose scales are integers themselves,
//! to be multiplied by the block's. The order of operations is ggml's, so the results are equal bit by bit.

use half::{bf16 as Bf16, f16 as F16};

fn half(bytes: &[u8]) -> f32 {
    F16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn int(byte: u8) -> f32 {
    f32::from(byte as i8)
}

pub(super) fn f32(bytes: &[u8], out: &mut [f32]) {
    bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(bytes);
}

pub(super) fn f16(bytes: &[u8], out: &mut [f32]) {
    bytes.chunks_exact(2).zip(out).for_each(|(x, out)| *out = half(x));
}

pub(super) fn bf16(bytes: &[u8], out: &mut [f32]) {
    bytes.chunks_exact(2).zip(out).for_each(|(x, out)| *out = Bf16::from_le_bytes([x[0], x[1]]).to_f32());
}

/// d, 16 bytes: low nibbles are the first half of the block, high nibbles the second.
pub(super) fn q4_0(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(18).zip(out.chunks_exact_mut(32)) {
        let d = half(block);
        for (i, q) in block[2..].iter().enumerate() {
            out[i] = (f32::from(q & 15) - 8.0) * d;
            out[i + 16] = (f32::from(q >> 4) - 8.0) * d;
        }
    }
}

/// d, m, 16 bytes.
pub(super) fn q4_1(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(20).zip(out.chunks_exact_mut(32)) {
        let (d, m) = (half(block), half(&block[2..]));
        for (i, q) in block[4..].iter().enumerate() {
            out[i] = f32::from(q & 15) * d + m;
            out[i + 16] = f32::from(q >> 4) * d + m;
        }
    }
}

/// The fifth bit of value `i`, in its place.
fn fifth(bits: &[u8], i: usize) -> u8 {
    (bits[i / 8] >> (i % 8) & 1) << 4
}

/// d, 32 fifth bits, 16 bytes.
pub(super) fn q5_0(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(22).zip(out.chunks_exact_mut(32)) {
        let (d, high) = (half(block), &block[2..6]);
        for (i, q) in block[6..].iter().enumerate() {
            out[i] = (f32::from(q & 15 | fifth(high, i)) - 16.0) * d;
            out[i + 16] = (f32::from(q >> 4 | fifth(high, i + 16)) - 16.0) * d;
        }
    }
}

/// d, m, 32 fifth bits, 16 bytes.
pub(super) fn q5_1(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(24).zip(out.chunks_exact_mut(32)) {
        let (d, m, high) = (half(block), half(&block[2..]), &block[4..8]);
        for (i, q) in block[8..].iter().enumerate() {
            out[i] = f32::from(q & 15 | fifth(high, i)) * d + m;
            out[i + 16] = f32::from(q >> 4 | fifth(high, i + 16)) * d + m;
        }
    }
}

/// d, 32 signed bytes.
pub(super) fn q8_0(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(34).zip(out.chunks_exact_mut(32)) {
        let d = half(block);
        block[2..].iter().zip(out).for_each(|(&q, out)| *out = int(q) * d);
    }
}

/// 16 bytes of scale and minimum (4 bits each), 64 bytes of 2-bit values, d, the minima's d.
pub(super) fn q2_k(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(84).zip(out.chunks_exact_mut(256)) {
        let (scales, q, d, dmin) = (&block[..16], &block[16..80], half(&block[80..]), half(&block[82..]));
        for (group, out) in out.chunks_exact_mut(16).enumerate() {
            let (scale, min) = (d * f32::from(scales[group] & 15), dmin * f32::from(scales[group] >> 4));
            let (q, shift) = quarter(q, group);
            out.iter_mut().zip(q).for_each(|(out, q)| *out = scale * f32::from(q >> shift & 3) - min);
        }
    }
}

/// Where the 16 values of a group have their two bits: 32 bytes hold four rows of 32 values.
fn quarter(q: &[u8], group: usize) -> (&[u8], usize) {
    let start = group / 8 * 32 + group % 2 * 16;
    (&q[start..start + 16], group % 8 / 2 * 2)
}

/// 32 bytes of third bits, 64 bytes of 2-bit values, 16 scales of 6 bits, d.
pub(super) fn q3_k(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(110).zip(out.chunks_exact_mut(256)) {
        let (high, q, scales, d) = (&block[..32], &block[32..96], &block[96..108], half(&block[108..]));
        for (group, out) in out.chunks_exact_mut(16).enumerate() {
            let low = if group < 8 { scales[group] & 15 } else { scales[group - 8] >> 4 };
            let top = scales[8 + group % 4] >> (group / 4 * 2) & 3;
            let scale = d * (f32::from(low | top << 4) - 32.0);
            let (q, shift) = quarter(q, group);
            let high = &high[group % 2 * 16..];
            for ((out, q), high) in out.iter_mut().zip(q).zip(high) {
                // A third bit that is not set takes four away.
                let set = high >> (group / 2) & 1;
                *out = scale * (f32::from(q >> shift & 3 | set << 2) - 4.0);
            }
        }
    }
}

/// Scale and minimum, 6 bits each, of one of the 8 groups of a `Q4_K` or `Q5_K` block.
fn scale_and_min(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => (packed[group + 4] & 15 | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4),
    };
    (f32::from(scale), f32::from(min))
}

/// d, the minima's d, 12 bytes of scales and minima, 128 bytes: 32 of them hold two groups of 32.
pub(super) fn q4_k(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(144).zip(out.chunks_exact_mut(256)) {
        let (d, dmin, packed, q) = (half(block), half(&block[2..]), &block[4..16], &block[16..]);
        for (group, out) in out.chunks_exact_mut(32).enumerate() {
            let (scale, min) = scale_and_min(packed, group);
            let (scale, min) = (d * scale, dmin * min);
            let q = &q[group / 2 * 32..];
            let shift = group % 2 * 4;
            out.iter_mut().zip(q).for_each(|(out, q)| *out = scale * f32::from(q >> shift & 15) - min);
        }
    }
}

/// d, the minima's d, 12 bytes of scales and minima, 32 bytes of fifth bits, 128 bytes as in `Q4_K`.
pub(super) fn q5_k(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(176).zip(out.chunks_exact_mut(256)) {
        let (d, dmin, packed) = (half(block), half(&block[2..]), &block[4..16]);
        let (high, q) = (&block[16..48], &block[48..]);
        for (group, out) in out.chunks_exact_mut(32).enumerate() {
            let (scale, min) = scale_and_min(packed, group);
            let (scale, min) = (d * scale, dmin * min);
            let q = &q[group / 2 * 32..];
            let shift = group % 2 * 4;
            for ((out, q), high) in out.iter_mut().zip(q).zip(high) {
                *out = scale * f32::from(q >> shift & 15 | (high >> group & 1) << 4) - min;
            }
        }
    }
}

/// 128 bytes of low nibbles, 64 bytes of the two high bits, 16 signed scales, d.
pub(super) fn q6_k(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(210).zip(out.chunks_exact_mut(256)) {
        let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(&block[208..]));
        for (row, out) in out.chunks_exact_mut(32).enumerate() {
            let low = &low[row / 4 * 64 + row % 2 * 32..];
            let high = &high[row / 4 * 32..];
            let (nibble, pair) = (row % 4 / 2 * 4, row % 4 * 2);
            for (i, out) in out.iter_mut().enumerate() {
                let q = low[i] >> nibble & 15 | (high[i] >> pair & 3) << 4;
                *out = d * int(scales[row * 2 + i / 16]) * (f32::from(q) - 32.0);
            }
        }
    }
}
