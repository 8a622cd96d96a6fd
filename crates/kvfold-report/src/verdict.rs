//! The verdict: what the model kept and what it could not keep, in sentences.
//!
//! A table of numbers lets a reader who hopes see hope. The sentences say it
//! plainly, by fixed thresholds, and they say first what was lost.
//!
//! # Thresholds
//!
//! The [`Grade`] follows the worse of two losses: the rise in perplexity on
//! held-out text, and the mean KL divergence from the original model. The two
//! share one scale, because on text that the original model wrote itself a mean
//! KL of `k` nats raises perplexity by the factor `exp(k)`. Taking the worse one
//! keeps a retrofit honest that got better at its training text by becoming
//! another model.
//!
//! | loss | grade |
//! |---|---|
//! | up to 1 % | [`Grade::Kept`] |
//! | up to 5 % | [`Grade::Slight`] |
//! | up to 10 % | [`Grade::Clear`] |
//! | more, or not a number | [`Grade::Heavy`] |
//!
//! A logical or physical ratio below 1.05 counts as no compression, and a head
//! below 1.1 as one that keeps nearly every token.

use crate::format;
use crate::receipt::Receipt;
use crate::text;

/// Losses up to this count as none: within the noise of small evaluations.
const KEPT: f64 = 0.01;
/// Losses up to this are slight.
const SLIGHT: f64 = 0.05;
/// Losses up to this are clear; above, heavy.
const CLEAR: f64 = 0.10;
/// A ratio below this is no compression.
const NO_COMPRESSION: f64 = 1.05;
/// A head with a ratio below this keeps nearly every token.
const DENSE_HEAD: f64 = 1.1;
/// Speeds within this of each other are the same.
const SAME_SPEED: f64 = 0.03;

/// How much quality was lost, from none to too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// Up to 1 %.
    Kept,
    /// More than 1 %, up to 5 %.
    Slight,
    /// More than 5 %, up to 10 %.
    Clear,
    /// More than 10 %, or not measurable.
    Heavy,
}

impl Grade {
    /// The grade of a relative loss.
    pub fn of_loss(loss: f64) -> Grade {
        if loss <= KEPT {
            Grade::Kept
        } else if loss <= SLIGHT {
            Grade::Slight
        } else if loss <= CLEAR {
            Grade::Clear
        } else {
            // NaN fails every comparison and so ends here.
            Grade::Heavy
        }
    }

    /// The grade in a few words.
    pub fn headline(self) -> &'static str {
        match self {
            Grade::Kept => "Quality was kept (within 1 %).",
            Grade::Slight => "Quality fell slightly (more than 1 %).",
            Grade::Clear => "Quality fell clearly (more than 5 %).",
            Grade::Heavy => "Quality fell heavily (more than 10 %).",
        }
    }
}

/// The judgement of a receipt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// How much quality was lost.
    pub grade: Grade,
    /// Plain sentences, the headline first.
    pub sentences: Vec<String>,
}

impl Verdict {
    /// Judges a receipt.
    pub fn of(receipt: &Receipt) -> Verdict {
        let quality = &receipt.quality;
        let grade = Grade::of_loss(quality.perplexity.rise()).max(Grade::of_loss(quality.kl.mean.exp_m1()));
        let mut sentences = vec![grade.headline().to_owned()];
        sentences.push(perplexity(receipt));
        sentences.push(divergence(receipt));
        sentences.push(agreement(receipt));
        sentences.push(memory(receipt));
        sentences.extend(dense_heads(receipt));
        sentences.push(speed(receipt));
        Verdict { grade, sentences }
    }

    /// The sentences as a list, wrapped to a width.
    pub fn render(&self, width: usize) -> String {
        let mut out = String::new();
        for sentence in &self.sentences {
            for (i, line) in text::wrap(sentence, width.saturating_sub(4)).iter().enumerate() {
                out.push_str(if i == 0 { "  - " } else { "    " });
                out.push_str(line);
                out.push('\n');
            }
        }
        out
    }
}

fn perplexity(receipt: &Receipt) -> String {
    let p = receipt.quality.perplexity;
    let (dense, compressed) = (format::plain(p.dense), format::plain(p.compressed));
    let rise = p.rise();
    if !rise.is_finite() {
        format!(
            "Perplexity could not be compared: {dense} dense, {compressed} compressed. One of the models is broken."
        )
    } else if rise > KEPT {
        format!("Perplexity on held-out text rose from {dense} to {compressed} ({}).", format::change(rise))
    } else if rise < -KEPT {
        format!(
            "Perplexity on held-out text fell from {dense} to {compressed} ({}): the retrofit also taught the model this kind of text.",
            format::change(rise)
        )
    } else {
        format!("Perplexity on held-out text stayed at {compressed} ({dense} before, {}).", format::change(rise))
    }
}

fn divergence(receipt: &Receipt) -> String {
    let kl = receipt.quality.kl;
    if !kl.mean.is_finite() {
        return "KL divergence from the original model is not a number at some positions.".to_owned();
    }
    format!(
        "The compressed model diverges from the original by {} nats a token on average, and by {} or more at the worst 1 % of positions.",
        format::nats(kl.mean),
        format::nats(kl.p99)
    )
}

fn agreement(receipt: &Receipt) -> String {
    let quality = receipt.quality;
    let differs = 1.0 - quality.top1_agreement;
    let positions = format::exact(quality.evaluated_tokens);
    if differs == 0.0 {
        format!("Its most likely next token is the original's at all {positions} positions.")
    } else {
        format!(
            "Its most likely next token differs from the original's at {} of {positions} positions.",
            format::percent(differs)
        )
    }
}

fn memory(receipt: &Receipt) -> String {
    let m = &receipt.memory;
    let both = format!(
        "logical {}, physical {}",
        format::ratio_and_removed(m.logical_ratio),
        format::ratio_and_removed(m.physical_ratio)
    );
    let tokens = format::exact(m.context_tokens);
    if m.logical_ratio < NO_COMPRESSION {
        format!("The cache was not compressed at {tokens} tokens: {both}.")
    } else if m.physical_ratio < NO_COMPRESSION {
        format!(
            "Tokens were folded, yet at {tokens} tokens no memory was saved: {both}. Longer contexts fill their pages better."
        )
    } else {
        format!(
            "In return the cache takes {} instead of {} at {tokens} tokens: {both}.",
            format::bytes(m.kv_bytes),
            format::bytes(m.dense_kv_bytes)
        )
    }
}

fn dense_heads(receipt: &Receipt) -> Option<String> {
    let heads = &receipt.memory.heads;
    let all = heads.iter().flatten().count();
    let dense = heads.iter().flatten().filter(|&&ratio| ratio < DENSE_HEAD).count();
    let verb = if dense == 1 { "keeps" } else { "keep" };
    // Without any compression the sentence on memory has said it.
    (dense > 0 && receipt.memory.logical_ratio >= NO_COMPRESSION)
        .then(|| format!("{dense} of {all} KV heads {verb} nearly every token."))
}

fn speed(receipt: &Receipt) -> String {
    let speed = receipt.tokens_per_second;
    let gain = speed.gain();
    let batch = match speed.batch {
        1 => "one sequence at a time".to_owned(),
        n => format!("{n} sequences at once"),
    };
    let ceiling = speed.ceiling.map_or_else(String::new, |ceiling| {
        format!("; the bytes that need not be read account for {}", format::ratio(ceiling))
    });
    if !gain.is_finite() {
        format!("Decoding speed was not measured ({batch}).")
    } else if (gain - 1.0).abs() <= SAME_SPEED {
        format!("Decoding is as fast as with the full cache ({batch}{ceiling}).")
    } else if gain > 1.0 {
        format!("Decoding is {} as fast as with the full cache ({batch}{ceiling}).", format::ratio(gain))
    } else {
        format!("Decoding is slower: {} the speed of the full cache ({batch}{ceiling}).", format::ratio(gain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn verdict(change: impl FnOnce(&mut Receipt)) -> Verdict {
        let mut receipt = sample::receipt();
        change(&mut receipt);
        Verdict::of(&receipt)
    }

    #[test]
    fn a_slight_loss_in_full() {
        let verdict = Verdict::of(&sample::receipt());
        assert_eq!(verdict.grade, Grade::Slight);
        insta::assert_snapshot!(format!("Verdict\n{}", verdict.render(80)), @"
        Verdict
          - Quality fell slightly (more than 1 %).
          - Perplexity on held-out text rose from 3.69 to 3.84 (+4.1 %).
          - The compressed model diverges from the original by 0.0412 nats a token on
            average, and by 0.612 or more at the worst 1 % of positions.
          - Its most likely next token differs from the original's at 7.4 % of 16,352
            positions.
          - In return the cache takes 44.0 KiB instead of 160 KiB at 512 tokens: logical
            3.84x (74.0 % removed), physical 3.64x (72.5 % removed).
          - 1 of 6 KV heads keeps nearly every token.
          - Decoding is 1.10x as fast as with the full cache (one sequence at a time;
            the bytes that need not be read account for 1.10x).
        ");
    }

    #[test]
    fn grades_change_at_one_five_and_ten_percent() {
        for (loss, grade) in [
            (-0.5, Grade::Kept),
            (0.01, Grade::Kept),
            (0.011, Grade::Slight),
            (0.05, Grade::Slight),
            (0.051, Grade::Clear),
            (0.10, Grade::Clear),
            (0.101, Grade::Heavy),
            (f64::INFINITY, Grade::Heavy),
            (f64::NAN, Grade::Heavy),
        ] {
            assert_eq!(Grade::of_loss(loss), grade, "{loss}");
        }
    }

    #[test]
    fn a_lower_perplexity_does_not_excuse_a_high_divergence() {
        let verdict = verdict(|r| {
            r.quality.perplexity.compressed = 3.0;
            r.quality.kl.mean = 0.2;
        });
        assert_eq!(verdict.grade, Grade::Heavy);
        assert!(verdict.sentences[1].contains("also taught the model"));
    }

    #[test]
    fn a_broken_model_is_called_broken() {
        let verdict = verdict(|r| {
            r.quality.perplexity.compressed = f64::NAN;
            r.quality.kl.mean = f64::NAN;
        });
        assert_eq!(verdict.grade, Grade::Heavy);
        assert!(verdict.sentences[1].contains("One of the models is broken."));
        assert!(verdict.sentences[2].contains("not a number"));
    }

    #[test]
    fn compression_that_did_not_happen_is_named() {
        let all = |r: f64| {
            verdict(|receipt| {
                receipt.memory.logical_ratio = r;
                receipt.memory.physical_ratio = 0.98;
            })
            .sentences
            .join("\n")
        };
        assert!(all(1.0).contains("The cache was not compressed at 512 tokens: logical 1.00x"));
        assert!(all(1.0).contains("physical 0.98x (2.0 % added)"));
        assert!(!all(1.0).contains("keep nearly every token"), "said once is enough");
        assert!(all(4.0).contains("no memory was saved"));
    }

    #[test]
    fn slower_decoding_is_not_dressed_up() {
        let last = |dense, compressed| {
            let verdict = verdict(|r| {
                r.tokens_per_second.dense = dense;
                r.tokens_per_second.compressed = compressed;
            });
            verdict.sentences.last().cloned().unwrap_or_default()
        };
        assert!(last(100.0, 80.0).starts_with("Decoding is slower: 0.80x the speed"));
        assert!(last(100.0, 101.0).starts_with("Decoding is as fast"));
        assert!(last(100.0, 150.0).starts_with("Decoding is 1.50x as fast"));
        assert!(last(0.0, 0.0).starts_with("Decoding speed was not measured"));
    }
}
