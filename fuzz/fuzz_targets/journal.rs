//! Journals as crashes and other hands leave them: no panic; what can be opened is read, goes on,
//! and then has its entries still. A file that is none is left as it is.
#![no_main]

use std::io::Write;

use ecso_batch::journal::{Entry, JournalHeader, Journal, JournalReader};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Line {
    id: String,
    #[serde(default)]
    arm: String,
}

impl Entry for Line {
    fn id(&self) -> &str {
        &self.id
    }

    fn arm(&self) -> &str {
        &self.arm
    }

    fn failed(&self) -> bool {
        false
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    work: String,
}

impl JournalHeader for Header {
    fn difference(&self, begun: &Self) -> Option<&'static str> {
        (begun.work != self.work).then_some("work")
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("a temporary file");
    let read = || -> Option<usize> {
        let latest = JournalReader::at(file.path()).latest::<Line>().ok()?;
        let total = latest.total();
        let read = latest.map(Result::ok).collect::<Option<Vec<Line>>>()?;
        assert_eq!(read.len(), total, "each entry comes once");
        Some(total)
    };
    let before = read();
    let header = Header { work: "fuzz".into() };
    let Ok(mut journal) = Journal::open_file(file.path(), &header) else {
        assert_eq!(std::fs::read(file.path()).expect("a temporary file"), bytes, "what can't be opened stays");
        return;
    };
    let is_begun = br#"{"work":"fuzz"}"#.starts_with(bytes);
    let is_whole = bytes.trim_ascii_end().ends_with(b"}");
    assert!(is_begun || is_whole || bytes.contains(&b'\n'), "only a header that was cut off is cut off");
    assert!(before.is_none_or(|before| before == journal.len()));
    let added = Line { id: "added".into(), arm: "here".into() };
    journal.record(&added).expect("room on the disk");
    assert!(before.is_none() || read() == Some(journal.len()), "what was there is there still");
});
