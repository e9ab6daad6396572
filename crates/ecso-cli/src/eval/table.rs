//! Tables of other people: JSON lines, JSON, CSV, TSV, under their own column names.

use std::{
    collections::{HashMap, HashSet},
    fmt::Display,
    marker::PhantomData,
    path::Path,
};

use ecso_eval::{
    benchmarks,
    text::{self, cut},
};
use serde::{
    Deserialize,
    de::{DeserializeOwned, Deserializer, Error, MapAccess, Visitor},
};
use serde_json::{Map, Value};

use crate::UsageError;

/// Which columns are what: `query=prompt`; several make a list, `label=first,second,third`.
pub(super) type Columns = HashMap<String, Vec<String>>;

pub(super) fn columns(pairs: &[String]) -> anyhow::Result<Columns> {
    let split = |pair: &String| {
        let (what, columns) = pair.split_once('=')?;
        Some((
            what.trim().to_owned(),
            columns.split(',').map(|column| column.trim().to_owned()).collect(),
        ))
    };
    let columns: Option<Columns> = pairs.iter().map(split).collect();
    Ok(columns
        .ok_or_else(|| UsageError("--map takes WHAT=COLUMN, as in response=generation".into()))?)
}

/// The rows of a file, their columns called as they are here, where `known` are all that `columns`
/// can say. The `id` of each is a text of its own; a row without one has its number, from 1.
pub(super) fn rows<T: DeserializeOwned>(
    path: &Path,
    columns: &Columns,
    known: &[&str],
) -> anyhow::Result<Vec<T>> {
    let wrong = |error: &dyn Display| UsageError(format!("{}: {error}", path.display()));
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let rows = match extension.as_str() {
        "csv" => of_cells(path, ',')?,
        "tsv" => of_cells(path, '\t')?,
        _ => {
            let text = text::read(path).map_err(|error| wrong(&error))?;
            let is_json = extension == "json" || text.trim_start().starts_with('[');
            let rows = if is_json { of_json(&text) } else { of_lines(&text) };
            rows.map_err(|error| wrong(&error))?
        }
    };
    if let Some(unknown) = columns.keys().find(|what| !known.contains(&what.as_str())) {
        let there: Vec<&str> =
            rows.first().into_iter().flat_map(Map::keys).map(String::as_str).collect();
        let known = known.join(", ");
        let there = cut(there.join(", "));
        return Err(UsageError(format!(
            "--map {unknown}=…: a column can be {known}, not `{unknown}`; {} has the columns {there}",
            path.display()
        ))
        .into());
    }
    let (mut read, mut ids) = (Vec::new(), HashMap::new());
    for (number, mut row) in (1..).zip(rows) {
        for (what, columns) in columns {
            let mut values = Vec::new();
            for column in columns {
                let value = row.get(column).cloned();
                values.push(value.ok_or_else(|| {
                    wrong(&format_args!("row {number} has no column {column:?}"))
                })?);
            }
            let value = if values.len() == 1 { values.swap_remove(0) } else { values.into() };
            row.insert(what.clone(), value);
        }
        let id = match row.get("id") {
            None | Some(Value::Null) => Some(number.to_string()),
            Some(id) => joined(id, "/"),
        };
        let id = id.ok_or_else(|| wrong(&format_args!("row {number}: its id is no text")))?;
        if let Some(first) = ids.insert(id.clone(), number) {
            let same = format_args!("row {number} has the id {:?} of row {first}", cut(&id));
            return Err(wrong(&format_args!(
                "{same}; --map id=COLUMN,COLUMN makes one of several columns"
            ))
            .into());
        }
        row.insert("id".into(), id.into());
        let row = serde_json::from_value(row.into());
        let hint = "--map says which column is what";
        read.push(row.map_err(|error| wrong(&format_args!("row {number}: {error}; {hint}")))?);
    }
    Ok(read)
}

type Row = Map<String, Value>;
type Rows = Result<Vec<Row>, String>;

fn of_cells(path: &Path, delimiter: char) -> Result<Vec<Row>, UsageError> {
    let rows =
        benchmarks::table_rows(path, delimiter).map_err(|error| UsageError(error.to_string()))?;
    let row = |cells: Vec<(String, String)>| {
        cells.into_iter().map(|(name, cell)| (name, cell.into())).collect()
    };
    Ok(rows.into_iter().map(row).collect())
}

fn of_lines(text: &str) -> Rows {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let row = |(number, line)| match serde_json::from_str(line) {
        Ok(Object(row)) => Ok(row.into_iter().collect()),
        Err(error) => Err(format!("line {number}: {error}")),
    };
    lines.map(row).collect()
}

/// A list of rows, or lists of rows by name, whose rows are then called `NAME-1`, `NAME-2`, …
fn of_json(text: &str) -> Rows {
    let wrong = |error: serde_json::Error| error.to_string();
    if text.trim_start().starts_with('[') {
        let rows: Vec<Object<Value>> = serde_json::from_str(text).map_err(wrong)?;
        return Ok(rows.into_iter().map(|Object(row)| row.into_iter().collect()).collect());
    }
    let Object(groups): Object<Vec<Object<Value>>> = serde_json::from_str(text).map_err(wrong)?;
    let mut rows = Vec::new();
    for (name, group) in groups {
        for (number, Object(row)) in (1..).zip(group) {
            let mut row: Row = row.into_iter().collect();
            row.entry("id").or_insert_with(|| format!("{name}-{number}").into());
            rows.push(row);
        }
    }
    Ok(rows)
}

/// A JSON object in which no name stands twice.
struct Object<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Names<T> {
            type Value = Object<T>;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object with named columns")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut object, mut known) = (Vec::new(), HashSet::new());
                while let Some((name, value)) = map.next_entry::<String, T>()? {
                    if !known.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!(
                            "{:?} is there twice",
                            cut(&name)
                        )));
                    }
                    object.push((name, value));
                }
                Ok(Object(object))
            }
        }

        deserializer.deserialize_map(Names(PhantomData))
    }
}

/// A text as it is, a number as it is written, a list with `mark` between its entries; none of what
/// is no text.
pub(super) fn joined(value: &Value, mark: &str) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        Value::Array(list) => {
            let texts: Option<Vec<String>> = list.iter().map(|value| joined(value, mark)).collect();
            texts.map(|texts| texts.join(mark))
        }
        Value::Null | Value::Object(_) => None,
    }
}
