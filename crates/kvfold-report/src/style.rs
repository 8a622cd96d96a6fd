//! How a rendering may look: colour and width.

/// What the caller knows about the place the text will be shown.
///
/// The caller decides; the command line looks at `--color`, `NO_COLOR` and
/// whether its output is a terminal, and nothing in this crate looks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Whether ANSI escape sequences may be used.
    pub color: bool,
    /// The columns to stay within.
    pub width: usize,
}

impl Style {
    /// No colour, 80 columns: right for a file, a pipe or a test.
    pub const PLAIN: Style = Style { color: false, width: 80 };

    /// The width, kept to what still makes a readable page: at least 64 columns
    /// and at most 120, for longer lines are hard to follow.
    pub(crate) fn page(&self) -> usize {
        self.width.clamp(64, 120)
    }

    /// Bold, where there is colour.
    pub(crate) fn bold(&self, text: &str) -> String {
        self.wrapped("1", text)
    }

    /// Less important than the rest, where there is colour.
    pub(crate) fn dim(&self, text: &str) -> String {
        self.wrapped("2", text)
    }

    /// Text on a background from the 256-colour palette.
    pub(crate) fn cell(&self, foreground: u8, background: u8, text: &str) -> String {
        self.wrapped(&format!("38;5;{foreground};48;5;{background}"), text)
    }

    fn wrapped(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

impl Default for Style {
    fn default() -> Style {
        Style::PLAIN
    }
}
