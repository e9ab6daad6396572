//! Opens text files: decompresses them, skips byte order marks, and reports encodings other than
//! UTF-8.

use std::{
    io::{self, BufRead, BufReader, Cursor, Read},
    path::Path,
};

use ecso::Cause;
use flate2::bufread::MultiGzDecoder;

use super::InputError;
use crate::regular;

/// Maximum bytes of a row, including images in it.
pub(super) const MAX_ROW: usize = 1 << 30;

/// A text file that is being read.
pub(super) type Text = Box<dyn BufRead + Send>;

/// Opens a text file, after its byte order mark.
pub(super) fn open(path: &Path) -> Result<Text, InputError> {
    let failed = |error: io::Error| InputError::from_error(path, error);
    let file = BufReader::new(regular::open(path).map_err(failed)?);
    let (mut start, mut text) = peek(file).map_err(failed)?;
    match start[..] {
        [0x1f, 0x8b, ..] => {
            (start, text) = peek(BufReader::new(MultiGzDecoder::new(text))).map_err(failed)?;
        }
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let unpacked = zstd::Decoder::with_buffer(text).map_err(failed)?;
            (start, text) = peek(BufReader::new(unpacked)).map_err(failed)?;
        }
        _ => {}
    }
    let problem = match start[..] {
        [0xff, 0xfe, 0, 0] | [0, 0, 0xfe, 0xff] => wrong_encoding("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => wrong_encoding("UTF-16"),
        [first, 0, _, 0] | [0, first, 0, _] if first != 0 => wrong_encoding("UTF-16"),
        [b'P', b'K', 3, 4] => {
            "this is a ZIP archive or an Excel file; unpack it, or save it as CSV".into()
        }
        [b'P', b'A', b'R', b'1'] => "this is a Parquet file; rename it to .parquet".into(),
        _ => {
            if start.starts_with(b"\xef\xbb\xbf") {
                text.consume(3);
            }
            return Ok(text);
        }
    };
    Err(InputError::new(path, problem))
}

/// The first four bytes of a text, and the whole text.
fn peek(mut text: impl BufRead + Send + 'static) -> io::Result<(Vec<u8>, Text)> {
    let mut start = Vec::new();
    text.by_ref().take(4).read_to_end(&mut start)?;
    Ok((start.clone(), Box::new(Cursor::new(start).chain(text))))
}

fn wrong_encoding(encoding: &str) -> String {
    format!("the file is {encoding} text; convert it with `iconv -f {encoding} -t UTF-8`")
}

/// The error of text that is not UTF-8.
pub(super) fn not_utf8(error: std::str::Utf8Error) -> Cause {
    let message = format!(
        "not UTF-8 at byte {} (is the file in an older encoding, such as Latin-1?); convert it \
         with `iconv`",
        error.valid_up_to()
    );
    Cause::new(message, error)
}
