//! `config.json`: what is read, what is refused and in which words, what is written back.

use crate::common::{BORROWED, CONFIG, HEAD, compression, parse, refused_in, retrofitted, says, set, valid};
use kvfold_model::shape::Shape;
use kvfold_model::{Config, Family, names};
use proptest::prelude::*;
use serde_json::{Value, json};

#[track_caller]
/// The tensors of a configuration.
fn expected(config: &kvfold_model::Config) -> Vec<(String, Vec<usize>)> {
    kvfold_model::weights::Weights::<()>::expected(&kvfold_model::shape::Shape::of(config))
}

fn refused(field: &str, value: impl Into<Option<Value>>) -> String {
    let message = refused_in(valid(), field, value);
    says(&message, &[&format!("`{field}` is ")]);
    message
}

fn accepted(field: &str, value: impl Into<Option<Value>>) -> Config {
    let mut config = valid();
    set(&mut config, field, value.into());
    parse(&config).unwrap()
}

#[test]
fn the_embedded_model_is_read() {
    let config = parse(&valid()).unwrap();
    assert_eq!((config.hidden_size, config.intermediate_size, config.num_hidden_layers), (64, 172, 5));
    assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (8, 4, 8));
    assert_eq!((config.query_width(), config.kv_width(), config.group_size()), (64, 32, 2));
    assert_eq!((config.vocab_size, config.max_position_embeddings), (512, 512));
    assert_eq!((config.rope.theta, config.rms_norm_eps), (10000.0, 1e-5));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    assert!(config.tie_word_embeddings);
    assert_eq!(config.architecture(), "LlamaForCausalLM");
}

#[test]
fn absent_fields_have_hugging_faces_defaults() {
    assert_eq!(accepted("num_key_value_heads", None).num_key_value_heads, 8);
    assert_eq!(accepted("num_key_value_heads", Value::Null).num_key_value_heads, 8);
    assert_eq!(accepted("head_dim", None).head_dim, 8);
    assert_eq!(accepted("rope_theta", None).rope.theta, 10000.0);
    assert_eq!(accepted("rms_norm_eps", None).rms_norm_eps, 1e-6);
    assert_eq!(accepted("max_position_embeddings", None).max_position_embeddings, 2048);
    assert!(!accepted("tie_word_embeddings", None).tie_word_embeddings);
    assert_eq!(accepted("eos_token_id", None).eos_token_ids, [2]);
    assert_eq!(accepted("bos_token_id", None).bos_token_id, Some(1));
    accepted("hidden_act", None);
    accepted("model_type", None);
}

#[test]
fn end_tokens_are_one_or_several_or_none() {
    assert_eq!(accepted("eos_token_id", json!([2, 7])).eos_token_ids, [2, 7]);
    assert!(accepted("eos_token_id", json!(null)).eos_token_ids.is_empty());
    assert_eq!(accepted("bos_token_id", json!(null)).bos_token_id, None);
    for value in [json!(512), json!(-1), json!("2"), json!([2, 512]), json!(1.5)] {
        says(&refused("eos_token_id", value), &["512"]);
    }
    says(&refused("bos_token_id", json!(512)), &["is 512;", "below `vocab_size`, 512"]);
}

#[test]
fn rope_theta_may_lie_in_rope_parameters() {
    let parameters = json!({ "rope_type": "default", "rope_theta": 500000.0 });
    assert_eq!(accepted("rope_parameters", parameters).rope.theta, 500000.0);
    assert_eq!(accepted("rope_parameters", json!({})).rope.theta, 10000.0);

    let inside = |parameters: Value| refused_in(valid(), "rope_parameters", parameters);
    says(&inside(json!({ "rope_type": "longrope" })), &["`rope_parameters.rope_type` is \"longrope\"", "\"llama3\""]);
    says(&inside(json!({ "rope_theta": "big" })), &["`rope_parameters.rope_theta` is \"big\""]);
    says(&inside(json!({ "partial_rotary_factor": 0.5 })), &["`rope_parameters.partial_rotary_factor` is 0.5"]);
    says(&inside(json!(7)), &["`rope_parameters` is 7; expected an object"]);
}

#[test]
fn what_is_not_computed_is_refused() {
    accepted("rope_scaling", json!(null));
    says(&refused("mlp_bias", json!(true)), &["is true", "without biases"]);
    says(&refused("hidden_act", json!("gelu")), &["\"gelu\"", "only \"silu\""]);
    says(&refused("quantization_config", json!({ "bits": 4 })), &["{\"bits\":4}", "unquantized"]);
}

#[test]
fn other_architectures_are_refused_with_the_list_of_ours() {
    let both = &["LlamaForCausalLM", "KvfoldLlamaForCausalLM"];
    says(&refused("architectures", json!(["GemmaForCausalLM"])), &["GemmaForCausalLM"]);
    for value in [json!(["GemmaForCausalLM"]), json!([]), json!("LlamaForCausalLM"), json!([1]), json!(null)] {
        says(&refused("architectures", value), both);
    }
    says(&refused("architectures", None), &["is missing"]);
    says(&refused("model_type", json!("mistral")), &["is \"mistral\"", "\"llama\""]);
}

#[test]
fn impossible_dimensions_are_refused() {
    let required = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"];
    for field in required {
        says(&refused(field, None), &["is missing; expected an integer from 1"]);
    }
    for field in required.into_iter().chain(["num_key_value_heads", "head_dim", "max_position_embeddings"]) {
        for value in [
            json!(0),
            json!(-8),
            json!("64"),
            json!(64.5),
            json!(u64::MAX),
            json!(1u64 << 40),
            json!([64]),
            json!(true),
        ] {
            says(&refused(field, value.clone()), &[&format!("is {value};"), "expected an integer from 1 to "]);
        }
    }
    says(&refused("num_hidden_layers", json!(5000)), &["from 1 to 4096"]);
    says(&refused("num_key_value_heads", json!(3)), &["is 3; expected a divisor of `num_attention_heads`, 8"]);
    says(&refused("head_dim", json!(7)), &["is 7; expected an even number", "RoPE"]);
    says(&refused("head_dim", json!(1 << 24)), &["at most 16777216 / `num_attention_heads`, 8"]);
}

#[test]
fn a_head_dim_must_follow_from_the_rest_if_it_is_not_given() {
    let mut config = valid();
    set(&mut config, "head_dim", None);
    says(&refused_in(config.clone(), "hidden_size", json!(65)), &["`hidden_size` is 65; expected a multiple of", "8"]);
    says(&refused_in(config, "hidden_size", json!(56)), &["`hidden_size` is 56; expected", "even number"]);
}

#[test]
fn impossible_constants_are_refused() {
    for value in [json!(0), json!(-1e-5), json!("1e-5"), json!(true), json!(1.0)] {
        says(&refused("rms_norm_eps", value), &["expected a number above 0"]);
    }
    for value in [json!(0.0), json!(-10000), json!("10000")] {
        says(&refused("rope_theta", value), &["expected a finite number above 0"]);
    }
    says(&refused("tie_word_embeddings", json!(1)), &["is 1; expected true or false"]);
    // JSON has no NaN; Python writes it anyway.
    let text = CONFIG.replace("1e-05", "NaN");
    let error = Config::parse(text.as_bytes(), "x/config.json").unwrap_err().to_string();
    says(&error, &["x/config.json: invalid JSON", "line 15"]);
}

#[test]
fn what_is_no_object_is_refused() {
    for text in ["", "[]", "7", "{", "\u{feff}{}"] {
        let error = Config::parse(text.as_bytes(), "x/config.json").unwrap_err().to_string();
        says(&error, &["x/config.json: invalid JSON"]);
    }
}

#[test]
fn a_long_value_is_cut_in_the_message() {
    let message = refused("hidden_size", json!("é".repeat(5000)));
    assert!(message.len() < 400, "{} bytes", message.len());
}

#[test]
fn the_expected_tensors_follow_the_config() {
    let shape = |config: &Config, name: &str| expected(config).into_iter().find(|(n, _)| n == name).map(|(_, s)| s);
    let tied = parse(&valid()).unwrap();
    assert_eq!(expected(&tied).len(), 1 + 5 * 9 + 1);
    assert_eq!(shape(&tied, names::LM_HEAD), None);
    assert_eq!(shape(&tied, &names::layer(4, names::K_PROJ)), Some(vec![32, 64]));
    assert_eq!(shape(&tied, &names::layer(0, names::DECIDE_PROJ)), None);

    let untied = accepted("tie_word_embeddings", json!(false));
    assert_eq!(shape(&untied, "lm_head.weight"), Some(vec![512, 64]));

    // Heads that together are wider than the residual stream.
    let wide = accepted("head_dim", json!(16));
    assert_eq!(shape(&wide, "model.layers.0.self_attn.o_proj.weight"), Some(vec![64, 128]));

    let head = tied.with_compression(compression(HEAD)).unwrap();
    assert_eq!(shape(&head, "model.layers.2.self_attn.decide_proj.weight"), Some(vec![8, 64]));
    let borrowed = tied.with_compression(compression(BORROWED)).unwrap();
    assert_eq!(shape(&borrowed, "model.layers.2.self_attn.decide_proj.weight"), None);
}

/// Any JSON value, shallow.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..70).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,9}", inner, 0..4).prop_map(|map| map.into_iter().collect()),
        ]
    })
}

/// A RoPE scaling of a known kind, or none.
fn any_scaling() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!({ "type": "linear", "factor": 2.0 })),
        Just(json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64 })),
        Just(json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8,
            "beta_slow": 1, "truncate": false, "mscale": 1.0, "mscale_all_dim": 0.7 })),
    ]
}

/// The paths of every field, those of objects inside included.
fn paths(value: &Value, prefix: &str, out: &mut Vec<String>) {
    for (key, value) in value.as_object().into_iter().flatten() {
        let path = format!("{prefix}{key}");
        paths(value, &format!("{path}."), out);
        out.push(path);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_change_of_a_config_is_a_panic(
        ours in any::<bool>(),
        family in 0..Family::ALL.len(),
        scaling in any_scaling(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop::option::weighted(0.9, any_json())), 1..4),
    ) {
        let mut config = if ours { retrofitted() } else { valid() };
        let family = Family::ALL[family];
        config["architectures"] = json!([if ours { family.retrofitted_architecture() } else { family.architecture() }]);
        config["model_type"] = json!(if ours { family.retrofitted_model_type() } else { family.model_type() });
        config["rope_scaling"] = scaling;
        for (at, value) in changes {
            let mut all = Vec::new();
            paths(&config, "", &mut all);
            if all.is_empty() {
                break;
            }
            set(&mut config, &all[at.index(all.len())], value);
        }
        // What is accepted must be usable: its tensors can be listed and sized, and it survives the way back.
        if let Ok(parsed) = parse(&config) {
            prop_assert!(Shape::of(&parsed).inv_freq().iter().all(|f| f.is_finite() && *f >= 0.0), "{parsed:?}");
            for (name, shape) in expected(&parsed) {
                let bytes = shape.iter().try_fold(8usize, |bytes, &dim| bytes.checked_mul(dim));
                prop_assert!(bytes.is_some(), "{name} {shape:?}");
            }
            prop_assert_eq!(&Config::parse(parsed.to_json().as_bytes(), "back").unwrap(), &parsed);
        }
    }
}
