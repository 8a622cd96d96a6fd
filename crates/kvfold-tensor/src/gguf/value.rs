//! Metadata of a GGUF file.

/// A value of the metadata. Integers of all widths are one variant, as are lists of them.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// An integer without a sign.
    Unsigned(u64),
    /// An integer with one.
    Signed(i64),
    /// A single-precision number; not widened, so that 1e-5 is still written as that.
    F32(f32),
    /// A double-precision number.
    F64(f64),
    /// True or false.
    Bool(bool),
    /// A text.
    String(String),
    /// A list of integers.
    Integers(Vec<i64>),
    /// A list of numbers.
    Floats(Vec<f64>),
    /// A list of truth values.
    Bools(Vec<bool>),
    /// A list of texts.
    Strings(Vec<String>),
}

impl Value {
    /// The integer, if it is one and not negative.
    pub fn as_unsigned(&self) -> Option<u64> {
        match self {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// The number, if it is one with a fraction: an `F32` as the shortest decimal that means it, which is what the author
    /// of the model wrote.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Value::F32(x) => x.to_string().parse().ok(),
            Value::F64(x) => Some(*x),
            _ => None,
        }
    }

    /// The truth value, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The value for a message: short, whatever somebody put into the file.
    pub fn brief(&self) -> String {
        const LIMIT: usize = 100;
        let list = |len: usize, what: &str| format!("a list of {len} {what}");
        match self {
            Value::Unsigned(n) => n.to_string(),
            Value::Signed(n) => n.to_string(),
            Value::F32(x) => x.to_string(),
            Value::F64(x) => x.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::String(text) => match text.char_indices().nth(LIMIT) {
                Some((cut, _)) => format!("{:?}...", &text[..cut]),
                None => format!("{text:?}"),
            },
            Value::Integers(list_of) => list(list_of.len(), "integers"),
            Value::Floats(list_of) => list(list_of.len(), "numbers"),
            Value::Bools(list_of) => list(list_of.len(), "truth values"),
            Value::Strings(list_of) => list(list_of.len(), "texts"),
        }
    }
}
