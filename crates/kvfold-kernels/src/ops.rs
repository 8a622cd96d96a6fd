//! The seam: the only place numbers are touched.
//!
//! [`Ops`] is the forward half, enough to run a model. [`Grad`] adds the adjoint of every op and the optimiser step,
//! enough to train one. [`CacheOps`] adds attention over a paged cache, enough to serve one. A backend implements all
//! three; the tape of `kvfold-autograd` implements `Ops` by wrapping a backend and recording which adjoints to call.
//!
//! Tensors are token-major: a batch of sequences is one block of N rows, described by [`Spans`], so ragged batches need
//! no padding. Letters: N rows (tokens of all sequences), T tokens of a sequence, H query heads, G KV heads, D head
//! dim, C model dim, V vocabulary, S sequences.
//!
//! Shapes are checked when weights are loaded and batches are built; an op given shapes that do not fit is a bug in
//! kvfold and panics with both shapes.

use crate::dmc::Decision;
use crate::paged::{Block, CacheDType, HeadTable, PageLayout, Rule};

/// One sequence's rows in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First row.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Position of the first row in its sequence; above 0 when earlier tokens are already in a cache.
    pub position: usize,
}

/// How the N rows of a batch divide into sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    spans: Vec<Span>,
    rows: usize,
}

impl Spans {
    /// Whole sequences of these lengths, each starting at position 0.
    pub fn of_lengths(lengths: &[usize]) -> Self {
        Self::of_chunks(lengths.iter().map(|&len| (len, 0)))
    }

    /// Chunks given as (length, position of the first token).
    pub fn of_chunks(chunks: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let mut rows = 0;
        let spans = chunks
            .into_iter()
            .map(|(len, position)| {
                let start = rows;
                rows += len;
                Span { start, len, position }
            })
            .collect();
        Self { spans, rows }
    }

    /// The spans in row order.
    pub fn iter(&self) -> std::slice::Iter<'_, Span> {
        self.spans.iter()
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// True when there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Number of rows of all sequences.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows of so many of each sequence's last tokens.
    pub fn last_rows(&self, wanted: &[usize]) -> Vec<u32> {
        let last = self.spans.iter().zip(wanted);
        last.flat_map(|(span, wanted)| (span.start + span.len - wanted) as u32..(span.start + span.len) as u32)
            .collect()
    }
}

impl<'a> IntoIterator for &'a Spans {
    type Item = &'a Span;
    type IntoIter = std::slice::Iter<'a, Span>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// How a row of queries, keys or values divides into heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads H.
    pub query: usize,
    /// KV heads G; H is a multiple of it.
    pub kv: usize,
    /// Head dim D.
    pub dim: usize,
}

impl Heads {
    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.query / self.kv
    }
}

/// Keys and values of one attention range with their key biases.
#[derive(Clone, Debug)]
pub struct Keys<T> {
    /// Rotated keys `[N, G*D]`.
    pub k: T,
    /// Values `[N, G*D]`.
    pub v: T,
    /// Added to every score of the key, `[N, G]`: the log of its mass.
    pub mass: Option<T>,
}

/// Pooled states: what queries more than `delay` tokens away see instead of the exact keys.
#[derive(Clone, Debug)]
pub struct Pooled<T> {
    /// The states as keys and values.
    pub keys: Keys<T>,
    /// Log of the chance that the state was not folded on, `[N, G]`; spared for the newest state a query sees.
    pub close: T,
}

/// What the queries of a batch attend to (spec 2.5, with a delay W).
///
/// Query i sees exact key j for `i-W < j <= i`, and pooled state j for `j <= i-W`, the state at `j = i-W` spared from
/// `close`. Without pooled states the exact keys cover everything (plain causal attention). With W = 0 there are no
/// exact keys: each query sees its own pooled state, as in the paper.
#[derive(Clone, Debug)]
pub struct Visible<T> {
    /// Exact keys of the newest tokens; `None` only when the delay is 0.
    pub exact: Option<Keys<T>>,
    /// Pooled states of the older ones; `None` for plain attention.
    pub pooled: Option<Pooled<T>>,
    /// W, tokens that stay exact; not used without pooled states.
    pub delay: usize,
    /// What factors of products may be rounded to; whether they are is the machine's choice. Sums stay f32.
    pub precision: Precision,
}

/// A batch's keys and values before rotation, with what decides how they pool.
#[derive(Clone, Debug)]
pub struct PoolInput<T> {
    /// Keys before rotation `[N, G*D]`.
    pub k: T,
    /// Values `[N, G*D]`.
    pub v: T,
    /// Share of the previous state that stays in this one, `[N, G]`, 0 at sequence starts.
    pub alpha: T,
    /// Importance, `[N, G]`, above 0.
    pub omega: T,
}

/// How [`Ops::pool`] averages.
#[derive(Clone, Copy, Debug)]
pub struct PoolShape {
    /// KV heads and head dim.
    pub heads: Heads,
    /// Newest tokens that enter a state at most; `None` for all of the segment.
    pub window: Option<usize>,
}

/// The running weighted means.
#[derive(Clone, Debug)]
pub struct PoolOutput<T> {
    /// Mean keys before rotation `[N, G*D]`.
    pub k: T,
    /// Mean values `[N, G*D]`.
    pub v: T,
    /// Mass, the sum of weights, `[N, G]`.
    pub mass: T,
}

/// Logit and importance of every token.
#[derive(Clone, Debug)]
pub struct Gate<T> {
    /// Decision logit a, `[N, G]`: above 0 folds.
    pub logit: T,
    /// Importance omega, `[N, G]`.
    pub omega: T,
}

/// A relaxed or hard decision, ready for pooling and attention.
#[derive(Clone, Debug)]
pub struct Decided<T> {
    /// Share of the previous state kept, `[N, G]`; 0 at sequence starts.
    pub alpha: T,
    /// For key j, log(1 - alpha of token j+1), `[N, G]`; 0 for the last token of a sequence.
    pub close: T,
}

/// Which distribution the expectation of a KL divergence is taken over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlDirection {
    /// KL(teacher || student): the student covers what the teacher finds likely.
    #[default]
    Forward,
    /// KL(student || teacher): the student avoids what the teacher finds unlikely.
    Reverse,
}

/// Over which heads the fold rate must reach the target together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// All heads of all layers together (the paper): the model chooses where to compress.
    #[default]
    Global,
    /// Each layer by itself.
    Layer,
    /// Each KV head by itself.
    Head,
}

/// Over which tokens the fold rate must reach the target together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Over {
    /// Each sequence by itself (the released code); of a packed one, each document.
    #[default]
    Sequence,
    /// The whole batch (the paper's formula).
    Batch,
}

/// On which side of its target a fold rate is pushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pull {
    /// Below it only (the paper): `max(0, target - rate)`. Nothing brings back a rate that is above, so the model ends
    /// above on average where texts differ.
    #[default]
    Up,
    /// On both: `|target - rate|`.
    Both,
}

impl Pull {
    /// What is pushed against of `target - rate`.
    pub(crate) fn on(self, missing: f64) -> f64 {
        match self {
            Pull::Up => missing.max(0.0),
            Pull::Both => missing,
        }
    }
}

/// The loss that asks for compression (spec 2.6).
#[derive(Clone, Copy, Debug)]
pub struct Hinge {
    /// Folds per token seen that are asked for: `1 - 1/CR`.
    pub target: f64,
    /// Heads that share one constraint.
    pub scope: Scope,
    /// Tokens that share one constraint.
    pub over: Over,
    /// Sides on which it pushes.
    pub pull: Pull,
    /// The length at which the target is stated; `None` asks the same of every length.
    pub stated_at: Option<StatedAt>,
}

impl Hinge {
    /// Folds per token that are asked of a sequence of `len` tokens.
    pub fn target_of(&self, len: usize) -> f64 {
        self.stated_at.map_or(self.target, |at| at.target(self.target, len))
    }
}

/// Tokens of a sequence that are exempt from folding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exempt {
    /// First tokens, whose slots nothing folds into.
    pub sinks: usize,
    /// W, newest tokens, which stay exact.
    pub delay: usize,
}

impl Exempt {
    /// Tokens of a sequence of `len` that may fold. The first never does: there is no slot before it.
    pub fn foldable(self, len: usize) -> std::ops::Range<usize> {
        let first = self.sinks.saturating_add(1);
        first..len.saturating_sub(self.delay).max(first)
    }
}

/// A length at which a target is stated. A shorter sequence, of which as many tokens are exempt, cannot fold as much: it is
/// asked for the same share of what may fold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatedAt {
    /// Tokens of a sequence.
    pub length: usize,
    /// Tokens that do not fold.
    pub exempt: Exempt,
}

impl StatedAt {
    /// Folds per token of a sequence of `len` tokens when `target` is asked at the stated length.
    pub fn target(&self, target: f64, len: usize) -> f64 {
        if len == self.length {
            return target;
        }
        let foldable = |len: usize| self.exempt.foldable(len).len() as f64;
        let (ours, all) = (foldable(len), foldable(self.length));
        if ours == 0.0 { 0.0 } else { target * (self.length as f64 / all) * (ours / len as f64) }
    }
}

/// How the products of a weight are computed: with which operands, summed in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// The backend's own floats.
    #[default]
    F32,
    /// Both factors rounded to bf16: half the bytes, and twice the speed where the machine has bf16 products.
    Bf16,
    /// Weights in 8 bits, 32 terms to a scale (8.5 bits a weight), the other factor rounded to 16 bits, 32 terms of a row to a
    /// scale. For serving only: there is no gradient.
    Q8,
}

/// A model's predictions of next tokens: the softmax of `x . w^T`, in the precision of `w`.
#[derive(Debug)]
pub struct Predictions<'a, T> {
    /// Normed residual stream `[N,C]`.
    pub x: &'a T,
    /// Output projection `[V,C]`.
    pub w: &'a T,
}

/// What predictions are compared with.
#[derive(Debug)]
pub enum Goal<'a, T> {
    /// Next tokens, one per row, some [`NO_TARGET`]: cross-entropy, the mean over rows with a target.
    Tokens(&'a [u32]),
    /// A teacher's predictions, which are constants: KL divergence, the mean over rows.
    Teacher(Predictions<'a, T>, KlDirection),
}

// By hand, since a derive would ask for `T: Copy`.
impl<T> Clone for Predictions<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Predictions<'_, T> {}

impl<T> Clone for Goal<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Goal<'_, T> {}

/// What [`Grad::prediction_loss_grad`] returns.
#[derive(Clone, Debug)]
pub struct LossGrad<T> {
    /// The loss `[1]`.
    pub loss: T,
    /// Gradient of `x`.
    pub x: T,
    /// Gradient of `w`, where it was asked for.
    pub w: Option<T>,
}

/// A target that [`Ops::prediction_loss`] passes over.
pub const NO_TARGET: u32 = u32::MAX;

/// Smallest importance, bf16's epsilon as in the reference: keeps masses away from 0.
pub const MIN_IMPORTANCE: f64 = 0.0078125;

/// A norm of whole rows: [`Ops::rms_norm`] with a gain `[C]`.
#[derive(Debug)]
pub struct Norm<'a, T> {
    /// What channels are multiplied by, `[C]`.
    pub gain: &'a T,
    /// What is added to the mean of squares.
    pub eps: f64,
}

impl<T> Clone for Norm<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Norm<'_, T> {}

/// [`Ops::feed_forward`] by its definition, of rows `y` that are normed.
pub(crate) fn feed_forward<O: Ops + ?Sized>(
    ops: &O,
    x: &O::Tensor,
    y: &O::Tensor,
    [gate, up, down]: [&O::Tensor; 3],
) -> O::Tensor {
    ops.linear_onto(x, &ops.swiglu(&ops.linear(y, gate), &ops.linear(y, up)), down)
}

/// The forward half of a backend.
pub trait Ops: std::fmt::Debug {
    /// An array of this backend; cheap to clone.
    type Tensor: Clone + std::fmt::Debug;

    /// An array from host numbers, row-major.
    fn tensor(&self, shape: &[usize], data: &[f32]) -> Self::Tensor;

    /// A weight `[M,K]` for [`Ops::linear`] and [`Ops::embed`], held in its precision only: what inference needs.
    fn weight(&self, shape: &[usize], data: &[f32], precision: Precision) -> Self::Tensor;

    /// In which precision a weight is multiplied.
    fn precision(&self, weight: &Self::Tensor) -> Precision;

    /// The numbers of an array, row-major.
    fn to_host(&self, x: &Self::Tensor) -> Vec<f32>;

    /// The number in a `[1]` array, such as a loss.
    fn scalar(&self, x: &Self::Tensor) -> f64;

    /// The shape of an array.
    fn shape(&self, x: &Self::Tensor) -> Vec<usize>;

    /// `x [N,K] . w [M,K]^T -> [N,M]`, in the precision of `w`. Each output is one sum over K in ascending order, whatever
    /// N is.
    fn linear(&self, x: &Self::Tensor, w: &Self::Tensor) -> Self::Tensor;

    /// [`Ops::linear`] of the same rows by each of several weights.
    fn linears(&self, x: &Self::Tensor, weights: &[&Self::Tensor]) -> Vec<Self::Tensor> {
        weights.iter().map(|w| self.linear(x, w)).collect()
    }

    /// [`Ops::linears`] of normed rows.
    fn normed_linears(
        &self,
        x: &Self::Tensor,
        norm: Norm<'_, Self::Tensor>,
        weights: &[&Self::Tensor],
    ) -> Vec<Self::Tensor> {
        self.linears(&self.rms_norm(x, norm.gain, norm.eps), weights)
    }

    /// `base + x . w^T`, with a product of [`Ops::linear`].
    fn linear_onto(&self, base: &Self::Tensor, x: &Self::Tensor, w: &Self::Tensor) -> Self::Tensor {
        self.add(base, &self.linear(x, w), 1.0)
    }

    /// A feed-forward layer, `x + swiglu(y . gate^T, y . up^T) . down^T` of the normed rows y, with weights `[F,C]`, `[F,C]` and
    /// `[C,F]`: `[N,C]`.
    fn feed_forward(
        &self,
        x: &Self::Tensor,
        norm: Norm<'_, Self::Tensor>,
        weights: [&Self::Tensor; 3],
    ) -> Self::Tensor {
        feed_forward(self, x, &self.rms_norm(x, norm.gain, norm.eps), weights)
    }

    /// Rows `ids` of `table [V,C]` -> `[N,C]`.
    fn embed(&self, ids: &[u32], table: &Self::Tensor) -> Self::Tensor;

    /// `x + row` for every row of `x [N,C]`, with `row [C]`: a bias.
    fn add_row(&self, x: &Self::Tensor, row: &Self::Tensor) -> Self::Tensor;

    /// `x / sqrt(mean(x^2) + eps) * w` for every C channels of `x [N, groups*C]`, with `w [C]`: whole rows, or their heads.
    fn rms_norm(&self, x: &Self::Tensor, w: &Self::Tensor, eps: f64) -> Self::Tensor;

    /// Cosines and sines of `positions x D/2` angles, the table that [`Ops::rope`] reads: `[P, D]`, cosines first.
    fn rope_table(&self, inv_freq: &[f64], positions: usize) -> Self::Tensor;

    /// Rotates every head of `x [N, heads*D]` by its position (half-rotation layout: channel d pairs with d + D/2).
    fn rope(&self, x: &Self::Tensor, table: &Self::Tensor, spans: &Spans) -> Self::Tensor;

    /// Multiplies one channel of every head, or of every group of heads, of `x [N, heads*D]` by `factor`.
    fn scale_channel(&self, x: &Self::Tensor, channel: Channel, factor: f64) -> Self::Tensor;

    /// `gate * sigmoid(gate) * up`.
    fn swiglu(&self, gate: &Self::Tensor, up: &Self::Tensor) -> Self::Tensor;

    /// `x + factor * y`.
    fn add(&self, x: &Self::Tensor, y: &Self::Tensor, factor: f64) -> Self::Tensor;

    /// `scale * x - offset`.
    fn affine(&self, x: &Self::Tensor, scale: f64, offset: f64) -> Self::Tensor;

    /// `factor * x`.
    fn scale(&self, x: &Self::Tensor, factor: f64) -> Self::Tensor;

    /// Natural logarithm.
    fn ln(&self, x: &Self::Tensor) -> Self::Tensor;

    /// How far predictions are from what they should be, `[1]`, nats per row. Logits of a few hundred rows exist at a time.
    fn prediction_loss(&self, predicted: Predictions<'_, Self::Tensor>, goal: Goal<'_, Self::Tensor>) -> Self::Tensor;

    /// Logit and importance from the last channels of keys and queries before rotation (spec 1.2).
    fn borrowed_gate(&self, q: &Self::Tensor, k: &Self::Tensor, heads: Heads, decision: Borrowed)
    -> Gate<Self::Tensor>;

    /// Decision logit `[N, G]` from the last channel of each group's first query before rotation (spec 5.2).
    fn query_logit(&self, q: &Self::Tensor, heads: Heads, decision: Borrowed) -> Self::Tensor;

    /// Logit and importance from the head's outputs `[N, 2G]`: `scale * r - offset`, and an importance that is 1 at
    /// `r = 0`, so that a zero-initialised head weighs all tokens alike.
    fn head_gate(&self, r: &Self::Tensor, scale: f64, offset: f64) -> Gate<Self::Tensor>;

    /// Decision logits `[N,G]`, each with what the token before it in its sequence says of it: `logit[t] + ahead[t-1]`.
    fn add_ahead(&self, logit: &Self::Tensor, ahead: &Self::Tensor, spans: &Spans) -> Self::Tensor;

    /// Mean over the columns of `[N,G]`, in every column.
    fn share_columns(&self, x: &Self::Tensor) -> Self::Tensor;

    /// `(logit + noise) / temperature`.
    fn relax(&self, logit: &Self::Tensor, noise: &Self::Tensor, temperature: f64) -> Self::Tensor;

    /// Soft decisions from relaxed logits `[N,G]` (spec 2.1, 2.5). The first `sinks + 1` tokens of a sequence append.
    fn decide_soft(&self, relaxed: &Self::Tensor, spans: &Spans, sinks: usize) -> Decided<Self::Tensor>;

    /// Hard decisions from logits `[N,G]`: fold where the logit is above 0; closed keys get minus infinity. The first
    /// `sinks + 1` tokens of a sequence append.
    fn decide_hard(&self, logit: &Self::Tensor, spans: &Spans, sinks: usize) -> Decided<Self::Tensor>;

    /// Folds per token seen, `[S,G]`, counting hard decisions (`logit > 0`) of the tokens that are not exempt: those
    /// carried out when the sequence ends. Slots held are `T * (1 - rate)`. Gradients pass straight through to the soft
    /// decision.
    fn fold_rate(&self, relaxed: &Self::Tensor, spans: &Spans, exempt: Exempt) -> Self::Tensor;

    /// The hinge over the layers' fold rates, each `[S,G]`: mean over units of how far they miss the target, as [`Pull`] says, `[1]`.
    fn hinge(&self, rates: &[Self::Tensor], spans: &Spans, hinge: Hinge) -> Self::Tensor;

    /// Running weighted means (spec 2.2, 2.3).
    fn pool(&self, input: &PoolInput<Self::Tensor>, spans: &Spans, shape: PoolShape) -> PoolOutput<Self::Tensor>;

    /// Causal attention of `q [N, H*D]`, rotated, over what is visible -> `[N, H*D]`.
    fn attention(&self, q: &Self::Tensor, visible: &Visible<Self::Tensor>, spans: &Spans, heads: Heads)
    -> Self::Tensor;
}

/// Column `at` of every `every` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Columns of a head, or of a group of heads.
    pub every: usize,
    /// Which of them.
    pub at: usize,
}

impl Channel {
    /// The last channel of every head.
    pub fn last(dim: usize) -> Self {
        Self { every: dim, at: dim - 1 }
    }

    /// The last channel of the first query head of every group.
    pub fn last_of_first_query(heads: Heads) -> Self {
        Self { every: heads.group() * heads.dim, at: heads.dim - 1 }
    }
}

/// The numbers of [`Decision::Borrowed`].
#[derive(Clone, Copy, Debug)]
pub struct Borrowed {
    /// Factor on the channel of the logit.
    pub scale: f64,
    /// Subtracted from the logit, added to the importance logit.
    pub offset: f64,
}

impl Decision {
    /// Whether queries and keys lose their last channel.
    pub fn borrows_channel(&self) -> bool {
        matches!(self, Decision::Borrowed { .. })
    }
}

/// What [`Grad::attention_grad`] returns.
#[derive(Clone, Debug)]
pub struct AttentionGrad<T> {
    /// Gradient of the queries.
    pub q: T,
    /// Gradients of the exact keys, where there were any.
    pub exact: Option<Keys<T>>,
    /// Gradients of the pooled states, where there were any.
    pub pooled: Option<Pooled<T>>,
}

/// What [`Grad::attention_saving`] keeps for the backward pass.
#[derive(Clone, Debug)]
pub struct AttentionSaved<T> {
    /// The output `[N, H*D]`.
    pub out: T,
    /// Log of the sum of exponentials of each query's scores, `[N,H]`.
    pub lse: T,
}

/// Which reads are late, and what a fold makes of two keys.
#[derive(Clone, Copy, Debug)]
pub struct Late {
    /// Tokens between a key and the first query that counts.
    pub later: usize,
    /// What the exponential of a slot's score counts for when two keys are in it: 2 with log masses, 1 without.
    pub pair: f64,
}

/// Sums over the queries that read a key late, by query head, `[N,H]` each: of the share `p` that a query gives the key and
/// the share `p'` that it gives the key before it (0 for a sequence's first).
#[derive(Clone, Debug)]
pub struct LateReads<T> {
    /// `p^2`.
    pub own: T,
    /// `(p - p')^2`: what a slot cannot tell apart.
    pub apart: T,
    /// `(p + p' - pair sqrt(p p'))^2`: what a slot is read less than its two tokens, since its key is their mean and the
    /// exponential of a mean is smaller than the mean of the exponentials.
    pub lost: T,
}

/// AdamW's numbers for one parameter and step (decoupled weight decay).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay per unit of learning rate.
    pub weight_decay: f64,
    /// Step count, from 1.
    pub step: u64,
    /// Factor on the gradient (clipping).
    pub grad_scale: f64,
}

/// A parameter's moments.
#[derive(Clone, Debug)]
pub struct Moments<T> {
    /// Mean of gradients.
    pub m: T,
    /// Mean of squared gradients.
    pub v: T,
}

/// The adjoint of every op of [`Ops`], the optimiser, and what a run measures before it starts. `d` is the gradient of the
/// op's output. Where there is an `onto`, it is what other ops gave the same input, and the sum of both is returned.
pub trait Grad: Ops {
    /// A weight to train: its numbers in full, its products in `precision`.
    fn master(&self, shape: &[usize], data: &[f32], precision: Precision) -> Self::Tensor;
    /// Gradient of `x` in [`Ops::linear`], in the precision of `w`.
    fn linear_grad_x(&self, w: &Self::Tensor, d: &Self::Tensor, onto: Option<Self::Tensor>) -> Self::Tensor;
    /// Gradient of `w` in [`Ops::linear`], in the precision of `w`.
    fn linear_grad_w(&self, x: &Self::Tensor, w: &Self::Tensor, d: &Self::Tensor) -> Self::Tensor;
    /// Gradient of the table in [`Ops::embed`].
    fn embed_grad(
        &self,
        ids: &[u32],
        table: &Self::Tensor,
        d: &Self::Tensor,
        onto: Option<Self::Tensor>,
    ) -> Self::Tensor;
    /// Gradient of `row` in [`Ops::add_row`]: the sums of the columns of `d [N,C]`, `[C]`.
    fn add_row_grad(&self, d: &Self::Tensor) -> Self::Tensor;
    /// Gradients of `x`, added to `onto`, and of `w` in [`Ops::rms_norm`].
    fn rms_norm_grad(
        &self,
        x: &Self::Tensor,
        w: &Self::Tensor,
        eps: f64,
        d: &Self::Tensor,
        onto: Option<Self::Tensor>,
    ) -> (Self::Tensor, Self::Tensor);
    /// Gradient of [`Ops::rope`]: the rotation backwards.
    fn rope_grad(&self, table: &Self::Tensor, spans: &Spans, d: &Self::Tensor) -> Self::Tensor;
    /// Gradients of `gate` and `up` in [`Ops::swiglu`].
    fn swiglu_grad(&self, gate: &Self::Tensor, up: &Self::Tensor, d: &Self::Tensor) -> (Self::Tensor, Self::Tensor);
    /// Gradient of [`Ops::ln`].
    fn ln_grad(&self, x: &Self::Tensor, d: &Self::Tensor) -> Self::Tensor;
    /// [`Ops::prediction_loss`] with its gradients by `x` and, where `w_too`, by `w`; all at once, since the logits that
    /// they need are as dear as the loss.
    fn prediction_loss_grad(
        &self,
        predicted: Predictions<'_, Self::Tensor>,
        goal: Goal<'_, Self::Tensor>,
        w_too: bool,
    ) -> LossGrad<Self::Tensor>;
    /// Gradients of `q` and `k` in [`Ops::borrowed_gate`].
    fn borrowed_gate_grad(
        &self,
        inputs: (&Self::Tensor, &Self::Tensor),
        heads: Heads,
        decision: Borrowed,
        d: &Gate<Self::Tensor>,
    ) -> (Self::Tensor, Self::Tensor);
    /// Gradient of `q` in [`Ops::query_logit`].
    fn query_logit_grad(&self, heads: Heads, decision: Borrowed, d: &Self::Tensor) -> Self::Tensor;
    /// Gradient of `r` in [`Ops::head_gate`].
    fn head_gate_grad(&self, r: &Self::Tensor, scale: f64, d: &Gate<Self::Tensor>) -> Self::Tensor;
    /// Gradient of `ahead` in [`Ops::add_ahead`]; that of `logit` is `d`.
    fn add_ahead_grad(&self, spans: &Spans, d: &Self::Tensor) -> Self::Tensor;
    /// Gradient of the relaxed logits in [`Ops::decide_soft`].
    fn decide_soft_grad(
        &self,
        relaxed: &Self::Tensor,
        spans: &Spans,
        sinks: usize,
        d: &Decided<Self::Tensor>,
    ) -> Self::Tensor;
    /// Gradient of the relaxed logits in [`Ops::fold_rate`], straight through.
    fn fold_rate_grad(&self, relaxed: &Self::Tensor, spans: &Spans, exempt: Exempt, d: &Self::Tensor) -> Self::Tensor;
    /// Gradients of the rates in [`Ops::hinge`].
    fn hinge_grad(&self, rates: &[Self::Tensor], spans: &Spans, hinge: Hinge, d: &Self::Tensor) -> Vec<Self::Tensor>;
    /// Gradients of the inputs of [`Ops::pool`].
    fn pool_grad(
        &self,
        input: &PoolInput<Self::Tensor>,
        spans: &Spans,
        shape: PoolShape,
        d: &PoolOutput<Self::Tensor>,
    ) -> PoolInput<Self::Tensor>;
    /// [`Ops::attention`], keeping what its adjoint needs.
    fn attention_saving(
        &self,
        q: &Self::Tensor,
        visible: &Visible<Self::Tensor>,
        spans: &Spans,
        heads: Heads,
    ) -> AttentionSaved<Self::Tensor>;
    /// How each key is read late, and how unlike the one before it. Of plain attention that [`Grad::attention_saving`] ran,
    /// with its `lse`.
    fn late_reads(
        &self,
        inputs: (&Self::Tensor, &Visible<Self::Tensor>),
        saved: &AttentionSaved<Self::Tensor>,
        spans: &Spans,
        heads: Heads,
        late: Late,
    ) -> LateReads<Self::Tensor>;
    /// Gradients of the inputs of [`Ops::attention`].
    fn attention_grad(
        &self,
        inputs: (&Self::Tensor, &Visible<Self::Tensor>),
        saved: &AttentionSaved<Self::Tensor>,
        spans: &Spans,
        heads: Heads,
        d: &Self::Tensor,
    ) -> AttentionGrad<Self::Tensor>;

    /// An array of zeros shaped like `x`.
    fn zeros_like(&self, x: &Self::Tensor) -> Self::Tensor;
    /// Sum of squares, for gradient norms.
    fn sum_squares(&self, x: &Self::Tensor) -> f64;
    /// One AdamW step in place.
    fn adamw(&self, param: &mut Self::Tensor, grad: &Self::Tensor, moments: &mut Moments<Self::Tensor>, adamw: AdamW);
    /// Sets row r of a `[R,C]` array, or element r of `[R]`, to 0 for every r in `rows`, in place.
    fn zero_rows(&self, x: &mut Self::Tensor, rows: &[usize]);
}

/// New tokens of a batch for one layer, and the caches they go to.
#[derive(Debug)]
pub struct CachedAttention<'a, O: CacheOps> {
    /// Queries before rotation `[N, H*D]`.
    pub q: &'a O::Tensor,
    /// The channel of queries that is zero after rotation, where there is one.
    pub zeroed: Option<Channel>,
    /// Keys before rotation `[N, G*D]`.
    pub k: &'a O::Tensor,
    /// Values `[N, G*D]`.
    pub v: &'a O::Tensor,
    /// Decision logits `[N, G]`, for rules that decide.
    pub logit: Option<&'a O::Tensor>,
    /// What each token adds to the logit of the next, `[N, G]`, in models whose decisions look back.
    pub ahead: Option<&'a O::Tensor>,
    /// Importances `[N, G]`, for rules that average.
    pub omega: Option<&'a O::Tensor>,
    /// The rotary table.
    pub angles: &'a O::Tensor,
    /// The batch's sequences.
    pub spans: &'a Spans,
    /// Head counts and dim.
    pub heads: Heads,
    /// What becomes of a token.
    pub rule: Rule,
    /// Type of keys and values in slots.
    pub dtype: CacheDType,
    /// Memory of pages of slots, of the layout [`Rule::page`].
    pub pages: &'a O::Arena,
    /// Memory of pages of rings, of the layout [`Rule::ring_page`].
    pub rings: &'a O::Arena,
    /// Memory of open states, of [`Rule::state_len`] floats each.
    pub states: &'a O::Arena,
    /// Per sequence, its G heads of this layer, with pages enough for the worst case.
    pub tables: Vec<&'a mut [HeadTable]>,
    /// Per sequence, of how many of its last tokens the output is wanted: it has no rows of others. All, where absent.
    pub wanted: Option<&'a [usize]>,
}

/// Attention over a paged cache.
pub trait CacheOps: Ops {
    /// Memory in blocks of one size.
    type Arena: std::fmt::Debug;

    /// An arena for pages of a layout.
    fn page_arena(&self, layout: PageLayout) -> Self::Arena;

    /// An arena for open states of `len` floats.
    fn state_arena(&self, len: usize) -> Self::Arena;

    /// Makes at least `wanted` more blocks and returns their handles.
    fn grow(&self, arena: &mut Self::Arena, wanted: usize) -> Vec<Block>;

    /// Bytes of a block.
    fn block_bytes(&self, arena: &Self::Arena) -> usize;

    /// Makes a block equal to another of its arena.
    fn copy_block(&self, arena: &Self::Arena, from: &Block, to: &mut Block);

    /// The bytes of a block as they lie in memory.
    fn block_to_host(&self, arena: &Self::Arena, block: &Block) -> Vec<u8>;

    /// The bytes of a page of this layout as they lie in memory, with zeros for all slots but the first `used`.
    fn page_to_host(&self, arena: &Self::Arena, page: &Block, layout: PageLayout, used: usize) -> Vec<u8>;

    /// Fills a block with bytes as they lie in memory.
    ///
    /// # Panics
    /// When there are not [`CacheOps::block_bytes`] of them.
    fn block_from_host(&self, arena: &Self::Arena, bytes: &[u8], block: &mut Block);

    /// Takes the batch's tokens into their caches, each seeing what its cache holds at its time -> `[N, H*D]`.
    fn cached_attention(&self, step: CachedAttention<'_, Self>) -> Self::Tensor
    where
        Self: Sized;
}
