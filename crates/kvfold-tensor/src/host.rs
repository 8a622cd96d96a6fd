//! A tensor at rest in the memory of this machine.

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use half::{bf16, f16};

use crate::{AlignedBytes, DType};

/// A dense, row-major array in main memory: a dtype, a shape, and the bytes in between the two.
///
/// The invariant is that the number of bytes is the product of the shape times the dtype's size; there is no way to build
/// one that breaks it. A shape of no dimensions is a scalar and has one element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: AlignedBytes,
}

impl HostTensor {
    /// A tensor of zeros.
    ///
    /// # Panics
    ///
    /// If `shape` has more bytes than an address can count.
    pub fn zeros(dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let len =
            byte_len(dtype, &shape).unwrap_or_else(|| panic!("a {dtype} tensor of shape {shape:?} fits no memory"));
        HostTensor { dtype, shape, bytes: AlignedBytes::zeroed(len) }
    }

    /// An `F32` tensor with these values.
    ///
    /// # Panics
    ///
    /// If the number of values is not the product of `shape`: the caller has mixed up two tensors.
    pub fn from_f32(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        Self::from_values(DType::F32, shape.into(), values)
    }

    /// An `F64` tensor with these values.
    ///
    /// # Panics
    ///
    /// If the number of values is not the product of `shape`: the caller has mixed up two tensors.
    pub fn from_f64(shape: impl Into<Vec<usize>>, values: &[f64]) -> Self {
        Self::from_values(DType::F64, shape.into(), values)
    }

    fn from_values<T: Pod>(dtype: DType, shape: Vec<usize>, values: &[T]) -> Self {
        let mut tensor = Self::zeros(dtype, shape);
        assert_eq!(tensor.numel(), values.len(), "the values do not fill the shape {:?}", tensor.shape);
        cast_slice_mut::<u8, T>(&mut tensor.bytes).copy_from_slice(values);
        tensor
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The length of each dimension, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of elements.
    pub fn numel(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// The elements as they are stored: row-major, little-endian, the first on a 64-byte boundary.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The elements as they are stored, to be filled in place.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The elements without a copy, if they are stored as `F32`.
    pub fn as_f32(&self) -> Option<&[f32]> {
        (self.dtype == DType::F32).then(|| cast_slice(&self.bytes))
    }

    /// The elements as `f32`: exact from the 16-bit types, rounded to nearest from `F64`.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::F64 => self.map(|x: f64| x as f32),
            DType::F32 => self.map(|x: f32| x),
            DType::F16 => self.map(f16::to_f32),
            DType::BF16 => self.map(bf16::to_f32),
        }
    }

    /// The elements as `f64`, always exact.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            DType::F64 => self.map(|x: f64| x),
            DType::F32 => self.map(|x: f32| f64::from(x)),
            DType::F16 => self.map(f16::to_f64),
            DType::BF16 => self.map(bf16::to_f64),
        }
    }

    /// The same values in another element type, rounded to nearest, ties to even.
    ///
    /// From `F64` to a 16-bit type the way leads over `f32`: rounding twice may be off by one unit in the last place, which
    /// no weight notices, while `half` drops the low bits of a double where the machine has no instruction for it.
    pub fn to_dtype(&self, dtype: DType) -> HostTensor {
        let shape = self.shape.clone();
        match dtype {
            _ if dtype == self.dtype => self.clone(),
            DType::F64 => Self::from_f64(shape, &self.to_f64()),
            DType::F32 => Self::from_f32(shape, &self.to_f32()),
            DType::F16 => {
                Self::from_values(dtype, shape, &self.to_f32().into_iter().map(f16::from_f32).collect::<Vec<_>>())
            }
            DType::BF16 => {
                Self::from_values(dtype, shape, &self.to_f32().into_iter().map(bf16::from_f32).collect::<Vec<_>>())
            }
        }
    }

    /// The index (in row-major order) and the value of the first element that is NaN or infinite.
    pub fn first_non_finite(&self) -> Option<(usize, f64)> {
        let index = match self.dtype {
            DType::F64 => self.position(|x: f64| !x.is_finite()),
            DType::F32 => self.position(|x: f32| !x.is_finite()),
            DType::F16 => self.position(|x: u16| x & 0x7c00 == 0x7c00),
            DType::BF16 => self.position(|x: u16| x & 0x7f80 == 0x7f80),
        }?;
        Some((index, self.get(index)))
    }

    fn get(&self, index: usize) -> f64 {
        match self.dtype {
            DType::F64 => cast_slice::<u8, f64>(&self.bytes)[index],
            DType::F32 => cast_slice::<u8, f32>(&self.bytes)[index].into(),
            DType::F16 => cast_slice::<u8, f16>(&self.bytes)[index].to_f64(),
            DType::BF16 => cast_slice::<u8, bf16>(&self.bytes)[index].to_f64(),
        }
    }

    fn map<T: Pod, U>(&self, convert: impl Fn(T) -> U) -> Vec<U> {
        cast_slice::<u8, T>(&self.bytes).iter().map(|&x| convert(x)).collect()
    }

    /// The first element for which `bad` holds. Whole blocks are judged without an early exit, which lets the compiler
    /// vectorise the loop: this runs over every weight of a model that is loaded.
    fn position<T: Pod>(&self, bad: impl Fn(T) -> bool) -> Option<usize> {
        const BLOCK: usize = 4096;
        let values = cast_slice::<u8, T>(&self.bytes);
        let block = values.chunks(BLOCK).position(|block| block.iter().fold(false, |any, &x| any | bad(x)))?;
        let within = values[block * BLOCK..].iter().position(|&x| bad(x))?;
        Some(block * BLOCK + within)
    }
}

/// The bytes that a tensor of this dtype and shape takes, or `None` if that is more than an address can count.
fn byte_len(dtype: DType, shape: &[usize]) -> Option<usize> {
    // Zero first: an empty tensor is empty however absurd its other dimensions are.
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(dtype.size(), |len, &dim| len.checked_mul(dim)).filter(|&len| len <= isize::MAX as usize - 63)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_scalar_has_one_element_and_an_empty_tensor_none() {
        assert_eq!(HostTensor::from_f32([], &[3.0]).to_f64(), [3.0]);
        assert_eq!(HostTensor::zeros(DType::BF16, [3, 0, 5]).numel(), 0);
        assert_eq!(byte_len(DType::F32, &[usize::MAX, usize::MAX, 0]), Some(0));
        assert_eq!(byte_len(DType::F32, &[usize::MAX, 2]), None);
    }

    #[test]
    #[should_panic(expected = "the values do not fill the shape [2, 2]")]
    fn values_must_fill_the_shape() {
        HostTensor::from_f32([2, 2], &[1.0, 2.0, 3.0]);
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        // 1 + 2^-8 lies halfway between two bfloat16 neighbours; the even one is 1.
        let x = HostTensor::from_f32([3], &[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 70000.0]);
        assert_eq!(x.to_dtype(DType::BF16).to_f32(), [1.0, 1.015625, 70144.0]);
        assert_eq!(x.to_dtype(DType::F16).to_f32()[2], f32::INFINITY);
    }

    #[test]
    fn the_first_bad_element_is_found_in_every_dtype() {
        let good = HostTensor::from_f64([4], &[0.0, -1.0, 2.0, 3.0]);
        let bad = HostTensor::from_f64([4], &[0.0, 1.0, f64::NEG_INFINITY, f64::NAN]);
        let late = [vec![0.0; 5000], vec![f64::NAN]].concat();
        let late = HostTensor::from_f64([5001], &late);
        for dtype in DType::ALL {
            assert_eq!(late.to_dtype(dtype).first_non_finite().unwrap().0, 5000);
            assert_eq!(good.to_dtype(dtype).first_non_finite(), None);
            assert_eq!(bad.to_dtype(dtype).first_non_finite(), Some((2, f64::NEG_INFINITY)));
        }
    }

    proptest! {
        #[test]
        fn sixteen_bit_values_survive_the_way_through_wider_types(bits in prop::collection::vec(any::<u16>(), 0..64)) {
            for dtype in [DType::F16, DType::BF16] {
                let mut tensor = HostTensor::zeros(dtype, [bits.len()]);
                tensor.bytes_mut().copy_from_slice(cast_slice(&bits));
                // NaN payloads may change on the way, so those elements are taken out.
                let finite: Vec<f32> = tensor.to_f32().into_iter().filter(|x| !x.is_nan()).collect();
                let tensor = HostTensor::from_f32([finite.len()], &finite).to_dtype(dtype);
                prop_assert_eq!(&tensor.to_f32(), &finite);
                prop_assert_eq!(&tensor.to_dtype(DType::F64).to_dtype(dtype), &tensor);
                prop_assert_eq!(&tensor.to_dtype(DType::F32).to_dtype(dtype), &tensor);
            }
        }
    }
}
