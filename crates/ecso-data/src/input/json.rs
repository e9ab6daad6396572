//! JSON lines, and arrays of any length: an array is read by a thread of its own that hands over one element after the other.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
    sync::mpsc::{SyncSender, sync_channel},
};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::Value;

use super::{InputError, Records};

pub(super) fn lines(path: &Path) -> Result<Records, InputError> {
    let file = File::open(path).map_err(|error| InputError::new(path, error))?;
    let lines = BufReader::new(file).lines();
    let filled = lines.filter(|line| !line.as_ref().is_ok_and(|line| line.trim().is_empty()));
    Ok(Box::new(filled.map(|line| {
        let line = line.map_err(|error| error.to_string())?;
        serde_json::from_str(&line).map_err(|error| format!("not JSON: {error}"))
    })))
}

pub(super) fn array(path: &Path) -> Result<Records, InputError> {
    let file = File::open(path).map_err(|error| InputError::new(path, error))?;
    let (sender, elements) = sync_channel(16);
    let reader = std::thread::Builder::new().name("json".into()).spawn(move || {
        let mut text = serde_json::Deserializer::from_reader(BufReader::new(file));
        if let Err(error) = Elements(&sender).deserialize(&mut text) {
            // Nobody listens any more, or this is told as the last row.
            let _ = sender.send(Err(format!("not a JSON array of rows: {error}")));
        }
    });
    reader.map_err(|error| InputError::new(path, error))?;
    Ok(Box::new(elements.into_iter()))
}

/// Hands over the elements of an array.
struct Elements<'a>(&'a SyncSender<Result<Value, String>>);

impl<'de> DeserializeSeed<'de> for Elements<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        while let Some(element) = elements.next_element()? {
            if self.0.send(Ok(element)).is_err() {
                break;
            }
        }
        while elements.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}
