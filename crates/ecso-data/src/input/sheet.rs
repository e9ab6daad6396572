//! CSV and TSV. What stands between quotes is looked at once more: a quote that isn't closed would take the rows behind it into its cell.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use ecso::Cause;

use super::{
    InputError, Records, at,
    cell::{Cell, Fields},
    record::Mapping,
    text::{self, not_utf8},
};
use crate::row::cut;

/// Rows of a table of text.
pub(super) fn records(path: &Path, usual: u8, mapping: &Mapping) -> Result<Records, InputError> {
    let (mut file, _) = text::open(path)?;
    let (mut raw, _) = text::open(path)?;
    let begin = file.fill_buf().map_err(|error| InputError::of(path, error))?;
    let line = begin.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii_end().to_vec();
    // Excel may say in a line of its own what it separates cells by.
    let said = line.strip_prefix(b"sep=").filter(|rest| rest.len() == 1).map(|rest| rest[0]);
    if said.is_some() {
        for text in [&mut file, &mut raw] {
            text.read_until(b'\n', &mut Vec::new()).map_err(|error| InputError::of(path, error))?;
        }
    }
    let delimiter = said.unwrap_or_else(|| delimiter(&line, usual));
    let mut table = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(file);
    let header = table.byte_headers().map_err(|error| InputError::of(path, error))?.clone();
    let mut names: Vec<String> = Vec::with_capacity(header.len());
    for name in &header {
        let name = std::str::from_utf8(name)
            .map_err(|error| InputError::new(path, being("its first line", not_utf8(error))))?;
        let name = name.trim().to_owned();
        if !name.is_empty() && names.contains(&name) {
            return Err(InputError::new(
                path,
                format!("two columns are called `{}`; give one another name", cut(&name)),
            ));
        }
        names.push(name);
    }
    mapping.fits(names.iter().map(String::as_str), &[]).map_err(|cause| InputError::new(path, cause))?;
    Ok(Box::new(Table { cells: table, raw, at: 0, names, delimiter, ended: false }))
}

/// How many rows there are.
pub(super) fn count(path: &Path) -> Option<u64> {
    let (file, _) = text::open(path).ok()?;
    let mut records = csv::ReaderBuilder::new().flexible(true).from_reader(file);
    Some(records.byte_records().count() as u64)
}

/// What separates the cells of a header: the usual, if it is there.
fn delimiter(header: &[u8], usual: u8) -> u8 {
    let count = |delimiter: u8| header.split(|byte| *byte == delimiter).count() - 1;
    match [b',', b';', b'\t', b'|'].into_iter().max_by_key(|delimiter| count(*delimiter)) {
        Some(most) if count(usual) == 0 && count(most) > 0 => most,
        _ => usual,
    }
}

struct Table {
    cells: csv::Reader<BufReader<File>>,
    /// The same text, as far as it was read.
    raw: BufReader<File>,
    at: u64,
    names: Vec<String>,
    delimiter: u8,
    ended: bool,
}

impl Table {
    fn row(&mut self, record: &csv::ByteRecord, begin: u64) -> Result<Cell, Cause> {
        // The header and blank lines stand between this row and the last.
        let end = self.cells.position().byte();
        let read = |raw: &mut BufReader<File>, bytes: u64| {
            let mut text = Vec::new();
            raw.take(bytes).read_to_end(&mut text).map(|_| text).map_err(Cause::of)
        };
        read(&mut self.raw, begin.saturating_sub(self.at))?;
        let text = read(&mut self.raw, end.saturating_sub(begin))?;
        self.at = end;
        quotes(&text, self.delimiter)?;
        if record.len() != self.names.len() {
            return Err(
                format!("{} cells, where the first line names {} columns", record.len(), self.names.len()).into()
            );
        }
        let mut fields = Fields::new();
        for (name, cell) in self.names.iter().zip(record).filter(|(name, _)| !name.is_empty()) {
            let text = std::str::from_utf8(cell)
                .map_err(|error| being(&format!("column `{}`", cut(name)), not_utf8(error)))?;
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
        let mut record = csv::ByteRecord::new();
        let (begin, line) = (self.cells.position().byte(), self.cells.position().line());
        let row = match self.cells.read_byte_record(&mut record) {
            Ok(false) => return None,
            Ok(true) => self.row(&record, begin),
            // The record was read all the same.
            Err(error) if matches!(error.kind(), csv::ErrorKind::UnequalLengths { .. }) => self.row(&record, begin),
            Err(error) => {
                self.ended = true;
                Err(at("the file can't be read any further", Cause::of(error)))
            }
        };
        Some(row.map_err(|cause| at(&format!("line {line}"), cause)))
    }
}

/// A cause that says what `what` is.
fn being(what: &str, cause: Cause) -> Cause {
    Cause::new(format!("{what} is {cause}"), cause)
}

/// Holds that every quote that opens a cell ends it.
fn quotes(row: &[u8], delimiter: u8) -> Result<(), Cause> {
    let row = row.trim_ascii_start();
    let lines = row.trim_ascii_end().split(|byte| *byte == b'\n').count() - 1;
    let wrong = |what: &str| {
        Err(format!("{what}; it goes on over {lines} more lines. Quotes in a cell are doubled: \"\"").into())
    };
    let (mut at, mut begins, mut in_quotes) = (0, true, false);
    while let Some(byte) = row.get(at) {
        let next = row.get(at + 1);
        match byte {
            b'"' if in_quotes && next == Some(&b'"') => at += 1,
            b'"' if in_quotes => {
                in_quotes = false;
                let rest = &row[at + 1..];
                let blank = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t') && **byte != delimiter).count();
                match rest.get(blank) {
                    None | Some(b'\r' | b'\n') => {}
                    Some(byte) if *byte == delimiter => {}
                    Some(_) => return wrong("behind a quote that closes a cell stands more of it"),
                }
            }
            b'"' if begins => in_quotes = true,
            _ => {}
        }
        begins = !in_quotes && (*byte == delimiter || *byte == b'\n');
        at += 1;
    }
    if in_quotes { wrong("a quote that opens a cell is never closed") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        std::fs::write(&path, text).unwrap();
        let one = |row: Result<Cell, Cause>| match row {
            Ok(cell) => {
                let text = |name| cell.get(name).and_then(Cell::text).unwrap_or("-").to_owned();
                format!("{} {}", text("a"), text("b"))
            }
            Err(cause) => cause.to_string(),
        };
        records(&path, b',', &Mapping::default()).unwrap().map(one).collect()
    }

    #[test]
    fn tables_are_read_as_programs_write_them() {
        for text in [
            "a,b\n1,\"x, \"\"y\"\"\nz\"\n2,w\n",
            "\u{feff}a,b\r\n1,\"x, \"\"y\"\"\nz\"\r\n\r\n2,w",
            "a;b\n1;\"x, \"\"y\"\"\nz\"\n2;w\n",
            "sep=;\r\na;b\r\n1;\"x, \"\"y\"\"\nz\"\r\n2;w\r\n",
            "a\tb\n1\t\"x, \"\"y\"\"\nz\" \n2\tw\n",
            ",a,b\n0,1,\"x, \"\"y\"\"\nz\"\n1,2,w\n",
        ] {
            let read = read(text.as_bytes());
            assert!(read.len() == 2 && read[0].trim_end() == "1 x, \"y\"\nz" && read[1] == "2 w", "{text}: {read:?}");
        }
    }

    #[test]
    fn a_broken_row_is_its_own_error_and_the_next_is_read() {
        for (text, says) in [
            (&b"a,b\n1,\xe4\n2,w\n"[..], "line 2: column `b` is not UTF-8"),
            (b"a,b\n1\n2,w\n", "1 cells"),
            (b"a,b\n1,\"x\ny\",\"\n2,w\n", "never closed"),
            (b"a,b\n1,\"he said \\\"no\\\"\"\n2,w\n", "stands more of it"),
            (b"a,b\n\"1,x\n3,\"y\",z\n2,w\n", "over 1 more lines"),
        ] {
            let read = read(text);
            assert!(read[0].contains(says), "{read:?}");
            assert!(says == "never closed" || read.last().unwrap() == "2 w", "{read:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        for (text, says) in
            [(&b"a,a\n1,2\n"[..], "two columns"), (b"\xff\xfea\0", "UTF-16"), (b"\xe4,b\n", "not UTF-8")]
        {
            let path = folder.path().join("rows.csv");
            std::fs::write(&path, text).unwrap();
            let error = records(&path, b',', &Mapping::default()).err().unwrap().to_string();
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
