//! The weights of a model, by what they do, whatever holds them: host tensors, a backend's arrays, a tape's variables.

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
    /// Output projection, `[C, H*D]`.
    pub o: T,
    /// Decision head, `[2G, C]`: logits, then importances. Only in models that decide by a head.
    pub decide: Option<T>,
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
    /// Makes a block from what `make` returns for each Hugging Face name (without its layer prefix) and shape.
    pub fn build<E>(shape: &Shape, mut make: impl FnMut(&str, &[usize]) -> Result<T, E>) -> Result<Self, E> {
        let (hidden, ffn) = (shape.hidden, shape.intermediate);
        let (q, kv) = (shape.heads.query * shape.heads.dim, shape.heads.kv * shape.heads.dim);
        Ok(Self {
            input_norm: make("input_layernorm.weight", &[hidden])?,
            q: make("self_attn.q_proj.weight", &[q, hidden])?,
            k: make("self_attn.k_proj.weight", &[kv, hidden])?,
            v: make("self_attn.v_proj.weight", &[kv, hidden])?,
            o: make("self_attn.o_proj.weight", &[hidden, q])?,
            decide: match shape.decides_by_head {
                true => Some(make("self_attn.decide_proj.weight", &[2 * shape.heads.kv, hidden])?),
                false => None,
            },
            post_norm: make("post_attention_layernorm.weight", &[hidden])?,
            gate: make("mlp.gate_proj.weight", &[ffn, hidden])?,
            up: make("mlp.up_proj.weight", &[ffn, hidden])?,
            down: make("mlp.down_proj.weight", &[hidden, ffn])?,
        })
    }

    /// The weights in the order of [`Block::build`].
    pub fn list(&self) -> Vec<&T> {
        let Self { input_norm, q, k, v, o, decide, post_norm, gate, up, down } = self;
        [input_norm, q, k, v, o].into_iter().chain(decide).chain([post_norm, gate, up, down]).collect()
    }

    fn list_mut(&mut self) -> Vec<&mut T> {
        let Self { input_norm, q, k, v, o, decide, post_norm, gate, up, down } = self;
        [input_norm, q, k, v, o].into_iter().chain(decide).chain([post_norm, gate, up, down]).collect()
    }
}

impl<T> Weights<T> {
    /// Makes the weights from what `make` returns for each Hugging Face name and shape.
    pub fn build<E>(shape: &Shape, mut make: impl FnMut(&str, &[usize]) -> Result<T, E>) -> Result<Self, E> {
        Ok(Self {
            embed: make("model.embed_tokens.weight", &[shape.vocab, shape.hidden])?,
            blocks: (0..shape.layers)
                .map(|layer| Block::build(shape, |name, dims| make(&format!("model.layers.{layer}.{name}"), dims)))
                .collect::<Result<_, _>>()?,
            norm: make("model.norm.weight", &[shape.hidden])?,
            head: match shape.tied {
                true => None,
                false => Some(make("lm_head.weight", &[shape.vocab, shape.hidden])?),
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
