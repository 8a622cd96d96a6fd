//! Every family of models: its logits are those of an independent implementation (`oracle/golden_families.py`), and its
//! configuration is read as its class at Hugging Face reads it.

use crate::common::{compression, parse, refused_in, says, set, valid};
use kvfold_kernels::ops::{Precision, Spans};
use kvfold_kernels::{FastCpu, Ops, Reference};
use kvfold_model::attend::Plain;
use kvfold_model::rope::{Rope, Scaling};
use kvfold_model::shape::Shape;
use kvfold_model::weights::Weights;
use kvfold_model::{Checkpoint, Config, Family, Loaded};
use kvfold_tensor::DType;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::PathBuf;

const CASES: [(&str, Family, DType); 8] = [
    ("llama2", Family::Llama, DType::F32),
    ("llama3", Family::Llama, DType::BF16),
    ("llama_bias_linear", Family::Llama, DType::F16),
    ("mistral", Family::Mistral, DType::F16),
    ("qwen2", Family::Qwen2, DType::BF16),
    ("qwen2_yarn", Family::Qwen2, DType::BF16),
    ("qwen3", Family::Qwen3, DType::F16),
    ("qwen3_yarn", Family::Qwen3, DType::F16),
];

fn path(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/families").join(name);
    path.display().to_string()
}

/// Token ids and logits.
fn golden(name: &str) -> (Vec<u32>, Vec<f64>) {
    let bytes = std::fs::read(path(&format!("{name}.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: &str| file.tensor(name).unwrap().data();
    let tokens = data("tokens").chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32);
    let logits = data("logits").chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())));
    (tokens.collect(), logits.collect())
}

#[track_caller]
fn assert_close(what: &str, got: impl IntoIterator<Item = f64>, want: &[f64], tolerance: f64) {
    let got: Vec<f64> = got.into_iter().collect();
    assert_eq!(got.len(), want.len(), "{what}");
    let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, |a, b| if b <= a { a } else { b });
    assert!(worst < tolerance, "{what}: logits off by {worst:e}");
}

#[test]
fn logits_are_those_of_transformers() {
    for (name, family, dtype) in CASES {
        let checkpoint = Checkpoint::open(&path(name)).unwrap();
        assert_eq!(checkpoint.config.family, family);
        assert!(checkpoint.tensors.values().all(|tensor| tensor.dtype() == dtype), "{name}");
        assert!(checkpoint.ignored.is_empty(), "{name}: {:?}", checkpoint.ignored);
        let (ids, want) = golden(name);
        let spans = Spans::of_lengths(&[ids.len()]);

        // The golden's norms and angles are float32.
        let exact = Loaded::with_precision(Reference::<f64>::reference(), &checkpoint, Precision::F32);
        let logits = exact.pass(&spans).forward(&exact.weights, &ids, &mut Plain);
        assert_close(name, logits.data().iter().copied(), &want, 1e-5);

        let fast = Loaded::with_precision(FastCpu::new(), &checkpoint, Precision::F32);
        let logits = fast.pass(&spans).forward(&fast.weights, &ids, &mut Plain);
        assert_close(name, fast.ops.to_host(&logits).into_iter().map(f64::from), &want, 2e-5);
    }
}

#[test]
fn a_weight_that_another_family_has_no_place_for_is_named() {
    let cases = [("qwen3", Family::Qwen2, "k_norm.weight"), ("qwen2", Family::Qwen3, "k_proj.bias")];
    for (name, other, tensor) in cases {
        let dir = tempfile::tempdir().unwrap();
        let read = |file: &str| std::fs::read(format!("{}/{file}", path(name))).unwrap();
        let mut config: Value = serde_json::from_slice(&read("config.json")).unwrap();
        config["architectures"] = json!([other.architecture()]);
        config["model_type"] = json!(other.model_type());
        config["head_dim"] = json!(if name == "qwen3" { 8 } else { 4 });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        for file in ["model.safetensors", "tokenizer.json"] {
            std::fs::write(dir.path().join(file), read(file)).unwrap();
        }
        let tensor = format!("model.safetensors: tensor `model.layers.0.self_attn.{tensor}` has no place in a model");
        says(&crate::common::refused(dir.path().to_str().unwrap()), &[&tensor]);
    }
}

// ---- config.json ----

/// The embedded model's configuration as one of another family.
fn of(family: Family) -> Value {
    let mut config = valid();
    config["architectures"] = json!([family.architecture()]);
    config["model_type"] = json!(family.model_type());
    config
}

fn with(family: Family, changes: Value) -> Config {
    let mut config = of(family);
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    parse(&config).unwrap()
}

fn names(config: &Config) -> Vec<String> {
    Weights::<()>::expected(&Shape::of(config)).into_iter().map(|(name, _)| name).collect()
}

#[test]
fn each_family_has_its_parts() {
    let has = |config: &Config, part: &str| names(config).contains(&format!("model.layers.0.self_attn.{part}"));
    let parts = ["q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias", "q_norm.weight", "k_norm.weight"];
    let bias = json!({ "attention_bias": true });
    for (family, changes, expected) in [
        (Family::Llama, json!({}), [false, false, false, false, false, false]),
        (Family::Llama, bias.clone(), [true, true, true, true, false, false]),
        (Family::Mistral, bias.clone(), [false, false, false, false, false, false]),
        (Family::Qwen2, json!({ "attention_bias": false }), [true, true, true, false, false, false]),
        (Family::Qwen3, json!({}), [false, false, false, false, true, true]),
        (Family::Qwen3, bias, [true, true, true, true, true, true]),
    ] {
        let config = with(family, changes);
        assert_eq!(parts.map(|part| has(&config, part)), expected, "{family:?}");
    }
}

#[test]
fn a_retrofitted_model_of_each_family_has_a_name_of_its_own() {
    for family in Family::ALL {
        let config = with(family, json!({})).with_compression(compression(crate::common::HEAD)).unwrap();
        assert_eq!(config.architecture(), format!("Kvfold{}", family.architecture()));
        let written: Value = serde_json::from_str(&config.to_json()).unwrap();
        assert_eq!(written["model_type"], format!("kvfold_{}", family.model_type()));
        assert_eq!(parse(&written).unwrap(), config);
    }
}

#[test]
fn absent_fields_have_the_defaults_of_the_family() {
    for (family, heads, kv, dim, context, bos) in [
        (Family::Mistral, 16, 8, 4, 131_072, Some(1)),
        (Family::Qwen2, 32, 32, 2, 32_768, None),
        (Family::Qwen3, 32, 32, 128, 32_768, None),
    ] {
        let mut config = of(family);
        for field in ["num_key_value_heads", "head_dim", "max_position_embeddings", "bos_token_id"] {
            set(&mut config, field, None);
        }
        config["num_attention_heads"] = json!(heads);
        config["sliding_window"] = Value::Null;
        let config = parse(&config).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim), (kv, dim), "{family:?}");
        assert_eq!((config.max_position_embeddings, config.bos_token_id), (context, bos), "{family:?}");
    }
    // An explicit null is Hugging Face's own rule for these two.
    let null = with(Family::Mistral, json!({ "num_key_value_heads": null, "head_dim": null }));
    assert_eq!((null.num_key_value_heads, null.head_dim), (8, 8));
}

#[test]
fn a_window_that_a_sequence_can_outgrow_is_refused() {
    let context = 512;
    let window = |family, changes: Value| {
        let mut config = of(family);
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        parse(&config).map(|_| ()).map_err(|error| error.to_string())
    };
    let long = json!({ "max_position_embeddings": 8192 });
    says(&window(Family::Mistral, long.clone()).unwrap_err(), &["`sliding_window` is missing", "8192", "4096"]);
    for (family, changes) in [
        (Family::Mistral, json!({ "sliding_window": context - 1 })),
        (Family::Qwen2, json!({ "sliding_window": 64, "use_sliding_window": true, "max_window_layers": 2 })),
        (
            Family::Qwen3,
            json!({ "sliding_window": 64, "use_sliding_window": true,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention", "full_attention"] }),
        ),
    ] {
        let message = window(family, changes.clone()).unwrap_err();
        let set = format!("set that to {} to use", changes["sliding_window"]);
        says(&message, &["x/config.json: `sliding_window` is", "does not support", &set]);
    }
    for (family, changes) in [
        (Family::Mistral, json!({ "sliding_window": null, "max_position_embeddings": 8192 })),
        (Family::Mistral, json!({ "sliding_window": context })),
        (Family::Llama, json!({ "sliding_window": 64 })),
        (Family::Qwen2, json!({ "sliding_window": 64, "use_sliding_window": false })),
        (Family::Qwen2, json!({ "sliding_window": 64, "use_sliding_window": true, "max_window_layers": 5 })),
        (
            Family::Qwen3,
            json!({ "sliding_window": 64, "use_sliding_window": true,
            "layer_types": ["full_attention"] }),
        ),
    ] {
        window(family, changes).unwrap();
    }
}

#[test]
fn both_layouts_of_rope_are_one_configuration() {
    let scaling = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64 });
    let older = with(Family::Llama, json!({ "rope_theta": 5e5, "rope_scaling": scaling }));
    let mut inside = scaling.clone();
    inside["rope_theta"] = json!(5e5);
    let newer = with(Family::Llama, json!({ "rope_theta": null, "rope_parameters": inside }));
    let llama3 = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 64 };
    assert_eq!((older.rope, newer.rope), (Rope { theta: 5e5, scaling: llama3 }, Rope { theta: 5e5, scaling: llama3 }));

    let of = |scaling: Value| with(Family::Llama, json!({ "rope_scaling": scaling })).rope.scaling;
    assert_eq!(of(json!({ "type": "linear", "factor": 2 })), Scaling::Linear { factor: 2.0 });
    // Within the original length, which is the whole context here, dynamic scaling is none.
    assert_eq!(of(json!({ "type": "dynamic", "factor": 2.0 })), Scaling::None);
    let factor = |scaling| match of(scaling) {
        Scaling::Yarn { factor, attention_factor, original, .. } => (factor, attention_factor, original),
        other => panic!("{other:?}"),
    };
    let (stretch, sharpen, original) = factor(json!({ "type": "yarn", "factor": 4.0 }));
    assert_eq!((stretch, original), (4.0, 512));
    assert!((sharpen - (0.1 * 4_f64.ln() + 1.0)).abs() < 1e-15);
    let deepseek = json!({ "type": "yarn", "factor": null, "original_max_position_embeddings": 128,
        "mscale": 1.0, "mscale_all_dim": 0.5 });
    let (stretch, sharpen, _) = factor(deepseek);
    assert_eq!(stretch, 4.0);
    assert!((sharpen - (0.1 * 4_f64.ln() + 1.0) / (0.05 * 4_f64.ln() + 1.0)).abs() < 1e-15);
}

#[test]
fn rope_that_is_not_computed_or_makes_no_sense_is_refused_by_its_field() {
    let llama3 = |low: f64, high: f64| {
        json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": 64 })
    };
    for (scaling, field) in [
        (json!({ "rope_type": "longrope", "factor": 2.0 }), "rope_scaling.rope_type"),
        (json!({ "type": "su" }), "rope_scaling.type"),
        (
            json!({ "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256 }),
            "rope_scaling.rope_type",
        ),
        (json!({ "rope_type": "linear" }), "rope_scaling.factor"),
        (json!({ "rope_type": "linear", "factor": 0.5 }), "rope_scaling.factor"),
        (json!({ "rope_type": "default", "partial_rotary_factor": 0.5 }), "rope_scaling.partial_rotary_factor"),
        (json!({ "rope_type": "default", "mrope_section": [1, 1, 2] }), "rope_scaling.mrope_section"),
        (json!({ "full_attention": { "rope_type": "default" } }), "rope_scaling"),
        (llama3(4.0, 4.0), "rope_scaling.high_freq_factor"),
        (llama3(0.0, 4.0), "rope_scaling.low_freq_factor"),
        (json!({ "rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 2.0 }), "rope_scaling.beta_fast"),
        (json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0 }), "rope_scaling.rope_theta"),
        (
            json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0 }),
            "rope_scaling.original_max_position_embeddings",
        ),
    ] {
        let message = refused_in(valid(), "rope_scaling", scaling);
        says(&message, &[&format!("`{field}` is")]);
    }
    says(&refused_in(valid(), "partial_rotary_factor", json!(0.25)), &["`partial_rotary_factor` is 0.25"]);
}

#[test]
fn scaled_frequencies_stay_between_the_plain_and_the_divided_ones() {
    let theta = 1e4;
    let plain = Rope::plain(theta).inv_freq(128);
    let yarn = Scaling::Yarn {
        factor: 8.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        original: 8192,
        attention_factor: 1.2,
    };
    for scaling in [Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192 }, yarn] {
        let scaled = Rope { theta, scaling }.inv_freq(128);
        assert_eq!((scaled[0], scaled[63]), (plain[0], plain[63] / 8.0), "{scaling:?}");
        let between = plain.iter().zip(&scaled).filter(|(p, s)| **s < **p && **s > **p / 8.0).count();
        assert!(between > 5, "{scaling:?}: {between} interpolated");
        assert!(plain.iter().zip(&scaled).all(|(p, s)| s <= p && *s >= p / 8.0), "{scaling:?}");
    }
}
