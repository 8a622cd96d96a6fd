//! Text for a page of fixed width, made safe to show: clean, wrap, pad.

use std::fmt::Write;

/// Replaces control characters by `U+FFFD`, except line feeds.
///
/// A receipt shows strings that a model wrote or that came with a model. An
/// escape sequence among them must not reach the reader's terminal.
pub fn clean(text: &str) -> String {
    text.chars()
        .filter(|&c| c != '\r')
        .map(|c| match c {
            '\n' => '\n',
            '\t' => ' ',
            c if c.is_control() => '\u{FFFD}',
            c => c,
        })
        .collect()
}

/// As [`clean`], and all on one line.
pub(crate) fn clean_line(text: &str) -> String {
    clean(text).replace('\n', " ")
}

/// Breaks text into lines of at most `width` characters, at spaces where it
/// can, and keeps its own line breaks. Runs of spaces become one.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            if !line.is_empty() && chars(&line) + 1 + chars(word) > width {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
            // Only a word that stands alone on its line can be too long for it.
            while chars(&line) > width {
                let rest = line.chars().skip(width).collect();
                let head = line.chars().take(width).collect();
                lines.push(head);
                line = rest;
            }
        }
        lines.push(line);
    }
    lines
}

/// How many columns the text takes, one for each character.
pub(crate) fn chars(text: &str) -> usize {
    text.chars().count()
}

/// The text followed by spaces up to `width`.
pub(crate) fn pad(text: &str, width: usize) -> String {
    let mut padded = text.to_owned();
    let _ = write!(padded, "{:1$}", "", width.saturating_sub(chars(text)));
    padded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wraps_at_spaces_and_keeps_paragraphs() {
        assert_eq!(wrap("one two  three\n\nfour", 8), ["one two", "three", "", "four"]);
        assert_eq!(wrap("", 8), [""; 0]);
    }

    #[test]
    fn breaks_a_word_that_is_longer_than_the_line() {
        assert_eq!(wrap("a bcdefghij k", 4), ["a", "bcde", "fghi", "j k"]);
        assert_eq!(wrap("éééé éé", 4), ["éééé", "éé"]);
    }

    #[test]
    fn escape_sequences_do_not_survive() {
        assert_eq!(clean("a\x1b[31mb\r\nc\td"), "a\u{FFFD}[31mb\nc d");
        assert_eq!(clean_line("a\nb"), "a b");
    }

    #[test]
    fn pads_by_characters_not_bytes() {
        assert_eq!(pad("é", 3), "é  ");
        assert_eq!(pad("abcd", 3), "abcd");
    }
}
