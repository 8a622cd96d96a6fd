//! The heat map: one cell for every layer and KV head, the darker the more that
//! head folds.
//!
//! A retrofit does not compress evenly, and the map shows at a glance where the
//! model kept its tokens. It must work for a toy of 5 x 4 heads and for one of
//! 80 x 8, in 80 columns, with and without colour. So cells come in three
//! sizes, from a cell with its number down to a single character, and a map
//! that is taller than a screen continues in another panel to its right:
//!
//! ```text
//!     h0    h1         h0    h1
//! L0 | 1.2   4.0    L2 | 3.8   5.1
//! L1 | 2.2   4.4    L3 | 4.6   7.7
//! ```
//!
//! The largest size wins that keeps the map within the width and within
//! [`MAX_ROWS`] rows; if none does, the shortest map wins.

use crate::format;
use crate::style::Style;
use crate::text::{chars, pad};

/// Taller maps are split into panels.
pub const MAX_ROWS: usize = 32;

/// Spaces between two panels.
const GAP: usize = 3;

/// From nothing folded to the most, without colour.
const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];

/// The same in the 256-colour palette, after viridis: dark violet to yellow, in
/// rising luminance, so that it survives a print in grey and colour blindness.
const RAMP: [u8; 9] = [53, 54, 25, 31, 36, 71, 113, 148, 220];
/// The first of [`RAMP`] that is bright enough for black text.
const BRIGHT: usize = 3;
const BLACK: u8 = 16;
const WHITE: u8 = 231;

/// How large a cell is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cell {
    Number,
    Wide,
    Narrow,
}

impl Cell {
    const ALL: [Cell; 3] = [Cell::Number, Cell::Wide, Cell::Narrow];

    fn columns(self) -> usize {
        match self {
            Cell::Number => 6,
            Cell::Wide => 2,
            Cell::Narrow => 1,
        }
    }
}

/// Draws ratios, given as layers x KV heads, with labels and a legend. Gives an
/// empty string if there are no heads.
pub fn heat_map(heads: &[Vec<f64>], style: &Style) -> String {
    let widest = heads.iter().map(Vec::len).max().unwrap_or(0);
    if widest == 0 {
        return String::new();
    }
    let layout = Layout::choose(heads.len(), widest, style.page());
    let scale = Scale::over(heads);
    let mut out = String::new();
    let bands = widest.div_ceil(layout.heads);
    for band in 0..bands {
        let first_head = band * layout.heads;
        let shown = layout.heads.min(widest - first_head);
        let panels = heads.len().div_ceil(layout.rows);
        let ruler = pad("", layout.label) + &ruler(first_head, shown, layout.cell);
        let header = vec![pad(&ruler, layout.panel()); panels].join(&" ".repeat(GAP));
        out.push_str(&style.dim(header.trim_end()));
        out.push('\n');
        for row in 0..layout.rows {
            let mut line = String::new();
            for (panel, layer) in (row..heads.len()).step_by(layout.rows).enumerate() {
                if panel > 0 {
                    line.push_str(&" ".repeat(GAP));
                }
                line.push_str(&style.dim(&pad(&format!("L{layer}"), layout.label)));
                for head in first_head..first_head + shown {
                    let ratio = heads[layer].get(head).copied();
                    line.push_str(&draw(ratio, layout.cell, scale, style));
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
    }
    out.push_str(&legend(scale, style));
    out
}

/// Where everything goes.
struct Layout {
    cell: Cell,
    /// Columns of a row label, with the space after it.
    label: usize,
    /// Heads side by side; fewer than the model has only if not even the
    /// narrowest cells fit, and then the map continues below.
    heads: usize,
    /// Layers below one another.
    rows: usize,
}

impl Layout {
    fn choose(layers: usize, heads: usize, width: usize) -> Layout {
        let label = chars(&format!("L{}", layers - 1)) + 1;
        let mut shortest: Option<Layout> = None;
        for cell in Cell::ALL {
            let panel = label + heads * cell.columns();
            if panel > width {
                continue;
            }
            let panels = (width + GAP) / (panel + GAP);
            // The fewest panels that are short enough, and all of one height.
            let panels = panels.min(layers.div_ceil(MAX_ROWS));
            let layout = Layout { cell, label, heads, rows: layers.div_ceil(panels) };
            if layout.rows <= MAX_ROWS {
                return layout;
            }
            if shortest.as_ref().is_none_or(|s| layout.rows < s.rows) {
                shortest = Some(layout);
            }
        }
        shortest.unwrap_or(Layout { cell: Cell::Narrow, label, heads: width - label, rows: layers })
    }

    fn panel(&self) -> usize {
        self.label + self.heads * self.cell.columns()
    }
}

/// Labels above the heads: `h0`, `h1`, ..., or as many of them as find room.
fn ruler(first: usize, count: usize, cell: Cell) -> String {
    let width = count * cell.columns();
    let mut line = String::new();
    for head in first..first + count {
        let label = format!("h{head}");
        // Above the digits of a cell with a number, at the edge of one without.
        let inset = if cell == Cell::Number { 2 } else { 0 };
        let at = (head - first) * cell.columns() + inset;
        let free = line.is_empty() || at > chars(&line);
        let round = cell == Cell::Number || head % 4 == 0 || head == first;
        if free && round && at + chars(&label) <= width.max(chars(&label)) {
            line = pad(&line, at) + &label;
        }
    }
    line
}

/// From ratios to shades: logarithmic, so that every doubling is the same
/// step: 2x lies halfway between 1x and 4x.
#[derive(Clone, Copy)]
struct Scale {
    top: f64,
}

impl Scale {
    fn over(heads: &[Vec<f64>]) -> Scale {
        let finite = heads.iter().flatten().copied().filter(|ratio| ratio.is_finite());
        Scale { top: finite.fold(2.0, f64::max) }
    }

    /// Which of `steps` shades; nothing for a ratio that is no number.
    fn step(self, ratio: f64, steps: usize) -> Option<usize> {
        if !ratio.is_finite() || ratio <= 0.0 {
            return None;
        }
        let level = (ratio.ln() / self.top.ln()).clamp(0.0, 1.0);
        Some((level * (steps - 1) as f64).round() as usize)
    }

    /// The ratio in the middle of a shade.
    fn ratio(self, step: usize, steps: usize) -> f64 {
        self.top.powf(step as f64 / (steps - 1) as f64)
    }
}

fn draw(ratio: Option<f64>, cell: Cell, scale: Scale, style: &Style) -> String {
    // A ragged model has no head here: leave the place empty.
    let Some(ratio) = ratio else {
        return " ".repeat(cell.columns());
    };
    let number = format::short_ratio(ratio);
    if style.color {
        let body = match cell {
            Cell::Number => format!("{number:>5} "),
            _ => " ".repeat(cell.columns()),
        };
        match scale.step(ratio, RAMP.len()) {
            Some(step) => style.cell(if step < BRIGHT { WHITE } else { BLACK }, RAMP[step], &body),
            None => body,
        }
    } else {
        let shade = scale.step(ratio, SHADES.len()).map_or('?', |step| SHADES[step]);
        match cell {
            Cell::Number => format!("{shade}{number:>4} "),
            _ => shade.to_string().repeat(cell.columns()),
        }
    }
}

/// The shades with the ratio each stands for.
fn legend(scale: Scale, style: &Style) -> String {
    let mut line = style.dim("tokens per slot: ");
    if style.color {
        line.push_str(&format!("{}x ", format::short_ratio(1.0)));
        for (step, &background) in RAMP.iter().enumerate() {
            line.push_str(&style.cell(if step < BRIGHT { WHITE } else { BLACK }, background, "  "));
        }
        line.push_str(&format!(" {}x", format::short_ratio(scale.top)));
    } else {
        let entries: Vec<String> = SHADES
            .iter()
            .enumerate()
            .map(|(step, shade)| format!("{shade} {}x", format::short_ratio(scale.ratio(step, SHADES.len()))))
            .collect();
        line.push_str(&entries.join("  "));
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ratios that rise with the layer and differ between heads.
    fn made_up(layers: usize, heads: usize) -> Vec<Vec<f64>> {
        (0..layers).map(|l| (0..heads).map(|h| 1.0 + 7.0 * ((l * 5 + h * 3) % 11) as f64 / 10.0).collect()).collect()
    }

    fn widest_line(map: &str) -> usize {
        map.lines().map(chars).max().unwrap_or(0)
    }

    #[test]
    fn small_model_shows_every_number() {
        insta::assert_snapshot!(heat_map(&made_up(5, 4), &Style::PLAIN), @"
             h0    h1    h2    h3
        L0 · 1.0 ▒ 3.1 ▓ 5.2 █ 7.3
        L1 ▓ 4.5 █ 6.6 · 1.0 ▒ 3.1
        L2 █ 8.0 ▒ 2.4 ▓ 4.5 █ 6.6
        L3 ▓ 3.8 ▓ 5.9 █ 8.0 ▒ 2.4
        L4 █ 7.3 ░ 1.7 ▓ 3.8 ▓ 5.9
        tokens per slot: · 1.0x  ░ 1.7x  ▒ 2.8x  ▓ 4.8x  █ 8.0x
        ");
    }

    #[test]
    fn tall_model_continues_in_a_panel_to_the_right() {
        insta::assert_snapshot!(heat_map(&made_up(40, 3), &Style::PLAIN), @"
              h0    h1    h2           h0    h1    h2
        L0  · 1.0 ▒ 3.1 ▓ 5.2    L20 ░ 1.7 ▓ 3.8 ▓ 5.9
        L1  ▓ 4.5 █ 6.6 · 1.0    L21 ▓ 5.2 █ 7.3 ░ 1.7
        L2  █ 8.0 ▒ 2.4 ▓ 4.5    L22 · 1.0 ▒ 3.1 ▓ 5.2
        L3  ▓ 3.8 ▓ 5.9 █ 8.0    L23 ▓ 4.5 █ 6.6 · 1.0
        L4  █ 7.3 ░ 1.7 ▓ 3.8    L24 █ 8.0 ▒ 2.4 ▓ 4.5
        L5  ▒ 3.1 ▓ 5.2 █ 7.3    L25 ▓ 3.8 ▓ 5.9 █ 8.0
        L6  █ 6.6 · 1.0 ▒ 3.1    L26 █ 7.3 ░ 1.7 ▓ 3.8
        L7  ▒ 2.4 ▓ 4.5 █ 6.6    L27 ▒ 3.1 ▓ 5.2 █ 7.3
        L8  ▓ 5.9 █ 8.0 ▒ 2.4    L28 █ 6.6 · 1.0 ▒ 3.1
        L9  ░ 1.7 ▓ 3.8 ▓ 5.9    L29 ▒ 2.4 ▓ 4.5 █ 6.6
        L10 ▓ 5.2 █ 7.3 ░ 1.7    L30 ▓ 5.9 █ 8.0 ▒ 2.4
        L11 · 1.0 ▒ 3.1 ▓ 5.2    L31 ░ 1.7 ▓ 3.8 ▓ 5.9
        L12 ▓ 4.5 █ 6.6 · 1.0    L32 ▓ 5.2 █ 7.3 ░ 1.7
        L13 █ 8.0 ▒ 2.4 ▓ 4.5    L33 · 1.0 ▒ 3.1 ▓ 5.2
        L14 ▓ 3.8 ▓ 5.9 █ 8.0    L34 ▓ 4.5 █ 6.6 · 1.0
        L15 █ 7.3 ░ 1.7 ▓ 3.8    L35 █ 8.0 ▒ 2.4 ▓ 4.5
        L16 ▒ 3.1 ▓ 5.2 █ 7.3    L36 ▓ 3.8 ▓ 5.9 █ 8.0
        L17 █ 6.6 · 1.0 ▒ 3.1    L37 █ 7.3 ░ 1.7 ▓ 3.8
        L18 ▒ 2.4 ▓ 4.5 █ 6.6    L38 ▒ 3.1 ▓ 5.2 █ 7.3
        L19 ▓ 5.9 █ 8.0 ▒ 2.4    L39 █ 6.6 · 1.0 ▒ 3.1
        tokens per slot: · 1.0x  ░ 1.7x  ▒ 2.8x  ▓ 4.8x  █ 8.0x
        ");
    }

    #[test]
    fn eighty_layers_shrink_to_shades() {
        insta::assert_snapshot!(heat_map(&made_up(80, 8), &Style::PLAIN), @"
            h0      h4             h0      h4             h0      h4
        L0  ··▒▒▓▓██░░▓▓▓▓██   L27 ▒▒▓▓██░░▓▓▓▓██▒▒   L54 ▓▓██░░▓▓▓▓██▒▒▓▓
        L1  ▓▓██··▒▒▓▓██░░▓▓   L28 ██··▒▒▓▓██░░▓▓▓▓   L55 ··▒▒▓▓██░░▓▓▓▓██
        L2  ██▒▒▓▓██··▒▒▓▓██   L29 ▒▒▓▓██··▒▒▓▓██░░   L56 ▓▓██··▒▒▓▓██░░▓▓
        L3  ▓▓▓▓██▒▒▓▓██··▒▒   L30 ▓▓██▒▒▓▓██··▒▒▓▓   L57 ██▒▒▓▓██··▒▒▓▓██
        L4  ██░░▓▓▓▓██▒▒▓▓██   L31 ░░▓▓▓▓██▒▒▓▓██··   L58 ▓▓▓▓██▒▒▓▓██··▒▒
        L5  ▒▒▓▓██░░▓▓▓▓██▒▒   L32 ▓▓██░░▓▓▓▓██▒▒▓▓   L59 ██░░▓▓▓▓██▒▒▓▓██
        L6  ██··▒▒▓▓██░░▓▓▓▓   L33 ··▒▒▓▓██░░▓▓▓▓██   L60 ▒▒▓▓██░░▓▓▓▓██▒▒
        L7  ▒▒▓▓██··▒▒▓▓██░░   L34 ▓▓██··▒▒▓▓██░░▓▓   L61 ██··▒▒▓▓██░░▓▓▓▓
        L8  ▓▓██▒▒▓▓██··▒▒▓▓   L35 ██▒▒▓▓██··▒▒▓▓██   L62 ▒▒▓▓██··▒▒▓▓██░░
        L9  ░░▓▓▓▓██▒▒▓▓██··   L36 ▓▓▓▓██▒▒▓▓██··▒▒   L63 ▓▓██▒▒▓▓██··▒▒▓▓
        L10 ▓▓██░░▓▓▓▓██▒▒▓▓   L37 ██░░▓▓▓▓██▒▒▓▓██   L64 ░░▓▓▓▓██▒▒▓▓██··
        L11 ··▒▒▓▓██░░▓▓▓▓██   L38 ▒▒▓▓██░░▓▓▓▓██▒▒   L65 ▓▓██░░▓▓▓▓██▒▒▓▓
        L12 ▓▓██··▒▒▓▓██░░▓▓   L39 ██··▒▒▓▓██░░▓▓▓▓   L66 ··▒▒▓▓██░░▓▓▓▓██
        L13 ██▒▒▓▓██··▒▒▓▓██   L40 ▒▒▓▓██··▒▒▓▓██░░   L67 ▓▓██··▒▒▓▓██░░▓▓
        L14 ▓▓▓▓██▒▒▓▓██··▒▒   L41 ▓▓██▒▒▓▓██··▒▒▓▓   L68 ██▒▒▓▓██··▒▒▓▓██
        L15 ██░░▓▓▓▓██▒▒▓▓██   L42 ░░▓▓▓▓██▒▒▓▓██··   L69 ▓▓▓▓██▒▒▓▓██··▒▒
        L16 ▒▒▓▓██░░▓▓▓▓██▒▒   L43 ▓▓██░░▓▓▓▓██▒▒▓▓   L70 ██░░▓▓▓▓██▒▒▓▓██
        L17 ██··▒▒▓▓██░░▓▓▓▓   L44 ··▒▒▓▓██░░▓▓▓▓██   L71 ▒▒▓▓██░░▓▓▓▓██▒▒
        L18 ▒▒▓▓██··▒▒▓▓██░░   L45 ▓▓██··▒▒▓▓██░░▓▓   L72 ██··▒▒▓▓██░░▓▓▓▓
        L19 ▓▓██▒▒▓▓██··▒▒▓▓   L46 ██▒▒▓▓██··▒▒▓▓██   L73 ▒▒▓▓██··▒▒▓▓██░░
        L20 ░░▓▓▓▓██▒▒▓▓██··   L47 ▓▓▓▓██▒▒▓▓██··▒▒   L74 ▓▓██▒▒▓▓██··▒▒▓▓
        L21 ▓▓██░░▓▓▓▓██▒▒▓▓   L48 ██░░▓▓▓▓██▒▒▓▓██   L75 ░░▓▓▓▓██▒▒▓▓██··
        L22 ··▒▒▓▓██░░▓▓▓▓██   L49 ▒▒▓▓██░░▓▓▓▓██▒▒   L76 ▓▓██░░▓▓▓▓██▒▒▓▓
        L23 ▓▓██··▒▒▓▓██░░▓▓   L50 ██··▒▒▓▓██░░▓▓▓▓   L77 ··▒▒▓▓██░░▓▓▓▓██
        L24 ██▒▒▓▓██··▒▒▓▓██   L51 ▒▒▓▓██··▒▒▓▓██░░   L78 ▓▓██··▒▒▓▓██░░▓▓
        L25 ▓▓▓▓██▒▒▓▓██··▒▒   L52 ▓▓██▒▒▓▓██··▒▒▓▓   L79 ██▒▒▓▓██··▒▒▓▓██
        L26 ██░░▓▓▓▓██▒▒▓▓██   L53 ░░▓▓▓▓██▒▒▓▓██··
        tokens per slot: · 1.0x  ░ 1.7x  ▒ 2.8x  ▓ 4.8x  █ 8.0x
        ");
    }

    #[test]
    fn thirty_two_by_thirty_two_shrinks_to_shades() {
        let map = heat_map(&made_up(32, 32), &Style::PLAIN);
        let first: String = map.lines().take(3).map(|line| format!("{line}\n")).collect();
        insta::assert_snapshot!(first, @"
            h0      h4      h8      h12     h16     h20     h24     h28
        L0  ··▒▒▓▓██░░▓▓▓▓██▒▒▓▓██··▒▒▓▓██░░▓▓▓▓██▒▒▓▓██··▒▒▓▓██░░▓▓▓▓██▒▒▓▓
        L1  ▓▓██··▒▒▓▓██░░▓▓▓▓██▒▒▓▓██··▒▒▓▓██░░▓▓▓▓██▒▒▓▓██··▒▒▓▓██░░▓▓▓▓██
        ");
    }

    #[test]
    fn colour_has_one_cell_per_head_and_a_ramp() {
        let style = Style { color: true, width: 80 };
        insta::assert_snapshot!(heat_map(&[vec![1.0, 8.0]], &style).escape_debug(), @r"\u{1b}[2m     h0    h1\u{1b}[0m\n\u{1b}[2mL0 \u{1b}[0m\u{1b}[38;5;231;48;5;53m  1.0 \u{1b}[0m\u{1b}[38;5;16;48;5;220m  8.0 \u{1b}[0m\n\u{1b}[2mtokens per slot: \u{1b}[0m1.0x \u{1b}[38;5;231;48;5;53m  \u{1b}[0m\u{1b}[38;5;231;48;5;54m  \u{1b}[0m\u{1b}[38;5;231;48;5;25m  \u{1b}[0m\u{1b}[38;5;16;48;5;31m  \u{1b}[0m\u{1b}[38;5;16;48;5;36m  \u{1b}[0m\u{1b}[38;5;16;48;5;71m  \u{1b}[0m\u{1b}[38;5;16;48;5;113m  \u{1b}[0m\u{1b}[38;5;16;48;5;148m  \u{1b}[0m\u{1b}[38;5;16;48;5;220m  \u{1b}[0m 8.0x\n");
    }

    #[test]
    fn the_ramp_rises_in_luminance_and_its_numbers_can_be_read() {
        let channel = |level: u8| {
            let value = if level == 0 { 0.0 } else { 55.0 + 40.0 * f64::from(level) } / 255.0;
            if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055f64).powf(2.4) }
        };
        // Colours 16 to 231 are a cube of 6 x 6 x 6.
        let luminance = |color: u8| {
            let (r, g, b) = ((color - 16) / 36, (color - 16) / 6 % 6, (color - 16) % 6);
            0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b)
        };
        for pair in RAMP.windows(2) {
            assert!(luminance(pair[0]) < luminance(pair[1]), "{pair:?}");
        }
        for (step, &background) in RAMP.iter().enumerate() {
            let text = if step < BRIGHT { WHITE } else { BLACK };
            let (a, b) = (luminance(text), luminance(background));
            let contrast = (a.max(b) + 0.05) / (a.min(b) + 0.05);
            assert!(contrast >= 4.5, "{background}: {contrast}");
        }
    }

    #[test]
    fn any_model_stays_within_any_width() {
        for (layers, heads) in [(1, 1), (5, 4), (30, 3), (32, 32), (80, 8), (126, 8), (40, 128)] {
            for width in [64, 80, 120] {
                let map = heat_map(&made_up(layers, heads), &Style { color: false, width });
                assert!(widest_line(&map) <= width, "{layers} x {heads} in {width}:\n{map}");
                assert!(map.lines().all(|line| line.trim_end() == line), "trailing spaces");
            }
        }
    }

    #[test]
    fn nothing_to_show_and_broken_ratios() {
        assert_eq!(heat_map(&[], &Style::PLAIN), "");
        assert_eq!(heat_map(&[vec![]], &Style::PLAIN), "");
        let map = heat_map(&[vec![f64::NAN, 1.0], vec![4.0]], &Style::PLAIN);
        assert!(map.contains("?   ? "), "{map}");
    }
}
