//! A kernel set: how the CPU backend computes what is worth computing in more than one way.
//!
//! [`Scalar`] is the reference, generic over the float; its every method is the definition. [`Fast`] is f32 with the
//! machine's vectors. Tests run both through the same backend and compare.

#[cfg(target_arch = "x86_64")]
use crate::amx;
use crate::attention::{self, AttentionJob, AttentionJobGrad};
use crate::bf16::{self, GemmBf16};
use crate::ops::{Late, LateReads};
use crate::pack::{self, Packing};
use crate::paged::{self, DecodeJob, KeyPanels, Sums, ValuePanels};
use crate::q8::{self, GemmQ8};
use crate::real::Real;
use crate::simd::{self, Gemm, Level};

/// The choices of a CPU backend.
pub trait KernelSet<F: Real>: Copy + std::fmt::Debug + Send + Sync + 'static {
    /// What a thread keeps set up from one product of panels to the next.
    type Tiles: Default;

    /// Runs an elementwise kernel compiled for this set's instruction set.
    fn run<R>(self, f: impl FnOnce() -> R) -> R;

    /// The exponential that elementwise kernels use.
    fn exp(x: F) -> F;

    /// The exponential of a number that is about 0 or below, whose value counts beside 1.
    fn exp_share(x: F) -> F;

    /// The power of two of a number that is a little above 0 or below, where it is rounded to bf16.
    fn exp2_weight(x: F) -> F;

    /// A matrix product on one thread.
    fn gemm(self, g: Gemm<'_, F>, c: &mut [F]) {
        g.check_output(c.len());
        // SAFETY: all of the output lies inside the exclusive slice.
        unsafe { self.gemm_at(g, c.as_mut_ptr()) }
    }

    /// A matrix product on one thread, into rows that other threads write too, in other columns.
    ///
    /// # Safety
    /// Rows of `g.n` elements, `g.c_row` apart, must be valid at `c`, and nobody else may use them.
    unsafe fn gemm_at(self, g: Gemm<'_, F>, c: *mut F);

    /// Whether products of bf16 operands are fastest from packed words, however many rows there are; else many rows are
    /// multiplied as floats that were rounded, in the same order.
    fn pairs(self) -> bool;

    /// Whether products of bf16 operands are so much faster than others that attention is worth rounding for them, where it
    /// is asked for in that precision.
    fn tiles(self) -> bool;

    /// Packs numbers to words of two bf16 terms.
    fn pack(self, packing: Packing<'_, F>, words: &mut [u32]);

    /// A matrix product of packed bf16 operands on one thread.
    ///
    /// # Safety
    /// As [`KernelSet::gemm_at`].
    unsafe fn gemm_bf16(self, g: GemmBf16<'_>, c: *mut F);

    /// A matrix product with a panel of an 8-bit weight on one thread.
    ///
    /// # Safety
    /// As [`KernelSet::gemm_at`].
    unsafe fn gemm_q8(self, g: GemmQ8<'_>, c: *mut F);

    /// Attention of one KV head's queries in one sequence.
    fn attention(self, job: &AttentionJob<'_, F>, out: &mut [F], lse: &mut [F]);

    /// Sums over the queries that read each key late; of plain attention.
    fn late_reads(self, job: &AttentionJob<'_, F>, lse: &[F], late: Late, reads: LateReads<&mut [F]>);

    /// The adjoint of [`KernelSet::attention`].
    fn attention_grad(self, job: &AttentionJob<'_, F>, grad: &mut AttentionJobGrad<'_, F>);

    /// One token of a paged cache's head: takes it and attends to what it sees, in floats.
    fn decode(self, job: DecodeJob<'_, F>);

    /// Scores of queries and panels of keys, in words.
    fn key_panels(self, tiles: &mut Self::Tiles, product: KeyPanels<'_>, scores: &mut [F]) {
        let _ = tiles;
        product.define(scores);
    }

    /// Powers of two of scores of rows `[panels][rows][32]` beside their tops, which are raised where they must, as words
    /// `[panels][rows][16]`; they are added to the rows' totals.
    fn weigh(self, scores: &[F], sums: Sums<'_, F>, weights: &mut [u32]) {
        paged::weigh::<F, Self>(scores, sums, weights);
    }

    /// Adds weighted panels of values, in words, to rows of outputs.
    fn value_panels(self, tiles: &mut Self::Tiles, product: ValuePanels<'_>, out: &mut [F]) {
        let _ = tiles;
        product.define(out);
    }
}

/// The reference: plain loops, library exponentials.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scalar;

impl<F: Real> KernelSet<F> for Scalar {
    type Tiles = ();

    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn exp(x: F) -> F {
        x.exp()
    }

    #[inline(always)]
    fn exp_share(x: F) -> F {
        x.exp()
    }

    fn exp2_weight(x: F) -> F {
        x.exp2()
    }

    unsafe fn gemm_at(self, g: Gemm<'_, F>, c: *mut F) {
        // SAFETY: the caller's.
        unsafe { simd::gemm_scalar(g, c) }
    }

    fn pairs(self) -> bool {
        true
    }

    fn tiles(self) -> bool {
        true
    }

    fn pack(self, packing: Packing<'_, F>, words: &mut [u32]) {
        pack::pack_scalar(packing, words);
    }

    unsafe fn gemm_bf16(self, g: GemmBf16<'_>, c: *mut F) {
        // SAFETY: the caller's.
        unsafe { bf16::gemm_scalar(g, c) }
    }

    unsafe fn gemm_q8(self, g: GemmQ8<'_>, c: *mut F) {
        // SAFETY: the caller's.
        unsafe { q8::gemm_scalar(g, c) }
    }

    fn attention(self, job: &AttentionJob<'_, F>, out: &mut [F], lse: &mut [F]) {
        attention::reference(job, out, lse);
    }

    fn late_reads(self, job: &AttentionJob<'_, F>, lse: &[F], late: Late, reads: LateReads<&mut [F]>) {
        attention::reference_reads(job, lse, late, reads);
    }

    fn attention_grad(self, job: &AttentionJob<'_, F>, grad: &mut AttentionJobGrad<'_, F>) {
        attention::reference_grad(job, grad);
    }

    fn decode(self, job: DecodeJob<'_, F>) {
        paged::one::<F, Self, paged::Plain>(job);
    }
}

/// f32 with the vectors of an instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Fast(pub Level);

impl KernelSet<f32> for Fast {
    #[cfg(target_arch = "x86_64")]
    type Tiles = amx::Tiles;
    #[cfg(not(target_arch = "x86_64"))]
    type Tiles = ();

    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        self.0.run(f)
    }

    #[inline(always)]
    fn exp(x: f32) -> f32 {
        simd::exp_fast(x)
    }

    #[inline(always)]
    fn exp_share(x: f32) -> f32 {
        simd::exp_share(x)
    }

    fn exp2_weight(x: f32) -> f32 {
        simd::exp2_weight(x)
    }

    unsafe fn gemm_at(self, g: Gemm<'_, f32>, c: *mut f32) {
        // SAFETY: the caller's.
        unsafe { simd::gemm(self.0, g, c) }
    }

    fn pairs(self) -> bool {
        self.0 >= Level::Avx512Bf16
    }

    fn tiles(self) -> bool {
        self.0 >= Level::AmxBf16
    }

    fn pack(self, packing: Packing<'_, f32>, words: &mut [u32]) {
        pack::pack(self.0, packing, words);
    }

    unsafe fn gemm_bf16(self, g: GemmBf16<'_>, c: *mut f32) {
        // SAFETY: the caller's.
        unsafe { bf16::gemm(self.0, g, c) }
    }

    unsafe fn gemm_q8(self, g: GemmQ8<'_>, c: *mut f32) {
        // SAFETY: the caller's.
        unsafe { q8::gemm(self.0, g, c) }
    }

    fn attention(self, job: &AttentionJob<'_, f32>, out: &mut [f32], lse: &mut [f32]) {
        attention::blocked::forward(self, job, out, lse);
    }

    fn late_reads(self, job: &AttentionJob<'_, f32>, lse: &[f32], late: Late, reads: LateReads<&mut [f32]>) {
        attention::blocked::reads(self, job, lse, late, reads);
    }

    fn attention_grad(self, job: &AttentionJob<'_, f32>, grad: &mut AttentionJobGrad<'_, f32>) {
        attention::blocked::backward(self, job, grad);
    }

    fn decode(self, job: DecodeJob<'_, f32>) {
        paged::decode(self.0, job);
    }

    fn key_panels(self, tiles: &mut Self::Tiles, product: KeyPanels<'_>, scores: &mut [f32]) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::AmxBf16 => amx::key_panels(tiles, product, scores),
            _ => product.define(scores),
        }
    }

    fn weigh(self, scores: &[f32], sums: Sums<'_, f32>, weights: &mut [u32]) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::AmxBf16 => paged::weigh_on_amx(scores, sums, weights),
            _ => paged::weigh::<f32, Self>(scores, sums, weights),
        }
    }

    fn value_panels(self, tiles: &mut Self::Tiles, product: ValuePanels<'_>, out: &mut [f32]) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::AmxBf16 => amx::value_panels(tiles, product, out),
            _ => product.define(out),
        }
    }
}
