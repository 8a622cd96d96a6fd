//! The part of pickle that a dictionary of tensors needs, read as data.
//!
//! A pickle is a program for a stack machine, and in Python two of its instructions call whatever the file names. Here
//! nothing is called. A global is a name; the few that make tensors and dictionaries are known to this module, objects of
//! the libraries that write checkpoints become inert records of a class name and a state, and every other name, and every
//! other instruction, ends the reading with an error that says where it stood.
//!
//! Objects lie in one list and refer to each other by index, as the memo of pickle does. So a value that contains itself
//! is no danger, nothing recurses, and since an instruction makes at most one object, memory is bounded by the length of
//! the program.

use std::collections::HashMap;

/// What a tensor in the file looks like, and where its elements are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The length of each dimension, outermost first.
    pub shape: Vec<usize>,
    /// The kind of storage that holds its elements, such as `BFloat16Storage`.
    pub storage: String,
    /// The storage's name in the archive.
    pub(super) key: String,
    /// Elements of the storage.
    pub(super) len: usize,
    /// Where in the storage its first element is.
    pub(super) offset: usize,
    /// Elements from one index to the next, by dimension.
    pub(super) strides: Vec<usize>,
}

/// Why a program was not read to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// The byte at which the instruction stands.
    pub(super) offset: usize,
    pub(super) reason: String,
}

type Id = u32;

#[derive(Clone, Debug)]
enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    /// Lists, tuples and sets.
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A name in a module.
    Global(String),
    /// What a class of a known library would have made: its state, if it was given one.
    Object {
        state: Option<Id>,
    },
    Storage {
        kind: String,
        key: String,
        len: usize,
    },
    Tensor(TensorInfo),
}

/// What a program made.
#[derive(Clone, Debug)]
pub(super) struct Pickle {
    nodes: Vec<Node>,
    root: Id,
}

impl Pickle {
    /// Runs a program.
    pub(super) fn read(program: &[u8]) -> Result<Pickle, Refused> {
        let mut machine = Machine {
            program,
            at: 0,
            begun: 0,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        let root = machine.run()?;
        Ok(Pickle { nodes: machine.nodes, root })
    }

    /// What stood on the stack at the end.
    pub(super) fn root(&self) -> Value<'_> {
        Value { pickle: self, id: self.root }
    }
}

/// A value of a file.
#[derive(Clone, Copy)]
pub struct Value<'a> {
    pickle: &'a Pickle,
    id: Id,
}

impl std::fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.node().fmt(f)
    }
}

impl<'a> Value<'a> {
    fn node(self) -> &'a Node {
        &self.pickle.nodes[self.id as usize]
    }

    fn of(self, id: Id) -> Value<'a> {
        Value { pickle: self.pickle, id }
    }

    /// The entries of a dictionary, or of an object's state, whose keys are texts; none of anything else.
    pub fn entries(self) -> impl Iterator<Item = (&'a str, Value<'a>)> {
        let mut entries: &'a [(Id, Id)] = &[];
        match self.node() {
            Node::Dict(found) => entries = found,
            Node::Object { state: Some(state) } => {
                if let Node::Dict(found) = self.of(*state).node() {
                    entries = found;
                }
            }
            _ => {}
        }
        entries.iter().filter_map(move |&(key, value)| Some((self.of(key).text()?, self.of(value))))
    }

    /// The entry under a key.
    pub fn get(self, key: &str) -> Option<Value<'a>> {
        self.entries().find(|(found, _)| *found == key).map(|(_, value)| value)
    }

    /// A text.
    pub fn text(self) -> Option<&'a str> {
        match self.node() {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number.
    pub fn integer(self) -> Option<i64> {
        match *self.node() {
            Node::Int(n) => Some(n),
            _ => None,
        }
    }

    /// A number.
    pub fn number(self) -> Option<f64> {
        match *self.node() {
            Node::Int(n) => Some(n as f64),
            Node::Float(x) => Some(x),
            _ => None,
        }
    }

    /// True or false.
    pub fn flag(self) -> Option<bool> {
        match *self.node() {
            Node::Bool(flag) => Some(flag),
            _ => None,
        }
    }

    /// Whether it is Python's `None`.
    pub fn is_none(self) -> bool {
        matches!(self.node(), Node::None)
    }

    /// A tensor.
    pub fn tensor(self) -> Option<&'a TensorInfo> {
        match self.node() {
            Node::Tensor(info) => Some(info),
            _ => None,
        }
    }
}

/// Names that stand for something: what makes tensors and dictionaries.
const REBUILD: &str = "torch._utils._rebuild_tensor_v2";
const PARAMETER: &str = "torch._utils._rebuild_parameter";
const ORDERED: &str = "collections.OrderedDict";
const SIZE: &str = "torch.Size";

/// Libraries whose other names are taken as names, so that settings and random states beside the tensors do no harm.
const INERT: [&str; 8] =
    ["megatron.", "transformer_engine.", "numpy.", "torch.", "argparse.", "types.", "pathlib.", "collections."];
const INERT_NAMES: [&str; 4] = ["_io.BytesIO", "_codecs.encode", "__builtin__.set", "builtins.set"];

struct Machine<'p> {
    program: &'p [u8],
    at: usize,
    /// Where the instruction that runs begins.
    begun: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack at the marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

type Step<T> = Result<T, Refused>;

impl<'p> Machine<'p> {
    fn refused<T>(&self, reason: impl Into<String>) -> Step<T> {
        Err(Refused { offset: self.begun, reason: reason.into() })
    }

    fn bytes(&mut self, len: usize) -> Step<&'p [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.program.len());
        let Some(end) = end else { return self.refused("the program ends inside of an instruction") };
        let bytes = &self.program[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    /// A little-endian number of N bytes.
    fn number<const N: usize>(&mut self) -> Step<u64> {
        let bytes = self.bytes(N)?;
        Ok(bytes.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    /// Bytes after their count of N bytes.
    fn counted<const N: usize>(&mut self) -> Step<&'p [u8]> {
        match usize::try_from(self.number::<N>()?) {
            Ok(len) => self.bytes(len),
            Err(_) => self.refused("the program ends inside of an instruction"),
        }
    }

    fn utf8(&self, bytes: &[u8]) -> Step<String> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => self.refused("a text that is not UTF-8"),
        }
    }

    fn line(&mut self) -> Step<String> {
        let Some(len) = self.program[self.at..].iter().position(|&byte| byte == b'\n') else {
            return self.refused("the program ends inside of a name");
        };
        let line = self.bytes(len)?;
        self.at += 1;
        self.utf8(line)
    }

    fn push(&mut self, node: Node) -> Step<()> {
        let Ok(id) = Id::try_from(self.nodes.len()) else {
            return self.refused("more objects than any checkpoint has");
        };
        self.nodes.push(node);
        self.stack.push(id);
        Ok(())
    }

    /// The newest value above the newest mark.
    fn pop(&mut self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(id) if self.stack.len() >= floor => Ok(id),
            _ => self.refused("a value is taken from an empty stack"),
        }
    }

    fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.last() {
            Some(&id) if self.stack.len() > floor => Ok(id),
            _ => self.refused("a value is taken from an empty stack"),
        }
    }

    fn pop_mark(&mut self) -> Step<Vec<Id>> {
        match self.marks.pop() {
            Some(height) => Ok(self.stack.split_off(height)),
            None => self.refused("there is no mark"),
        }
    }

    fn node(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }

    fn run(&mut self) -> Step<Id> {
        loop {
            self.begun = self.at;
            let opcode = self.bytes(1)?[0];
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    let version = self.number::<1>()?;
                    if !(2..=5).contains(&version) {
                        return self.refused(format!("protocol {version}; 2 to 5 are read"));
                    }
                }
                // A frame says how many bytes belong together; nothing depends on it.
                0x95 => drop(self.number::<8>()?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.pop_mark()?),
                b'N' => self.push(Node::None)?,
                0x88 | 0x89 => self.push(Node::Bool(opcode == 0x88))?,
                b'J' => {
                    let n = self.number::<4>()? as u32 as i32;
                    self.push(Node::Int(n.into()))?;
                }
                b'K' => {
                    let n = self.number::<1>()?;
                    self.push(Node::Int(n as i64))?;
                }
                b'M' => {
                    let n = self.number::<2>()?;
                    self.push(Node::Int(n as i64))?;
                }
                0x8a => {
                    let bytes = self.counted::<1>()?;
                    let node = long(bytes);
                    self.push(node)?;
                }
                b'G' => {
                    let bits = self.bytes(8)?.iter().fold(0, |n, &byte| n << 8 | u64::from(byte));
                    self.push(Node::Float(f64::from_bits(bits)))?;
                }
                b'X' | 0x8c | 0x8d => {
                    let bytes = match opcode {
                        b'X' => self.counted::<4>()?,
                        0x8c => self.counted::<1>()?,
                        _ => self.counted::<8>()?,
                    };
                    let text = self.utf8(bytes)?;
                    self.push(Node::Text(text))?;
                }
                // Bytes, which nothing here has a use for.
                b'C' | b'U' => drop(self.counted::<1>().and_then(|_| self.inert())?),
                b'B' | b'T' => drop(self.counted::<4>().and_then(|_| self.inert())?),
                0x8e => drop(self.counted::<8>().and_then(|_| self.inert())?),
                b']' | b')' | 0x8f => self.push(Node::List(Vec::new()))?,
                b'}' => self.push(Node::Dict(Vec::new()))?,
                b'a' => {
                    let item = self.pop()?;
                    self.extend(vec![item])?;
                }
                b'e' | 0x90 => {
                    let items = self.pop_mark()?;
                    self.extend(items)?;
                }
                b't' => {
                    let items = self.pop_mark()?;
                    self.push(Node::List(items))?;
                }
                0x85..=0x87 => {
                    let mut items = (0x84..opcode).map(|_| self.pop()).collect::<Step<Vec<_>>>()?;
                    items.reverse();
                    self.push(Node::List(items))?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.insert(&[key, value])?;
                }
                b'u' => {
                    let items = self.pop_mark()?;
                    self.insert(&items)?;
                }
                b'h' => self.recall::<1>()?,
                b'j' => self.recall::<4>()?,
                b'q' => self.remember::<1>()?,
                b'r' => self.remember::<4>()?,
                0x94 => {
                    let (place, top) = (self.memo.len() as u32, self.top()?);
                    self.memo.insert(place, top);
                }
                b'c' => {
                    let name = format!("{}.{}", self.line()?, self.line()?);
                    self.global(name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Node::Text(module), Node::Text(name)) = (self.node(module), self.node(name)) else {
                        return self.refused("a global whose name is no text");
                    };
                    let name = format!("{module}.{name}");
                    self.global(name)?;
                }
                b'R' | 0x81 => {
                    let (arguments, what) = (self.pop()?, self.pop()?);
                    self.make(what, arguments)?;
                }
                b'b' => self.build()?,
                b'Q' => self.storage()?,
                _ => return self.refused(format!("instruction 0x{opcode:02x}, which no dictionary of tensors needs")),
            }
        }
    }

    fn inert(&mut self) -> Step<()> {
        self.push(Node::Object { state: None })
    }

    fn recall<const N: usize>(&mut self) -> Step<()> {
        let place = self.number::<N>()? as u32;
        match self.memo.get(&place) {
            Some(&id) => {
                self.stack.push(id);
                Ok(())
            }
            None => self.refused(format!("memo {place}, which was never written")),
        }
    }

    fn remember<const N: usize>(&mut self) -> Step<()> {
        let (place, top) = (self.number::<N>()? as u32, self.top()?);
        self.memo.insert(place, top);
        Ok(())
    }

    fn extend(&mut self, items: Vec<Id>) -> Step<()> {
        let list = self.top()?;
        match &mut self.nodes[list as usize] {
            Node::List(list) => list.extend(items),
            Node::Object { .. } => {}
            _ => return self.refused("items are added to what is no list"),
        }
        Ok(())
    }

    fn insert(&mut self, items: &[Id]) -> Step<()> {
        if !items.len().is_multiple_of(2) {
            return self.refused("a key without a value");
        }
        let dict = self.top()?;
        match &mut self.nodes[dict as usize] {
            Node::Dict(dict) => dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            Node::Object { .. } => {}
            _ => return self.refused("entries are added to what is no dictionary"),
        }
        Ok(())
    }

    fn global(&mut self, name: String) -> Step<()> {
        let inert = INERT.iter().any(|library| name.starts_with(library)) || INERT_NAMES.contains(&name.as_str());
        if !inert {
            return self.refused(format!(
                "it names `{name}`, which is neither a tensor nor a class of the libraries that write checkpoints"
            ));
        }
        self.push(Node::Global(name))
    }

    /// What a call would have made.
    fn make(&mut self, what: Id, arguments: Id) -> Step<()> {
        let Node::Global(name) = self.node(what) else { return self.refused("a call of what is no name") };
        let Node::List(arguments) = self.node(arguments) else { return self.refused("a call without arguments") };
        match name.as_str() {
            REBUILD => {
                let info = self.tensor(arguments)?;
                self.push(Node::Tensor(info))
            }
            PARAMETER => match arguments.first() {
                Some(&data) => {
                    self.stack.push(data);
                    Ok(())
                }
                None => self.refused("a parameter without its tensor"),
            },
            ORDERED if arguments.is_empty() => self.push(Node::Dict(Vec::new())),
            SIZE => match arguments.first() {
                Some(&shape) => {
                    self.stack.push(shape);
                    Ok(())
                }
                None => self.push(Node::List(Vec::new())),
            },
            _ => self.inert(),
        }
    }

    /// Gives an object its state. The attributes of a dictionary or a tensor are nothing that is needed.
    fn build(&mut self) -> Step<()> {
        let given = self.pop()?;
        let object = self.top()?;
        match &mut self.nodes[object as usize] {
            Node::Object { state } => *state = Some(given),
            Node::Dict(_) | Node::Tensor(_) => {}
            _ => return self.refused("a state is given to what is no object"),
        }
        Ok(())
    }

    /// A storage: `("storage", kind, key, location, elements)`.
    fn storage(&mut self) -> Step<()> {
        let id = self.pop()?;
        let refused = "a persistent id that is no storage";
        let Node::List(parts) = self.node(id) else { return self.refused(refused) };
        let [tag, kind, key, _, len] = parts[..] else { return self.refused(refused) };
        let node = match (self.node(tag), self.node(kind), self.node(key), self.node(len)) {
            (Node::Text(tag), Node::Global(kind), Node::Text(key), &Node::Int(len)) if tag == "storage" && len >= 0 => {
                let kind = kind.rsplit('.').next().unwrap_or_default().to_owned();
                Node::Storage { kind, key: key.clone(), len: len as usize }
            }
            _ => return self.refused(refused),
        };
        self.push(node)
    }

    /// `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`.
    fn tensor(&self, arguments: &[Id]) -> Step<TensorInfo> {
        let &[storage, offset, shape, strides, ..] = arguments else {
            return self.refused("a tensor of fewer than four parts");
        };
        let size = |id: Id| match *self.node(id) {
            Node::Int(n) => usize::try_from(n).ok(),
            _ => None,
        };
        let sizes = |id: Id| match self.node(id) {
            Node::List(sizes) => sizes.iter().map(|&id| size(id)).collect::<Option<Vec<usize>>>(),
            _ => None,
        };
        let (Node::Storage { kind, key, len }, Some(offset), Some(shape), Some(strides)) =
            (self.node(storage), size(offset), sizes(shape), sizes(strides))
        else {
            return self.refused("a tensor whose parts are not a storage, an offset, a shape and strides");
        };
        if shape.len() != strides.len() {
            return self.refused("a tensor with as many strides as it has no dimensions");
        }
        Ok(TensorInfo { shape, storage: kind.clone(), key: key.clone(), len: *len, offset, strides })
    }
}

/// A whole number in two's complement; longer ones, such as seeds, are nothing that is needed.
fn long(bytes: &[u8]) -> Node {
    if bytes.len() > 8 {
        return Node::Object { state: None };
    }
    let sign = if bytes.last().is_some_and(|&top| top >= 0x80) { -1 } else { 0 };
    Node::Int(bytes.iter().rev().fold(sign, |n: i64, &byte| n << 8 | i64::from(byte)))
}
