//! Opening a file of text: what is compressed is unpacked, marks of byte order are passed over,
//! what is no UTF-8 says what it is.

use std::{
    io::{self, BufRead, BufReader, Cursor, Read},
    path::Path,
};

use ecso::Cause;
use flate2::bufread::MultiGzDecoder;

use super::InputError;
use crate::regular;

/// Bytes of a row, images in it included, that are held.
pub(super) const LONGEST: usize = 1 << 30;

/// A text as it is read.
pub(super) type Text = Box<dyn BufRead + Send>;

/// Opens a file of text behind its byte order mark.
pub(super) fn open(path: &Path) -> Result<Text, InputError> {
    let failed = |error: io::Error| InputError::of(path, error);
    let file = BufReader::new(regular::open(path).map_err(failed)?);
    let (mut begin, mut text) = peek(file).map_err(failed)?;
    match begin[..] {
        [0x1f, 0x8b, ..] => {
            (begin, text) = peek(BufReader::new(MultiGzDecoder::new(text))).map_err(failed)?
        }
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let unpacked = zstd::Decoder::with_buffer(text).map_err(failed)?;
            (begin, text) = peek(BufReader::new(unpacked)).map_err(failed)?;
        }
        _ => {}
    }
    let wrong = match begin[..] {
        [0xff, 0xfe, 0, 0] | [0, 0, 0xfe, 0xff] => foreign("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => foreign("UTF-16"),
        [first, 0, _, 0] | [0, first, 0, _] if first != 0 => foreign("UTF-16"),
        [b'P', b'K', 3, 4] => {
            "the file is a ZIP archive (or an Excel sheet); unpack it, or write it as CSV".into()
        }
        [b'P', b'A', b'R', b'1'] => "the file is Parquet; its name must end in .parquet".into(),
        _ => {
            if begin.starts_with(b"\xef\xbb\xbf") {
                text.consume(3);
            }
            return Ok(text);
        }
    };
    Err(InputError::new(path, wrong))
}

/// The first four bytes of a text, and all of it.
fn peek(mut text: impl BufRead + Send + 'static) -> io::Result<(Vec<u8>, Text)> {
    let mut begin = Vec::new();
    text.by_ref().take(4).read_to_end(&mut begin)?;
    Ok((begin.clone(), Box::new(Cursor::new(begin).chain(text))))
}

fn foreign(encoding: &str) -> String {
    format!(
        "the file is {encoding} text; write it as UTF-8 first, as `iconv -f {encoding} -t UTF-8` does"
    )
}

/// Why bytes are no text.
pub(super) fn not_utf8(error: std::str::Utf8Error) -> Cause {
    let told = format!(
        "not UTF-8 from byte {} on (is the file in an older encoding, such as Latin-1?); write it as UTF-8 first, as `iconv` does",
        error.valid_up_to()
    );
    Cause::new(told, error)
}
