//! A random model of a few hundred weights, texts for it, and short runs.

use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::noise::{hash, unit};
use kvfold_kernels::ops::{KlDirection, Over, Precision, Pull, Scope};
use kvfold_model::shape::Shape;
use kvfold_model::weights::Weights;
use kvfold_model::{Checkpoint, Config};
use kvfold_retrofit::settings::{Learning, Loss, Pressure, Stages, Text, Train};
use kvfold_retrofit::{Corpus, Settings, StepReport, Trainer};
use kvfold_tensor::{DType, HostTensor};
use serde_json::{Value, json};

pub(crate) const VOCAB: usize = 29;
pub(crate) const LENGTH: usize = 24;
pub(crate) const CONTEXT: usize = 48;

/// A number in -1 to 1 for a place.
fn signed(place: &[u64]) -> f32 {
    (2.0 * unit(hash(place)) - 1.0) as f32
}

/// A random model with grouped queries, weights of a size that keeps attention away from uniform, and two dtypes.
pub(crate) fn tiny() -> Checkpoint {
    tiny_with(&json!({}))
}

/// The same with other fields in its configuration.
pub(crate) fn tiny_with(fields: &Value) -> Checkpoint {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5
    });
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let config = Config::parse(config.to_string().as_bytes(), "config.json").unwrap();
    let expected = Weights::<()>::expected(&Shape::of(&config));
    let tensors = expected.into_iter().enumerate().map(|(n, (name, dims))| {
        let (centre, spread) = match dims.len() {
            1 if name.ends_with("bias") => (0.0, 0.3),
            1 => (1.0, 0.3),
            _ => (0.0, 1.7 / (dims[1] as f32).sqrt()),
        };
        let len: usize = dims.iter().product();
        let values: Vec<f32> = (0..len as u64).map(|i| centre + spread * signed(&[n as u64, i])).collect();
        let tensor = HostTensor::from_f32(dims, &values);
        let tensor = if name.contains("mlp") { tensor.to_dtype(DType::BF16) } else { tensor };
        (name, tensor)
    });
    let stories = Checkpoint::open("stories260k").unwrap();
    Checkpoint { tensors: tensors.collect(), config, source: "tiny".into(), ..stories }
}

/// Random text of `sequences` sequences.
pub(crate) fn corpus(sequences: usize) -> Corpus {
    let tokens = (0..sequences * LENGTH).map(|n| (hash(&[7, n as u64]) % VOCAB as u64) as u32);
    Corpus::cut(tokens.collect(), LENGTH).unwrap()
}

pub(crate) const HEAD: Decision = Decision::Head { scale: 4.0, offset: 1.0, bias: false, ahead: false };
pub(crate) const BORROWED: Decision = Decision::Borrowed { scale: 4.0, offset: 1.0 };

/// A run of the tiny model that folds a lot from its first step on.
pub(crate) fn settings(decision: Decision, (zeroing, ramp, hold): (u64, u64, u64)) -> Settings {
    Settings {
        method: Dmc {
            method: Method::Dmc,
            decision,
            delay: 3,
            sinks: 0,
            pool_window: Some(5),
            log_mass: true,
            share: Share::Head,
        }
        .into(),
        ratio: 2.0,
        from: None,
        calibration: None,
        loss: Loss::Distill { direction: KlDirection::Forward },
        text: Text::Given { digest: String::new(), max_tokens: None, reset: true },
        pressure: Pressure { scope: Scope::Global, over: Over::Batch, pull: Pull::Up, weight: 2.0, margin: 0.0 },
        temperature: 0.5,
        length: LENGTH,
        batch: 3,
        accumulate: 1,
        train: Train::All,
        stages: Stages { zeroing, ramp, hold },
        learning: Learning {
            rate: 3e-3,
            warmup: 1,
            floor: 0.1,
            decide_factor: 5.0,
            beta1: 0.9,
            beta2: 0.95,
            weight_decay: 0.01,
            clip: 1.0,
        },
        seed: 11,
        precision: Precision::F32,
        recompute: false,
    }
}

/// How a run decides.
pub(crate) fn dmc(settings: &mut Settings) -> &mut Dmc {
    match &mut settings.method {
        kvfold_retrofit::settings::Method::Dynamic(dmc) => dmc,
        other => panic!("{other:?} decides nothing"),
    }
}

pub(crate) fn trainer(settings: &Settings) -> Trainer<FastCpu> {
    trainer_of(&tiny(), settings)
}

pub(crate) fn trainer_of(base: &Checkpoint, settings: &Settings) -> Trainer<FastCpu> {
    Trainer::new(FastCpu::new(), base, settings.clone()).unwrap()
}

/// Steps until `until` steps are done.
pub(crate) fn steps(trainer: &mut Trainer<FastCpu>, corpus: &Corpus, until: u64) -> Vec<StepReport> {
    (trainer.steps()..until).map(|_| trainer.step(corpus).unwrap()).collect()
}

/// Weights and moments, to the bit.
pub(crate) fn bits(trainer: &Trainer<FastCpu>) -> Vec<(String, Vec<u32>)> {
    trainer.state().into_iter().map(|(n, t)| (n, t.to_f32().into_iter().map(f32::to_bits).collect())).collect()
}

/// A tensor of a trainer's state.
pub(crate) fn tensor(trainer: &Trainer<FastCpu>, name: &str) -> HostTensor {
    trainer.state().into_iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}")).1
}
