//! Layers of settings, and how they are merged.

use std::{collections::BTreeMap, path::Path};

use serde::{Serialize, de::DeserializeOwned};

use crate::error::UsageError;

/// Settings from one origin, as values by dotted key.
pub(super) struct Layer {
    origin: String,
    values: BTreeMap<String, toml::Value>,
}

impl Layer {
    pub(super) fn new(origin: impl Into<String>, table: toml::Table) -> Self {
        let mut values = BTreeMap::new();
        flatten("", table, &mut values);
        Self { origin: origin.into(), values }
    }

    pub(super) fn from_file(path: &Path) -> Result<Self, UsageError> {
        let text = std::fs::read_to_string(path).map_err(|error| UsageError::at(path, error))?;
        let table = text.parse().map_err(|error| UsageError::at(path, error))?;
        Ok(Self::new(path.display().to_string(), table))
    }

    /// `ECSO__SERVER__RETRIES` is the key `server.retries`.
    pub(super) fn from_environment() -> Self {
        let values = std::env::vars().filter_map(|(name, value)| {
            let key = name.strip_prefix("ECSO__")?.to_lowercase().replace("__", ".");
            Some((key, value.into()))
        });
        Self { origin: "environment".into(), values: values.collect() }
    }

    /// Sets a value, if there is one.
    pub(super) fn set(&mut self, key: &str, value: Option<impl Into<toml::Value>>) {
        self.values.extend(value.map(|value| (key.to_owned(), value.into())));
    }

    fn sets(&self, key: &str) -> bool {
        let group = format!("{key}.");
        self.values.keys().any(|set| set == key || set.starts_with(&group))
    }
}

/// Where each setting comes from.
pub(crate) struct Origins(Vec<Layer>);

impl Origins {
    pub(super) fn new(layers: Vec<Layer>) -> Self {
        Self(layers)
    }

    /// Each setting as dotted key, value and origin.
    pub(crate) fn of(
        &self,
        settings: &impl Serialize,
    ) -> anyhow::Result<Vec<(String, toml::Value, &str)>> {
        let origin = |key: &str| self.0.iter().rev().find(|layer| layer.sets(key));
        let merged = Layer::new("", toml::Table::try_from(settings)?);
        let rows = merged.values.into_iter().map(|(key, value)| {
            let origin = origin(&key).map_or("default", |layer| layer.origin.as_str());
            (key, value, origin)
        });
        Ok(rows.collect())
    }
}

/// The largest number of a setting. Times are added up, in seconds or milliseconds.
const LARGEST: u64 = 1 << 40;

/// Checks that no number is too large.
fn check_numbers(settings: &impl Serialize) -> anyhow::Result<()> {
    let settings = toml::Value::try_from(settings)
        .map_err(|error| UsageError(format!("settings: {error}")))?;
    match too_large("", &settings) {
        Some(key) => Err(UsageError(format!("{key}: at most {LARGEST}")).into()),
        None => Ok(()),
    }
}

/// The dotted key of a number that is too large.
fn too_large(key: &str, value: &toml::Value) -> Option<String> {
    let inner = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        toml::Value::Integer(number) if number.unsigned_abs() > LARGEST => Some(key.to_owned()),
        toml::Value::Array(values) => values.iter().find_map(|value| too_large(key, value)),
        toml::Value::Table(table) => {
            table.iter().find_map(|(name, value)| too_large(&inner(name), value))
        }
        _ => None,
    }
}

/// Merges layers; later ones override earlier ones. The first layer has all settings.
pub(super) fn merge<T: Serialize + DeserializeOwned>(layers: &[Layer]) -> anyhow::Result<T> {
    let mut merged = toml::Table::new();
    for layer in layers {
        for (key, value) in &layer.values {
            insert(&mut merged, key, value.clone()).map_err(|NotATable| {
                UsageError(format!("{key} ({}): this is not a group of settings", layer.origin))
            })?;
        }
    }
    // The builder applies its overrides in no particular order, so no key may contain another.
    let mut values = BTreeMap::new();
    flatten("", merged, &mut values);
    let mut builder = config::Config::builder();
    for (key, value) in &values {
        let value: config::Value =
            value.clone().try_into().map_err(|error| UsageError(format!("{key}: {error}")))?;
        builder = builder
            .set_override(key, value)
            .map_err(|error| UsageError(format!("{key}: {error}")))?;
    }
    let settings = builder.build().and_then(config::Config::try_deserialize);
    let settings: T = settings.map_err(|error| {
        let problem = values
            .iter()
            .find_map(|(key, value)| unknown_variant::<T>(&layers[0], key, value))
            .unwrap_or_else(|| error.to_string());
        UsageError(format!("settings: {problem}; `ecso config show` lists all settings"))
    })?;
    check_numbers(&settings)?;
    Ok(settings)
}

/// Flattens tables to dotted keys. The table `set` stays whole: its keys belong to the profile.
fn flatten(prefix: &str, table: toml::Table, values: &mut BTreeMap<String, toml::Value>) {
    for (key, value) in table {
        match value {
            toml::Value::Table(inner) if prefix.is_empty() && key != "set" => {
                flatten(&format!("{key}."), inner, values);
            }
            value => {
                values.insert(format!("{prefix}{key}"), value);
            }
        }
    }
}

/// A dotted key goes through a value that is not a table.
struct NotATable;

/// Inserts a value under a dotted key.
fn insert(table: &mut toml::Table, key: &str, value: toml::Value) -> Result<(), NotATable> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
            Ok(())
        }
        Some((group, rest)) => {
            let inner = table.entry(group).or_insert_with(|| toml::Table::new().into());
            insert(inner.as_table_mut().ok_or(NotATable)?, rest, value)
        }
    }
}

/// Describes a setting that is not one of its allowed values. `config` does not say which values
/// are allowed, so the setting is deserialized again, as the only one that is not a default.
fn unknown_variant<T: DeserializeOwned>(
    defaults: &Layer,
    key: &str,
    value: &toml::Value,
) -> Option<String> {
    let mut table = toml::Table::new();
    for (key, value) in &defaults.values {
        insert(&mut table, key, value.clone()).ok()?;
    }
    insert(&mut table, key, value.clone()).ok()?;
    let error = table.try_into::<T>().err()?;
    error.message().starts_with("unknown variant").then(|| format!("{key}: {}", error.message()))
}
