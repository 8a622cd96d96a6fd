//! The receipt for a person at a terminal.
//!
//! Sections of aligned lines, name to the left and value to the right, in the
//! order of the questions people ask: how much smaller, how much worse, how
//! fast, at what price. Then the heat map, the two texts, and the verdict last,
//! where the eye rests when the command has ended.

use crate::format;
use crate::heatmap::heat_map;
use crate::receipt::{KvBytes, Receipt, Story};
use crate::style::Style;
use crate::text::{chars, clean, clean_line, pad, wrap};

/// The column of the values.
const VALUES: usize = 20;
/// From this width on, the two texts stand side by side.
const SIDE_BY_SIDE: usize = 100;

/// Renders a receipt within `style.width`, kept to 64 to 120 columns.
pub fn render(receipt: &Receipt, style: &Style) -> String {
    let mut page = Page { out: String::new(), style: *style };
    page.header(receipt);
    page.memory(receipt);
    page.quality(receipt);
    page.speed(receipt);
    page.training(receipt);
    page.title("Where it folds", "tokens seen per slot held, layer by KV head");
    page.out.push_str(&heat_map(&receipt.memory.heads, style));
    if let Some(story) = &receipt.story {
        page.story(story);
    }
    page.title("Verdict", "");
    page.out.push_str(&receipt.verdict().render(style.page()));
    page.out
}

struct Page {
    out: String,
    style: Style,
}

impl Page {
    fn header(&mut self, receipt: &Receipt) {
        let model = clean_line(&receipt.model);
        self.out.push_str(&self.style.bold(&format!("kvfold receipt: {model}")));
        self.out.push('\n');
        let machine = &receipt.machine;
        self.row("measured", &format!("{} by kvfold {} ({})", receipt.date, receipt.kvfold_version, receipt.commit));
        self.row(
            "on",
            &format!(
                "{}, {} cores, {}, {}",
                machine.cpu,
                machine.cores,
                format::bytes(machine.memory_bytes),
                machine.os
            ),
        );
        self.row("command", &receipt.command);
        self.row("method", &method(receipt));
    }

    fn memory(&mut self, receipt: &Receipt) {
        let m = &receipt.memory;
        self.title("Memory", &format!("one sequence of {} tokens", format::exact(m.context_tokens)));
        self.row("logical ratio", &format::ratio_and_removed(m.logical_ratio));
        self.row("physical ratio", &format::ratio_and_removed(m.physical_ratio));
        self.row("full cache", &format::bytes(m.dense_kv_bytes));
        self.row("compressed cache", &format!("{} = {}", format::bytes(m.kv_bytes), parts(&m.kv_bytes_detail)));
    }

    fn quality(&mut self, receipt: &Receipt) {
        let q = &receipt.quality;
        self.title("Quality", &format!("{} held-out positions", format::exact(q.evaluated_tokens)));
        self.row(
            "perplexity",
            &format!(
                "{} dense, {} compressed ({})",
                format::plain(q.perplexity.dense),
                format::plain(q.perplexity.compressed),
                format::change(q.perplexity.rise())
            ),
        );
        self.row(
            "KL to original",
            &format!(
                "mean {}, P95 {}, P99 {} nats per token",
                format::nats(q.kl.mean),
                format::nats(q.kl.p95),
                format::nats(q.kl.p99)
            ),
        );
        self.row("top-1 agreement", &format::percent(q.top1_agreement));
    }

    fn speed(&mut self, receipt: &Receipt) {
        let s = receipt.tokens_per_second;
        let batch = if s.batch == 1 { String::new() } else { format!(", batch {}", s.batch) };
        self.title("Speed", &format!("decoding{batch}"));
        self.row("full cache", &format::rate(s.dense));
        let ceiling =
            s.ceiling.map_or_else(String::new, |ceiling| format!(", of which bytes {}", format::ratio(ceiling)));
        self.row("compressed cache", &format!("{} ({}{ceiling})", format::rate(s.compressed), format::ratio(s.gain())));
    }

    fn training(&mut self, receipt: &Receipt) {
        let Some(t) = receipt.training else { return };
        self.title("Training", "");
        self.row(
            "retrofit",
            &format!(
                "{} steps, {} tokens in {} ({})",
                format::exact(t.steps),
                format::count(t.tokens),
                format::duration(t.seconds),
                format::rate(t.tokens_per_second)
            ),
        );
        self.row("seed", &receipt.seed.to_string());
    }

    fn story(&mut self, story: &Story) {
        self.title("The same story twice", "");
        let width = self.style.page() - 2;
        let (dense, compressed) = (clean(&story.dense), clean(&story.compressed));
        self.paragraph(&format!("prompt: {}", clean_line(&story.prompt)), width);
        self.paragraph(&agreement(&dense, &compressed), width);
        self.out.push('\n');
        let headings = ["full cache", "compressed cache"];
        if width + 2 < SIDE_BY_SIDE {
            for (i, text) in [dense, compressed].iter().enumerate() {
                if i > 0 {
                    self.out.push('\n');
                }
                self.out.push_str(&format!("  {}\n", self.style.bold(headings[i])));
                self.paragraph(text, width);
            }
            return;
        }
        let column = (width - 3) / 2;
        let left = wrap(&dense, column);
        let right = wrap(&compressed, column);
        let heading = format!("{} │ {}", pad(headings[0], column), headings[1]);
        self.out.push_str(&format!("  {}\n", self.style.bold(&heading)));
        for i in 0..left.len().max(right.len()) {
            let side = |lines: &[String]| lines.get(i).cloned().unwrap_or_default();
            let line = format!("  {} │ {}", pad(&side(&left), column), side(&right));
            self.out.push_str(line.trim_end());
            self.out.push('\n');
        }
    }

    /// A heading, and what the numbers under it are about.
    fn title(&mut self, title: &str, about: &str) {
        self.out.push('\n');
        self.out.push_str(&self.style.bold(title));
        if !about.is_empty() {
            self.out.push_str(&self.style.dim(&format!(" ({about})")));
        }
        self.out.push('\n');
    }

    /// A name and its value; a long value continues under itself.
    fn row(&mut self, name: &str, value: &str) {
        let room = self.style.page() - VALUES;
        for (i, line) in wrap(&clean_line(value), room).iter().enumerate() {
            let name = if i == 0 { format!("  {name}") } else { String::new() };
            self.out.push_str(&pad(&name, VALUES));
            self.out.push_str(line);
            self.out.push('\n');
        }
    }

    fn paragraph(&mut self, text: &str, width: usize) {
        for line in wrap(text, width) {
            self.out.push_str(format!("  {line}").trim_end());
            self.out.push('\n');
        }
    }
}

fn method(receipt: &Receipt) -> String {
    let decision = receipt.decision.name();
    match receipt.delay {
        0 => format!("decision {decision}, folding at once"),
        delay => format!("decision {decision}, folding {delay} tokens late"),
    }
}

fn parts(detail: &KvBytes) -> String {
    let named = [("pages", detail.pages), ("open state", detail.open_state), ("exact recent tokens", detail.ring)];
    let parts: Vec<String> = named
        .iter()
        // Pages are always named: a cache without any would be news.
        .filter(|(name, bytes)| *bytes > 0 || *name == "pages")
        .map(|(name, bytes)| format!("{name} {}", format::bytes(*bytes)))
        .collect();
    parts.join(" + ")
}

/// How far the two texts are the same.
fn agreement(dense: &str, compressed: &str) -> String {
    let same = dense.chars().zip(compressed.chars()).take_while(|(a, b)| a == b).count();
    if dense == compressed {
        "Both caches wrote the same text.".to_owned()
    } else {
        format!("The same for {same} of {} characters, then each its own way.", chars(dense))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn eighty_columns() {
        insta::assert_snapshot!(render(&sample::receipt(), &Style::PLAIN), @"
        kvfold receipt: stories260k
          measured          2026-11-23T14:40:00Z by kvfold 0.1.0 (abc1234)
          on                Example CPU @ 2.10GHz, 2 cores, 8.00 GiB, linux x86_64
          command           kvfold demo --seed 7 --json receipt.json
          method            decision head, folding 16 tokens late

        Memory (one sequence of 512 tokens)
          logical ratio     3.84x (74.0 % removed)
          physical ratio    3.64x (72.5 % removed)
          full cache        160 KiB
          compressed cache  44.0 KiB = pages 40.0 KiB + open state 3.00 KiB + exact
                            recent tokens 1.00 KiB

        Quality (16,352 held-out positions)
          perplexity        3.69 dense, 3.84 compressed (+4.1 %)
          KL to original    mean 0.0412, P95 0.183, P99 0.612 nats per token
          top-1 agreement   92.6 %

        Speed (decoding)
          full cache        4.21 K tok/s
          compressed cache  4.63 K tok/s (1.10x, of which bytes 1.10x)

        Training
          retrofit          150 steps, 1.23 M tokens in 1 m 36 s (12.8 K tok/s)
          seed              7

        Where it folds (tokens seen per slot held, layer by KV head)
             h0    h1
        L0 ▒ 4.0 ▓ 8.0
        L1 █  16 ▓  10
        L2 · 1.1 █  12
        tokens per slot: · 1.0x  ░ 2.0x  ▒ 4.0x  ▓ 8.0x  █ 16x

        The same story twice
          prompt: Once upon a time
          The same for 72 of 126 characters, then each its own way.

          full cache
          Once upon a time, there was a little girl named Lily. She loved to play
          outside in the park. One day, she saw a big, red ball.

          compressed cache
          Once upon a time, there was a little girl named Lily. She loved to play with
          her toys. One day, her mom gave her a new doll.

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
    fn wide_pages_hold_both_texts_side_by_side() {
        let style = Style { color: false, width: 120 };
        let page = render(&sample::receipt(), &style);
        let (_, rest) = page.split_once("The same story twice").expect("a story");
        let (story, _) = rest.split_once("Verdict").expect("a verdict");
        insta::assert_snapshot!(format!("The same story twice{story}"), @"
        The same story twice
          prompt: Once upon a time
          The same for 72 of 126 characters, then each its own way.

          full cache                                                │ compressed cache
          Once upon a time, there was a little girl named Lily. She │ Once upon a time, there was a little girl named Lily. She
          loved to play outside in the park. One day, she saw a     │ loved to play with her toys. One day, her mom gave her a
          big, red ball.                                            │ new doll.
        ");
    }

    #[test]
    fn every_line_fits_and_none_ends_in_a_space() {
        for width in [64, 80, 99, 100, 120, 200] {
            let page = render(&sample::receipt(), &Style { color: false, width });
            for line in page.lines() {
                assert!(chars(line) <= width.min(120), "{width}: {line}");
                assert_eq!(line, line.trim_end(), "{width}");
            }
        }
    }

    #[test]
    fn plain_pages_hold_no_escape_even_if_the_model_wrote_one() {
        let mut receipt = sample::receipt();
        receipt.model = "evil\x1b]0;owned\x07".to_owned();
        receipt.machine.cpu = "\x1b[31mCPU".to_owned();
        let story = receipt.story.as_mut().expect("a story");
        story.compressed = "\x1b[2J gone".to_owned();
        let page = render(&receipt, &Style::PLAIN);
        assert!(!page.contains('\x1b') && !page.contains('\x07'));
    }

    #[test]
    fn colour_changes_nothing_but_the_map_and_escapes() {
        let plain = render(&sample::receipt(), &Style::PLAIN);
        let coloured = render(&sample::receipt(), &Style { color: true, width: 80 });
        let stripped = strip(&coloured);
        let head = |page: &str| page.split("Where it folds").next().map(str::to_owned);
        assert_eq!(head(&stripped), head(&plain));
    }

    #[test]
    fn parts_without_bytes_are_left_out() {
        insta::assert_snapshot!(parts(&KvBytes { pages: 4096, ..KvBytes::default() }), @"pages 4.00 KiB");
        insta::assert_snapshot!(parts(&sample::receipt().memory.kv_bytes_detail), @"pages 40.0 KiB + open state 3.00 KiB + exact recent tokens 1.00 KiB");
    }

    fn strip(text: &str) -> String {
        let mut parts = text.split('\x1b');
        let mut out = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            out.push_str(part.split_once('m').map_or("", |(_, rest)| rest));
        }
        out
    }
}
