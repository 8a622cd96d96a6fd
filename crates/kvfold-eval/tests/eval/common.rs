//! Models whose answers are known: what a model says is set through its embedding and output head.

use kvfold_engine::Engine;
use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::noise::{hash, unit};
use kvfold_model::shape::Shape;
use kvfold_model::weights::Weights;
use kvfold_model::{Checkpoint, Compression, Config};
use kvfold_tensor::HostTensor;
use serde_json::json;

pub(crate) const VOCAB: usize = 16;
pub(crate) const CONTEXT: usize = 128;

/// How a compressed model of these tests folds.
pub(crate) fn dmc(offset: f64) -> Dmc {
    let decision = Decision::Head { scale: 1.0, offset, bias: false, ahead: false };
    Dmc { method: Method::Dmc, decision, delay: 5, sinks: 0, pool_window: None, log_mass: true, share: Share::Head }
}

/// A model of 16 tokens and 16 channels whose weights `fill(name, index)` gives, plain or compressed.
pub(crate) fn model(dmc: Option<Dmc>, fill: impl Fn(&str, usize) -> f32) -> Checkpoint {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6
    });
    let mut config = Config::parse(config.to_string().as_bytes(), "config.json").unwrap();
    if let Some(dmc) = dmc {
        let section = Compression { dmc, ratio: 2.0, trained_length: CONTEXT, base_model: "known".into() };
        config = config.with_compression(section).unwrap();
    }
    let tensors = Weights::<()>::expected(&Shape::of(&config)).into_iter().map(|(name, dims)| {
        let values: Vec<f32> = (0..dims.iter().product()).map(|i| fill(&name, i)).collect();
        let tensor = HostTensor::from_f32(dims, &values);
        (name, tensor)
    });
    Checkpoint { tensors: tensors.collect(), config, ..Checkpoint::open("stories260k").unwrap() }
}

/// Random weights; decisions are mixed when a model folds.
pub(crate) fn random(name: &str, index: usize) -> f32 {
    let seed = name.bytes().fold(1, |h, b| hash(&[h, u64::from(b)]));
    let x = 2.0 * unit(hash(&[seed, index as u64])) as f32 - 1.0;
    if name.contains("norm") { 1.0 + 0.3 * x } else { x }
}

/// A model that has read nothing but its newest token `t`, and gives token `k` the logit `logits(t, k)`.
///
/// Blocks add nothing; the embedding of token t is the unit vector t, which the last norm makes 4, and the head
/// multiplies it by a quarter of the logits.
pub(crate) fn lookup(logits: impl Fn(usize, usize) -> f32) -> Checkpoint {
    model(None, |name, at| match name {
        "model.embed_tokens.weight" => f32::from(u8::from(at / 16 == at % 16)),
        "lm_head.weight" => logits(at % 16, at / 16) / 4.0,
        "model.norm.weight" => 1.0,
        _ => 0.0,
    })
}

/// A model that knows nothing, and is not a number once it has read token 2.
pub(crate) fn broken() -> Checkpoint {
    model(None, |name, at| match name {
        "model.embed_tokens.weight" if at / 16 == 2 => f32::NAN,
        "model.embed_tokens.weight" | "model.norm.weight" => 1.0,
        _ => 0.0,
    })
}

pub(crate) fn engine(model: &Checkpoint) -> Engine<FastCpu> {
    Engine::new(FastCpu::new(), model)
}

/// A random text.
pub(crate) fn text(len: usize) -> Vec<u32> {
    (0..len as u64).map(|n| (hash(&[3, n]) % VOCAB as u64) as u32).collect()
}

#[track_caller]
pub(crate) fn near(found: f64, wanted: f64, tolerance: f64) {
    assert!((found - wanted).abs() <= tolerance * wanted.abs().max(1.0), "{found}, not {wanted}");
}
