//! `kvfold generate`.

use crate::common::{Dir, assert_keys, golden, number};
use serde_json::Value;
use std::io::Read;
use std::process::Stdio;

const ONCE: &[&str] = &["generate", "--model", "stories260k", "--prompt", "Once upon a time"];

fn text(value: &Value) -> &str {
    value["text"].as_str().expect("a text")
}

#[test]
fn greedily_it_tells_the_golden_story() {
    let (dir, golden) = (Dir::new(), golden());
    let (prompt, story) = (golden["prompt"].as_str().expect("a prompt"), text(&golden));
    let count = golden["tokens"].as_array().expect("tokens").len().to_string();
    let args = &["generate", "--model", "stories260k", "--prompt", prompt, "--max-new-tokens", &count];
    let shown = dir.run(args).ok();
    assert_eq!(shown, format!("{story}\n"));
    for threads in ["1", "2"] {
        assert_eq!(dir.run_with(args, &["--threads", threads]).ok(), shown, "--threads {threads}");
    }

    let json = dir.run_with(args, &["--json"]).json();
    assert_eq!(format!("{prompt}{}", text(&json)), story);
    assert_eq!(json["new_tokens"].to_string(), count);
    assert_eq!(json["prompt_tokens"], golden["prompt_tokens"].as_array().expect("ids").len());
}

#[test]
fn the_json_has_these_keys() {
    let json = Dir::new().run_with(ONCE, &["--json", "--max-new-tokens", "3"]).json();
    assert_keys(
        &json,
        &[
            "schema",
            "model",
            "prompt",
            "text",
            "prompt_tokens",
            "new_tokens",
            "stopped",
            "seed",
            "temperature",
            "cache",
            "logical_ratio",
            "physical_ratio",
            "kv_bytes",
            "dense_kv_bytes",
            "tokens_per_second",
        ],
    );
    assert_eq!(json["schema"], "kvfold.generate/1");
    // A plain model's cache is the full cache.
    assert_eq!((number(&json, "/logical_ratio"), number(&json, "/physical_ratio")), (1.0, 1.0));
    assert_eq!(json["kv_bytes"], json["dense_kv_bytes"]);
}

#[test]
fn draws_depend_on_the_seed_and_on_nothing_else() {
    let dir = Dir::new();
    let drawn = |seed, extra: &[&str]| {
        let args = ["--temperature", "1", "--max-new-tokens", "60", "--json", "--seed", seed];
        text(&dir.run_with(ONCE, &[&args, extra].concat()).json()).to_owned()
    };
    let first = drawn("1", &[]);
    assert_eq!(drawn("1", &[]), first);
    assert_eq!(drawn("1", &["--threads", "1"]), first);
    assert_ne!(drawn("2", &[]), first);

    // What is left to draw from: only the most likely token, or all of them.
    let greedy = text(&dir.run_with(ONCE, &["--max-new-tokens", "60", "--json"]).json()).to_owned();
    for one in [["--top-k", "1"], ["--top-p", "0.01"], ["--min-p", "1"]] {
        assert_eq!(drawn("1", &one), greedy, "{one:?}");
    }
    assert_eq!(drawn("1", &["--top-k", "512", "--top-p", "1", "--min-p", "0", "--repetition-penalty", "1"]), first);
    assert_ne!(drawn("1", &["--repetition-penalty", "1.5"]), first);
    let refused = ["--top-p", "0", "--temperature", "1"];
    dir.run_with(ONCE, &refused).fails(3, &["`top_p` is 0", "above 0, at most 1"]);
}

#[test]
fn what_streams_is_what_json_holds() {
    let dir = Dir::new();
    let args = [ONCE, &["--temperature", "1.3", "--seed", "5", "--max-new-tokens", "80"]].concat();
    let json = dir.run_with(&args, &["--json"]).json();
    let streamed = dir.run(&args);
    assert!(streamed.err.contains("tok/s; f32 cache "), "{}", streamed.err);
    assert_eq!(streamed.ok(), format!("Once upon a time{}\n", text(&json)));
}

#[test]
fn no_new_tokens_are_no_text() {
    let dir = Dir::new();
    let json = dir.run_with(ONCE, &["--max-new-tokens", "0", "--json"]).json();
    assert_eq!((text(&json), &json["new_tokens"]), ("", &Value::from(0)));
    assert_eq!(number(&json, "/tokens_per_second"), 0.0);
    assert_eq!(dir.run_with(ONCE, &["--max-new-tokens", "0"]).ok(), "Once upon a time\n");
}

#[test]
fn a_text_ends_where_the_model_ends_it() {
    let dir = Dir::new();
    let stories = ["0", "1", "2", "3"].map(|seed| {
        dir.run_with(ONCE, &["--max-new-tokens", "505", "--temperature", "1", "--json", "--seed", seed]).json()
    });
    for story in &stories {
        assert_eq!(story["stopped"] == true, story["new_tokens"] != 505, "{story}");
        assert!(!text(story).contains("<s>") && !text(story).contains("</s>"), "{story}");
    }
    assert!(stories.iter().any(|story| story["stopped"] == true), "none of four stories has an end");
}

#[test]
fn an_empty_prompt_starts_a_text() {
    let json = Dir::new()
        .run(&["generate", "--model", "stories260k", "--prompt", "", "--max-new-tokens", "8", "--json"])
        .json();
    assert_eq!(json["prompt_tokens"], 1);
    assert!(!text(&json).is_empty());
}

#[test]
fn any_text_can_be_a_prompt() {
    let dir = Dir::new();
    for prompt in ["Zoë saw a 🐉 — \"no!\" 日本語", "\u{1F469}\u{200D}\u{1F680}", "\n\t ", "- a list", "--json", "<s>"]
    {
        let args = ["generate", "--model", "stories260k", "--max-new-tokens", "4", "--prompt", prompt];
        let json = dir.run_with(&args, &["--json"]).json();
        assert_eq!(json["prompt"], prompt);
        assert_eq!(dir.run(&args).ok(), format!("{prompt}{}\n", text(&json)));
    }
}

#[test]
fn what_does_not_fit_the_context_is_refused_before_a_word_is_said() {
    let dir = Dir::new();
    let long = "the dog ".repeat(400);
    let args = ["generate", "--model", "stories260k", "--prompt", &long];
    dir.run(&args).fails(3, &["the model's context is 512", "shorten the prompt"]);
    dir.run_with(ONCE, &["--max-new-tokens", "512"]).fails(3, &["context is 512", "fewer new tokens"]);
    dir.run_with(ONCE, &["--max-new-tokens", &u64::MAX.to_string()]).fails(3, &["context is 512"]);

    // The whole context can be used: 5 tokens are the prompt, and a story may end before.
    let json = dir.run_with(ONCE, &["--max-new-tokens", "507", "--json"]).json();
    assert_eq!(json["prompt_tokens"], 5);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let dir = Dir::new();
    let args = [ONCE, &["--max-new-tokens", "400", "--temperature", "1"]].concat();
    let mut child =
        dir.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
    let mut first = [0; 4];
    let mut out = child.stdout.take().expect("a pipe");
    out.read_exact(&mut first).expect("a word");
    drop(out);
    let output = child.wait_with_output().expect("an end");
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
    assert_eq!(&first, b"Once");
}

#[test]
fn nobody_has_to_read_the_notes() {
    let dir = Dir::new();
    let mut child = dir.command(&[ONCE, &["--max-new-tokens", "100"]].concat());
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
    drop(child.stderr.take());
    let output = child.wait_with_output().expect("an end");
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout.starts_with(b"Once upon a time"));
}

#[test]
fn a_chat_is_put_into_the_words_of_the_models_template() {
    let dir = Dir::new();
    dir.model();
    let template = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}a:";
    dir.write("model/chat_template.jinja", template);
    dir.write("model/tokenizer_config.json", r#"{ "bos_token": "<s>" }"#);
    let limits = ["--max-new-tokens", "12"];
    let plain = |prompt| dir.run_with(&["generate", "--model", "model", "--prompt", prompt], &limits).ok();
    let chat = |more: &[&str]| {
        let args = ["generate", "--model", "model", "--chat", "--prompt", "Tell me a story."];
        dir.run_with(&args, &[&limits, more].concat())
    };
    // The answer alone is shown; `<s>` comes once, from the template.
    let words = "u: Tell me a story.\na:";
    assert_eq!(format!("{words}{}", chat(&[]).ok()), plain(words));
    let words = "s: Once upon a time\nu: Tell me a story.\na:";
    let answer = chat(&["--system", "Once upon a time"]).ok();
    assert_eq!(format!("{words}{answer}"), plain(words));
    let json = chat(&["--system", "Once upon a time", "--json"]).json();
    assert_eq!(format!("{}\n", text(&json)), answer);
    assert_eq!(json["prompt"], "Tell me a story.");

    dir.run(&["generate", "--model", "model", "--prompt", "x", "--system", "y"]).fails(2, &["--chat"]);
    dir.write("model/chat_template.jinja", "\n{{ raise_exception('No.') }}");
    chat(&[]).fails(3, &["chat_template.jinja", "does not take this chat: No."]);
    dir.write("model/chat_template.jinja", "\n{% if %}");
    chat(&[]).fails(3, &["chat_template.jinja", "line 2 of the chat template"]);
    dir.run(&["generate", "--model", "stories260k", "--prompt", "x", "--chat"]).fails(3, &["no chat template"]);
}

#[test]
fn a_token_that_ends_a_turn_ends_the_answer() {
    let dir = Dir::new();
    dir.model();
    let args = ["generate", "--model", "model", "--prompt", "Once upon a time", "--max-new-tokens", "20", "--json"];
    let json = dir.run(&args).json();
    assert_eq!((json["stopped"].clone(), json["new_tokens"].clone()), (false.into(), 20.into()));
    // The comma, which the story has at once.
    let tokenizer = dir.json("model/tokenizer.json");
    let comma = tokenizer["model"]["vocab"][","].as_u64().expect("an id");
    dir.write("model/generation_config.json", format!("{{ \"eos_token_id\": [2, {comma}] }}"));
    let json = dir.run(&args).json();
    assert_eq!((json["stopped"].clone(), text(&json)), (true.into(), ""));
}
