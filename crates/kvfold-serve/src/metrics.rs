//! Numbers for Prometheus: under our prefix, and under vLLM's names where a dashboard looks for those.

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};
use std::sync::atomic::AtomicU64;

/// A gauge of ratios and shares.
pub(crate) type Share = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Ended {
    pub(crate) reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Succeeded {
    finished_reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Answered {
    pub(crate) route: String,
    pub(crate) status: u16,
}

/// Seconds until a first token, or until an answer ends.
const LONG: [f64; 16] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// Seconds between tokens.
const SHORT: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0];

/// All of the server's numbers. Whoever causes one changes it here.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) running: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) pages_held: Gauge,
    pub(crate) pages_limit: Gauge,
    pub(crate) page_usage: Share,
    pub(crate) bytes_held: Gauge,
    pub(crate) bytes_dense: Gauge,
    pub(crate) bytes_limit: Gauge,
    pub(crate) logical_ratio: Share,
    pub(crate) physical_ratio: Share,
    pub(crate) predicted_share: Share,
    ended: Family<Ended, Counter>,
    succeeded: Family<Succeeded, Counter>,
    pub(crate) preemptions: Counter,
    pub(crate) prompt_tokens: Counter,
    pub(crate) generation_tokens: Counter,
    pub(crate) prefix_tokens: Counter,
    pub(crate) prefix_hit_tokens: Counter,
    pub(crate) tokens_seen: Counter<f64, AtomicU64>,
    pub(crate) slots_held: Counter<f64, AtomicU64>,
    pub(crate) first_token: Histogram,
    pub(crate) inter_token: Histogram,
    pub(crate) request_seconds: Histogram,
    pub(crate) queue_seconds: Histogram,
    pub(crate) http: Family<Answered, Counter>,
    resident: Gauge,
}

impl Metrics {
    /// All at zero. `about` are labels that say what runs.
    pub(crate) fn new(model: &str, about: Vec<(&'static str, String)>) -> Self {
        let mut ours = Registry::default();
        ours.register("kvfold", "What runs here", Info::new(about));
        let mut book = Book { registry: ours, model: model.to_owned() };
        let long = || Histogram::new(LONG);
        let metrics = Self {
            running: book.both("requests_running", &["num_requests_running"], "Requests that run"),
            waiting: book.both("requests_waiting", &["num_requests_waiting"], "Requests that wait"),
            pages_held: book.ours("kv_pages_held", "Pages that sequences hold"),
            pages_limit: book.ours("kv_pages_limit", "Pages there are"),
            page_usage: book
                .theirs(&["kv_cache_usage_perc", "gpu_cache_usage_perc"], "Share of the pages that is held"),
            bytes_held: book.ours("kv_bytes_held", "Bytes that running requests hold"),
            bytes_dense: book.ours("kv_bytes_dense", "Bytes that full caches of running requests would hold"),
            bytes_limit: book.ours("kv_bytes_limit", "Bytes of all pages there are"),
            logical_ratio: book.ours("logical_ratio", "Tokens seen per slot held, of running requests"),
            physical_ratio: book.ours("physical_ratio", "Bytes of full caches per byte held, of running requests"),
            predicted_share: book.ours("predicted_share", "Pages that admission expects of a text, of a full cache's"),
            ended: book.ours("requests_finished", "Requests that ended"),
            succeeded: book.theirs(&["request_success"], "Requests that ended with an answer"),
            preemptions: book.both("preemptions", &["num_preemptions"], "Times that a request lost its cache"),
            prompt_tokens: book.both("prompt_tokens", &["prompt_tokens"], "Tokens of prompts"),
            generation_tokens: book.both("generation_tokens", &["generation_tokens"], "New tokens"),
            prefix_tokens: book.both(
                "prefix_tokens",
                &["prefix_cache_queries"],
                "Tokens of prompts that were looked up in the prefix cache",
            ),
            prefix_hit_tokens: book.both(
                "prefix_hit_tokens",
                &["prefix_cache_hits"],
                "Tokens of prompts that were found there",
            ),
            tokens_seen: book.ours("tokens_seen", "Tokens that caches of ended requests had taken"),
            slots_held: book.ours("slots_held", "Slots per head that they held"),
            first_token: book.measured(
                "time_to_first_token_seconds",
                "time_to_first_token_seconds",
                "From a request to its first token",
                long(),
            ),
            inter_token: book.measured(
                "inter_token_latency_seconds",
                "inter_token_latency_seconds",
                "Between tokens of a request",
                Histogram::new(SHORT),
            ),
            request_seconds: book.measured(
                "request_seconds",
                "e2e_request_latency_seconds",
                "From a request to its end",
                long(),
            ),
            queue_seconds: book.measured(
                "queue_seconds",
                "request_queue_time_seconds",
                "From a request to its first pass",
                long(),
            ),
            http: book.ours("http_requests", "Answers"),
            resident: Gauge::default(),
            registry: Registry::default(),
        };
        let mut registry = book.registry;
        registry.register("process_resident_memory_bytes", "Resident memory", metrics.resident.clone());
        Self { registry, ..metrics }
    }

    /// A request ended: `stop`, `length` or `cancelled`.
    pub(crate) fn ended(&self, reason: &'static str) {
        self.ended.get_or_create(&Ended { reason }).inc();
        if reason != "cancelled" {
            self.succeeded.get_or_create(&Succeeded { finished_reason: reason }).inc();
        }
    }

    /// The page that Prometheus reads.
    pub(crate) fn page(&self) -> String {
        self.resident.set(resident_bytes());
        let mut page = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut page, &self.registry);
        page
    }
}

/// Numbers under their names.
struct Book {
    registry: Registry,
    model: String,
}

impl Book {
    fn ours<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        self.both(name, &[], help)
    }

    fn theirs<M: Metric + Clone + Default>(&mut self, names: &[&str], help: &str) -> M {
        let metric = M::default();
        self.vllm(names, help, &metric);
        metric
    }

    fn both<M: Metric + Clone + Default>(&mut self, ours: &str, theirs: &[&str], help: &str) -> M {
        let metric = self.theirs::<M>(theirs, help);
        self.registry.register(format!("kvfold_{ours}"), help, metric.clone());
        metric
    }

    fn measured(&mut self, ours: &str, theirs: &str, help: &str, metric: Histogram) -> Histogram {
        self.registry.register(format!("kvfold_{ours}"), help, metric.clone());
        self.vllm(&[theirs], help, &metric);
        metric
    }

    fn vllm<M: Metric + Clone>(&mut self, names: &[&str], help: &str, metric: &M) {
        let label = ("model_name".into(), self.model.clone().into());
        let registry = self.registry.sub_registry_with_label(label);
        names.iter().for_each(|name| registry.register(format!("vllm:{name}"), help, metric.clone()));
    }
}

/// Bytes of memory that this process has; 0 where the system does not say.
fn resident_bytes() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<i64>().ok());
    kib.unwrap_or(0) * 1024
}
