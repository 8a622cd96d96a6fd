//! Chat templates: rendered as transformers renders them (`oracle/golden_chat.py`), and what is said of bad ones.

use crate::common::says;
use jiff::civil::date;
use kvfold_model::{Chat, ChatTemplate, Checkpoint, ModelError};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/chats")
}

/// The embedded model with these files beside its own.
fn with(files: &[(&str, &str)]) -> Checkpoint {
    let mut checkpoint = Checkpoint::open("stories260k").unwrap();
    for (name, content) in files {
        checkpoint.companions.insert((*name).into(), content.as_bytes().to_vec());
    }
    checkpoint
}

const TOKENS: &str = r#"{ "bos_token": "<s>", "eos_token": { "content": "</s>", "lstrip": false } }"#;

fn template(source: &str) -> kvfold_model::Result<ChatTemplate> {
    ChatTemplate::of(&with(&[("chat_template.jinja", source), ("tokenizer_config.json", TOKENS)]))
}

fn chat(messages: Value) -> Chat {
    let messages = messages.as_array().unwrap().clone();
    Chat { now: date(2024, 7, 26).at(15, 4, 5, 0), ..Chat::new(messages) }
}

fn hello() -> Chat {
    chat(json!([{ "role": "user", "content": "Hello" }]))
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let cases: Vec<Map<String, Value>> =
        serde_json::from_slice(&std::fs::read(dir().join("chats.json")).unwrap()).unwrap();
    let known = ["template", "messages", "tools", "add_generation_prompt", "text", "refused", "failed"];
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let template = template(&std::fs::read_to_string(dir().join(name)).unwrap()).unwrap();
        let mut chat = chat(case["messages"].clone());
        chat.tools = case.get("tools").map(|tools| tools.as_array().unwrap().clone());
        chat.add_generation_prompt = case.get("add_generation_prompt") != Some(&Value::Bool(false));
        let more = case.iter().filter(|(key, _)| !known.contains(&key.as_str()));
        chat.variables = more.map(|(key, value)| (key.clone(), value.clone())).collect();
        match (template.render(&chat), case.get("text"), case.get("refused")) {
            (Ok(text), Some(want), _) => assert_eq!(text, want.as_str().unwrap(), "{name}: {:?}", chat.messages),
            (Err(ModelError::ChatRefused { reason, .. }), _, Some(want)) => assert_eq!(reason, want.as_str().unwrap()),
            (Err(ModelError::Template { .. }), None, None) => {}
            (got, want, refused) => panic!("{name}: {got:?}, expected {want:?} {refused:?}"),
        }
    }
    assert!(cases.len() >= 80);
}

#[test]
fn a_template_is_found_where_models_keep_it() {
    let config = |template: Value| json!({ "bos_token": "<s>", "chat_template": template }).to_string();
    let rendered = |files: &[(&str, &str)], chat: &Chat| ChatTemplate::of(&with(files)).unwrap().render(chat).unwrap();

    let one = config(json!("{{ bos_token }}one"));
    assert_eq!(rendered(&[("tokenizer_config.json", &one)], &hello()), "<s>one");
    // A file of its own wins; a special token of the older file is found, and overruled by the newer one.
    let tokens = r#"{ "bos_token": "<old>", "eos_token": "</s>" }"#;
    let files = [
        ("tokenizer_config.json", one.as_str()),
        ("special_tokens_map.json", tokens),
        ("chat_template.jinja", "two{{ bos_token }}{{ eos_token }}"),
    ];
    assert_eq!(rendered(&files, &hello()), "two<s></s>");

    let several =
        config(json!([{ "name": "default", "template": "plain" }, { "name": "tool_use", "template": "tools" }]));
    let mut with_tools = hello();
    assert_eq!(rendered(&[("tokenizer_config.json", &several)], &with_tools), "plain");
    with_tools.tools = Some(vec![json!({ "type": "function" })]);
    assert_eq!(rendered(&[("tokenizer_config.json", &several)], &with_tools), "tools");

    let message = ChatTemplate::of(&with(&[])).unwrap_err().to_string();
    says(&message, &["stories260k: has no chat template", "chat_template.jinja", "base model"]);
}

#[test]
fn a_bad_template_is_named_with_the_line() {
    let message = template("one\ntwo\n{% for x in %}").unwrap_err().to_string();
    says(&message, &["stories260k: chat_template.jinja: line 3 of the chat template: syntax error"]);

    let failing = |source: &str| template(source).unwrap().render(&hello()).unwrap_err().to_string();
    says(&failing("\n\n{{ messages[7].content }}"), &["line 3 of the chat template", "undefined"]);
    says(&failing("{{ messages | nonsense }}"), &["line 1", "nonsense"]);
    says(&failing("{{ 'text'.nonsense() }}"), &["line 1", "nonsense"]);
    says(&failing("{{ strftime_now('%&') }}"), &["line 1", "strftime_now"]);
    says(&failing("{{ [1] | tojson(separators=(',',)) }}"), &["line 1", "`separators` are two texts"]);
    says(
        &failing("\n{{ raise_exception('Only Latin, please.') }}"),
        &["chat_template.jinja: the model's chat template does not take this chat: Only Latin, please."],
    );
}

#[test]
fn a_template_of_a_stranger_ends() {
    let endless = "{% for a in range(10000) %}{% for b in range(10000) %}{{ a }}{% endfor %}{% endfor %}";
    let message = template(endless).unwrap().render(&hello()).unwrap_err().to_string();
    says(&message, &["line 1 of the chat template", "fuel"]);
}

#[test]
fn a_file_that_is_no_json_is_named() {
    let message = ChatTemplate::of(&with(&[("tokenizer_config.json", "{")])).unwrap_err().to_string();
    says(&message, &["stories260k: tokenizer_config.json: invalid JSON"]);
}
