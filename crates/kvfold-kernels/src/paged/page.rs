//! How a page's slots lie in memory, and how their numbers are rounded.
//!
//! Inside a page, keys lie transposed, so that the scores of 16 slots are computed at once:
//!
//! ```text
//! keys [D][16]   values [16][D]   of the cache's type
//! scales of keys [16], of values [16], in bf16 (int8 alone)
//! log masses [16], in the backend's floats (when the model uses them)
//! ```
//!
//! Two bf16 numbers that are neighbouring terms of a sum, two channels of a key or one channel of two values, share a word
//! (`bf16.rs`): keys `[D/2][16]` and values `[8][D]` words are right factors as they lie, for whatever multiplies words.
//!
//! An int8 slot has one scale for its key and one for its value, chosen when the slot is written: its largest magnitude
//! is 127. A scale is rounded up to bf16 before it is used, so that halving its bytes costs the numbers nothing.

use super::PAGE_SLOTS;
use crate::aligned::Aligned;
use crate::bf16;
use crate::ops::Precision;
use crate::real::Real;
use crate::simd::prefetch;

/// The type in which a cache holds keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheDType {
    /// The backend's own floats.
    #[default]
    F32,
    /// bf16: half the bytes.
    Bf16,
    /// 8 bits and a scale per key and per value: a quarter of the bytes and a little more.
    Int8,
}

impl CacheDType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            CacheDType::F32 => "f32",
            CacheDType::Bf16 => "bf16",
            CacheDType::Int8 => "int8",
        }
    }

    /// The type of the tokens in the ring. They are what queries attend to most and are rounded again when they enter a
    /// slot, so none of them is held in 8 bits; the ring does not grow with the text.
    pub fn of_ring(self) -> Self {
        match self {
            CacheDType::F32 => CacheDType::F32,
            CacheDType::Bf16 | CacheDType::Int8 => CacheDType::Bf16,
        }
    }
}

impl From<Precision> for CacheDType {
    /// The type of a model's cache when nothing else is asked for: as its weights are held, but no coarser than bf16.
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => CacheDType::F32,
            Precision::Bf16 | Precision::Q8 => CacheDType::Bf16,
        }
    }
}

/// What a page holds, and so where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Head dim D.
    pub dim: usize,
    /// Type of keys and values.
    pub dtype: CacheDType,
    /// Whether slots have a log mass.
    pub mass: bool,
}

/// A type that numbers are stored in: any bits are a value of it.
trait Packed: Copy {}
impl Packed for u32 {}
impl Packed for u16 {}
impl Packed for i8 {}
impl Packed for u8 {}

/// The bytes of a block.
pub(crate) fn bytes<F: Real>(block: &[F]) -> &[u8] {
    packed(block)
}

/// The bytes of a block, for writing.
pub(crate) fn bytes_mut<F: Real>(block: &mut [F]) -> &mut [u8] {
    packed_mut(block)
}

/// Floats as the packed numbers that their memory holds.
fn packed<F: Real, T: Packed>(floats: &[F]) -> &[T] {
    // SAFETY: any bits are a T, which has no more than a float's alignment and divides its size.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), size_of_val(floats) / size_of::<T>()) }
}

/// As [`packed`], for writing.
fn packed_mut<F: Real, T: Packed>(floats: &mut [F]) -> &mut [T] {
    // SAFETY: as in `packed`, and any bits are a float.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(floats) / size_of::<T>()) }
}

/// The parts of a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page<'a, F> {
    pub(crate) numbers: Numbers<'a, F>,
    /// Log masses; empty when slots have none.
    pub(crate) mass: &'a [F],
}

/// Keys, then values of a page.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Numbers<'a, F> {
    Floats(&'a [F]),
    /// Words of two.
    Bf16(&'a [u32]),
    Int8 {
        numbers: &'a [i8],
        /// Of keys, then of values.
        scales: &'a [u16],
    },
}

/// A half of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Keys,
    Values,
}

impl Half {
    /// This half of a page's numbers.
    #[inline(always)]
    fn of<T>(self, numbers: &[T]) -> &[T] {
        let (keys, values) = numbers.split_at(numbers.len() / 2);
        match self {
            Half::Keys => keys,
            Half::Values => values,
        }
    }
}

impl PageLayout {
    /// Floats that keys and values, scales, and masses take.
    fn parts<F>(self) -> [usize; 3] {
        let (numbers, scales) = (PAGE_SLOTS * 2 * self.dim, 2 * PAGE_SLOTS);
        let floats = |bytes: usize| bytes / size_of::<F>();
        let [numbers, scales] = match self.dtype {
            CacheDType::F32 => [numbers, 0],
            CacheDType::Bf16 => [floats(2 * numbers), 0],
            CacheDType::Int8 => [floats(numbers), floats(2 * scales)],
        };
        [numbers, scales, PAGE_SLOTS * usize::from(self.mass)]
    }

    /// Length of a page in floats.
    pub(crate) fn floats<F>(self) -> usize {
        self.parts::<F>().iter().sum()
    }

    /// A page's parts.
    #[inline(always)]
    pub(crate) fn view<F: Real>(self, page: &[F]) -> Page<'_, F> {
        let [numbers, scales, _] = self.parts::<F>();
        let (numbers, rest) = page.split_at(numbers);
        let (scales, mass) = rest.split_at(scales);
        let numbers = match self.dtype {
            CacheDType::F32 => Numbers::Floats(numbers),
            CacheDType::Bf16 => Numbers::Bf16(packed(numbers)),
            CacheDType::Int8 => Numbers::Int8 { numbers: packed(numbers), scales: packed(scales) },
        };
        Page { numbers, mass }
    }

    /// Writes the key and the value of one slot, rounded, and its log mass.
    #[inline(always)]
    pub(super) fn write<F: Real>(self, page: &mut [F], lane: usize, (k, v): (&[F], &[F]), mass: Option<F>) {
        let [numbers, scales, _] = self.parts::<F>();
        let (numbers, rest) = page.split_at_mut(numbers);
        let (scales, masses) = rest.split_at_mut(scales);
        match self.dtype {
            CacheDType::F32 => place(numbers, lane, (k, v), [|x| x, |x| x]),
            CacheDType::Bf16 => place_pairs(packed_mut(numbers), lane, (k, v)),
            CacheDType::Int8 => {
                let scales = packed_mut::<F, u16>(scales);
                let [of_key, of_value] = [scale_of(k), scale_of(v)];
                (scales[lane], scales[PAGE_SLOTS + lane]) = (of_key, of_value);
                place(packed_mut(numbers), lane, (k, v), [of_key, of_value].map(|scale| move |x| steps(x, scale)));
            }
        }
        if let Some(mass) = mass {
            masses[lane] = mass;
        }
    }

    /// Makes zeros of all slots but the first `used`.
    pub(crate) fn clear<F: Real>(self, page: &mut [F], used: usize) {
        let nothing = vec![F::zero(); self.dim];
        (used..PAGE_SLOTS).for_each(|lane| self.write(page, lane, (&nothing, &nothing), self.mass.then(F::zero)));
    }
}

/// Puts a key and a value where a slot's are, each number converted.
#[inline(always)]
fn place<F: Real, T>(to: &mut [T], lane: usize, (k, v): (&[F], &[F]), [of_key, of_value]: [impl Fn(F) -> T; 2]) {
    let dim = k.len();
    for (d, &k) in k.iter().enumerate() {
        to[d * PAGE_SLOTS + lane] = of_key(k);
    }
    let values = &mut to[(PAGE_SLOTS + lane) * dim..][..dim];
    values.iter_mut().zip(v).for_each(|(to, &v)| *to = of_value(v));
}

/// Puts a key and a value, rounded to bf16, where a slot's are in words of two.
#[inline(always)]
pub(super) fn place_pairs<F: Real>(words: &mut [u32], lane: usize, (k, v): (&[F], &[F])) {
    let (keys, values) = words.split_at_mut(words.len() / 2);
    for (words, pair) in keys.chunks_exact_mut(PAGE_SLOTS).zip(k.chunks_exact(2)) {
        words[lane] = bf16::pair(pair[0], pair[1]);
    }
    let half = 16 * (lane % 2);
    for (word, &v) in values[lane / 2 * v.len()..][..v.len()].iter_mut().zip(v) {
        *word = *word & !(0xffff << half) | bf16::round(v.f64() as f32) << half;
    }
}

/// Term `n` of a sum, the lower or the upper one of its word.
#[inline(always)]
fn half<F: Real>(word: u32, n: usize) -> F {
    widened((word >> (16 * (n % 2))) as u16)
}

/// The number that bf16 bits stand for.
#[inline(always)]
fn widened<F: Real>(bits: u16) -> F {
    F::of(f64::from(bf16::widen(u32::from(bits))))
}

/// The scale of a row: its largest magnitude over 127, rounded up to bf16; NaN when something in it is not finite.
#[inline(always)]
fn scale_of<F: Real>(row: &[F]) -> u16 {
    if !row.iter().all(|x| x.is_finite()) {
        return bf16::round(f32::NAN) as u16;
    }
    let top = row.iter().fold(F::zero(), |top, x| top.max(x.abs()));
    ((top.f64() as f32 / 127.0).to_bits().wrapping_add(0xffff) >> 16) as u16
}

/// The nearest multiple of a scale; 0 when the scale is 0.
#[inline(always)]
fn steps<F: Real>(x: F, scale: u16) -> i8 {
    // At most 127, since scales are rounded up; the conversion turns NaN into 0.
    (x.f64() as f32 / bf16::widen(u32::from(scale))).round_ties_even() as i8
}

impl<F: Real> Numbers<'_, F> {
    /// Channel d of the key in a lane, without its scale.
    #[inline(always)]
    pub(crate) fn key(&self, d: usize, lane: usize) -> F {
        let at = d * PAGE_SLOTS + lane;
        match *self {
            Numbers::Floats(numbers) => numbers[at],
            Numbers::Bf16(words) => half(words[d / 2 * PAGE_SLOTS + lane], d),
            Numbers::Int8 { numbers, .. } => F::of(f64::from(numbers[at])),
        }
    }

    /// Channel d of the value in a lane, of `dim`, without its scale.
    #[inline(always)]
    pub(crate) fn value(&self, (d, dim): (usize, usize), lane: usize) -> F {
        let at = (PAGE_SLOTS + lane) * dim + d;
        match *self {
            Numbers::Floats(numbers) => numbers[at],
            Numbers::Bf16(words) => half(words[(PAGE_SLOTS + lane) / 2 * dim + d], lane),
            Numbers::Int8 { numbers, .. } => F::of(f64::from(numbers[at])),
        }
    }

    /// The scales of the keys, or of the values.
    #[inline(always)]
    fn scales(&self, first: usize) -> Option<[F; PAGE_SLOTS]> {
        match *self {
            Numbers::Int8 { scales, .. } => {
                let (scales, _) = scales[first..].as_chunks::<PAGE_SLOTS>();
                Some(scales[0].map(widened))
            }
            _ => None,
        }
    }

    /// What scores of the slots are multiplied by.
    #[inline(always)]
    pub(crate) fn key_scales(&self) -> Option<[F; PAGE_SLOTS]> {
        self.scales(0)
    }

    /// What weights of the slots are multiplied by.
    #[inline(always)]
    pub(crate) fn value_scales(&self) -> Option<[F; PAGE_SLOTS]> {
        self.scales(PAGE_SLOTS)
    }
}

impl<'a, F: Real> Page<'a, F> {
    /// A page of words, without masses.
    pub(super) fn of_words(words: &'a [u32]) -> Self {
        Self { numbers: Numbers::Bf16(words), mass: &[] }
    }

    /// The words of a page of them.
    pub(super) fn words(&self) -> &'a [u32] {
        match self.numbers {
            Numbers::Bf16(words) => words,
            _ => panic!("not a page of words"),
        }
    }

    /// The keys of a page of words, `[D/2][16]`.
    pub(super) fn keys(&self) -> &'a [u32] {
        Half::Keys.of(self.words())
    }

    /// The values of a page of words, `[8][D]`.
    #[inline(always)]
    pub(super) fn values(&self) -> &'a [u32] {
        Half::Values.of(self.words())
    }

    /// Reads the key and the value of one slot.
    #[inline(always)]
    pub(super) fn read(&self, lane: usize, (k, v): (&mut [F], &mut [F])) {
        let dim = k.len();
        let scale = |scales: Option<[F; PAGE_SLOTS]>| scales.map_or(F::one(), |scales| scales[lane]);
        let (of_key, of_value) = (scale(self.numbers.key_scales()), scale(self.numbers.value_scales()));
        for (d, k) in k.iter_mut().enumerate() {
            *k = self.numbers.key(d, lane) * of_key;
        }
        for (d, v) in v.iter_mut().enumerate() {
            *v = self.numbers.value((d, dim), lane) * of_value;
        }
    }

    /// Half a page as floats without scales: keys `[D][16]`, or values `[16][D]`.
    #[inline(always)]
    pub(super) fn floats<'b>(&self, half: Half, dim: usize, buffer: &'b mut Aligned<F>) -> &'b [F]
    where
        'a: 'b,
    {
        match self.numbers {
            Numbers::Floats(numbers) => return half.of(numbers),
            Numbers::Bf16(words) => {
                buffer.resize(PAGE_SLOTS * dim, F::zero());
                match half {
                    Half::Keys => bf16::widen_rows(half.of(words), PAGE_SLOTS, buffer),
                    Half::Values => bf16::widen_rows(half.of(words), dim, buffer),
                }
            }
            Numbers::Int8 { numbers, .. } => {
                buffer.resize(PAGE_SLOTS * dim, F::zero());
                buffer.iter_mut().zip(half.of(numbers)).for_each(|(to, &x)| *to = F::of(f64::from(x)));
            }
        }
        buffer
    }

    /// Asks for half a page, which will be read soon.
    #[inline(always)]
    pub(super) fn prefetch(&self, half: Half) {
        match self.numbers {
            Numbers::Floats(numbers) => prefetch(half.of(numbers)),
            Numbers::Bf16(numbers) => prefetch(half.of(numbers)),
            Numbers::Int8 { numbers, .. } => prefetch(half.of(numbers)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page<F: Real>(dtype: CacheDType, mass: bool, slots: &[(Vec<F>, Vec<F>)]) -> (PageLayout, Vec<F>) {
        let layout = PageLayout { dim: slots[0].0.len(), dtype, mass };
        let mut page = vec![F::zero(); layout.floats::<F>()];
        for (lane, (k, v)) in slots.iter().enumerate() {
            layout.write(&mut page, lane, (k, v), mass.then(|| F::of(lane as f64)));
        }
        (layout, page)
    }

    fn slots<F: Real>(dim: usize) -> Vec<(Vec<F>, Vec<F>)> {
        let row =
            |n: usize| -> Vec<F> { (0..dim).map(|d| F::of(((n * 31 + d * 7) % 23) as f64 * 0.37 - 4.0)).collect() };
        (0..PAGE_SLOTS).map(|n| (row(n), row(n + 100))).collect()
    }

    fn slots_are_read_as_they_were_written_to_rounding<F: Real>() {
        for (dtype, tolerance) in
            [(CacheDType::F32, 0.0), (CacheDType::Bf16, 1.0 / 256.0), (CacheDType::Int8, 1.0 / 251.0)]
        {
            for (dim, mass) in [(2, false), (8, true), (20, false), (64, true)] {
                let slots = slots::<F>(dim);
                let (layout, page) = page(dtype, mass, &slots);
                let view = layout.view(&page);
                for (lane, want) in slots.iter().enumerate() {
                    let (mut k, mut v) = (vec![F::zero(); dim], vec![F::zero(); dim]);
                    view.read(lane, (&mut k, &mut v));
                    for (got, want) in [(&k, &want.0), (&v, &want.1)] {
                        let top = want.iter().map(|x| x.f64().abs()).fold(0.0, f64::max);
                        for (got, want) in got.iter().zip(want) {
                            let error = (got.f64() - want.f64()).abs();
                            assert!(error <= tolerance * top, "{dtype:?} {dim}: {got:?} {want:?}");
                        }
                    }
                }
                let masses: Vec<f64> = view.mass.iter().map(|m| m.f64()).collect();
                let want: Vec<f64> = (0..PAGE_SLOTS * usize::from(mass)).map(|lane| lane as f64).collect();
                assert_eq!(masses, want);
            }
        }
    }

    #[test]
    fn slots_are_read_as_they_were_written() {
        slots_are_read_as_they_were_written_to_rounding::<f32>();
        slots_are_read_as_they_were_written_to_rounding::<f64>();
    }

    #[test]
    fn what_is_cleared_is_zeros_and_the_rest_is_as_it_was() {
        for (dtype, mass) in CacheDType::ALL.map(|dtype| [(dtype, false), (dtype, true)]).concat() {
            let slots = slots::<f32>(8);
            let (layout, mut cleared) = page(dtype, mass, &slots);
            layout.clear(&mut cleared, 5);
            let (_, fewer) = page(dtype, mass, &slots[..5]);
            assert_eq!(bytes(&cleared), bytes(&fewer), "{dtype:?}");
        }
    }

    #[test]
    fn pages_have_the_bytes_of_their_type() {
        let bytes = |dtype, mass| 4 * PageLayout { dim: 64, dtype, mass }.floats::<f32>();
        assert_eq!(CacheDType::ALL.map(|dtype| bytes(dtype, false)), [8192, 4096, 2048 + 64]);
        assert_eq!(bytes(CacheDType::Int8, true), 2048 + 64 + 64);
        assert_eq!(8 * PageLayout { dim: 2, dtype: CacheDType::Int8, mass: false }.floats::<f64>(), 64 + 64);
    }

    #[test]
    fn what_no_step_can_hold_is_not_held_quietly() {
        let layout = PageLayout { dim: 2, dtype: CacheDType::Int8, mass: false };
        let mut page = vec![0.0f32; layout.floats::<f32>()];
        let (mut k, mut v) = ([0.0; 2], [0.0; 2]);
        layout.write(&mut page, 3, (&[1.0, f32::INFINITY], &[0.0, 0.0]), None);
        layout.view(&page).read(3, (&mut k, &mut v));
        assert!(k.iter().all(|x| x.is_nan()) && v == [0.0; 2], "{k:?} {v:?}");
        for top in [1e-30f32, 3e38] {
            layout.write(&mut page, 3, (&[top, 0.0], &[0.0, -top]), None);
            layout.view(&page).read(3, (&mut k, &mut v));
            assert!((k[0] / top - 1.0).abs() < 0.01 && (v[1] / top + 1.0).abs() < 0.01, "{top}: {k:?} {v:?}");
        }
    }
}
