//! Tables of other people: JSON lines, JSON, CSV, under their own column names.

use std::{collections::HashMap, fmt::Display, path::Path};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::UsageError;

/// Which columns are what: `query=prompt`; several make a list, `label=first,second,third`.
pub(super) type Columns = HashMap<String, Vec<String>>;

pub(super) fn columns(pairs: &[String]) -> anyhow::Result<Columns> {
    let split = |pair: &String| {
        let (what, columns) = pair.split_once('=')?;
        Some((what.trim().to_owned(), columns.split(',').map(|column| column.trim().to_owned()).collect()))
    };
    let columns: Option<Columns> = pairs.iter().map(split).collect();
    Ok(columns.ok_or_else(|| UsageError("--map takes WHAT=COLUMN, as in response=generation".into()))?)
}

/// The rows of a file, their columns called as they are here. A row without an `id` has its number, from 1.
pub(super) fn rows<T: DeserializeOwned>(path: &Path, columns: &Columns) -> anyhow::Result<Vec<T>> {
    let wrong = |error: &dyn Display| UsageError(format!("{}: {error}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| wrong(&error))?;
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(wrong(&"it is UTF-16; save it as UTF-8").into());
    }
    let text = String::from_utf8(bytes).map_err(|error| wrong(&error))?;
    let text = text.trim_start_matches('\u{feff}');
    let is = |extension: &str| path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension));
    let rows = if is("csv") {
        of_csv(text)
    } else if is("json") || text.trim_start().starts_with('[') {
        of_json(text)
    } else {
        of_lines(text)
    };
    let mut read = Vec::new();
    for (number, mut row) in (1..).zip(rows.map_err(|error| wrong(&error))?) {
        for (what, columns) in columns {
            let mut values = Vec::new();
            for column in columns {
                let value = row.get(column).cloned();
                values.push(value.ok_or_else(|| wrong(&format_args!("row {number} has no column {column:?}")))?);
            }
            let value = if values.len() == 1 { values.swap_remove(0) } else { values.into() };
            row.insert(what.clone(), value);
        }
        row.entry("id").or_insert_with(|| number.to_string().into());
        let row = serde_json::from_value(row.into());
        let hint = "--map says which column is what";
        read.push(row.map_err(|error| wrong(&format_args!("row {number}: {error}; {hint}")))?);
    }
    Ok(read)
}

type Rows = Result<Vec<Map<String, Value>>, String>;

fn of_csv(text: &str) -> Rows {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let names = reader.headers().map_err(|error| error.to_string())?.clone();
    let row = |row: csv::StringRecord| {
        names.iter().zip(row.iter()).map(|(name, value)| (name.to_owned(), value.into())).collect()
    };
    reader.records().map(|read| read.map(row).map_err(|error| error.to_string())).collect()
}

fn of_lines(text: &str) -> Rows {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(number, line)| serde_json::from_str(line).map_err(|error| format!("line {number}: {error}"))).collect()
}

/// A list of rows, or lists of rows by name, whose rows are then called `NAME-1`, `NAME-2`, …
fn of_json(text: &str) -> Rows {
    match serde_json::from_str(text).map_err(|error| error.to_string())? {
        Value::Array(rows) => rows.into_iter().map(object).collect(),
        Value::Object(groups) => {
            let mut rows = Vec::new();
            for (name, group) in groups {
                let Value::Array(group) = group else { return Err(format!("{name:?} is no list of rows")) };
                for (number, row) in (1..).zip(group) {
                    let mut row = object(row)?;
                    row.entry("id").or_insert_with(|| json!(format!("{name}-{number}")));
                    rows.push(row);
                }
            }
            Ok(rows)
        }
        _ => Err("it is no list of rows".into()),
    }
}

fn object(row: Value) -> Result<Map<String, Value>, String> {
    if let Value::Object(row) = row { Ok(row) } else { Err("a row has no named columns".into()) }
}

/// A text as it is, a number as it is written, a list with `mark` between its entries.
pub(super) fn joined(value: &Value, mark: &str) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(|value| joined(value, mark)).collect::<Vec<_>>().join(mark),
        other => other.to_string(),
    }
}
