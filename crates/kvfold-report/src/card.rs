//! The model card: the `README.md` of a retrofitted model.
//!
//! A retrofitted checkpoint looks like a Llama and is none: its weights expect
//! a cache that folds. Somebody who finds the directory years later must learn
//! from the card alone what it is, why their usual loader refuses it, how to
//! run it, what it was measured to lose, and how to make it again.

use std::fmt::Write;

use crate::format;
use crate::receipt::{Decision, Memory, Method, Quality};
use crate::text::clean_line;

/// Everything a model card says.
#[derive(Clone, Debug, PartialEq)]
pub struct Card {
    /// The title, usually the name of the directory.
    pub name: String,
    /// The original model: a hub id such as `HuggingFaceTB/SmolLM2-135M`, or
    /// any other name.
    pub base_model: String,
    /// The licence of the original model as its own card names it, if known.
    pub license: Option<String>,
    /// The name under `architectures` in `config.json`.
    pub architecture: String,
    /// How it was made.
    pub recipe: Recipe,
    /// What the cache took, if it was measured.
    pub memory: Option<Memory>,
    /// What the model still can do, if it was measured.
    pub quality: Option<Quality>,
    /// The command that made it.
    pub command: String,
    /// The version of kvfold that made it.
    pub kvfold_version: String,
}

/// The settings of a retrofit that a reader of the card wants to know.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// How the cache became smaller.
    pub method: Method,
    /// The logical ratio asked for.
    pub ratio_asked: f64,
    /// The logical ratio at the end of training, on training text; none without training.
    pub ratio_trained: Option<f64>,
    /// The length of the sequences trained on.
    pub context_tokens: u64,
    /// How many of the most recent tokens are held exactly.
    pub delay: u64,
    /// How many first tokens keep slots of their own.
    pub sinks: u64,
    /// Where the decision to append or to fold comes from; none where nothing
    /// is decided.
    pub decision: Option<Decision>,
    /// Whether the input of the token before is read for a decision, too.
    pub looks_back: bool,
    /// Tokens of the original's text that decisions were fitted on before training; none where they began at zero.
    pub fitted_tokens: Option<u64>,
    /// The loss, such as `distill` or `lm`.
    pub loss: String,
    /// Steps of the optimiser.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// The seed of everything random.
    pub seed: u64,
    /// Where the training text came from.
    pub text: String,
}

impl Card {
    /// Writes the card: YAML front matter as the Hugging Face hub reads it, then
    /// Markdown.
    pub fn render(&self) -> String {
        let mut out = String::new();
        self.front_matter(&mut out);
        self.introduction(&mut out);
        self.settings(&mut out);
        self.measurements(&mut out);
        self.limitations(&mut out);
        let _ = write!(
            out,
            "\n## How to make it again\n\nWith kvfold {}:\n\n{}",
            clean_line(&self.kvfold_version),
            fenced("sh", &self.command)
        );
        out
    }

    fn front_matter(&self, out: &mut String) {
        out.push_str("---\n");
        // The hub rejects a card whose base model is no hub id.
        if is_hub_id(&self.base_model) {
            let _ = writeln!(out, "base_model: {}", quoted(&self.base_model));
        }
        if let Some(license) = &self.license {
            let _ = writeln!(out, "license: {}", quoted(license));
        }
        out.push_str("library_name: kvfold\n");
        out.push_str("pipeline_tag: text-generation\n");
        let tag = match self.recipe.method {
            Method::Dmc => "dynamic-memory-compression",
            Method::Dms => "dynamic-memory-sparsification",
            Method::Gqa => "grouped-query-attention",
        };
        let _ = writeln!(out, "tags:\n- kvfold\n- {tag}\n- kv-cache");
        out.push_str("---\n\n");
    }

    fn introduction(&self, out: &mut String) {
        let base = inline(&self.base_model);
        let asked = format::ratio(self.recipe.ratio_asked);
        let what = match self.recipe.method {
            Method::Dmc => format!(
                "{base}, retrofitted with Dynamic Memory Compression (DMC) to a key-value cache {asked} \
                 smaller. For every layer and KV head the model decides whether a new key and value are \
                 appended to the cache or folded into its newest slot."
            ),
            Method::Dms => format!(
                "{base}, retrofitted with Dynamic Memory Sparsification (DMS) to a key-value cache {asked} \
                 smaller. For every layer and KV head the model decides which keys and values are evicted \
                 when they leave the window of the newest tokens."
            ),
            Method::Gqa => format!(
                "{base}, up-trained to grouped-query attention with a key-value cache {asked} smaller. Each \
                 KV head began as the mean of the original's heads that it stands for."
            ),
        };
        let architecture = clean_line(&self.architecture);
        let learned = match self.recipe.method {
            Method::Dmc => Some("a folding"),
            Method::Dms => Some("an evicting"),
            Method::Gqa => None,
        };
        let who = match learned {
            Some(cache) => format!(
                "Plain Llama loaders refuse this model, and they should. Its `config.json` names the \
                 architecture `{architecture}`, because the weights have learned to live with {cache} \
                 cache; run as a plain Llama they would seem to work and write worse text, without any \
                 sign of why."
            ),
            None => format!("It is a plain `{architecture}`: what loads the original loads this model too."),
        };
        let run = fenced("sh", "kvfold generate --model . --prompt \"Once upon a time\"");
        let _ = write!(out, "# {}\n\n{what}\n\n## How to run it\n\n{run}\n{who}\n", clean_line(&self.name));
    }

    fn settings(&self, out: &mut String) {
        let recipe = &self.recipe;
        let measured = |ratio: fn(&Memory) -> f64| {
            self.memory.as_ref().map_or_else(|| "not measured".to_owned(), |m| format::ratio_and_removed(ratio(m)))
        };
        let decision = match (recipe.decision, recipe.method) {
            (None, _) => "none: nothing is decided",
            (Some(Decision::Head), _) => "`head`: a linear layer of its own in every layer",
            (Some(Decision::Borrowed), Method::Dms) => {
                "`borrowed`: the last channel of each group's first query, given up for it"
            }
            (Some(Decision::Borrowed), _) => "`borrowed`: the last channel of each key, given up for it",
        };
        let decision = match recipe.looks_back {
            true => format!("{decision}, which also reads the token before"),
            false => decision.to_owned(),
        };
        let decision = match recipe.fitted_tokens {
            Some(tokens) => {
                format!("{decision}; it began as a fit to what folding costs, on {} tokens", format::exact(tokens))
            }
            None => decision,
        };
        let trained = recipe.ratio_trained.map_or_else(|| "not trained".to_owned(), format::ratio_and_removed);
        let delay = match (recipe.delay, recipe.method) {
            (_, Method::Gqa) => "none: every token keeps its slot".to_owned(),
            (0, Method::Dmc) => "0: tokens are folded at once".to_owned(),
            (0, Method::Dms) => "0: tokens are evicted at once".to_owned(),
            (delay, _) => format!("{delay}: that many recent tokens are held exactly"),
        };
        let sinks = match (recipe.sinks, recipe.method) {
            (_, Method::Gqa) => "none: every token keeps its slot".to_owned(),
            (0, _) => "0: first tokens are as any other".to_owned(),
            (sinks, _) => format!("{sinks}: that many first tokens keep slots of their own"),
        };
        let method = match recipe.method {
            Method::Dmc => "Dynamic Memory Compression",
            Method::Dms => "Dynamic Memory Sparsification",
            Method::Gqa => "grouped-query attention, up-trained",
        };
        out.push_str("\n## Settings\n\n");
        table(
            out,
            ["setting", "value"],
            &[
                ["method", method],
                ["ratio asked for", &format::ratio_and_removed(recipe.ratio_asked)],
                ["logical ratio at the end of training", &trained],
                ["logical ratio measured", &measured(|m| m.logical_ratio)],
                ["physical ratio measured", &measured(|m| m.physical_ratio)],
                ["sequence length", &format!("{} tokens", format::exact(recipe.context_tokens))],
                ["delay", &delay],
                ["sinks", &sinks],
                ["decision", &decision],
                ["loss", &recipe.loss],
                ["steps", &format::exact(recipe.steps)],
                ["tokens", &format::exact(recipe.tokens)],
                ["seed", &recipe.seed.to_string()],
                ["text", &recipe.text],
            ],
        );
    }

    fn measurements(&self, out: &mut String) {
        out.push_str("\n## Measured\n\n");
        if self.memory.is_none() && self.quality.is_none() {
            out.push_str("Nothing has been measured yet. `kvfold eval ppl --model . --text FILE` does it.\n");
            return;
        }
        if let Some(m) = &self.memory {
            let _ = writeln!(
                out,
                "One sequence of {} tokens takes {} of cache, unused slots and open states included; \
                 the original model takes {}.\n",
                format::exact(m.context_tokens),
                format::bytes(m.kv_bytes),
                format::bytes(m.dense_kv_bytes)
            );
        }
        let Some(q) = &self.quality else { return };
        let _ = writeln!(
            out,
            "Compared with the original model at {} held-out positions:\n",
            format::exact(q.evaluated_tokens)
        );
        table(
            out,
            ["measure", "value"],
            &[
                ["perplexity, original", &format::plain(q.perplexity.dense)],
                [
                    "perplexity, compressed",
                    &format!("{} ({})", format::plain(q.perplexity.compressed), format::change(q.perplexity.rise())),
                ],
                ["KL divergence, mean", &format!("{} nats per token", format::nats(q.kl.mean))],
                ["KL divergence, P95", &format!("{} nats per token", format::nats(q.kl.p95))],
                ["KL divergence, P99", &format!("{} nats per token", format::nats(q.kl.p99))],
                ["same most likely token", &format::percent(q.top1_agreement)],
            ],
        );
    }

    fn limitations(&self, out: &mut String) {
        out.push_str("\n## Limitations\n\n");
        out.push_str(match self.recipe.method {
            Method::Dmc => {
                "- Folding is lossy. What was folded cannot be told apart again, so tasks that quote a \
                 long context word for word suffer first.\n"
            }
            Method::Dms => {
                "- Eviction is lossy. What was evicted is gone, so tasks that quote a long context word for \
                 word suffer first.\n"
            }
            Method::Gqa => {
                "- Merging heads is lossy: what distinct heads told apart, the merged one has to learn \
                 again.\n"
            }
        });
        if self.recipe.method != Method::Gqa {
            let _ = write!(
                out,
                "- The ratio is learned, not enforced: other kinds of text, and sequences other than {} \
                 tokens long, reach other ratios.\n\
                 - The physical ratio falls short of the logical one, most of all in short sequences, whose \
                 last pages are mostly empty.\n",
                format::exact(self.recipe.context_tokens)
            );
        }
        out.push_str("- Whatever the original model gets wrong, this one gets wrong too.\n");
        match &self.license {
            Some(_) => out.push_str("- The licence of the original model applies.\n"),
            None => out.push_str(
                "- The licence of the original model applies. It was not stated where this model was \
                 made; look it up before you pass the model on.\n",
            ),
        }
    }
}

/// `owner/name` in the characters that the hub allows.
fn is_hub_id(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let part = |part: &str| part.chars().all(allowed) && part.starts_with(|c: char| c.is_ascii_alphanumeric());
    name.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

/// A YAML string. Every JSON string is one.
fn quoted(text: &str) -> String {
    serde_json::Value::from(clean_line(text)).to_string()
}

/// Text as Markdown code, so that nothing in it is read as Markdown.
fn inline(text: &str) -> String {
    format!("`{}`", clean_line(text).replace('`', "'"))
}

/// A code block whose fence is longer than any run of backticks in the code.
fn fenced(language: &str, code: &str) -> String {
    let mut fence = "```".to_owned();
    while code.contains(&fence) {
        fence.push('`');
    }
    format!("{fence}{language}\n{}\n{fence}\n", code.trim_end())
}

fn table<const N: usize>(out: &mut String, header: [&str; 2], rows: &[[&str; 2]; N]) {
    let _ = writeln!(out, "| {} | {} |\n|---|---|", header[0], header[1]);
    for [name, value] in rows {
        let _ = writeln!(out, "| {name} | {} |", clean_line(value).replace('|', "\\|"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn made_up() -> Card {
        Card {
            name: "stories260k-4x".to_owned(),
            base_model: "stories260k".to_owned(),
            license: Some("mit".to_owned()),
            architecture: "KvfoldLlamaForCausalLM".to_owned(),
            recipe: Recipe {
                ratio_asked: 4.0,
                ratio_trained: Some(4.06),
                context_tokens: 512,
                method: Method::Dmc,
                delay: 16,
                sinks: 1,
                decision: Some(Decision::Head),
                looks_back: false,
                fitted_tokens: None,
                loss: "distill".to_owned(),
                steps: 150,
                tokens: 1_228_800,
                seed: 7,
                text: "sampled from the model itself".to_owned(),
            },
            memory: None,
            quality: None,
            command: "kvfold retrofit --model stories260k --out stories260k-4x --ratio 4 --seed 7".to_owned(),
            kvfold_version: "0.1.0".to_owned(),
        }
    }

    #[test]
    fn a_card_with_everything() {
        let receipt = sample::receipt();
        let card = Card {
            memory: Some(receipt.memory),
            quality: Some(receipt.quality),
            base_model: "HuggingFaceTB/SmolLM2-135M".to_owned(),
            ..made_up()
        };
        insta::assert_snapshot!(card.render(), @r#"
        ---
        base_model: "HuggingFaceTB/SmolLM2-135M"
        license: "mit"
        library_name: kvfold
        pipeline_tag: text-generation
        tags:
        - kvfold
        - dynamic-memory-compression
        - kv-cache
        ---

        # stories260k-4x

        `HuggingFaceTB/SmolLM2-135M`, retrofitted with Dynamic Memory Compression (DMC) to a key-value cache 4.00x smaller. For every layer and KV head the model decides whether a new key and value are appended to the cache or folded into its newest slot.

        ## How to run it

        ```sh
        kvfold generate --model . --prompt "Once upon a time"
        ```

        Plain Llama loaders refuse this model, and they should. Its `config.json` names the architecture `KvfoldLlamaForCausalLM`, because the weights have learned to live with a folding cache; run as a plain Llama they would seem to work and write worse text, without any sign of why.

        ## Settings

        | setting | value |
        |---|---|
        | method | Dynamic Memory Compression |
        | ratio asked for | 4.00x (75.0 % removed) |
        | logical ratio at the end of training | 4.06x (75.4 % removed) |
        | logical ratio measured | 3.84x (74.0 % removed) |
        | physical ratio measured | 3.64x (72.5 % removed) |
        | sequence length | 512 tokens |
        | delay | 16: that many recent tokens are held exactly |
        | sinks | 1: that many first tokens keep slots of their own |
        | decision | `head`: a linear layer of its own in every layer |
        | loss | distill |
        | steps | 150 |
        | tokens | 1,228,800 |
        | seed | 7 |
        | text | sampled from the model itself |

        ## Measured

        One sequence of 512 tokens takes 44.0 KiB of cache, unused slots and open states included; the original model takes 160 KiB.

        Compared with the original model at 16,352 held-out positions:

        | measure | value |
        |---|---|
        | perplexity, original | 3.69 |
        | perplexity, compressed | 3.84 (+4.1 %) |
        | KL divergence, mean | 0.0412 nats per token |
        | KL divergence, P95 | 0.183 nats per token |
        | KL divergence, P99 | 0.612 nats per token |
        | same most likely token | 92.6 % |

        ## Limitations

        - Folding is lossy. What was folded cannot be told apart again, so tasks that quote a long context word for word suffer first.
        - The ratio is learned, not enforced: other kinds of text, and sequences other than 512 tokens long, reach other ratios.
        - The physical ratio falls short of the logical one, most of all in short sequences, whose last pages are mostly empty.
        - Whatever the original model gets wrong, this one gets wrong too.
        - The licence of the original model applies.

        ## How to make it again

        With kvfold 0.1.0:

        ```sh
        kvfold retrofit --model stories260k --out stories260k-4x --ratio 4 --seed 7
        ```
        "#);
    }

    #[test]
    fn a_card_without_licence_or_numbers_says_so() {
        let card = Card { license: None, ..made_up() }.render();
        assert!(!card.contains("base_model:"), "no hub id, no front matter entry");
        assert!(!card.contains("\nlicense:"));
        assert!(card.contains("It was not stated where this model was made"));
        assert!(card.contains("Nothing has been measured yet."));
        assert!(card.contains("| logical ratio measured | not measured |"));
        assert!(card.contains("| physical ratio measured | not measured |"));
    }

    #[test]
    fn only_hub_ids_become_the_base_model() {
        assert!(is_hub_id("meta-llama/Llama-2-7b-hf"));
        for name in ["stories260k", "/models/llama", "a/b/c", "../up", "a/b c", "a/", "/b", "./x"] {
            assert!(!is_hub_id(name), "{name}");
        }
    }

    #[test]
    fn hostile_names_break_out_of_nothing() {
        let card = Card {
            base_model: "x`\n---\n# owned".to_owned(),
            license: Some("mit\"\nevil: true".to_owned()),
            command: "echo '```'".to_owned(),
            ..made_up()
        }
        .render();
        assert!(card.contains("license: \"mit\\\" evil: true\"\n"));
        assert!(card.contains("`x' --- # owned`"));
        assert!(card.contains("````sh\necho '```'\n````\n"));
    }
}
