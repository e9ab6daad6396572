//! Reads JSON lines and arrays, whatever the extension. A broken row does not affect others: a row
//! ends with its line or, in an array, where its brackets and quotes are balanced. These are
//! counted before anything is parsed.

use std::{
    io::{self, BufRead, Read},
    path::Path,
};

use ecso::Cause;

use super::{
    InputError, Records, at,
    cell::{self, Cell, MAX_VALUES},
    cut_short,
    text::{self, MAX_ROW, Text},
};
use crate::row::shorten;

/// Opens a file and returns its records: the elements of an array, or else the lines.
pub(super) fn records(path: &Path) -> Result<Records, InputError> {
    let mut source = Source::new(text::open(path)?);
    let is_array = source.is_array().map_err(|error| InputError::from_error(path, error))?;
    Ok(if is_array {
        Box::new(Elements { source, is_open: false, ended: false })
    } else {
        Box::new(Lines { source, ended: false })
    })
}

/// The number of rows, if each is a line.
pub(super) fn count(path: &Path) -> Option<u64> {
    let mut source = Source::new(text::open(path).ok()?);
    if source.is_array().ok()? {
        return None;
    }
    let mut rows = 0;
    while source.skip_blank().ok()?.is_some() {
        source.read_line(|_| ()).ok()?;
        rows += 1;
    }
    Some(rows)
}

/// A text in chunks, which end with a line or after 64 KiB.
struct Source {
    text: Text,
    chunk: Vec<u8>,
    /// The position in the chunk.
    position: usize,
    /// The line of the chunk, from 1.
    line: u64,
    /// Whether the chunk is the start of its line.
    starts_line: bool,
}

impl Source {
    fn new(text: Text) -> Self {
        Self { text, chunk: Vec::new(), position: 0, line: 0, starts_line: true }
    }

    /// Whether an array starts here, or an object that spans several lines, which is read like the
    /// element of an array.
    fn is_array(&mut self) -> io::Result<bool> {
        let first = self.skip_blank()?;
        Ok(first == Some(b'[')
            || (first == Some(b'{') && self.chunk[self.position..].trim_ascii_end() == b"{"))
    }

    /// Reads to the end of the line.
    fn read_line(&mut self, mut read: impl FnMut(&[u8])) -> io::Result<()> {
        while self.fill()? {
            let rest = &self.chunk[self.position..];
            read(rest);
            let is_line_end = rest.ends_with(b"\n");
            self.position = self.chunk.len();
            if is_line_end {
                break;
            }
        }
        Ok(())
    }

    /// Reads the next chunk if this one is consumed. Returns false at the end of the text.
    fn fill(&mut self) -> io::Result<bool> {
        if self.position < self.chunk.len() {
            return Ok(true);
        }
        self.starts_line = self.line == 0 || self.chunk.last() == Some(&b'\n');
        self.line += u64::from(self.starts_line);
        self.chunk.clear();
        self.position = 0;
        let count = self.text.by_ref().take(1 << 16).read_until(b'\n', &mut self.chunk)?;
        Ok(count > 0)
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(if self.fill()? { Some(self.chunk[self.position]) } else { None })
    }

    fn skip_blank(&mut self) -> io::Result<Option<u8>> {
        while let Some(byte) = self.peek()? {
            if !byte.is_ascii_whitespace() {
                return Ok(Some(byte));
            }
            self.position += 1;
        }
        Ok(None)
    }

    /// The text before the position in its line, if that is blank: the indent of an element.
    fn indent(&self) -> Option<Vec<u8>> {
        let before = &self.chunk[..self.position];
        (self.starts_line && before.trim_ascii().is_empty()).then(|| before.to_vec())
    }
}

/// JSON lines.
struct Lines {
    source: Source,
    ended: bool,
}

impl Lines {
    fn line(&mut self) -> io::Result<Option<Result<Cell, Cause>>> {
        if self.source.skip_blank()?.is_none() {
            return Ok(None);
        }
        let (mut row, number) = (Vec::new(), self.source.line);
        let (mut is_too_long, mut has_line_end) = (false, false);
        self.source.read_line(|rest| {
            has_line_end = rest.ends_with(b"\n");
            is_too_long |= row.len() + rest.len() > MAX_ROW;
            if !is_too_long {
                row.extend_from_slice(rest);
            }
        })?;
        let row = if is_too_long { Err(too_long(number)) } else { parse(row.trim_ascii(), number) };
        // If the last line has no line end and is invalid, the file is truncated.
        Ok(Some(row.map_err(|cause| if has_line_end { cause } else { cut_short(cause) })))
    }
}

impl Iterator for Lines {
    type Item = Result<Cell, Cause>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        self.line().unwrap_or_else(|error| {
            self.ended = true;
            Some(Err(cut_short(at("the file can't be read any further", Cause::from_error(error)))))
        })
    }
}

/// The elements of an array, or a sequence of values.
struct Elements {
    source: Source,
    /// Whether the position is inside an array.
    is_open: bool,
    ended: bool,
}

impl Elements {
    fn element(&mut self) -> io::Result<Option<Result<Cell, Cause>>> {
        loop {
            match self.source.skip_blank()? {
                None => {
                    self.ended = true;
                    let problem =
                        "the file ends before the `]` of its JSON array; rows may be missing";
                    return Ok(self.is_open.then(|| Err(cut_short(problem))));
                }
                Some(b'[') if !self.is_open => self.is_open = true,
                Some(b']') if self.is_open => self.is_open = false,
                Some(b',') => {}
                Some(_) => return self.value().map(Some),
            }
            self.source.position += 1;
        }
    }

    /// Reads the value that starts here.
    fn value(&mut self) -> io::Result<Result<Cell, Cause>> {
        let (first_line, indent) = (self.source.line, self.source.indent());
        let is_multiline = self.source.chunk[self.source.position..].trim_ascii_end().len() == 1;
        let (mut row, mut open, mut in_string, mut escaped) =
            (Vec::new(), Vec::new(), false, false);
        while let Some(byte) = self.source.peek()? {
            if row.len() >= MAX_ROW {
                self.ended = true;
                return Ok(Err(cut_short(format!(
                    "{}; the rest of the file is skipped",
                    too_long(first_line)
                ))));
            }
            let is_end = !in_string
                && open.is_empty()
                && !row.is_empty()
                && matches!(byte, b',' | b']' | b'\n');
            if is_end {
                return Ok(parse(row.trim_ascii(), first_line));
            }
            row.push(byte);
            self.source.position += 1;
            let mut is_valid = true;
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                b'\n' if in_string => is_valid = false,
                _ if in_string => {}
                b'{' => open.push(b'}'),
                b'[' => open.push(b']'),
                b'}' | b']' => {
                    is_valid = open.pop() == Some(byte);
                    if is_valid && open.is_empty() {
                        return Ok(parse(&row, first_line));
                    }
                }
                _ => {}
            }
            if !is_valid {
                let line = self.source.line;
                let problem =
                    if in_string { "unclosed quote" } else { "missing or unexpected bracket" };
                let next = self.find_next(indent.as_deref(), is_multiline)?;
                self.ended = next.is_none();
                let skipped = match next {
                    None => {
                        "; the next row can't be found, so the rest of the file is skipped".into()
                    }
                    Some(next) if next > line + 1 => format!("; skipped up to line {next}"),
                    Some(_) => String::new(),
                };
                let message = format!("line {line}: invalid JSON: {problem}{skipped}");
                return Ok(Err(if self.ended { cut_short(message) } else { message.into() }));
            }
        }
        if open.is_empty() && !in_string {
            return Ok(parse(row.trim_ascii(), first_line));
        }
        self.ended = true;
        let message = format!("line {first_line}: the file ends inside the value that starts here");
        Ok(Err(cut_short(message)))
    }

    /// Moves to the next line that starts like the broken element, and returns its number.
    fn find_next(&mut self, indent: Option<&[u8]>, is_multiline: bool) -> io::Result<Option<u64>> {
        // Without indents, an object inside the element could be taken for the next element.
        let indent = indent.filter(|indent| !is_multiline || !indent.is_empty());
        if !(self.source.starts_line && self.source.position == 0) {
            self.source.position = self.source.chunk.len();
        }
        while self.source.fill()? {
            let (starts_line, line) = (self.source.starts_line, self.source.chunk.trim_ascii_end());
            let rest = indent.filter(|_| starts_line).and_then(|indent| line.strip_prefix(indent));
            if rest.is_some_and(|rest| {
                rest.first() == Some(&b'{') && (rest.len() == 1) == is_multiline
            }) {
                return Ok(Some(self.source.line));
            }
            self.source.position = self.source.chunk.len();
        }
        Ok(None)
    }
}

impl Iterator for Elements {
    type Item = Result<Cell, Cause>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        self.element().unwrap_or_else(|error| {
            self.ended = true;
            Some(Err(cut_short(at("the file can't be read any further", Cause::from_error(error)))))
        })
    }
}

fn too_long(line: u64) -> Cause {
    format!("line {line}: the row has more than {MAX_ROW} bytes").into()
}

fn parse(row: &[u8], line: u64) -> Result<Cell, Cause> {
    // Concatenated files have byte order marks between lines.
    let row = row.strip_prefix(b"\xef\xbb\xbf").unwrap_or(row);
    if cell::has_too_many_values(row) {
        return Err(format!("line {line}: the row has more than {MAX_VALUES} values").into());
    }
    let text = std::str::from_utf8(row)
        .map_err(|error| at(&format!("line {line}"), text::not_utf8(error)))?;
    serde_json::from_str(text).map_err(|error| {
        let message = error.to_string();
        // Its place is within the row, and is replaced by that within the file.
        let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(text, _)| text);
        let place = format!(
            "line {}, column {}",
            line + (error.line() as u64).saturating_sub(1),
            error.column()
        );
        let mut lines = row.split(|byte| *byte == b'\n');
        let line_text = lines.nth(error.line().saturating_sub(1)).unwrap_or_default();
        let around = line_text.iter().skip(error.column().saturating_sub(3)).take(12);
        let around = around.copied().collect::<Vec<u8>>();
        let around = String::from_utf8_lossy(&around);
        let hint = if around.contains("NaN") || around.contains("Infinity") {
            " (JSON has no NaN or Infinity, though Python writes them; use null)"
        } else if row.starts_with(b"#") || around.contains("//") || around.contains("/*") {
            " (JSON has no comments)"
        } else if message.contains("hex escape") || message.contains("surrogate") {
            " (half of a surrogate pair is not a character)"
        } else if row.ends_with(b",") {
            " (JSON lines have no comma after a row)"
        } else {
            ""
        };
        Cause::new(format!("{place}: invalid JSON: {}{hint}", shorten(message)), error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<Result<Cell, Cause>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, text).unwrap();
        records(&path).unwrap().collect()
    }

    /// The number in each row, or its error.
    fn describe(text: &str) -> Vec<String> {
        let describe = |row: Result<Cell, Cause>| match row {
            Ok(Cell::Fields(fields)) => {
                fields.values().next().map_or_else(String::new, |cell| match cell {
                    Cell::Number(number) => number.to_string(),
                    other => other.kind().to_owned(),
                })
            }
            Ok(other) => other.kind().to_owned(),
            Err(cause) => cause.to_string(),
        };
        read(text).into_iter().map(describe).collect()
    }

    #[test]
    fn lines_arrays_and_multiline_objects_are_recognised() {
        for text in [
            "{\"a\":1}\n{\"a\":2}\n",
            "\u{feff}{\"a\":1}\r\n\r\n\u{feff}{\"a\":2}",
            "[{\"a\":1},{\"a\":2}]",
            " [\n  {\n    \"a\": 1\n  },\n  {\n    \"a\": 2\n  }\n]\n",
            "\u{feff}[{\"a\":1},\r\n{\"a\":2},]\r\n",
            "{\n\"a\": 1\n}\n{\n\"a\": 2\n}\n",
            "[{\"a\":1}]\n[{\"a\":2}]\n",
        ] {
            assert_eq!(describe(text), ["1", "2"], "{text}");
        }
        assert_eq!(describe("[]"), Vec::<String>::new());
        assert_eq!(
            describe("[3, \"]\", [1, {\"a\": \"]\\\"}\"}]]"),
            ["a number", "text", "a list"]
        );
    }

    #[test]
    fn a_broken_row_does_not_affect_the_next() {
        for (text, says) in [
            ("{\"a\":1},\n{\"a\":2}", "no comma after a row"),
            ("{\"a\":NaN}\n{\"a\":2}", "no NaN"),
            ("{\"a\":-Infinity}\n{\"a\":2}", "no NaN"),
            ("{\"a\":1\n{\"a\":2}", "line 1, column 6"),
            ("{\"a\":1,\"a\":3}\n{\"a\":2}", "occurs twice"),
            ("[{\"a\":NaN},{\"a\":2}]", "no NaN"),
            ("[{\"a\":1,},{\"a\":2}]", "trailing comma"),
            ("[\n{\"a\":\"1},\n{\"a\":2}]", "line 2: invalid JSON: unclosed quote"),
            ("[\n{\"a\":[1},\n{\"a\":2}]", "line 2: invalid JSON: missing or unexpected bracket"),
            ("[\n  {\n    \"a\": \"1\n  },\n  {\n    \"a\": 2\n  }\n]", "up to line 5"),
        ] {
            let rows = describe(text);
            assert!(
                rows.len() == 2 && rows[0].contains(says) && rows[1] == "2",
                "{text}: {rows:?}"
            );
        }
        let rows = describe("[{\"a\":1},{\"a\":{}");
        assert!(rows.len() == 2 && rows[1].contains("the file ends inside"), "{rows:?}");
    }

    #[test]
    fn errors_do_not_contain_long_rows() {
        let long = "x".repeat(3 << 20);
        for text in [
            format!("{{\"{long}\":1,\"{long}\":2}}"),
            format!("{{\"a\":\"{long}\n"),
            format!("[{{\"a\":\"{long}\n"),
        ] {
            let rows = describe(&text);
            assert!(
                rows.len() == 1 && rows[0].len() < 600 && rows[0].contains("line 1"),
                "{}",
                rows[0].len()
            );
        }
    }

    #[test]
    fn the_number_of_values_is_limited() {
        let many = "0,".repeat(MAX_VALUES + 1);
        let rows = describe(&format!("{{\"a\":[{many}0]}}\n{{\"a\":2}}"));
        assert!(rows.len() == 2 && rows[0].contains("values") && rows[1] == "2", "{}", rows[0]);
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "[\\[\\]{},:\"\\\\a1 \n]{0,40}") {
            for begin in ["", "[", "{\n"] {
                let _ = read(&format!("{begin}{text}"));
            }
        }
    }
}
