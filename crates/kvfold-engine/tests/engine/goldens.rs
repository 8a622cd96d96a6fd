//! The engine tells the golden story: prefill and decode over the paged cache against an independent implementation.

use kvfold_engine::{Engine, Options, Sampler, Stop, generate};
use kvfold_kernels::FastCpu;
use kvfold_model::Checkpoint;
use std::ops::ControlFlow;

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn greedy_decoding_tells_the_golden_story() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../kvfold-model/tests/goldens/stories260k_greedy.json");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path).expect("a golden")).expect("JSON");
    let checkpoint = Checkpoint::open("stories260k").expect("the embedded model");
    let prompt = ids(&golden["prompt_tokens"]);
    assert_eq!(checkpoint.tokenizer.encode(golden["prompt"].as_str().expect("text"), true).expect("tokens"), prompt);

    let stop = Stop { max_new_tokens: 200, ..Stop::default() };
    for chunk in [1, 7, 128] {
        let mut engine = Engine::new(FastCpu::new(), &checkpoint).with_chunk(chunk);
        let options = Options { sampler: Sampler::GREEDY, stop: stop.clone() };
        let story = generate(&mut engine, &prompt, &options, |_| ControlFlow::Continue(())).expect("a story");
        assert_eq!(story.tokens, ids(&golden["tokens"]), "chunk {chunk}");
        let all: Vec<u32> = prompt.iter().chain(&story.tokens).copied().collect();
        assert_eq!(checkpoint.tokenizer.decode(&all, true).expect("text"), golden["text"].as_str().expect("text"));
        drop(story);
        assert_eq!(engine.pool().pages_held(), 0);
    }
}
