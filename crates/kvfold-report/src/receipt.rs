//! The receipt: every number behind a claim of compression, in one document.
//!
//! A [`Receipt`] is written by the program that measured and read by people who
//! doubt it. So it says where it was made and by which command, it holds bytes
//! as the allocator counts them beside the slots the decisions imply, and
//! [`Receipt::contradictions`] recomputes from its parts whatever can be
//! recomputed.
//!
//! The JSON is flat where the Rust is grouped: [`Memory`] and [`Quality`] are
//! groups only because the model card needs them without the rest.

use serde::{Deserialize, Serialize};

use crate::quantiles::Quantiles;
use crate::verdict::Verdict;

/// One measured comparison of a compressed cache with the full one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// The format of the document.
    pub schema: Schema,
    /// The version of kvfold that measured.
    pub kvfold_version: String,
    /// The commit that this kvfold was built from: a short hash, `-dirty` after
    /// it if the sources differed, or `unknown`.
    pub commit: String,
    /// The command line, such that running it again measures again.
    pub command: String,
    /// When it was measured, in ISO 8601.
    pub date: String,
    /// Where it was measured.
    pub machine: Machine,
    /// The name of the model, or the directory it was loaded from.
    pub model: String,
    /// The seed of everything random in the run.
    pub seed: u64,
    /// How the cache became smaller.
    #[serde(default)]
    pub method: Method,
    /// How many of the most recent tokens are always held exactly; 0 is the
    /// DMC of the paper.
    pub delay: u64,
    /// How many first tokens keep slots of their own.
    #[serde(default)]
    pub sinks: u64,
    /// Where the decision to append or to fold comes from.
    pub decision: Decision,
    /// What the cache took.
    #[serde(flatten)]
    pub memory: Memory,
    /// What the model still can do.
    #[serde(flatten)]
    pub quality: Quality,
    /// How fast it decodes.
    pub tokens_per_second: Speed,
    /// The retrofit that led here, if it was part of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<Training>,
    /// One text, continued with both caches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub story: Option<Story>,
}

/// The format of a receipt. A new variant is a new format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Schema {
    /// The first format.
    #[default]
    #[serde(rename = "kvfold.receipt/1")]
    V1,
}

/// The machine that measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's own name for itself.
    pub cpu: String,
    /// The cores the run could use.
    pub cores: u64,
    /// The memory of the machine.
    pub memory_bytes: u64,
    /// The operating system and its architecture.
    pub os: String,
}

/// How a cache became smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Dynamic Memory Compression: tokens are folded into the newest slot.
    #[default]
    Dmc,
    /// Dynamic Memory Sparsification: tokens are evicted.
    Dms,
    /// Up-trained grouped-query attention: KV heads are merged.
    Gqa,
}

/// Where the decision to append or to fold comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// A small linear layer of its own.
    Head,
    /// The last channel of each key, given up for it, as in the paper.
    Borrowed,
}

impl Decision {
    /// The name in JSON and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Decision::Head => "head",
            Decision::Borrowed => "borrowed",
        }
    }
}

/// What the cache took, compressed and in full.
///
/// Bytes are those of one sequence of `context_tokens` tokens; where several
/// sequences were measured, their mean, rounded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// The length of the sequences measured.
    pub context_tokens: u64,
    /// Tokens seen over slots held, exact recent tokens counted as slots. A
    /// slot of a merged head is one for every head that it stands for.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub logical_ratio: f64,
    /// `dense_kv_bytes` over `kv_bytes`.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub physical_ratio: f64,
    /// The bytes the compressed cache held, as its allocator counts them.
    pub kv_bytes: u64,
    /// The bytes the full cache held for the same tokens, counted the same way.
    pub dense_kv_bytes: u64,
    /// What `kv_bytes` consists of.
    pub kv_bytes_detail: KvBytes,
    /// The logical ratio of every head, all finite: layers, then KV heads.
    pub heads: Vec<Vec<f64>>,
}

/// The parts of the bytes a compressed cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvBytes {
    /// Whole pages, their unused slots included.
    pub pages: u64,
    /// The sums of the slots that may still grow.
    pub open_state: u64,
    /// Exact recent tokens, where they are kept outside the pages.
    #[serde(default)]
    pub ring: u64,
}

impl KvBytes {
    /// All parts together.
    pub fn total(&self) -> u64 {
        self.pages + self.open_state + self.ring
    }
}

/// What the model still can do, on text it has not been trained on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// The positions that the numbers below are taken over.
    pub evaluated_tokens: u64,
    /// How surprised each model is by the text.
    pub perplexity: Perplexity,
    /// Divergence of the compressed model from the original one, in nats, over
    /// the positions.
    pub kl: Quantiles,
    /// The fraction of positions where both hold the same token most likely.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub top1_agreement: f64,
}

/// Perplexity on held-out text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// Of the original model with its full cache.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub dense: f64,
    /// Of the retrofitted model with its compressed cache.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub compressed: f64,
}

impl Perplexity {
    /// The relative rise from dense to compressed; negative if it fell.
    pub fn rise(&self) -> f64 {
        self.compressed / self.dense - 1.0
    }
}

/// How fast both models decode, in tokens per second, all sequences together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// With the full cache.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub dense: f64,
    /// With the compressed cache.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub compressed: f64,
    /// The sequences decoded at once.
    #[serde(default = "one")]
    pub batch: u64,
    /// The speed-up that fewer bytes account for, from [`Speed::byte_ceiling`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceiling: Option<f64>,
}

fn one() -> u64 {
    1
}

impl Speed {
    /// How many times faster the compressed model decodes.
    pub fn gain(&self) -> f64 {
        self.compressed / self.dense
    }

    /// What reading fewer bytes can gain, the most there is where memory is the
    /// limit; where everything lies in the processor's caches, fewer slots to
    /// compute with gain more. Each step reads the weights once and the cache
    /// of every sequence. At batch 1 and short contexts it
    /// is close to 1, whatever the ratio.
    pub fn byte_ceiling(weight_bytes: u64, dense_kv_bytes: u64, kv_bytes: u64) -> f64 {
        (weight_bytes as f64 + dense_kv_bytes as f64) / (weight_bytes as f64 + kv_bytes as f64)
    }
}

/// What the retrofit took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Steps of the optimiser.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Wall clock of the steps.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub seconds: f64,
    /// Wall clock of the checkpoints between them; older receipts count it among the steps.
    #[serde(default)]
    pub saving_seconds: f64,
    /// Tokens over the steps' seconds.
    #[serde(deserialize_with = "crate::non_finite::nullable")]
    pub tokens_per_second: f64,
}

/// One prompt, continued with both caches and the same seed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Story {
    /// What both were given.
    pub prompt: String,
    /// What the original model wrote.
    pub dense: String,
    /// What the compressed model wrote.
    pub compressed: String,
}

impl Receipt {
    /// The document as JSON, for people to read too, with a final line feed.
    pub fn to_json(&self) -> String {
        let mut json =
            serde_json::to_string_pretty(self).expect("a receipt has string keys only, so it is always valid JSON");
        json.push('\n');
        json
    }

    /// Reads a receipt. Fields of later versions are ignored; a document of
    /// another format is an error that names both formats.
    pub fn from_json(json: &str) -> Result<Receipt, serde_json::Error> {
        serde_json::from_str(json)
    }

    /// What the model kept and what it could not keep.
    pub fn verdict(&self) -> Verdict {
        Verdict::of(self)
    }

    /// Everything the receipt says twice and not the same way. An honest
    /// receipt has none.
    pub fn contradictions(&self) -> Vec<String> {
        let mut found = self.memory.contradictions();
        let agreement = self.quality.top1_agreement;
        if !(0.0..=1.0).contains(&agreement) && !agreement.is_nan() {
            found.push(format!("top1_agreement is {agreement}, but is a fraction"));
        }
        if let Some(training) = self.training {
            let rate = training.tokens as f64 / training.seconds;
            if !close(training.tokens_per_second, rate) {
                found.push(format!(
                    "training.tokens_per_second is {}, but tokens / seconds is {rate}",
                    training.tokens_per_second
                ));
            }
        }
        found
    }
}

impl Memory {
    fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        let total = self.kv_bytes_detail.total();
        if total != self.kv_bytes {
            found.push(format!("kv_bytes is {}, but its parts sum to {total}", self.kv_bytes));
        }
        let physical = self.dense_kv_bytes as f64 / self.kv_bytes as f64;
        if !close(self.physical_ratio, physical) {
            found.push(format!(
                "physical_ratio is {}, but dense_kv_bytes / kv_bytes is {physical}",
                self.physical_ratio
            ));
        }
        let widths = self.heads.first().map_or(0, Vec::len);
        if widths == 0 || self.heads.iter().any(|layer| layer.len() != widths) {
            found.push("heads must have the same number of KV heads in every layer".to_owned());
            return found;
        }
        // Every head sees the same tokens, so slots add up as inverse ratios.
        let count = (self.heads.len() * widths) as f64;
        let held: f64 = self.heads.iter().flatten().map(|ratio| 1.0 / ratio).sum();
        if !close(self.logical_ratio, count / held) {
            found.push(format!(
                "logical_ratio is {}, but the heads' ratios make it {}",
                self.logical_ratio,
                count / held
            ));
        }
        found
    }
}

/// Within half a percent, which leaves room for rounding and none for claims.
fn close(stated: f64, computed: f64) -> bool {
    (stated - computed).abs() <= 0.005 * computed.abs()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::sample;

    #[test]
    fn the_json_is_flat_and_in_this_order() {
        insta::assert_snapshot!(sample::receipt().to_json(), @r#"
        {
          "schema": "kvfold.receipt/1",
          "kvfold_version": "0.1.0",
          "commit": "abc1234",
          "command": "kvfold demo --seed 7 --json receipt.json",
          "date": "2026-11-23T14:40:00Z",
          "machine": {
            "cpu": "Example CPU @ 2.10GHz",
            "cores": 2,
            "memory_bytes": 8589934592,
            "os": "linux x86_64"
          },
          "model": "stories260k",
          "seed": 7,
          "method": "dmc",
          "delay": 16,
          "sinks": 1,
          "decision": "head",
          "context_tokens": 512,
          "logical_ratio": 3.841205083947906,
          "physical_ratio": 3.6363636363636362,
          "kv_bytes": 45056,
          "dense_kv_bytes": 163840,
          "kv_bytes_detail": {
            "pages": 40960,
            "open_state": 3072,
            "ring": 1024
          },
          "heads": [
            [
              4.0,
              8.0
            ],
            [
              16.0,
              10.0
            ],
            [
              1.0625,
              12.0
            ]
          ],
          "evaluated_tokens": 16352,
          "perplexity": {
            "dense": 3.69,
            "compressed": 3.84
          },
          "kl": {
            "mean": 0.0412,
            "p95": 0.183,
            "p99": 0.612
          },
          "top1_agreement": 0.926,
          "tokens_per_second": {
            "dense": 4210.0,
            "compressed": 4630.0,
            "batch": 1,
            "ceiling": 1.1
          },
          "training": {
            "steps": 150,
            "tokens": 1228800,
            "seconds": 96.0,
            "saving_seconds": 1.0,
            "tokens_per_second": 12800.0
          },
          "story": {
            "prompt": "Once upon a time",
            "dense": "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball.",
            "compressed": "Once upon a time, there was a little girl named Lily. She loved to play with her toys. One day, her mom gave her a new doll."
          }
        }
        "#);
    }

    #[test]
    fn every_promised_key_is_at_its_path() {
        let json: Value = serde_json::from_str(&sample::receipt().to_json()).expect("own JSON");
        assert_eq!(json["schema"], "kvfold.receipt/1");
        for path in [
            "/logical_ratio",
            "/physical_ratio",
            "/kv_bytes",
            "/dense_kv_bytes",
            "/perplexity/dense",
            "/perplexity/compressed",
            "/kl/mean",
            "/kl/p95",
            "/kl/p99",
            "/top1_agreement",
            "/tokens_per_second/dense",
            "/tokens_per_second/compressed",
            "/heads/0/0",
        ] {
            assert!(json.pointer(path).is_some_and(Value::is_number), "no number at {path}");
        }
        assert_eq!(json["heads"].as_array().map(Vec::len), Some(3), "layers");
        assert_eq!(json["heads"][0].as_array().map(Vec::len), Some(2), "KV heads");
    }

    #[test]
    fn round_trips_with_and_without_its_options() {
        let mut receipt = sample::receipt();
        assert_eq!(Receipt::from_json(&receipt.to_json()).expect("own JSON"), receipt);
        receipt.training = None;
        receipt.story = None;
        receipt.tokens_per_second.ceiling = None;
        assert_eq!(Receipt::from_json(&receipt.to_json()).expect("own JSON"), receipt);
    }

    #[test]
    fn a_broken_model_still_has_a_readable_receipt() {
        let mut receipt = sample::receipt();
        receipt.quality.perplexity.compressed = f64::INFINITY;
        receipt.quality.kl.mean = f64::NAN;
        let back = Receipt::from_json(&receipt.to_json()).expect("own JSON");
        assert!(back.quality.perplexity.compressed.is_nan() && back.quality.kl.mean.is_nan());
    }

    #[test]
    fn another_format_is_refused_by_name() {
        let json = sample::receipt().to_json().replace("kvfold.receipt/1", "kvfold.receipt/2");
        let error = Receipt::from_json(&json).expect_err("unknown format").to_string();
        assert!(error.contains("kvfold.receipt/2") && error.contains("kvfold.receipt/1"), "{error}");
    }

    #[test]
    fn an_honest_receipt_agrees_with_itself() {
        assert_eq!(sample::receipt().contradictions(), [""; 0]);
    }

    #[test]
    fn each_flattering_number_is_found_out() {
        let tampered = |change: fn(&mut Receipt)| {
            let mut receipt = sample::receipt();
            change(&mut receipt);
            receipt.contradictions().join("\n")
        };
        assert!(tampered(|r| r.memory.logical_ratio *= 1.02).starts_with("logical_ratio is"));
        assert!(tampered(|r| r.memory.physical_ratio *= 1.02).starts_with("physical_ratio is"));
        assert!(tampered(|r| r.memory.kv_bytes_detail.pages -= 1).starts_with("kv_bytes is"));
        assert!(tampered(|r| r.memory.heads[1].truncate(1)).starts_with("heads must"));
        assert!(tampered(|r| r.quality.top1_agreement = 92.6).starts_with("top1_agreement is"));
        assert!(
            tampered(|r| r.training.as_mut().expect("trained").seconds *= 0.5)
                .starts_with("training.tokens_per_second is")
        );
    }

    #[test]
    fn the_byte_ceiling_is_the_ratio_only_when_the_cache_outweighs_the_model() {
        assert_eq!(Speed::byte_ceiling(0, 400, 100), 4.0);
        assert_eq!(Speed::byte_ceiling(1_000_000, 0, 0), 1.0);
        assert!(Speed::byte_ceiling(1_000_000, 400, 100) < 1.001);
    }
}
