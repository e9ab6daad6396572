//! Tables from other programs, with their own column names: JSON lines, JSON, CSV and TSV.

use std::{
    collections::{HashMap, HashSet},
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

use crate::error::UsageError;

/// Columns by field. Several columns make a list.
pub(super) type Columns = HashMap<String, Vec<String>>;

/// Reads pairs such as `query=prompt`, or `label=first,second,third` for a list.
pub(super) fn columns_by_field(pairs: &[(String, String)]) -> Columns {
    let columns = |text: &String| text.split(',').map(|column| column.trim().to_owned()).collect();
    pairs.iter().map(|(field, text)| (field.clone(), columns(text))).collect()
}

/// Reads the rows of a file, with columns renamed to `fields`. Each `id` becomes a unique text; a
/// row without one gets its number, from 1.
pub(super) fn rows<T: DeserializeOwned>(
    path: &Path,
    columns: &Columns,
    fields: &[&str],
) -> anyhow::Result<Vec<T>> {
    let rows = read(path)?;
    if let Some(unknown) = columns.keys().find(|field| !fields.contains(&field.as_str())) {
        let names: Vec<&str> =
            rows.first().into_iter().flat_map(Map::keys).map(String::as_str).collect();
        return Err(UsageError(format!(
            "--map {unknown}=…: unknown field `{unknown}`, expected one of {}; {} has the columns \
             {}",
            fields.join(", "),
            path.display(),
            cut(names.join(", "))
        ))
        .into());
    }
    let (mut parsed, mut ids) = (Vec::new(), HashMap::new());
    for (number, row) in (1..).zip(rows) {
        let in_row = |problem: String| UsageError::at(path, format!("row {number}{problem}"));
        let mut row = rename_columns(row, columns)
            .map_err(|column| in_row(format!(" has no column {column:?}")))?;
        let id = match row.get("id") {
            None | Some(Value::Null) => Some(number.to_string()),
            Some(id) => joined(id, "/"),
        };
        let id = id.ok_or_else(|| in_row(": its id is not a text".into()))?;
        if let Some(first) = ids.insert(id.clone(), number) {
            let problem = format!(
                " has the id {:?} of row {first}; --map id=COLUMN,COLUMN builds one from several \
                 columns",
                cut(&id)
            );
            return Err(in_row(problem).into());
        }
        row.insert("id".into(), id.into());
        parsed.push(serde_json::from_value(row.into()).map_err(|error| {
            in_row(format!(": {error}; --map FIELD=COLUMN names the column of a field"))
        })?);
    }
    Ok(parsed)
}

/// Adds each field from its columns. The error is a column that the row doesn't have.
fn rename_columns(mut row: Row, columns: &Columns) -> Result<Row, String> {
    for (field, columns) in columns {
        let values = columns.iter().map(|column| row.get(column).cloned().ok_or(column.clone()));
        let mut values: Vec<Value> = values.collect::<Result<_, _>>()?;
        let value = if values.len() == 1 { values.swap_remove(0) } else { values.into() };
        row.insert(field.clone(), value);
    }
    Ok(row)
}

/// Reads the rows of a file as they are.
fn read(path: &Path) -> Result<Vec<Row>, UsageError> {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match extension.as_str() {
        "csv" => read_cells(path, ','),
        "tsv" => read_cells(path, '\t'),
        _ => {
            let text = text::read(path).map_err(|error| UsageError::at(path, error))?;
            let is_json = extension == "json" || text.trim_start().starts_with('[');
            let rows = if is_json { parse_json(&text) } else { parse_lines(&text) };
            rows.map_err(|error| UsageError::at(path, error))
        }
    }
}

type Row = Map<String, Value>;
type Rows = Result<Vec<Row>, String>;

fn read_cells(path: &Path, delimiter: char) -> Result<Vec<Row>, UsageError> {
    let rows =
        benchmarks::table_rows(path, delimiter).map_err(|error| UsageError(error.to_string()))?;
    let row = |cells: Vec<(String, String)>| {
        cells.into_iter().map(|(name, cell)| (name, cell.into())).collect()
    };
    Ok(rows.into_iter().map(row).collect())
}

fn parse_lines(text: &str) -> Rows {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let row = |(number, line)| match serde_json::from_str(line) {
        Ok(Object(row)) => Ok(row.into_iter().collect()),
        Err(error) => Err(format!("line {number}: {error}")),
    };
    lines.map(row).collect()
}

/// Parses a list of rows, or an object of such lists, whose rows get the ids `NAME-1`, `NAME-2`, …
fn parse_json(text: &str) -> Rows {
    let message = |error: serde_json::Error| error.to_string();
    if text.trim_start().starts_with('[') {
        let rows: Vec<Object<Value>> = serde_json::from_str(text).map_err(message)?;
        return Ok(rows.into_iter().map(|Object(row)| row.into_iter().collect()).collect());
    }
    let Object(groups): Object<Vec<Object<Value>>> = serde_json::from_str(text).map_err(message)?;
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

/// A JSON object without duplicate names.
struct Object<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object with named columns")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut object, mut names) = (Vec::new(), HashSet::new());
                while let Some((name, value)) = map.next_entry::<String, T>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!(
                            "{:?} occurs twice",
                            cut(&name)
                        )));
                    }
                    object.push((name, value));
                }
                Ok(Object(object))
            }
        }

        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

/// The value as text, with the items of a list joined by `separator`; none for null and objects.
pub(super) fn joined(value: &Value, separator: &str) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        Value::Array(list) => {
            let texts: Option<Vec<String>> =
                list.iter().map(|value| joined(value, separator)).collect();
            texts.map(|texts| texts.join(separator))
        }
        Value::Null | Value::Object(_) => None,
    }
}
