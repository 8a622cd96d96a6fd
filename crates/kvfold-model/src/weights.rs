//! The weights of a model, by what they do, whatever holds them: host tensors, a backend's arrays, a tape's variables.

use crate::names;
use crate::shape::Shape;

/// One decoder block.
#[derive(Clone, Debug)]
pub struct Block<T> {
    /// Norm before attention, `[C]`.
    pub input_norm: T,
    /// Query projection, `[H*D, C]`.
    pub q: T,
    /// Key projection, `[G*D, C]`.
    pub k: T,
    /// Value projection, `[G*D, C]`.
    pub v: T,
    /// Added to queries, `[H*D]`, in families that have it.
    pub q_bias: Option<T>,
    /// Added to keys, `[G*D]`, in families that have it.
    pub k_bias: Option<T>,
    /// Added to values, `[G*D]`, in families that have it.
    pub v_bias: Option<T>,
    /// Norm of each head's queries, `[D]`, in families that have it.
    pub q_norm: Option<T>,
    /// Norm of each head's keys, `[D]`, in families that have it.
    pub k_norm: Option<T>,
    /// Output projection, `[C, H*D]`.
    pub o: T,
    /// Added to attention's output, `[C]`, in families that have it.
    pub o_bias: Option<T>,
    /// Decision head, `[2G, C]`: logits, then importances; `[G, C]` in DMS. Only in models that decide by a head.
    pub decide: Option<T>,
    /// Added to the decision head's outputs, `[2G]`; `[G]` in DMS. Only where the configuration says so.
    pub decide_bias: Option<T>,
    /// What each token adds to the decision logits of the next, `[G, C]`.
    pub decide_ahead: Option<T>,
    /// Norm before the feed-forward layer, `[C]`.
    pub post_norm: T,
    /// Feed-forward gate, `[F, C]`.
    pub gate: T,
    /// Feed-forward input, `[F, C]`.
    pub up: T,
    /// Feed-forward output, `[C, F]`.
    pub down: T,
}

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct Weights<T> {
    /// Token embeddings, `[V, C]`.
    pub embed: T,
    /// Blocks, first to last.
    pub blocks: Vec<Block<T>>,
    /// Norm before the logits, `[C]`.
    pub norm: T,
    /// Output projection, `[V, C]`; absent when the embeddings serve.
    pub head: Option<T>,
}

impl<T> Block<T> {
    /// Makes a block from what `make` returns for each part's name and shape.
    pub fn build<E>(shape: &Shape, mut make: impl FnMut(&str, &[usize]) -> Result<T, E>) -> Result<Self, E> {
        let (hidden, ffn) = (shape.hidden, shape.intermediate);
        let (q, kv) = (shape.heads.query * shape.heads.dim, shape.heads.kv * shape.heads.dim);
        Ok(Self {
            input_norm: make(names::INPUT_NORM, &[hidden])?,
            q: make(names::Q_PROJ, &[q, hidden])?,
            k: make(names::K_PROJ, &[kv, hidden])?,
            v: make(names::V_PROJ, &[kv, hidden])?,
            q_bias: shape.qkv_bias.then(|| make(names::Q_BIAS, &[q])).transpose()?,
            k_bias: shape.qkv_bias.then(|| make(names::K_BIAS, &[kv])).transpose()?,
            v_bias: shape.qkv_bias.then(|| make(names::V_BIAS, &[kv])).transpose()?,
            q_norm: shape.qk_norm.then(|| make(names::Q_NORM, &[shape.heads.dim])).transpose()?,
            k_norm: shape.qk_norm.then(|| make(names::K_NORM, &[shape.heads.dim])).transpose()?,
            o: make(names::O_PROJ, &[hidden, q])?,
            o_bias: shape.o_bias.then(|| make(names::O_BIAS, &[hidden])).transpose()?,
            decide: match shape.decide_outputs {
                0 => None,
                outputs => Some(make(names::DECIDE_PROJ, &[outputs, hidden])?),
            },
            decide_bias: shape.decide_bias.then(|| make(names::DECIDE_BIAS, &[shape.decide_outputs])).transpose()?,
            decide_ahead: shape
                .decide_ahead
                .then(|| make(names::DECIDE_AHEAD, &[shape.heads.kv, hidden]))
                .transpose()?,
            post_norm: make(names::POST_ATTENTION_NORM, &[hidden])?,
            gate: make(names::GATE_PROJ, &[ffn, hidden])?,
            up: make(names::UP_PROJ, &[ffn, hidden])?,
            down: make(names::DOWN_PROJ, &[hidden, ffn])?,
        })
    }

    /// The weights in the order of [`Block::build`].
    pub fn list(&self) -> Vec<&T> {
        let Self { input_norm, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, .. } = self;
        let Self { o, o_bias, decide, decide_bias, decide_ahead, post_norm, gate, up, down, .. } = self;
        let projections = [input_norm, q, k, v].into_iter().chain(q_bias).chain(k_bias).chain(v_bias);
        let attention = projections.chain(q_norm).chain(k_norm).chain([o]).chain(o_bias);
        attention.chain(decide).chain(decide_bias).chain(decide_ahead).chain([post_norm, gate, up, down]).collect()
    }

    fn list_mut(&mut self) -> Vec<&mut T> {
        let Self { input_norm, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, .. } = self;
        let Self { o, o_bias, decide, decide_bias, decide_ahead, post_norm, gate, up, down, .. } = self;
        let projections = [input_norm, q, k, v].into_iter().chain(q_bias).chain(k_bias).chain(v_bias);
        let attention = projections.chain(q_norm).chain(k_norm).chain([o]).chain(o_bias);
        attention.chain(decide).chain(decide_bias).chain(decide_ahead).chain([post_norm, gate, up, down]).collect()
    }
}

impl<T> Weights<T> {
    /// Makes the weights from what `make` returns for each Hugging Face name and shape.
    pub fn build<E>(shape: &Shape, mut make: impl FnMut(&str, &[usize]) -> Result<T, E>) -> Result<Self, E> {
        Ok(Self {
            embed: make(names::EMBED, &[shape.vocab, shape.hidden])?,
            blocks: (0..shape.layers)
                .map(|layer| Block::build(shape, |part, dims| make(&names::layer(layer, part), dims)))
                .collect::<Result<_, _>>()?,
            norm: make(names::NORM, &[shape.hidden])?,
            head: match shape.tied {
                true => None,
                false => Some(make(names::LM_HEAD, &[shape.vocab, shape.hidden])?),
            },
        })
    }

    /// The names and shapes that [`Weights::build`] asks for, in order.
    pub fn expected(shape: &Shape) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        let built = Weights::<()>::build(shape, |name, dims| {
            all.push((name.to_owned(), dims.to_vec()));
            Ok::<_, std::convert::Infallible>(())
        });
        match built {
            Ok(_) => all,
        }
    }

    /// The weights in the order of [`Weights::build`].
    pub fn list(&self) -> Vec<&T> {
        let blocks = self.blocks.iter().flat_map(Block::list);
        std::iter::once(&self.embed).chain(blocks).chain([&self.norm]).chain(&self.head).collect()
    }

    /// The weights in the order of [`Weights::build`], to change them.
    pub fn list_mut(&mut self) -> Vec<&mut T> {
        let blocks = self.blocks.iter_mut().flat_map(Block::list_mut);
        std::iter::once(&mut self.embed).chain(blocks).chain([&mut self.norm]).chain(&mut self.head).collect()
    }

    /// The same weights, each changed by `f`.
    pub fn map<U>(&self, shape: &Shape, mut f: impl FnMut(&T) -> U) -> Weights<U> {
        let mut all = self.list().into_iter();
        let built = Weights::build(shape, |_, _| {
            Ok::<_, std::convert::Infallible>(f(all.next().expect("build and list have one order")))
        });
        match built {
            Ok(weights) => weights,
        }
    }

    /// The projection to logits.
    pub fn unembed(&self) -> &T {
        self.head.as_ref().unwrap_or(&self.embed)
    }
}
