//! The `kvfold` section: read strictly, written so that plain loaders refuse the model.

use crate::common::{BORROWED, HEAD, compression, parse, refused_in, retrofitted, says, section, valid};
use kvfold_kernels::dmc::{Decision, Method};
use kvfold_model::{Compression, Config};
use proptest::prelude::*;
use serde_json::{Value, json};

#[test]
fn a_retrofitted_model_has_a_section_and_a_plain_one_has_none() {
    assert_eq!(parse(&retrofitted()).unwrap().compression, Some(compression(BORROWED)));
    says(&refused_in(retrofitted(), "kvfold", None), &["`kvfold` is missing", "KvfoldLlamaForCausalLM"]);
    says(&refused_in(retrofitted(), "kvfold", json!([])), &["`kvfold` is []", "object"]);
    says(
        &refused_in(valid(), "kvfold", section()),
        &["`kvfold` is {", "none in a model of architecture LlamaForCausalLM"],
    );
    says(&refused_in(retrofitted(), "model_type", json!("llama")), &["`model_type` is \"llama\"", "kvfold_llama"]);
}

#[test]
fn an_unknown_version_says_which_is_read() {
    let message = refused_in(retrofitted(), "kvfold.version", json!(3));
    says(&message, &["`kvfold.version` is 3", "this build reads versions 1 to 2"]);
    says(
        &refused_in(retrofitted(), "kvfold.version", json!("1")),
        &["`kvfold.version` is \"1\"; expected an integer from 1 to 2"],
    );
    says(&refused_in(retrofitted(), "kvfold.version", None), &["`kvfold.version` is missing"]);
}

#[test]
fn a_bad_section_names_the_field() {
    let bad = |field: &str, value: Value| refused_in(retrofitted(), field, value);
    says(&bad("kvfold.cache.delay", json!(513)), &["`kvfold.cache.delay` is 513", "at most 512"]);
    says(&bad("kvfold.cache.delay", json!(-1)), &["`kvfold.cache`", "-1"]);
    says(&bad("kvfold.cache.sinks", json!(512)), &["`kvfold.cache.sinks` is 512", "less than 512"]);
    says(&bad("kvfold.cache.pool_window", json!(0)), &["`kvfold.cache.pool_window` is 0; expected 1 to 512", "null"]);
    says(&bad("kvfold.cache.decision.scale", json!(0.0)), &["`kvfold.cache.decision.scale` is 0; expected", "above 0"]);
    says(&bad("kvfold.cache.decision.scale", json!("1")), &["`kvfold.cache` cannot be read", "string \"1\""]);
    says(&bad("kvfold.cache.decision.source", json!("oracle")), &["`kvfold.cache`", "oracle", "borrowed", "head"]);
    says(&bad("kvfold.cache.surprise", json!(1)), &["`kvfold.cache`", "unknown field `surprise`"]);
    says(&bad("kvfold.cache", json!(null)), &["`kvfold.cache` is null; expected an object"]);
    says(&bad("kvfold.surprise", json!(1)), &["`kvfold` cannot be read: unknown field `surprise`"]);
    says(&bad("kvfold.ratio", json!(0.5)), &["`kvfold.ratio` is 0.5; expected", "from 1"]);
    says(&bad("kvfold.trained_length", json!(0)), &["`kvfold.trained_length` is 0"]);
    says(&refused_in(retrofitted(), "kvfold.base_model", None), &["`kvfold` cannot be read", "base_model"]);
}

#[test]
fn a_section_from_before_there_were_sinks_has_none() {
    let mut section = retrofitted();
    section["kvfold"]["cache"].as_object_mut().unwrap().shift_remove("sinks");
    let sinks = |section: &Value| parse(section).unwrap().compression.unwrap().dmc.sinks;
    assert_eq!(sinks(&section), 0);
    section["kvfold"]["cache"]["sinks"] = json!(4);
    assert_eq!(sinks(&section), 4);
}

#[test]
fn version_1_is_read_as_the_same_model() {
    let mut old = retrofitted();
    let section = old["kvfold"].as_object_mut().unwrap();
    let mut cache = section.shift_remove("cache").unwrap();
    cache.as_object_mut().unwrap().shift_remove("method");
    section.insert("dmc".into(), cache);
    section.insert("version".into(), json!(1));
    let config = parse(&old).unwrap();
    assert_eq!(config.compression, Some(compression(BORROWED)));
    let bad = |field: &str, value: Value| refused_in(old.clone(), field, value);
    says(&bad("kvfold.dmc.delay", json!(513)), &["`kvfold.dmc.delay` is 513", "at most 512"]);
    says(&bad("kvfold.dmc.method", json!("dms")), &["`kvfold.dmc.method` is \"dms\"; expected none", "version 1"]);
    says(&bad("kvfold.cache", json!({})), &["`kvfold.cache` is {}; expected none", "version 1"]);
    says(&bad("kvfold.version", json!(2)), &["`kvfold.cache` is missing; expected an object"]);
}

#[test]
fn dms_has_nothing_to_average() {
    let mut dms = retrofitted();
    dms["kvfold"]["cache"]["method"] = json!("dms");
    says(&refused_in(dms.clone(), "kvfold.ratio", json!(2.0)), &["`kvfold.cache.pool_window` is 12; expected null"]);
    dms["kvfold"]["cache"]["pool_window"] = json!(null);
    says(&refused_in(dms.clone(), "kvfold.ratio", json!(2.0)), &["`kvfold.cache.log_mass` is true; expected false"]);
    dms["kvfold"]["cache"]["log_mass"] = json!(false);
    assert_eq!(parse(&dms).unwrap().compression.unwrap().dmc.method, Method::Dms);
    says(&refused_in(dms, "kvfold.cache.method", json!("h2o")), &["`kvfold.cache`", "h2o", "dmc", "dms"]);
}

#[test]
fn with_compression_makes_a_config_that_plain_loaders_refuse() {
    let mut plain = valid();
    plain["something_of_tomorrow"] = json!({ "keep": ["me", 1.5] });
    plain["auto_map"] = json!({ "AutoModelForCausalLM": "modeling.Llama" });
    let config = parse(&plain).unwrap().with_compression(compression(HEAD)).unwrap();
    assert_eq!(config.architecture(), "KvfoldLlamaForCausalLM");

    let text = config.to_json();
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["architectures"], json!(["KvfoldLlamaForCausalLM"]));
    assert_eq!(json["model_type"], "kvfold_llama");
    assert_eq!(json["kvfold"]["version"], 2);
    assert_eq!(json["something_of_tomorrow"], plain["something_of_tomorrow"]);
    assert_eq!(json.get("auto_map"), None);
    assert_eq!(json["rms_norm_eps"], plain["rms_norm_eps"]);
    assert_eq!(Config::parse(text.as_bytes(), "back").unwrap(), config);
}

#[test]
fn with_compression_refuses_what_could_not_be_read_back() {
    let plain = parse(&valid()).unwrap();
    let with = |change: fn(&mut Compression)| {
        let mut compression = compression(BORROWED);
        change(&mut compression);
        plain.with_compression(compression).unwrap_err().to_string()
    };
    says(&with(|c| c.ratio = f64::NAN), &["`kvfold.ratio` is NaN"]);
    says(&with(|c| c.dmc.pool_window = Some(0)), &["`kvfold.cache.pool_window` is 0"]);
    says(
        &with(|c| c.dmc.decision = Decision::Head { scale: f64::INFINITY, offset: 0.0, bias: false, ahead: false }),
        &["`kvfold.cache.decision.scale` is inf"],
    );
    says(
        &with(|c| c.dmc.decision = Decision::Head { scale: 1.0, offset: f64::NAN, bias: false, ahead: false }),
        &["`kvfold.cache.decision.offset` is NaN"],
    );
}

proptest! {
    #[test]
    fn settings_survive_the_way_through_a_file_to_the_bit(scale in 1e-9f64..1e9, offset in any::<f64>(), ratio in 1.0f64..64.0) {
        prop_assume!(offset.is_finite());
        let mut compression = compression(Decision::Head { scale, offset, bias: false, ahead: false });
        compression.ratio = ratio;
        let config = parse(&valid()).unwrap().with_compression(compression.clone()).unwrap();
        let back = Config::parse(config.to_json().as_bytes(), "back").unwrap();
        prop_assert_eq!(back.compression, Some(compression));
    }
}
