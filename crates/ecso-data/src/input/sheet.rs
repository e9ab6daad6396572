//! Reads CSV and TSV. Quotes are checked in addition: an unclosed quote would pull the following
//! rows into its cell.

use std::{
    io::{self, BufRead, Chain, Cursor, Read, Take},
    path::Path,
};

use csv::ByteRecord;
use ecso::Cause;

use super::{
    InputError, Records, at,
    cell::{Cell, Fields},
    cut_short,
    mapping::Mapping,
    text::{self, MAX_ROW, Text, not_utf8},
};
use crate::row::shorten;

/// Opens a file and returns its records. `default` is the delimiter that the extension implies.
pub(super) fn records(
    path: &Path,
    default: u8,
    mapping: &Mapping,
    has_query: bool,
) -> Result<Records, InputError> {
    let mut table = Table::open(path, default)?;
    let mut header = ByteRecord::new();
    let text = table.read(&mut header).map_err(|error| InputError::from_error(path, error))?;
    let text = text.map(|(_, text)| text).unwrap_or_default();
    check_quotes(&text, table.delimiter)
        .map_err(|cause| InputError::new(path, at("the first line", cause)))?;
    for name in &header {
        let name = std::str::from_utf8(name)
            .map_err(|error| InputError::new(path, prefix_is("the first line", not_utf8(error))))?;
        let name = name.trim().to_owned();
        if !name.is_empty() && table.names.contains(&name) {
            let problem = format!("two columns are named `{}`; rename one", shorten(&name));
            return Err(InputError::new(path, problem));
        }
        table.names.push(name);
    }
    mapping.check_table(&table.names, has_query).map_err(|cause| InputError::new(path, cause))?;
    Ok(Box::new(table))
}

/// The number of rows.
pub(super) fn count(path: &Path, default: u8) -> Option<u64> {
    let mut table = Table::open(path, default).ok()?;
    let mut record = ByteRecord::new();
    let mut rows = 0_u64;
    while table.advance(&mut record).ok()? {
        rows += 1;
    }
    Some(rows.saturating_sub(1))
}

/// Detects the delimiter of a header: the default, unless only another one occurs.
fn detect_delimiter(header: &[u8], default: u8) -> u8 {
    let count = |delimiter: u8| header.split(|byte| *byte == delimiter).count() - 1;
    match [b',', b';', b'\t', b'|'].into_iter().max_by_key(|delimiter| count(*delimiter)) {
        Some(most_frequent) if count(default) == 0 && count(most_frequent) > 0 => most_frequent,
        _ => default,
    }
}

struct Table {
    cells: csv::Reader<Take<Chain<Cursor<Vec<u8>>, Text>>>,
    /// The same file as raw text, read in step with `cells`.
    raw: Text,
    /// The number of bytes of `cells` that were read.
    offset: u64,
    /// The current line, from 1.
    line: usize,
    names: Vec<String>,
    delimiter: u8,
    ended: bool,
}

impl Table {
    fn open(path: &Path, default: u8) -> Result<Self, InputError> {
        let failed = |error: io::Error| InputError::from_error(path, error);
        let (mut text, mut raw) = (text::open(path)?, text::open(path)?);
        let mut first = Vec::new();
        text.by_ref().take(1 << 20).read_until(b'\n', &mut first).map_err(failed)?;
        let line = first.strip_suffix(b"\n").unwrap_or(&first);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        // Excel may declare the delimiter in the first line.
        let declared =
            line.strip_prefix(b"sep=").filter(|rest| rest.len() == 1).map(|rest| rest[0]);
        let delimiter = declared.unwrap_or_else(|| detect_delimiter(line, default));
        if declared.is_some() {
            raw.read_until(b'\n', &mut Vec::new()).map_err(failed)?;
            first.clear();
        }
        let text = Cursor::new(first).chain(text).take(0);
        let cells = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(delimiter)
            .from_reader(text);
        let line = if declared.is_some() { 2 } else { 1 };
        Ok(Self { cells, raw, offset: 0, line, names: Vec::new(), delimiter, ended: false })
    }

    /// Reads the next record. Returns false at the end of the file.
    fn advance(&mut self, record: &mut ByteRecord) -> Result<bool, csv::Error> {
        self.cells.get_mut().set_limit(MAX_ROW as u64);
        let has_record = self.cells.read_byte_record(record)?;
        if self.cells.get_ref().limit() == 0 {
            return Err(io::Error::other(format!("a row has more than {MAX_ROW} bytes")).into());
        }
        Ok(has_record)
    }

    /// Reads the next record. Returns its line and its raw text, or none at the end of the file.
    fn read(&mut self, record: &mut ByteRecord) -> Result<Option<(usize, Vec<u8>)>, csv::Error> {
        let has_record = self.advance(record)?;
        let (mut text, end) = (Vec::new(), self.cells.position().byte());
        self.raw.by_ref().take(end - self.offset).read_to_end(&mut text)?;
        self.offset = end;
        let lines = |text: &[u8]| text.split(|byte| *byte == b'\n').count() - 1;
        let blank = text.iter().position(|byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(0);
        let first_line = self.line + lines(&text[..blank]);
        self.line += lines(&text);
        Ok(has_record.then_some((first_line, text)))
    }

    fn row(&self, record: &ByteRecord, text: &[u8]) -> Result<Cell, Cause> {
        check_quotes(text, self.delimiter)?;
        if record.len() != self.names.len() {
            let (cells, columns) = (record.len(), self.names.len());
            return Err(format!("{cells} cells, but the header has {columns} columns").into());
        }
        let mut fields = Fields::new();
        for (name, cell) in self.names.iter().zip(record).filter(|(name, _)| !name.is_empty()) {
            let text = std::str::from_utf8(cell).map_err(|error| {
                prefix_is(&format!("column `{}`", shorten(name)), not_utf8(error))
            })?;
            let cell = if text.is_empty() { Cell::Null } else { Cell::Text(text.to_owned()) };
            fields.insert(name.clone(), cell);
        }
        Ok(Cell::Fields(fields))
    }
}

impl Iterator for Table {
    type Item = Result<Cell, Cause>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let mut record = ByteRecord::new();
        Some(match self.read(&mut record) {
            Ok(None) => return None,
            Ok(Some((line, text))) => {
                self.row(&record, &text).map_err(|cause| at(&format!("line {line}"), cause))
            }
            Err(error) => {
                self.ended = true;
                let place = format!("line {}: the file can't be read any further", self.line);
                Err(cut_short(at(&place, Cause::from_error(error))))
            }
        })
    }
}

/// Prefixes a cause with its subject.
fn prefix_is(subject: &str, cause: Cause) -> Cause {
    Cause::new(format!("{subject} is {cause}"), cause)
}

/// Checks that every quote that opens a cell also ends it.
fn check_quotes(row: &[u8], delimiter: u8) -> Result<(), Cause> {
    let row = row.trim_ascii_start();
    let lines = row.trim_ascii_end().split(|byte| *byte == b'\n').count() - 1;
    let message = |problem: &str| {
        format!("{problem}; the cell spans {lines} more lines. Double the quotes in cells: \"\"")
    };
    let (mut index, mut starts_cell, mut in_quotes) = (0, true, false);
    while let Some(byte) = row.get(index) {
        let next = row.get(index + 1);
        match byte {
            b'"' if in_quotes && next == Some(&b'"') => index += 1,
            b'"' if in_quotes => {
                in_quotes = false;
                let rest = &row[index + 1..];
                let blank = rest
                    .iter()
                    .take_while(|byte| matches!(byte, b' ' | b'\t') && **byte != delimiter)
                    .count();
                match rest.get(blank) {
                    None | Some(b'\r' | b'\n') => {}
                    Some(byte) if *byte == delimiter => {}
                    Some(_) => {
                        return Err(message("text follows the closing quote of a cell").into());
                    }
                }
            }
            b'"' if starts_cell => in_quotes = true,
            _ => {}
        }
        starts_cell = !in_quotes && (*byte == delimiter || *byte == b'\n');
        index += 1;
    }
    if in_quotes {
        Err(cut_short(message("the opening quote of a cell is never closed")))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        std::fs::write(&path, text).unwrap();
        let describe = |row: Result<Cell, Cause>| match row {
            Ok(cell) => {
                let text = |name| cell.get(name).and_then(Cell::text).unwrap_or("-").to_owned();
                format!("{} {}", text("a"), text("b"))
            }
            Err(cause) => cause.to_string(),
        };
        records(&path, b',', &Mapping::default(), true).unwrap().map(describe).collect()
    }

    #[test]
    fn common_dialects_are_read() {
        for text in [
            "a,b\n1,\"x, \"\"y\"\"\nz\"\n2,w\n",
            "\u{feff}a,b\r\n1,\"x, \"\"y\"\"\nz\"\r\n\r\n2,w",
            "a;b\n1;\"x, \"\"y\"\"\nz\"\n2;w\n",
            "sep=;\r\na;b\r\n1;\"x, \"\"y\"\"\nz\"\r\n2;w\r\n",
            "a\tb\n1\t\"x, \"\"y\"\"\nz\" \n2\tw\n",
            ",a,b\n0,1,\"x, \"\"y\"\"\nz\"\n1,2,w\n",
        ] {
            let read = read(text.as_bytes());
            assert!(
                read.len() == 2 && read[0].trim_end() == "1 x, \"y\"\nz" && read[1] == "2 w",
                "{text}: {read:?}"
            );
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("rows.csv");
            std::fs::write(&path, text).unwrap();
            assert_eq!(count(&path, b','), Some(2), "{text}");
        }
    }

    #[test]
    fn a_broken_row_does_not_affect_the_next() {
        for (text, says) in [
            (&b"a,b\n1,\xe4\n2,w\n"[..], "line 2: column `b` is not UTF-8"),
            (b"a,b\n1\n2,w\n", "1 cells"),
            (b"a,b\n1,\"x\ny\",\"\n2,w\n", "never closed"),
            (b"a,b\n1,\"he said \\\"no\\\"\"\n2,w\n", "text follows the closing quote"),
            (b"a,b\n\"1,x\n3,\"y\",z\n2,w\n", "spans 1 more lines"),
            (b"sep=;\r\na;b\r\n\r\n3\r\n2;w\r\n", "line 4: 1 cells"),
        ] {
            let read = read(text);
            assert!(read[0].contains(says), "{read:?}");
            assert!(says == "never closed" || read.last().unwrap() == "2 w", "{read:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        for (text, says) in [
            (&b"a,a\n1,2\n"[..], "two columns"),
            (b"\xff\xfea\0", "UTF-16"),
            (b"\xe4,b\n", "not UTF-8"),
            (b"a,\"b\n1,2\n", "never closed"),
        ] {
            let path = folder.path().join("rows.csv");
            std::fs::write(&path, text).unwrap();
            let error = records(&path, b',', &Mapping::default(), true).err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "[a,;\"\\\\ \n\r]{0,40}") {
            let _ = read(format!("a,b\n{text}").as_bytes());
        }
    }
}
