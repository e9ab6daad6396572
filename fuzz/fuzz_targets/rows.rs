//! Files of other people's rows, as lines or an array of JSON and as CSV: no panic, and every row
//! is one or an error with its number.
#![no_main]

use std::io::Write;

use ecso_data::input::Input;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for ending in [".jsonl", ".csv"] {
        let mut file = tempfile::Builder::new().suffix(ending).tempfile().expect("a temporary file");
        file.write_all(bytes).expect("a temporary file");
        let input = Input { path: file.path().to_owned(), ..Input::default() };
        let Ok(rows) = input.rows() else { continue };
        for (expected, row) in (0..).zip(rows) {
            let number = match &row {
                Ok(row) => row.number,
                Err(error) => error.number,
            };
            assert_eq!(number, expected);
            match row {
                Ok(row) => assert!(!row.query.is_empty() && row.query_images() <= row.images.len()),
                Err(error) => assert!((1..4096).contains(&error.reason.message().len())),
            }
        }
    }
});
