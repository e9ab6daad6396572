//! JSON lines and arrays, whatever the file is called. One broken row is its own error: lines end
//! it, and in an array its brackets and quotes do, which are counted before anything is parsed.

use std::{
    io::{self, BufRead, Read},
    path::Path,
};

use ecso::Cause;

use super::{
    InputError, Records, at,
    cell::{self, Cell, VALUES},
    cut_short,
    text::{self, LONGEST, Text},
};
use crate::row::cut;

/// Rows of a file: of an array if it begins as one, else of its lines.
pub(super) fn records(path: &Path) -> Result<Records, InputError> {
    let mut source = Source::new(text::open(path)?);
    let is_array = source.is_array().map_err(|error| InputError::of(path, error))?;
    Ok(if is_array {
        Box::new(Elements { source, is_open: false, ended: false })
    } else {
        Box::new(Lines { source, ended: false })
    })
}

/// How many rows there are, where lines tell.
pub(super) fn count(path: &Path) -> Option<u64> {
    let mut source = Source::new(text::open(path).ok()?);
    if source.is_array().ok()? {
        return None;
    }
    let mut rows = 0;
    while source.skip_blank().ok()?.is_some() {
        source.line_end(|_| ()).ok()?;
        rows += 1;
    }
    Some(rows)
}

/// Text in chunks that end with a line, or after 64 KiB.
struct Source {
    text: Text,
    chunk: Vec<u8>,
    at: usize,
    /// The line of the chunk, from 1.
    line: u64,
    /// Whether the chunk begins its line.
    is_fresh: bool,
}

impl Source {
    fn new(text: Text) -> Self {
        Self { text, chunk: Vec::new(), at: 0, line: 0, is_fresh: true }
    }

    /// Whether what begins here is an array, or an object that goes on in the next line: it is
    /// written as arrays are.
    fn is_array(&mut self) -> io::Result<bool> {
        let first = self.skip_blank()?;
        Ok(first == Some(b'[')
            || (first == Some(b'{') && self.chunk[self.at..].trim_ascii_end() == b"{"))
    }

    /// Reads on to the end of the line.
    fn line_end(&mut self, mut read: impl FnMut(&[u8])) -> io::Result<()> {
        while self.fill()? {
            let rest = &self.chunk[self.at..];
            read(rest);
            let ends = rest.ends_with(b"\n");
            self.at = self.chunk.len();
            if ends {
                break;
            }
        }
        Ok(())
    }

    /// The next chunk, if this one is read. Gives whether there is one.
    fn fill(&mut self) -> io::Result<bool> {
        if self.at < self.chunk.len() {
            return Ok(true);
        }
        self.is_fresh = self.line == 0 || self.chunk.last() == Some(&b'\n');
        self.line += u64::from(self.is_fresh);
        self.chunk.clear();
        self.at = 0;
        let read = self.text.by_ref().take(1 << 16).read_until(b'\n', &mut self.chunk)?;
        Ok(read > 0)
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(if self.fill()? { Some(self.chunk[self.at]) } else { None })
    }

    fn skip_blank(&mut self) -> io::Result<Option<u8>> {
        while let Some(byte) = self.peek()? {
            if !byte.is_ascii_whitespace() {
                return Ok(Some(byte));
            }
            self.at += 1;
        }
        Ok(None)
    }

    /// What stands before this place in its line, if that is blank: an element's indent.
    fn indent(&self) -> Option<Vec<u8>> {
        let before = &self.chunk[..self.at];
        (self.is_fresh && before.trim_ascii().is_empty()).then(|| before.to_vec())
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
        let (mut is_long, mut is_ended) = (false, false);
        self.source.line_end(|rest| {
            is_ended = rest.ends_with(b"\n");
            is_long |= row.len() + rest.len() > LONGEST;
            if !is_long {
                row.extend_from_slice(rest);
            }
        })?;
        let read = if is_long { Err(too_long(number)) } else { parse(row.trim_ascii(), number) };
        // The last line may have no end, but it is whole.
        Ok(Some(read.map_err(|cause| if is_ended { cause } else { cut_short(cause) })))
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

/// The elements of an array, or values one after the other.
struct Elements {
    source: Source,
    /// Behind a `[`.
    is_open: bool,
    ended: bool,
}

impl Elements {
    fn element(&mut self) -> io::Result<Option<Result<Cell, Cause>>> {
        loop {
            match self.source.skip_blank()? {
                None => {
                    self.ended = true;
                    let told =
                        "not a JSON array of rows: the file ends before its `]`; are rows missing?";
                    return Ok(self.is_open.then(|| Err(cut_short(told))));
                }
                Some(b'[') if !self.is_open => self.is_open = true,
                Some(b']') if self.is_open => self.is_open = false,
                Some(b',') => {}
                Some(_) => return self.one().map(Some),
            }
            self.source.at += 1;
        }
    }

    /// The value that begins here.
    fn one(&mut self) -> io::Result<Result<Cell, Cause>> {
        let (begin, indent) = (self.source.line, self.source.indent());
        let is_spread = self.source.chunk[self.source.at..].trim_ascii_end().len() == 1;
        let (mut row, mut open, mut in_string, mut escaped) =
            (Vec::new(), Vec::new(), false, false);
        while let Some(byte) = self.source.peek()? {
            if row.len() >= LONGEST {
                self.ended = true;
                return Ok(Err(cut_short(format!(
                    "{}; all behind it is left out",
                    too_long(begin)
                ))));
            }
            let ends_before = !in_string
                && open.is_empty()
                && !row.is_empty()
                && matches!(byte, b',' | b']' | b'\n');
            if ends_before {
                return Ok(parse(row.trim_ascii(), begin));
            }
            row.push(byte);
            self.source.at += 1;
            let mut is_right = true;
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                b'\n' if in_string => is_right = false,
                _ if in_string => {}
                b'{' => open.push(b'}'),
                b'[' => open.push(b']'),
                b'}' | b']' => {
                    is_right = open.pop() == Some(byte);
                    if is_right && open.is_empty() {
                        return Ok(parse(&row, begin));
                    }
                }
                _ => {}
            }
            if !is_right {
                let line = self.source.line;
                let what = if in_string {
                    "a quote isn't closed"
                } else {
                    "a bracket is missing or one too many"
                };
                let next = self.find_next(indent.as_deref(), is_spread)?;
                self.ended = next.is_none();
                let then = next.map_or_else(
                    || {
                        "; where the next row begins can't be told, so all behind it is left out"
                            .to_owned()
                    },
                    |next| {
                        if next > line + 1 {
                            format!("; all up to line {next} is left out")
                        } else {
                            String::new()
                        }
                    },
                );
                let told = format!("line {line}: not JSON: {what}{then}");
                return Ok(Err(if self.ended { cut_short(told) } else { told.into() }));
            }
        }
        if open.is_empty() && !in_string {
            return Ok(parse(row.trim_ascii(), begin));
        }
        self.ended = true;
        let told = format!(
            "line {begin}: not a JSON array of rows: the file ends inside the value that begins here"
        );
        Ok(Err(cut_short(told)))
    }

    /// Goes to the next line that begins as the broken element did, and gives its number.
    fn find_next(&mut self, indent: Option<&[u8]>, is_spread: bool) -> io::Result<Option<u64>> {
        // An object inside the element is indented as well, but for files without indents.
        let indent = indent.filter(|indent| !is_spread || !indent.is_empty());
        if !(self.source.is_fresh && self.source.at == 0) {
            self.source.at = self.source.chunk.len();
        }
        while self.source.fill()? {
            let (is_fresh, line) = (self.source.is_fresh, self.source.chunk.trim_ascii_end());
            let rest = indent.filter(|_| is_fresh).and_then(|indent| line.strip_prefix(indent));
            if rest
                .is_some_and(|rest| rest.first() == Some(&b'{') && (rest.len() == 1) == is_spread)
            {
                return Ok(Some(self.source.line));
            }
            self.source.at = self.source.chunk.len();
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
    format!("line {line}: the row has more than {LONGEST} bytes").into()
}

fn parse(row: &[u8], line: u64) -> Result<Cell, Cause> {
    // Files that were put one behind the other have such marks in their midst.
    let row = row.strip_prefix(b"\xef\xbb\xbf").unwrap_or(row);
    if cell::has_many(row) {
        return Err(format!("line {line}: the row has more than {VALUES} values").into());
    }
    let text = std::str::from_utf8(row)
        .map_err(|error| at(&format!("line {line}"), text::not_utf8(error)))?;
    serde_json::from_str(text).map_err(|error| {
        let said = error.to_string();
        // The place is said in lines of the file.
        let said = said.rsplit_once(" at line ").map_or(said.as_str(), |(what, _)| what);
        let place = format!(
            "line {}, column {}",
            line + (error.line() as u64).saturating_sub(1),
            error.column()
        );
        let around = row
            .split(|byte| *byte == b'\n')
            .nth(error.line().saturating_sub(1))
            .unwrap_or_default();
        let around = around
            .iter()
            .skip(error.column().saturating_sub(3))
            .take(12)
            .copied()
            .collect::<Vec<u8>>();
        let around = String::from_utf8_lossy(&around);
        let hint = if around.contains("NaN") || around.contains("Infinity") {
            " (JSON has no NaN and no Infinity, though Python writes them; write null)"
        } else if row.starts_with(b"#") || around.contains("//") || around.contains("/*") {
            " (JSON has no comments)"
        } else if said.contains("hex escape") || said.contains("surrogate") {
            " (half of a surrogate pair is no character)"
        } else if row.ends_with(b",") {
            " (in JSON lines no comma stands behind a row)"
        } else {
            ""
        };
        Cause::new(format!("{place}: not JSON: {}{hint}", cut(said)), error)
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

    /// The number in each row, or what its error says.
    fn told(text: &str) -> Vec<String> {
        let one = |row: Result<Cell, Cause>| match row {
            Ok(Cell::Fields(fields)) => {
                fields.values().next().map_or_else(String::new, |cell| match cell {
                    Cell::Number(number) => number.to_string(),
                    other => other.kind().to_owned(),
                })
            }
            Ok(other) => other.kind().to_owned(),
            Err(cause) => cause.to_string(),
        };
        read(text).into_iter().map(one).collect()
    }

    #[test]
    fn lines_arrays_and_spread_objects_are_told_apart_by_what_is_in_them() {
        for text in [
            "{\"a\":1}\n{\"a\":2}\n",
            "\u{feff}{\"a\":1}\r\n\r\n\u{feff}{\"a\":2}",
            "[{\"a\":1},{\"a\":2}]",
            " [\n  {\n    \"a\": 1\n  },\n  {\n    \"a\": 2\n  }\n]\n",
            "\u{feff}[{\"a\":1},\r\n{\"a\":2},]\r\n",
            "{\n\"a\": 1\n}\n{\n\"a\": 2\n}\n",
            "[{\"a\":1}]\n[{\"a\":2}]\n",
        ] {
            assert_eq!(told(text), ["1", "2"], "{text}");
        }
        assert_eq!(told("[]"), Vec::<String>::new());
        assert_eq!(told("[3, \"]\", [1, {\"a\": \"]\\\"}\"}]]"), ["a number", "text", "a list"]);
    }

    #[test]
    fn a_broken_row_is_its_own_error_and_the_next_is_read() {
        for (text, says) in [
            ("{\"a\":1},\n{\"a\":2}", "no comma stands behind a row"),
            ("{\"a\":NaN}\n{\"a\":2}", "no NaN"),
            ("{\"a\":-Infinity}\n{\"a\":2}", "no NaN"),
            ("{\"a\":1\n{\"a\":2}", "line 1, column 6"),
            ("{\"a\":1,\"a\":3}\n{\"a\":2}", "stands twice"),
            ("[{\"a\":NaN},{\"a\":2}]", "no NaN"),
            ("[{\"a\":1,},{\"a\":2}]", "trailing comma"),
            ("[\n{\"a\":\"1},\n{\"a\":2}]", "line 2: not JSON: a quote isn't closed"),
            ("[\n{\"a\":[1},\n{\"a\":2}]", "line 2: not JSON: a bracket is missing"),
            ("[\n  {\n    \"a\": \"1\n  },\n  {\n    \"a\": 2\n  }\n]", "up to line 5"),
        ] {
            let told = told(text);
            assert!(
                told.len() == 2 && told[0].contains(says) && told[1] == "2",
                "{text}: {told:?}"
            );
        }
        let told = told("[{\"a\":1},{\"a\":{}");
        assert!(told.len() == 2 && told[1].contains("the file ends inside"), "{told:?}");
    }

    #[test]
    fn text_of_long_rows_is_in_no_error() {
        let long = "x".repeat(3 << 20);
        for text in [
            format!("{{\"{long}\":1,\"{long}\":2}}"),
            format!("{{\"a\":\"{long}\n"),
            format!("[{{\"a\":\"{long}\n"),
        ] {
            let told = told(&text);
            assert!(
                told.len() == 1 && told[0].len() < 600 && told[0].contains("not"),
                "{}",
                told[0].len()
            );
        }
    }

    #[test]
    fn values_of_a_row_are_limited() {
        let many = "0,".repeat(VALUES + 1);
        let told = told(&format!("{{\"a\":[{many}0]}}\n{{\"a\":2}}"));
        assert!(told.len() == 2 && told[0].contains("values") && told[1] == "2", "{}", told[0]);
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
