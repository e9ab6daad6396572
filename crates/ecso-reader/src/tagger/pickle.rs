//! Reads the tensors in a file of torch's old format: pickles that describe them, then the numbers.
//!
//! A pickle is a program. Only the instructions that such files consist of are accepted, and of
//! callables only tensors, their storages and dictionaries. Everything else is refused, and nothing
//! is ever executed.

use std::{collections::BTreeMap, rc::Rc};

use super::TaggerError;

/// The beginning of such a file: a pickle of torch's magic number.
const MAGIC: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
/// The version of the format.
const VERSION: i64 = 1001;
/// Most instructions of a file; one with 300 tensors has 12,000.
const MAX_INSTRUCTIONS: usize = 100_000;

/// The tensors of a file.
pub(super) struct Tensors<'a> {
    tensors: BTreeMap<&'a str, Tensor<'a>>,
    storages: BTreeMap<&'a str, &'a [u8]>,
}

/// A view of a storage.
#[derive(Clone)]
struct Tensor<'a> {
    storage: &'a str,
    /// Its start in the storage, in elements, as the strides.
    offset: usize,
    sizes: Vec<usize>,
    /// The distance of neighbours along each axis. The axes may be stored in any order.
    strides: Vec<usize>,
}

impl<'a> Tensors<'a> {
    pub(super) fn read(file: &'a [u8]) -> Result<Self, TaggerError> {
        let rest = file
            .strip_prefix(MAGIC)
            .ok_or_else(|| TaggerError::Package("it is not a file of torch".into()))?;
        let mut machine =
            Machine { rest, length: rest.len(), instructions: 0, storages: BTreeMap::new() };
        if !matches!(machine.pickle()?, Value::Integer(VERSION)) {
            return Err(machine.refuse("another version of the format"));
        }
        machine.pickle()?; // About the computer that wrote the file.
        let Value::Tensors(tensors) = machine.pickle()? else {
            return Err(machine.refuse("no tensors"));
        };
        let Value::Texts(keys) = machine.pickle()? else {
            return Err(machine.refuse("no list of storages"));
        };
        let mut storages = BTreeMap::new();
        for key in keys {
            let Some(storage) = machine.storages.remove(key) else {
                return Err(machine.refuse("an unknown storage"));
            };
            let count = u64::from_le_bytes(machine.array()?);
            if usize::try_from(count) != Ok(storage.count) {
                return Err(machine.refuse("a storage of another length"));
            }
            let bytes = machine.take(storage.count.saturating_mul(storage.width))?;
            if storage.width == FLOAT {
                storages.insert(key, bytes);
            }
        }
        if !machine.rest.is_empty() || !machine.storages.is_empty() {
            return Err(machine.refuse("not the end that was expected"));
        }
        Ok(Self { tensors, storages })
    }

    /// The elements of a tensor in row-major order. Its shape must be `shape`.
    pub(super) fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, TaggerError> {
        let tensor = self.tensors.get(name).filter(|tensor| tensor.sizes == shape);
        let tensor = tensor.ok_or_else(|| {
            TaggerError::Package(format!("it has no {name} of shape {shape:?}").into())
        })?;
        let storage = self.storages.get(tensor.storage).copied().unwrap_or_default();
        let (numbers, _) = storage.as_chunks::<FLOAT>();
        let number = |mut nth: usize| {
            let mut at = tensor.offset;
            for (size, stride) in tensor.sizes.iter().zip(&tensor.strides).rev() {
                at = at.saturating_add((nth % size).saturating_mul(*stride));
                nth /= size;
            }
            numbers.get(at).map(|bytes| f32::from_le_bytes(*bytes))
        };
        let floats: Option<Vec<f32>> = (0..shape.iter().product()).map(number).collect();
        floats
            .ok_or_else(|| TaggerError::Package(format!("{name} is not within its storage").into()))
    }
}

/// Bytes of a float.
const FLOAT: usize = 4;
/// Bytes of an integer.
const LONG: usize = 8;

/// The declared content of a storage.
struct Storage {
    /// Bytes of each element.
    width: usize,
    count: usize,
}

/// A value on the stack. Nesting is limited, so that no value is deep.
#[derive(Clone)]
enum Value<'a> {
    Mark,
    Nothing,
    Truth,
    Integer(i64),
    Text(&'a str),
    Tuple(Rc<[Value<'a>]>),
    /// A list. Only lists of texts are accepted.
    Texts(Vec<&'a str>),
    /// A dictionary. Everything in it except tensors is dropped.
    Tensors(BTreeMap<&'a str, Tensor<'a>>),
    /// The callables.
    Dictionary,
    Rebuild,
    /// The type of a storage: bytes of an element.
    Kind(usize),
    Storage(&'a str),
    Tensor(Rc<Tensor<'a>>),
}

struct Machine<'a> {
    rest: &'a [u8],
    length: usize,
    instructions: usize,
    storages: BTreeMap<&'a str, Storage>,
}

impl<'a> Machine<'a> {
    fn refuse(&self, why: &str) -> TaggerError {
        let place = MAGIC.len() + self.length - self.rest.len();
        TaggerError::Package(format!("{why}, at byte {place}").into())
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], TaggerError> {
        let (taken, rest) =
            self.rest.split_at_checked(count).ok_or_else(|| self.refuse("it is cut off"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], TaggerError> {
        let (taken, rest) =
            self.rest.split_first_chunk().ok_or_else(|| self.refuse("it is cut off"))?;
        self.rest = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Result<u8, TaggerError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn length(&mut self) -> Result<usize, TaggerError> {
        Ok(usize::try_from(u32::from_le_bytes(self.array()?)).unwrap_or(usize::MAX))
    }

    fn text(&self, bytes: &'a [u8]) -> Result<&'a str, TaggerError> {
        std::str::from_utf8(bytes).map_err(|_| self.refuse("a text that is not UTF-8"))
    }

    fn line(&mut self) -> Result<&'a str, TaggerError> {
        let end = self
            .rest
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or_else(|| self.refuse("it is cut off"))?;
        let line = self.take(end + 1)?;
        self.text(&line[..end])
    }

    /// Executes one pickle to its end, and returns its value.
    fn pickle(&mut self) -> Result<Value<'a>, TaggerError> {
        let mut stack = Stack(Vec::new());
        let mut remembered = BTreeMap::new();
        loop {
            self.instructions += 1;
            if self.instructions > MAX_INSTRUCTIONS {
                return Err(self.refuse("too many instructions"));
            }
            let instruction = self.byte()?;
            let done: Option<()> = match instruction {
                // The start, with the protocol version.
                0x80 => (self.byte()? == 2).then_some(()),
                b'.' => return stack.pop().ok_or_else(|| self.refuse("a pickle that is nothing")),
                b'(' => stack.push(Value::Mark),
                b'N' => stack.push(Value::Nothing),
                0x88 | 0x89 => stack.push(Value::Truth),
                b'K' => {
                    let integer = self.byte()?;
                    stack.push(Value::Integer(integer.into()))
                }
                b'M' => {
                    let integer = u16::from_le_bytes(self.array()?);
                    stack.push(Value::Integer(integer.into()))
                }
                b'J' => {
                    let integer = i32::from_le_bytes(self.array()?);
                    stack.push(Value::Integer(integer.into()))
                }
                b'X' => {
                    let length = self.length()?;
                    let bytes = self.take(length)?;
                    stack.push(Value::Text(self.text(bytes)?))
                }
                b'}' => stack.push(Value::Tensors(BTreeMap::new())),
                b']' => stack.push(Value::Texts(Vec::new())),
                b')' => stack.push(Value::Tuple(Rc::default())),
                0x85 => stack.pop().and_then(|only| stack.tuple(vec![only])),
                0x86 => stack
                    .pop()
                    .zip(stack.pop())
                    .and_then(|(last, first)| stack.tuple(vec![first, last])),
                b't' => stack.since_mark().and_then(|values| stack.tuple(values)),
                b'q' => {
                    let place = usize::from(self.byte()?);
                    stack.last().map(|value| remember(&mut remembered, place, value))
                }
                b'r' => {
                    let place = self.length()?;
                    stack.last().map(|value| remember(&mut remembered, place, value))
                }
                b'h' => {
                    let place = usize::from(self.byte()?);
                    remembered.get(&place).and_then(|value| stack.push(value.clone()))
                }
                b'j' => {
                    let place = self.length()?;
                    remembered.get(&place).and_then(|value| stack.push(value.clone()))
                }
                b'c' => callable(self.line()?, self.line()?).and_then(|value| stack.push(value)),
                b'R' => stack.call(),
                b'Q' => stack
                    .pop()
                    .and_then(|value| self.storage(&value))
                    .and_then(|value| stack.push(value)),
                b's' => {
                    stack.pop().zip(stack.pop()).and_then(|(value, key)| stack.set(&[key, value]))
                }
                b'u' => stack.since_mark().and_then(|pairs| stack.set(&pairs)),
                b'e' => stack.since_mark().and_then(|values| stack.append(&values)),
                // Attributes of a dictionary, which are dropped.
                b'b' => stack.pop().map(drop),
                _ => None,
            };
            done.ok_or_else(|| {
                self.refuse(&format!(
                    "an instruction (0x{instruction:02x}) that is not allowed here"
                ))
            })?;
        }
    }

    /// The storage of (`"storage"`, type, name, device, number of elements, nothing).
    fn storage(&mut self, value: &Value<'a>) -> Option<Value<'a>> {
        let Value::Tuple(parts) = value else { return None };
        let [
            Value::Text("storage"),
            Value::Kind(width),
            Value::Text(key),
            _,
            Value::Integer(count),
            Value::Nothing,
        ] = **parts
        else {
            return None;
        };
        let count = usize::try_from(count).ok()?;
        let known = self.storages.insert(key, Storage { width, count });
        known
            .is_none_or(|known| known.width == width && known.count == count)
            .then_some(Value::Storage(key))
    }
}

/// Puts a value in the memo. Lists and dictionaries are left out, since they still change.
fn remember<'a>(remembered: &mut BTreeMap<usize, Value<'a>>, place: usize, value: &Value<'a>) {
    if !matches!(value, Value::Texts(_) | Value::Tensors(_)) {
        remembered.insert(place, value.clone());
    }
}

fn callable<'a>(module: &str, name: &str) -> Option<Value<'a>> {
    match (module, name) {
        ("collections", "OrderedDict") => Some(Value::Dictionary),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Value::Rebuild),
        ("torch", "FloatStorage") => Some(Value::Kind(FLOAT)),
        ("torch", "LongStorage") => Some(Value::Kind(LONG)),
        _ => None,
    }
}

/// The stack of a pickle. Its functions return `None` if an instruction does not fit the values.
struct Stack<'a>(Vec<Value<'a>>);

impl<'a> Stack<'a> {
    #[expect(clippy::unnecessary_wraps, reason = "as the other instructions")]
    fn push(&mut self, value: Value<'a>) -> Option<()> {
        self.0.push(value);
        Some(())
    }

    fn pop(&mut self) -> Option<Value<'a>> {
        self.0.pop()
    }

    fn last(&self) -> Option<&Value<'a>> {
        self.0.last()
    }

    fn since_mark(&mut self) -> Option<Vec<Value<'a>>> {
        let mark = self.0.iter().rposition(|value| matches!(value, Value::Mark))?;
        let values = self.0.split_off(mark + 1);
        self.0.pop();
        Some(values)
    }

    fn tuple(&mut self, values: Vec<Value<'a>>) -> Option<()> {
        let deep = |value: &Value| match value {
            Value::Tuple(inner) => inner.iter().any(|value| matches!(value, Value::Tuple(_))),
            _ => false,
        };
        if values.iter().any(deep) { None } else { self.push(Value::Tuple(values.into())) }
    }

    fn call(&mut self) -> Option<()> {
        let (arguments, called) = self.pop().zip(self.pop())?;
        let Value::Tuple(arguments) = arguments else { return None };
        match (called, &*arguments) {
            (Value::Dictionary, []) => self.push(Value::Tensors(BTreeMap::new())),
            (
                Value::Rebuild,
                [
                    Value::Storage(storage),
                    Value::Integer(offset),
                    Value::Tuple(sizes),
                    Value::Tuple(strides),
                    _,
                    _,
                ],
            ) => {
                let (offset, sizes, strides) =
                    (usize::try_from(*offset).ok()?, numbers(sizes)?, numbers(strides)?);
                let even = sizes.len() == strides.len();
                let tensor = Tensor { storage, offset, sizes, strides };
                if even { self.push(Value::Tensor(Rc::new(tensor))) } else { None }
            }
            _ => None,
        }
    }

    fn set(&mut self, pairs: &[Value<'a>]) -> Option<()> {
        let Some(Value::Tensors(dictionary)) = self.0.last_mut() else { return None };
        let (pairs, []) = pairs.as_chunks::<2>() else { return None };
        for pair in pairs {
            if let [Value::Text(name), Value::Tensor(tensor)] = pair {
                dictionary.insert(name, Tensor::clone(tensor));
            }
        }
        Some(())
    }

    fn append(&mut self, values: &[Value<'a>]) -> Option<()> {
        let Some(Value::Texts(texts)) = self.0.last_mut() else { return None };
        let new = values
            .iter()
            .map(|value| if let Value::Text(text) = value { Some(*text) } else { None });
        texts.extend(new.collect::<Option<Vec<_>>>()?);
        Some(())
    }
}

fn numbers(values: &[Value]) -> Option<Vec<usize>> {
    let number = |value: &Value| {
        if let Value::Integer(number) = value { usize::try_from(*number).ok() } else { None }
    };
    values.iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn integer(value: u16) -> Vec<u8> {
        [b"M".as_slice(), &value.to_le_bytes()].concat()
    }

    fn text(text: &str) -> Vec<u8> {
        [b"X".as_slice(), &u32::try_from(text.len()).unwrap().to_le_bytes(), text.as_bytes()]
            .concat()
    }

    fn tuple(values: &[u16]) -> Vec<u8> {
        [b"(".to_vec(), values.iter().flat_map(|value| integer(*value)).collect(), b"t".to_vec()]
            .concat()
    }

    /// A file with one tensor, as torch writes it.
    fn file(sizes: &[u16], strides: &[u16], numbers: &[f32]) -> Vec<u8> {
        let count = u16::try_from(numbers.len()).unwrap();
        [
            MAGIC.to_vec(),
            b"\x80\x02M\xe9\x03.".to_vec(),
            b"\x80\x02}q\x00.".to_vec(),
            b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(".to_vec(),
            text("kernel"),
            b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
            text("storage"),
            b"ctorch\nFloatStorage\n".to_vec(),
            [text("7"), text("cpu"), integer(count), b"NtQK\x00".to_vec()].concat(),
            [tuple(sizes), tuple(strides), b"\x89h\x00)RtRu.".to_vec()].concat(),
            [b"\x80\x02](".to_vec(), text("7"), b"e.".to_vec()].concat(),
            u64::from(count).to_le_bytes().to_vec(),
            numbers.iter().flat_map(|number| number.to_le_bytes()).collect(),
        ]
        .concat()
    }

    #[test]
    fn strides_are_applied() {
        let numbers = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        for (strides, expected) in [([3, 1], numbers), ([1, 2], [1.0, 3.0, 5.0, 2.0, 4.0, 6.0])] {
            let file = file(&[2, 3], &strides, &numbers);
            let tensors = Tensors::read(&file).unwrap();
            assert_eq!(tensors.floats("kernel", &[2, 3]).unwrap(), expected);
            assert!(
                tensors.floats("kernel", &[3, 2]).is_err()
                    && tensors.floats("other", &[2, 3]).is_err()
            );
        }
        let beyond = file(&[2, 3], &[9, 1], &numbers);
        assert!(Tensors::read(&beyond).unwrap().floats("kernel", &[2, 3]).is_err());
    }

    #[test]
    fn files_without_tensors_are_refused() {
        let good = file(&[2], &[1], &[1.0, 2.0]);
        let at = good.windows(8).position(|bytes| bytes == b"ctorch._").unwrap();
        let system: Vec<u8> = [&good[..at], b"cposix\nsystem\n", &good[at..]].concat();
        let refused = |file: &[u8]| Tensors::read(file).err().unwrap().to_string();
        assert!(refused(&system).contains("an instruction (0x63) that is not allowed here"));
        let deep = [MAGIC, b"\x80\x02M\xe9\x03.\x80\x02N", &vec![0x85; 90_000]].concat();
        assert!(refused(&deep).contains("an instruction (0x85)"));
        let long = [MAGIC, &vec![b'N'; 200_000]].concat();
        assert!(refused(&long).contains("too many instructions"));
        assert!(refused(b"GIF89a").contains("not a file of torch"));
    }

    #[test]
    fn a_cut_file_is_refused() {
        let file = file(&[2, 3], &[1, 2], &[1.0; 6]);
        for length in 0..file.len() {
            assert!(Tensors::read(&file[..length]).is_err(), "{length}");
        }
    }

    proptest! {
        #[test]
        fn no_file_panics(changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6)) {
            let mut file = file(&[2, 3], &[1, 2], &[1.0; 6]);
            for (place, byte) in changes {
                let place = place.index(file.len());
                file[place] = byte;
            }
            let _ = Tensors::read(&file).and_then(|tensors| tensors.floats("kernel", &[2, 3]));
        }
    }
}
