//! Tables as people have them: text in several encodings, CSV and TSV with good and bad quotes,
//! JSON. A row that can't be read is reported with its location; the others are still read.

use std::{collections::HashSet, fmt, path::Path};

use csv::StringRecord;
use ecso::Cause;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, MapAccess, Visitor},
};
use serde_json::Value;

use super::{benchmark::DataError, location::RowLocation};
use crate::text::{self, cut, shortened};

/// Reads a text file.
pub(crate) fn read(path: &Path) -> Result<String, DataError> {
    text::read(path).map_err(|reason| DataError::new(path, reason))
}

/// Reads a JSON file.
pub(crate) fn json<T: DeserializeOwned>(path: &Path) -> Result<T, DataError> {
    serde_json::from_str(&read(path)?).map_err(|error| DataError::new(path, shortened(error)))
}

/// Parses a line of JSON. Errors name the column only.
pub(super) fn json_line<T: DeserializeOwned>(line: &str) -> Result<T, Cause> {
    serde_json::from_str(line).map_err(|error: serde_json::Error| {
        let reason = error.to_string().replace(" at line 1 column ", " at column ");
        let what =
            if error.is_data() { "the row has a wrong field" } else { "the row is not valid JSON" };
        format!("{what}: {}", cut(reason)).into()
    })
}

/// A JSON object with its members in order. A name that occurs twice is kept twice.
pub(super) struct OrderedObject(pub(super) Vec<(String, Value)>);

impl<'de> Deserialize<'de> for OrderedObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = OrderedObject;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of id: record")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<OrderedObject, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(OrderedObject(pairs))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

/// An id as it is written: text or a number.
pub(super) fn id(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// A table of text cells.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) columns: StringRecord,
    /// Every row has as many cells as there are columns.
    pub(super) rows: Vec<(RowLocation, Result<StringRecord, Cause>)>,
}

impl Table {
    /// Reads CSV or TSV with a header line. The delimiter is the one of semicolon, tab and comma
    /// that occurs most often in the header; `delimiter` wins ties.
    pub(super) fn read(path: &Path, delimiter: char) -> Result<Self, DataError> {
        let mut text = read(path)?;
        if !text.contains('\n') {
            // Line breaks of classic Mac OS.
            text = text.replace('\r', "\n");
        }
        let start = text.len() - text.trim_start_matches(['\r', '\n']).len();
        let header = text[start..].lines().next().unwrap_or_default();
        let count = |delimiter: char| header.matches(delimiter).count();
        let delimiter = [';', '\t', ',']
            .into_iter()
            .fold(delimiter, |best, other| if count(other) > count(best) { other } else { best });
        let (columns, mut at) = match quoted(&text[start..], delimiter) {
            Some((columns, end)) => (columns, start + end),
            None => (plain(header, delimiter), start + header.len()),
        };
        let columns: Vec<&str> = columns.iter().map(|name| name.trim()).collect();
        let mut line = 1 + text[..at].matches('\n').count();
        let mut rows = Vec::new();
        while at < text.len() {
            let (row, length) = row(&text[at..], delimiter, columns.len());
            let is_blank = row.as_ref().is_ok_and(|cells| cells.iter().all(String::is_empty));
            if !is_blank && !text[at..at + length].trim().is_empty() {
                rows.push((RowLocation::line(path, line), row.map(StringRecord::from)));
            }
            line += text[at..at + length].matches('\n').count();
            at += length;
        }
        if rows.is_empty() {
            return Err(DataError::new(path, "it has no rows"));
        }
        Ok(Self { columns: StringRecord::from(columns), rows })
    }

    /// Deserializes each row.
    pub(super) fn values<T: DeserializeOwned>(self) -> Vec<(RowLocation, Result<T, Cause>)> {
        let columns = self.columns;
        let value = |row: Result<StringRecord, Cause>| {
            let value = row?.deserialize(Some(&columns)).map_err(|error| match error.into_kind() {
                csv::ErrorKind::Deserialize { err, .. } => shortened(err),
                other => cut(format_args!("it can't be read: {other:?}")).into(),
            });
            value.map_err(|reason: Cause| {
                if !reason.message().contains("missing field") {
                    return reason;
                }
                let columns = cut(columns.iter().collect::<Vec<_>>().join(", "));
                Cause::new(format!("{reason}; the columns are {columns}"), reason)
            })
        };
        self.rows.into_iter().map(|(location, row)| (location, value(row))).collect()
    }
}

/// Reads a CSV or TSV file with a header line, also with semicolons. Each row is a list of column
/// names and cells.
///
/// # Errors
/// [`DataError`] that names the first row that can't be read, or a duplicate column.
pub fn table_rows(path: &Path, delimiter: char) -> Result<Vec<Vec<(String, String)>>, DataError> {
    let Table { columns, rows } = Table::read(path, delimiter)?;
    let mut known = HashSet::new();
    if let Some(name) = columns.iter().find(|name| !name.is_empty() && !known.insert(*name)) {
        return Err(DataError::new(path, format!("there are two columns {:?}", cut(name))));
    }
    let named = |row: StringRecord| {
        columns.iter().zip(&row).map(|(name, cell)| (name.into(), cell.into())).collect()
    };
    rows.into_iter()
        .map(|(location, row)| row.map(named).map_err(|reason| row_error(path, &location, reason)))
        .collect()
}

fn row_error(path: &Path, location: &RowLocation, reason: Cause) -> DataError {
    DataError::new(path, Cause::new(format!("{}: {reason}", location.row), reason))
}

/// Deserializes the rows of a CSV file with a header line.
pub(crate) fn csv_rows<T: DeserializeOwned>(
    path: &Path,
    delimiter: char,
) -> Result<Vec<T>, DataError> {
    let rows = Table::read(path, delimiter)?.values().into_iter();
    rows.map(|(location, row)| row.map_err(|reason| row_error(path, &location, reason))).collect()
}

/// The next row and its length in bytes. A row with correct quotes may span several lines.
/// Otherwise, a line with the right number of cells is taken literally: in TSV, which is usually
/// not quoted, a text may begin with a quotation mark.
fn row(text: &str, delimiter: char, columns: usize) -> (Result<Vec<String>, Cause>, usize) {
    let line = text.split_inclusive('\n').next().unwrap_or_default();
    let misfit = |cells: usize| Err(format!("{cells} cells where the header has {columns}").into());
    let cells = plain(line.trim_end_matches(['\r', '\n']), delimiter);
    // The cell whose quotation mark is still open at the end of the line.
    let open =
        cells.iter().position(|cell| cell.starts_with('"') && cell.matches('"').count() % 2 == 1);
    match quoted(text, delimiter) {
        Some((quoted, end))
            if end <= line.len() && (quoted.len() == columns || delimiter != '\t') =>
        {
            let row = if quoted.len() == columns { Ok(quoted) } else { misfit(quoted.len()) };
            (row, end)
        }
        Some((quoted, end)) if quoted.len() == columns => {
            let swallows = delimiter == '\t'
                && cells.len() == columns
                && open.is_some_and(|cell| cell + 1 < columns);
            if swallows { (Ok(cells), line.len()) } else { (Ok(quoted), end) }
        }
        Some(_) if delimiter != '\t' => (misfit(cells.len()), line.len()),
        None if delimiter != '\t' && open.is_some() => {
            (Err("a quotation mark is not closed, or is followed by text".into()), line.len())
        }
        _ if cells.len() == columns => (Ok(cells), line.len()),
        _ => (misfit(cells.len()), line.len()),
    }
}

/// The cells of the next row by RFC 4180, and the length of the row; `None` if a quoted cell isn't
/// closed, or continues after its closing quote.
fn quoted(text: &str, delimiter: char) -> Option<(Vec<String>, usize)> {
    let mut cells = Vec::new();
    let mut at = 0;
    loop {
        let rest = &text[at..];
        if let Some(inner) = rest.strip_prefix('"') {
            let mut end = inner.find('"')?;
            while inner[end + 1..].starts_with('"') {
                end = end + 2 + inner[end + 2..].find('"')?;
            }
            cells.push(inner[..end].replace("\"\"", "\""));
            at += end + 2;
        } else {
            let end = rest.find([delimiter, '\n']).unwrap_or(rest.len());
            let cell = &rest[..end];
            let ends_line = end == rest.len() || rest[end..].starts_with('\n');
            let cell = if ends_line { cell.strip_suffix('\r').unwrap_or(cell) } else { cell };
            cells.push(cell.to_owned());
            at += cell.len();
        }
        let rest = &text[at..];
        let end = if rest.starts_with("\r\n") { 2 } else { rest.len().min(1) };
        match rest.chars().next() {
            Some(next) if next == delimiter => at += 1,
            None | Some('\n') => return Some((cells, at + end)),
            Some('\r') if rest.len() == 1 || end == 2 => return Some((cells, at + end)),
            Some(_) => return None,
        }
    }
}

/// The cells of a line, taken literally. Only a cell that is correctly quoted as a whole loses its
/// quotes.
fn plain(line: &str, delimiter: char) -> Vec<String> {
    let cell = |cell: &str| match quoted(cell, delimiter) {
        Some((cells, _)) if cell.starts_with('"') && cells.len() == 1 => {
            cells.into_iter().collect()
        }
        _ => cell.to_owned(),
    };
    line.split(delimiter).map(cell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &[u8], delimiter: char) -> Vec<(String, Result<Vec<String>, Cause>)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let table = Table::read(file.path(), delimiter).unwrap();
        let cells = |row: StringRecord| row.iter().map(str::to_owned).collect();
        table.rows.into_iter().map(|(place, row)| (place.row, row.map(cells))).collect()
    }

    fn good(text: &str, delimiter: char) -> Vec<Vec<String>> {
        rows(text.as_bytes(), delimiter).into_iter().map(|(_, row)| row.unwrap()).collect()
    }

    #[test]
    fn encodings_and_line_breaks_make_no_difference() {
        let text = "id,q\n1,\u{e4} \u{1f600}\n2,\"b, \"\"c\"\"\"\n";
        let expected = [["1", "\u{e4} \u{1f600}"], ["2", "b, \"c\""]];
        let utf16 = |unit: fn(u16) -> [u8; 2], mark: bool| {
            let mark = mark.then_some(0xFEFF);
            mark.into_iter().chain(text.encode_utf16()).flat_map(unit).collect::<Vec<u8>>()
        };
        for bytes in [
            text.into(),
            format!("\u{feff}{text}").into_bytes(),
            text.replace('\n', "\r\n").into_bytes(),
            text.replace('\n', "\r").into_bytes(),
            format!("\n\n{text}\n\n,\n").into_bytes(),
            text.trim_end().into(),
            utf16(u16::to_le_bytes, true),
            utf16(u16::to_be_bytes, true),
            utf16(u16::to_le_bytes, false),
            utf16(u16::to_be_bytes, false),
        ] {
            let found: Vec<_> =
                rows(&bytes, ',').into_iter().map(|(_, row)| row.unwrap()).collect();
            assert_eq!(found, expected, "{bytes:?}");
        }
    }

    #[test]
    fn quotation_marks_are_read_as_intended() {
        assert_eq!(good("a;b\n1;\"x;y\"\n", ','), [["1", "x;y"]]);
        assert_eq!(good("a,b\n1,\"x\ny\"\n2,z\n", ','), [["1", "x\ny"], ["2", "z"]]);
        assert_eq!(
            good("a,b\n1,\"Well\" he said\n2,z\n", ','),
            [["1", "\"Well\" he said"], ["2", "z"]]
        );
        // Unquoted TSV: no text swallows the rows after it.
        assert_eq!(
            good(
                "a\tb\tc\n1\t\"open\tx\n2\t\"open\ty\n3\t\"Who\" is it?\tz\n4\t\"w\n\tw\"\tv\n",
                '\t'
            ),
            [
                ["1", "\"open", "x"],
                ["2", "\"open", "y"],
                ["3", "\"Who\" is it?", "z"],
                ["4", "w\n\tw", "v"]
            ]
        );
    }

    #[test]
    fn only_the_row_that_does_not_fit_is_an_error() {
        let found = rows(b"a,b\n1,x,y\n2,z\n3\n4,\"open\n5,v\n", ',');
        let shortened: Vec<(&str, bool)> =
            found.iter().map(|(place, row)| (place.as_str(), row.is_ok())).collect();
        assert_eq!(
            shortened,
            [
                ("line 2", false),
                ("line 3", true),
                ("line 4", false),
                ("line 5", false),
                ("line 6", true)
            ]
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "a,b\n").unwrap();
        assert!(Table::read(file.path(), ',').unwrap_err().to_string().contains("no rows"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_without_a_panic_or_loss(text in "[a\",;\t\r\n\u{e4}]{0,40}") {
            let text = format!("a,b\n{text}");
            let mut at = 4;
            while at < text.len() {
                let (_, length) = row(&text[at..], ',', 2);
                assert!(length > 0);
                let _ = row(&text[at..], '\t', 2);
                at += length;
            }
        }

        #[test]
        fn well_formed_tables_are_read_unchanged(
            cells in proptest::collection::vec("[a\",;\r\n\u{e4} ]{1,6}", 6),
        ) {
            for delimiter in [',', '\t'] {
                let mut writer = csv::WriterBuilder::new()
                    .delimiter(delimiter as u8)
                    .from_writer(Vec::new());
                writer.write_record(["one", "two", "n"]).unwrap();
                for pair in cells.chunks(2) {
                    writer.write_record([&pair[0], &pair[1], "0"]).unwrap();
                }
                let text = String::from_utf8(writer.into_inner().unwrap()).unwrap();
                let read = good(&text, delimiter);
                assert_eq!(read.len(), 3);
                for (row, pair) in read.iter().zip(cells.chunks(2)) {
                    assert_eq!(&row[..2], pair);
                }
            }
        }
    }
}
