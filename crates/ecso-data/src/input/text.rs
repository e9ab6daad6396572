//! Opening a file of text: marks of byte order are passed over, what is no UTF-8 says what it is.

use std::{
    fs::File,
    io::{BufRead, BufReader, Seek, SeekFrom},
    path::Path,
};

use ecso::Cause;

use super::InputError;

/// Bytes of a row, images in it included, that are held.
pub(super) const LONGEST: usize = 1 << 30;

/// Opens a file of text behind its byte order mark, and says how long that is.
pub(super) fn open(path: &Path) -> Result<(BufReader<File>, u64), InputError> {
    let failed = |error: std::io::Error| InputError::of(path, error);
    let mut text = BufReader::new(File::open(path).map_err(failed)?);
    let begin = text.fill_buf().map_err(failed)?;
    let wrong = match begin {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => Some(foreign("UTF-32")),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some(foreign("UTF-16")),
        [first, 0, _, 0, ..] | [0, first, 0, _, ..] if *first != 0 => Some(foreign("UTF-16")),
        [0x1f, 0x8b, ..] => Some("the file is compressed by gzip; unpack it first".into()),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("the file is compressed by Zstandard; unpack it first".into()),
        [b'P', b'K', 3, 4, ..] => {
            Some("the file is a ZIP archive (or an Excel sheet); unpack it, or write it as CSV".into())
        }
        [b'P', b'A', b'R', b'1', ..] => Some("the file is Parquet; its name must end in .parquet".into()),
        _ => None,
    };
    if let Some(wrong) = wrong {
        return Err(InputError::new(path, wrong));
    }
    let mark = if begin.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    text.seek(SeekFrom::Start(mark)).map_err(failed)?;
    Ok((text, mark))
}

fn foreign(encoding: &str) -> String {
    format!("the file is {encoding} text; write it as UTF-8 first, as `iconv -f {encoding} -t UTF-8` does")
}

/// Why bytes are no text.
pub(super) fn not_utf8(error: std::str::Utf8Error) -> Cause {
    let told = format!(
        "not UTF-8 from byte {} on (is the file in an older encoding, such as Latin-1?); write it as UTF-8 first, as `iconv` does",
        error.valid_up_to()
    );
    Cause::new(told, error)
}
