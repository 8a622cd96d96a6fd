//! The routes over the embedded model, without a network.

use crate::api::{App, router};
use crate::guard::Guard;
use crate::model::Served;
use crate::worker::{Room, Worker};
use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request};
use http_body_util::BodyExt;
use kvfold_engine::scheduler::Limits;
use kvfold_engine::{Engine, Options, Sampler, Stop, generate};
use kvfold_kernels::FastCpu;
use kvfold_model::Checkpoint;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tower::ServiceExt;

/// A chat template, for a model that has none.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if tools %}tools: {{ tools | tojson }}\n{% endif %}assistant:";

fn checkpoint() -> Checkpoint {
    Checkpoint::open("stories260k").unwrap()
}

fn with_template() -> Checkpoint {
    let mut checkpoint = checkpoint();
    checkpoint.companions.insert("chat_template.jinja".into(), TEMPLATE.into());
    checkpoint
}

struct Server {
    app: Arc<App>,
    router: Router,
}

/// An answer.
struct Answer {
    status: u16,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    #[track_caller]
    fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    /// The error's parameter and code.
    #[track_caller]
    fn refused(&self, status: u16) -> (String, String) {
        assert_eq!(self.status, status, "{}", self.text);
        let error = &self.json()["error"];
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&error["param"]), text(&error["code"]))
    }

    /// The chunks of a stream that came to its end.
    #[track_caller]
    fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        let data: Vec<&str> = self.text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.last(), Some(&"[DONE]"), "{}", self.text);
        data[..data.len() - 1].iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

impl Server {
    fn new() -> Self {
        Self::of(&checkpoint(), 16, 64)
    }

    fn of(checkpoint: &Checkpoint, running: usize, queue: usize) -> Self {
        let served = Served::new(checkpoint, "stories260k".into()).unwrap();
        let engine = Engine::new(FastCpu::new(), checkpoint);
        let Room { pages, prefixes } = Room::of(&engine, 8 << 20, running).unwrap();
        let limits = Limits { tokens: 64, running };
        let engine = engine.with_page_limit(pages);
        let worker = Worker::start(engine, (limits, prefixes), queue, (&served, "test")).unwrap();
        let app = App {
            served: Arc::new(served),
            worker,
            guard: Guard::default(),
            draining: AtomicBool::new(false),
            version: "test",
        };
        let app = Arc::new(app);
        Self { router: router(Arc::clone(&app)), app }
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.into_body().collect().await.unwrap().to_bytes();
        Answer { status, headers, text: String::from_utf8(body.to_vec()).unwrap() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(Self::request(path, body)).await
    }

    fn request(path: &str, body: &Value) -> Request<Body> {
        Request::post(path).header("content-type", "application/json").body(body.to_string().into()).unwrap()
    }

    /// `/v1/completions` with these fields beside a prompt and greedy decoding.
    async fn complete(&self, more: Value) -> Answer {
        let mut body = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 24 });
        merge(&mut body, more);
        self.post("/v1/completions", &body).await
    }

    async fn chat(&self, more: Value) -> Answer {
        let messages = json!([{ "role": "user", "content": "Tell me a story." }]);
        let mut body = json!({ "messages": messages, "temperature": 0, "max_tokens": 24 });
        merge(&mut body, more);
        self.post("/v1/chat/completions", &body).await
    }

    fn metric(&self, name: &str) -> f64 {
        let page = self.app.worker.metrics.page();
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {page}")).parse().unwrap()
    }

    /// Waits until nothing runs, waits, or is held.
    async fn settle(&self) {
        for _ in 0..500 {
            let busy = ["kvfold_requests_running", "kvfold_requests_waiting", "kvfold_kv_pages_held"];
            if busy.iter().all(|name| self.metric(name) == 0.0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{}", self.app.worker.metrics.page());
    }
}

fn merge(into: &mut Value, from: Value) {
    let (Value::Object(into), Value::Object(from)) = (into, from) else { panic!("two objects") };
    into.extend(from);
}

/// The text of streamed choices, by index.
fn streamed(chunks: &[Value], choice: usize) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let ours = choices.filter(|told| told["index"] == choice);
    ours.filter_map(|told| told["text"].as_str().or_else(|| told["delta"]["content"].as_str())).collect()
}

#[tokio::test]
async fn a_completion_is_what_the_engine_says() {
    let checkpoint = checkpoint();
    let prompt = checkpoint.tokenizer.encode("Once upon a time", true).unwrap();
    let stop = Stop { max_new_tokens: 24, at: checkpoint.stop_token_ids().unwrap(), ..Stop::default() };
    let options = Options { sampler: Sampler::GREEDY, stop };
    let mut engine = Engine::new(FastCpu::new(), &checkpoint);
    let generation = generate(&mut engine, &prompt, &options, |_| ControlFlow::Continue(())).unwrap();
    let all = checkpoint.tokenizer.decode(&[&prompt[..], &generation.tokens].concat(), true).unwrap();

    let answer = Server::new().complete(json!({})).await.ok();
    assert_eq!(format!("Once upon a time{}", answer["choices"][0]["text"].as_str().unwrap()), all);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["prompt_tokens"], prompt.len());
    assert_eq!(answer["usage"]["completion_tokens"], 24);
    let cache = &answer["usage"]["kvfold"];
    assert_eq!((&cache["engaged"], &cache["tokens_seen"]), (&json!(false), &json!(prompt.len() + 23)));
    assert_eq!((&cache["logical_ratio"], &cache["physical_ratio"]), (&json!(1.0), &json!(1.0)));
    assert_eq!(cache["kv_bytes"], engine.usage(&generation.sequence).bytes());
}

#[tokio::test]
async fn a_stream_has_openais_order_and_the_same_text() {
    let server = Server::new();
    let whole = server.complete(json!({ "stop": " mom" })).await.ok();
    let wishes = json!({ "stop": " mom", "stream": true, "stream_options": { "include_usage": true } });
    let chunks = server.complete(wishes).await.chunks();
    assert_eq!(streamed(&chunks, 0), whole["choices"][0]["text"].as_str().unwrap());
    let (last, rest) = chunks.split_last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
    assert!(rest.iter().all(|chunk| chunk["usage"].is_null() && chunk["id"] == last["id"]));
    let finish: Vec<&Value> = rest.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
    let (end, before) = finish.split_last().unwrap();
    assert!(*end == &whole["choices"][0]["finish_reason"] && before.iter().all(|reason| reason.is_null()));

    let server = Server::of(&with_template(), 4, 4);
    let whole = server.chat(json!({})).await.ok();
    let chunks = server.chat(json!({ "stream": true })).await.chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(
        chunks[1..].iter().all(|chunk| chunk["choices"][0]["delta"]["role"].is_null() && chunk.get("usage").is_none())
    );
    assert_eq!(streamed(&chunks, 0), whole["choices"][0]["message"]["content"].as_str().unwrap());
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"));
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it() {
    let server = Server::new();
    let free = server.complete(json!({ "max_tokens": 60 })).await.ok();
    let text = free["choices"][0]["text"].as_str().unwrap();
    // A string inside of words, over several tokens.
    let stop = &text[40..47];
    let ended = server.complete(json!({ "max_tokens": 60, "stop": ["never said", stop], "logprobs": 0 })).await.ok();
    let choice = &ended["choices"][0];
    assert_eq!(choice["text"], text[..text.find(stop).unwrap()]);
    assert_eq!(choice["finish_reason"], "stop");
    assert!(ended["usage"]["completion_tokens"].as_u64() < Some(60));
    let offsets = choice["logprobs"]["text_offset"].as_array().unwrap();
    assert!(offsets.iter().all(|offset| offset.as_u64() < Some(choice["text"].as_str().unwrap().len() as u64)));
}

#[tokio::test]
async fn a_prompt_is_scored_as_evaluation_harnesses_ask() {
    let server = Server::new();
    let tokens = server.app.served.encode("Once upon a time there was a dog.", true).unwrap();
    let wishes = json!({ "prompt": [tokens, tokens[..5]], "echo": true, "logprobs": 1, "max_tokens": 1, "seed": 1234 });
    let answer = server.complete(wishes.clone()).await.ok();
    for (choice, tokens) in answer["choices"].as_array().unwrap().iter().zip([&tokens[..], &tokens[..5]]) {
        let said = &choice["logprobs"];
        let list = |name: &str| said[name].as_array().unwrap().clone();
        assert_eq!(list("tokens").len(), tokens.len() + 1);
        assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
        assert!(list("token_logprobs")[1..].iter().all(|p| p.as_f64().is_some_and(|p| p <= 0.0)));
        // The new token is the likeliest.
        let (last, top) = (list("tokens").pop().unwrap(), list("top_logprobs").pop().unwrap());
        assert!(top.as_object().unwrap().contains_key(last.as_str().unwrap()));
    }
    let mut scored = wishes;
    merge(&mut scored, json!({ "max_tokens": 0 }));
    let only = server.complete(scored.clone()).await.ok();
    let all = |answer: &Value| answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    assert_eq!(all(&only)[..], all(&answer)[..tokens.len()]);
    assert_eq!(only["usage"]["completion_tokens"], 0);
    merge(&mut scored, json!({ "stream": true }));
    let chunks = server.complete(scored).await.chunks();
    assert_eq!(streamed(&chunks, 0), only["choices"][0]["text"].as_str().unwrap());
}

#[tokio::test]
async fn a_token_that_ends_a_text_has_its_probability() {
    let server = Server::new();
    let end = server.app.served.stop[0];
    let wishes = json!({ "logit_bias": { end.to_string(): 100 }, "echo": true, "logprobs": 1, "max_tokens": 1 });
    let answer = server.complete(wishes).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("Once upon a time"), &json!("stop")));
    let said = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(said.len() as u64, answer["usage"]["total_tokens"].as_u64().unwrap());
    assert!(said.last().unwrap().as_f64() < Some(0.0));
}

#[tokio::test]
async fn choices_and_seeds_are_repeatable() {
    let server = Server::new();
    let wishes = json!({ "n": 3, "temperature": 1.0, "seed": 7, "prompt": ["Once", "The dog"] });
    let texts = |answer: Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap().clone();
        assert!(choices.iter().enumerate().all(|(n, choice)| choice["index"] == n));
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let first = texts(server.complete(wishes.clone()).await.ok());
    assert_eq!((first.len(), &first), (6, &texts(server.complete(wishes.clone()).await.ok())));
    assert!(first[0] != first[1] && first[1] != first[2]);
    let mut stream = wishes;
    merge(&mut stream, json!({ "stream": true }));
    let chunks = server.complete(stream).await.chunks();
    assert_eq!((0..6).map(|n| streamed(&chunks, n)).collect::<Vec<_>>(), first);
    // Without a seed, each request draws its own.
    let free = json!({ "temperature": 1.5 });
    assert_ne!(texts(server.complete(free.clone()).await.ok()), texts(server.complete(free).await.ok()));
}

#[tokio::test]
async fn a_prompt_that_was_read_before_is_not_read_again() {
    let server = Server::new();
    let prompt = "Lily and her dog went to the park to play. ".repeat(12);
    let wishes = json!({ "prompt": prompt, "logprobs": 3 });
    let first = server.complete(wishes.clone()).await.ok();
    let second = server.complete(wishes.clone()).await.ok();
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached(&first), 0);
    assert!(cached(&second) > 100 && cached(&second) < first["usage"]["prompt_tokens"].as_u64().unwrap());
    assert_eq!((&first["choices"], &first["usage"]["kvfold"]), (&second["choices"], &second["usage"]["kvfold"]));
    assert_eq!(server.metric("kvfold_prefix_hit_tokens_total"), cached(&second) as f64);
    // Pages of what is kept are no request's.
    server.settle().await;
}

#[tokio::test]
async fn what_is_not_known_is_ignored_and_named_and_what_cannot_be_honoured_is_refused() {
    let server = Server::new();
    let answer =
        server.complete(json!({ "made_up": 1, "stop": null, "suffix": null, "stream_options": { "x": 1 } })).await;
    answer.ok();
    assert_eq!(answer.headers["x-ignored-params"], "stream_options.x,made_up");
    let refused = |more: Value, param: &'static str| {
        let server = &server;
        async move { assert_eq!(server.complete(more).await.refused(400).0, param) }
    };
    refused(json!({ "suffix": "x" }), "suffix").await;
    refused(json!({ "temperature": -1 }), "temperature").await;
    refused(json!({ "temperature": "hot" }), "temperature").await;
    refused(json!({ "top_p": 0 }), "top_p").await;
    refused(json!({ "n": 17 }), "n").await;
    refused(json!({ "stop": [""] }), "stop").await;
    refused(json!({ "stop": vec!["x"; 17] }), "stop").await;
    refused(json!({ "prompt": 3 }), "prompt").await;
    refused(json!({ "prompt": [] }), "prompt").await;
    // Longer than any text of the context: refused before its tokens are counted, which the engine would have done.
    let endless = server.complete(json!({ "prompt": "x".repeat(400_000) })).await.refused(400);
    assert_eq!(endless, ("prompt".to_owned(), "context_length_exceeded".to_owned()));
    refused(json!({ "prompt": [99999] }), "prompt").await;
    refused(json!({ "max_tokens": 0 }), "max_tokens").await;
    refused(json!({ "max_tokens": 100_000 }), "max_tokens").await;
    refused(json!({ "logit_bias": { "x": 1 } }), "logit_bias").await;
    refused(json!({ "logit_bias": { "5": 101 } }), "logit_bias").await;
    refused(json!({ "kvfold": { "live": true }, "n": 2 }), "kvfold").await;
    assert_eq!(server.complete(json!({ "model": "gpt-4" })).await.refused(404).1, "model_not_found");
    assert_eq!(server.chat(json!({})).await.refused(400).1, "no_chat_template");
    let plain = Request::post("/v1/completions").body("{}".into()).unwrap();
    server.send(plain).await.refused(415);
    server.get("/v1/completions").await.refused(405);
    server.get("/nowhere").await.refused(404);
}

#[tokio::test]
async fn answers_are_held_to_a_schema() {
    let server = Server::of(&with_template(), 4, 4);
    let schema = json!({
        "type": "object",
        "properties": { "colour": { "enum": ["red", "green"] }, "legs": { "type": "integer", "minimum": 0, "maximum": 99 } },
        "required": ["colour", "legs"],
        "additionalProperties": false,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "animal", "schema": schema } });
    for temperature in [0.0, 1.5] {
        let wishes =
            json!({ "response_format": format, "temperature": temperature, "max_tokens": 100, "logprobs": true });
        let answer = server.chat(wishes).await.ok();
        let choice = &answer["choices"][0];
        let made: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(["red", "green"].contains(&made["colour"].as_str().unwrap()), "{made}");
        assert!(made["legs"].as_u64() < Some(100) && choice["finish_reason"] == "stop", "{answer}");
        let said = choice["logprobs"]["content"].as_array().unwrap();
        assert!(said.iter().all(|said| said["logprob"].as_f64() > Some(-9999.0)), "the model's own probabilities");
    }
    let wrong = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": { "type": "nonsense" } } });
    assert_eq!(server.chat(json!({ "response_format": wrong })).await.refused(400).0, "response_format");
    assert_eq!(
        server.chat(json!({ "response_format": { "type": "yaml" } })).await.refused(400).0,
        "response_format.type"
    );
}

#[tokio::test]
async fn tools_are_called_when_they_must_be() {
    let server = Server::of(&with_template(), 4, 4);
    let tool = |name: &str| {
        let parameters = json!({
            "type": "object", "properties": { "n": { "type": "integer", "minimum": 1, "maximum": 9 } },
            "required": ["n"], "additionalProperties": false,
        });
        json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
    };
    let wishes = json!({ "tools": [tool("add"), tool("drop")], "tool_choice": "required", "max_tokens": 100 });
    let answer = server.chat(wishes.clone()).await.ok();
    let (choice, message) = (&answer["choices"][0], &answer["choices"][0]["message"]);
    assert_eq!((&choice["finish_reason"], &message["content"]), (&json!("tool_calls"), &Value::Null));
    let function = &message["tool_calls"][0]["function"];
    assert!(["add", "drop"].contains(&function["name"].as_str().unwrap()));
    let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
    assert!((1..=9).contains(&arguments["n"].as_u64().unwrap()));

    let mut named = wishes.clone();
    merge(&mut named, json!({ "tool_choice": { "type": "function", "function": { "name": "drop" } }, "stream": true }));
    let chunks = server.chat(named).await.chunks();
    assert_eq!(streamed(&chunks, 0), "");
    let call = chunks.iter().find_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].as_array()).unwrap();
    assert_eq!((&call[0]["index"], &call[0]["function"]["name"]), (&json!(0), &json!("drop")));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    let mut unknown = wishes;
    merge(&mut unknown, json!({ "tool_choice": { "type": "function", "function": { "name": "fly" } } }));
    assert_eq!(server.chat(unknown).await.refused(400).0, "tool_choice");
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_pages() {
    let server = Server::new();
    for stream in [true, false] {
        let body = json!({ "prompt": "Once", "max_tokens": 400, "stream": stream, "n": 4, "ignore_eos": true });
        let answer = server.router.clone().oneshot(Server::request("/v1/completions", &body));
        match stream {
            true => {
                let mut body = answer.await.unwrap().into_body();
                assert!(body.frame().await.is_some());
            }
            false => assert!(tokio::time::timeout(Duration::from_millis(30), answer).await.is_err()),
        }
        server.settle().await;
    }
    assert_eq!(server.metric("kvfold_requests_finished_total{reason=\"cancelled\"}"), 8.0);
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let server = Server::of(&checkpoint(), 1, 1);
    let body = json!({ "prompt": "Once", "max_tokens": 400, "ignore_eos": true });
    let asked: Vec<_> = (0..2)
        .map(|_| tokio::spawn(server.router.clone().oneshot(Server::request("/v1/completions", &body))))
        .collect();
    while server.metric("kvfold_requests_waiting") == 0.0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let answer = server.complete(json!({})).await;
    assert_eq!(answer.refused(429).1, "queue_full");
    assert_eq!(answer.headers["retry-after"], "1");
    asked.iter().for_each(tokio::task::JoinHandle::abort);
    server.settle().await;
    server.complete(json!({})).await.ok();
}

#[tokio::test]
async fn nothing_new_is_taken_while_it_drains() {
    let server = Server::new();
    assert_eq!(server.get("/ready").await.status, 200);
    server.app.draining.store(true, Ordering::Relaxed);
    assert_eq!(server.get("/ready").await.refused(503).1, "not_ready");
    assert_eq!(server.complete(json!({})).await.refused(503).1, "not_ready");
    assert_eq!((server.get("/health").await.status, server.get("/v1/models").await.status), (200, 200));
}

#[tokio::test]
async fn live_and_trace_say_what_the_cache_does() {
    let server = Server::new();
    let wishes = json!({ "stream": true, "kvfold": { "live": true, "trace": true } });
    let chunks = server.complete(wishes).await.chunks();
    let live: Vec<&Value> =
        chunks.iter().map(|chunk| &chunk["kvfold"]).filter(|live| live["heads"].is_array()).collect();
    assert!(live.len() > 10, "{chunks:?}");
    let seen: Vec<u64> = live.iter().map(|live| live["tokens_seen"].as_u64().unwrap()).collect();
    assert!(seen.is_sorted());
    let trace = chunks.iter().find_map(|chunk| chunk["kvfold"].get("trace")).unwrap();
    assert_eq!(trace["tokens"].as_array().unwrap().len() as u64, *seen.last().unwrap());
    assert_eq!((&trace["method"], &trace["folds"]), (&Value::Null, &json!([])));
}

#[test]
fn all_that_a_cache_comes_to_hold_is_within_its_bytes() {
    const RUNNING: usize = 4;
    let engine = Engine::new(FastCpu::new(), &checkpoint());
    let refused = Room::of(&engine, 1000, RUNNING).unwrap_err();
    let least: usize = refused.rsplit(' ').next().and_then(|bytes| bytes.parse().ok()).expect("what is needed");
    assert!(Room::of(&engine, least / 2, RUNNING).is_err());
    let usage = engine.usage(&engine.sequence());
    let state = engine.model().shape.layers * engine.model().shape.heads.kv * usage.state_bytes;
    let mut before = 0;
    for bytes in [least, 2 << 20, 8 << 20, 1 << 30] {
        let Room { pages, prefixes } = Room::of(&engine, bytes, RUNNING).unwrap();
        let held = pages * usage.page_bytes.max(usage.ring_page_bytes) + (RUNNING + prefixes) * state;
        assert!(held <= bytes && held > bytes - usage.page_bytes.max(usage.ring_page_bytes), "{held} of {bytes}");
        assert!((before..=256).contains(&prefixes), "{prefixes}");
        before = prefixes;
    }
    assert_eq!(before, 256);
}

#[tokio::test]
async fn choices_of_one_prompt_read_it_once() {
    let server = Server::new();
    let prompt = "Once upon a time there was a little girl who had a red ball. ".repeat(14);
    let metric = async |name: &str| {
        let metrics = server.get("/metrics").await.text;
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).expect("a metric");
        line.trim().parse::<f64>().expect("a number")
    };
    server.complete(json!({ "prompt": prompt, "n": 4, "max_tokens": 5, "temperature": 1 })).await.ok();
    let (asked, found) = (metric("kvfold_prefix_tokens_total ").await, metric("kvfold_prefix_hit_tokens_total ").await);
    assert!(asked > 4.0 * 256.0 && found == 3.0 * 256.0, "{found} of {asked}");
}

#[tokio::test]
async fn the_small_routes_answer() {
    let server = Server::new();
    let models = server.get("/v1/models").await.ok();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["kvfold"]["chat"]),
        (&json!("stories260k"), &json!(false))
    );
    server.get("/v1/models/stories260k").await.ok();
    server.get("/v1/models/some/other").await.refused(404);
    server.get("/v1/models/%ff%fe").await.refused(400);
    server.post("/detokenize", &json!({ "tokens": [99999] })).await.refused(400);
    assert_eq!(server.get("/version").await.ok()["version"], "test");
    let tokens = server.post("/tokenize", &json!({ "prompt": "Once upon" })).await.ok();
    let text = server.post("/detokenize", &json!({ "tokens": tokens["tokens"] })).await.ok();
    assert!(text["prompt"].as_str().unwrap().ends_with("Once upon"), "{text}");
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    let page = server.get("/").await;
    assert!(page.text.starts_with("<!doctype html>") && page.headers.contains_key("content-security-policy"));
    assert_eq!(server.get("/page/app.js").await.headers["content-type"], "text/javascript; charset=utf-8");
    server.get("/page/none.js").await.refused(404);
    let metrics = server.get("/metrics").await.text;
    for name in ["kvfold_requests_running 0", "vllm:num_requests_running{model_name=\"stories260k\"} 0", "# EOF"] {
        assert!(metrics.contains(name), "no {name} in {metrics}");
    }
}

#[tokio::test]
async fn the_document_lists_the_routes() {
    let server = Server::new();
    let document = server.get("/openapi.json").await.ok();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let request =
                Request::builder().method(method.to_uppercase().as_str()).uri(path.replace("{id}", "stories260k"));
            let answer = server.send(request.body(Body::empty()).unwrap()).await;
            assert!([200, 415].contains(&answer.status), "{method} {path}: {} {}", answer.status, answer.text);
        }
    }
}
