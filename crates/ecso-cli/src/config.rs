//! Settings: defaults, then a TOML file, then `ECSO__…` in the environment, then flags. Unknown
//! keys are an error.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context;
use ecso::{Limits, Profile};
use ecso_openai::MaxTokensField;
use etcetera::{AppStrategy, AppStrategyArgs, app_strategy::Xdg};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::{
    UsageError, calibration,
    cli::{ModelArgs, ProfileArgs, ServeArgs},
};

/// Where the API key is, unless somebody says otherwise.
const API_KEY_ENV: &str = "OPENAI_API_KEY";

/// All settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    /// Catalogue name, .gguf file or URL.
    pub(crate) model: String,
    /// The model's name on a server; empty takes the only one.
    pub(crate) model_name: String,
    /// Name of the environment variable with the API key.
    pub(crate) api_key_env: String,
    /// The key itself, where a caller has it; it is in no file.
    #[serde(skip)]
    pub(crate) api_key: Option<SecretString>,
    /// Projector of a .gguf model; empty is none.
    pub(crate) mmproj: PathBuf,
    /// Whether the text reader stands in front.
    pub(crate) reader: bool,
    /// Whether the tagger helps the reader, where its file is here.
    pub(crate) tagger: bool,
    /// Built-in profile, TOML file, or `auto`, which is `hardened`. `hardened` is as it was fitted
    /// to the model, if it was.
    pub(crate) profile: String,
    /// Fields of the profile that are changed.
    pub(crate) set: BTreeMap<String, String>,
    /// Where models are kept.
    pub(crate) models_dir: PathBuf,
    /// Where calibrations are kept.
    pub(crate) calibrations_dir: PathBuf,
    pub(crate) images: Limits,
    pub(crate) engine: Engine,
    pub(crate) server: Server,
    /// Where the guard's own calls go under `ecso serve`, if not to the server that is guarded.
    pub(crate) checks: Checks,
    /// Where `ecso serve` listens.
    pub(crate) listen: String,
    /// Where `ecso serve` listens for gateways that speak Envoy's external processing; empty is
    /// nowhere.
    pub(crate) ext_proc: String,
    pub(crate) gateway: ecso_gateway::Settings,
}

/// Settings of the engine in the process; 0 leaves it to the engine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Engine {
    /// Tokens of one conversation.
    pub(crate) context: u32,
    pub(crate) threads: u32,
    /// Conversations whose prefix is kept.
    pub(crate) slots: u32,
    /// Compute every prompt from its start.
    pub(crate) no_reuse: bool,
    /// Don't keep on disk what many prompts begin with.
    pub(crate) no_heads: bool,
    /// Layers on the GPU; -1 leaves it to the engine.
    pub(crate) gpu_layers: i64,
    /// A Jinja file in place of the model's own chat template; empty is none.
    pub(crate) chat_template: PathBuf,
}

/// Settings for a model behind a URL.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Server {
    /// Seconds for a connection.
    pub(crate) connect_timeout: u64,
    /// Seconds for a reply.
    pub(crate) reply_timeout: u64,
    /// How often a request is tried again.
    pub(crate) retries: usize,
    /// What the limit on new tokens is called: `auto`, `max_tokens` or `max_completion_tokens`.
    pub(crate) max_tokens_field: MaxTokensField,
    /// Request fields that are never sent, by name, for models that refuse them; in the environment
    /// separated by commas.
    #[serde(deserialize_with = "list")]
    pub(crate) omit: Vec<String>,
    /// Seconds after which a model that refused log-probabilities is asked for them again.
    pub(crate) forget_after: u64,
    /// Seconds that long work (`eval`, `synth`) waits for a server that went away.
    pub(crate) away_timeout: u64,
    /// URL of a proxy; empty leaves it to the environment.
    pub(crate) proxy: String,
    /// PEM file of certificates that are trusted besides the system's own; empty is none.
    pub(crate) ca_file: PathBuf,
    /// PEM file with this client's certificate chain and key; empty is none.
    pub(crate) client_cert: PathBuf,
    /// Unix socket that all requests go to; empty is none.
    pub(crate) unix_socket: PathBuf,
}

/// A cheaper or closer replica of the guarded model, for the guard's own calls.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Checks {
    /// Its server; empty is the guarded one.
    pub(crate) url: String,
    /// The model's name there; empty is the name that the client asks for.
    pub(crate) model_name: String,
    /// Name of the environment variable with its API key; empty is no key.
    pub(crate) api_key_env: String,
}

impl Default for Server {
    fn default() -> Self {
        let options = ecso_openai::Options::default();
        Self {
            connect_timeout: options.connect_timeout.as_secs(),
            reply_timeout: options.reply_timeout.as_secs(),
            retries: options.retries,
            max_tokens_field: options.max_tokens_field,
            omit: options.omit,
            forget_after: options.forget_after.as_secs(),
            away_timeout: 300,
            proxy: String::new(),
            ca_file: PathBuf::new(),
            client_cert: PathBuf::new(),
            unix_socket: PathBuf::new(),
        }
    }
}

/// A list, or a text of its members with commas between.
fn list<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum List {
        Text(String),
        Members(Vec<String>),
    }
    Ok(match List::deserialize(deserializer)? {
        List::Members(members) => members,
        List::Text(text) => text
            .split(',')
            .map(|member| member.trim().to_owned())
            .filter(|member| !member.is_empty())
            .collect(),
    })
}

fn folders() -> anyhow::Result<Xdg> {
    let names = AppStrategyArgs { app_name: "ecso".into(), ..AppStrategyArgs::default() };
    Xdg::new(names).context("there is no home folder")
}

fn defaults() -> anyhow::Result<Settings> {
    Ok(Settings {
        model: "mini".into(),
        model_name: String::new(),
        api_key_env: API_KEY_ENV.into(),
        api_key: None,
        mmproj: PathBuf::new(),
        reader: false,
        tagger: true,
        profile: "auto".into(),
        set: BTreeMap::new(),
        models_dir: folders()?.in_cache_dir("models"),
        calibrations_dir: folders()?.in_config_dir("calibrations"),
        images: Limits::default(),
        engine: Engine { gpu_layers: -1, ..Engine::default() },
        server: Server::default(),
        checks: Checks::default(),
        listen: "127.0.0.1:8080".into(),
        ext_proc: String::new(),
        gateway: ecso_gateway::Settings::default(),
    })
}

/// One layer of settings: where it comes from, and its dotted keys with their values.
struct Layer {
    origin: String,
    values: BTreeMap<String, toml::Value>,
}

impl Layer {
    fn new(origin: impl Into<String>, table: toml::Table) -> Self {
        let mut values = BTreeMap::new();
        flatten("", table, &mut values);
        Self { origin: origin.into(), values }
    }
}

/// Dotted keys; `set` is a map of its own and stays whole.
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

fn layers(
    file: Option<&Path>,
    model: &ModelArgs,
    profile: &ProfileArgs,
) -> anyhow::Result<Vec<Layer>> {
    let mut layers = below_flags(file)?;
    layers.push(Layer { origin: "flag".into(), values: flags(model, profile)? });
    Ok(layers)
}

fn below_flags(file: Option<&Path>) -> anyhow::Result<Vec<Layer>> {
    let mut layers = vec![Layer::new("default", toml::Table::try_from(defaults()?)?)];
    let own = folders()?.in_config_dir("config.toml");
    let path = match file {
        Some(file) => Some(file.to_owned()),
        None => own.exists().then_some(own),
    };
    if let Some(path) = path {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(&path)
            .map_err(|error| UsageError(format!("{shown}: {error}")))?;
        let table = text.parse().map_err(|error| UsageError(format!("{shown}: {error}")))?;
        layers.push(Layer::new(shown, table));
    }
    layers.push(Layer { origin: "environment".into(), values: environment() });
    Ok(layers)
}

fn environment() -> BTreeMap<String, toml::Value> {
    std::env::vars()
        .filter_map(|(name, value)| {
            let key = name.strip_prefix("ECSO__")?.to_lowercase().replace("__", ".");
            Some((key, toml::Value::String(value)))
        })
        .collect()
}

fn flags(
    model: &ModelArgs,
    profile: &ProfileArgs,
) -> anyhow::Result<BTreeMap<String, toml::Value>> {
    let mut values = BTreeMap::new();
    let mut put = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            values.insert(key.to_owned(), toml::Value::String(value));
        }
    };
    put("model", model.model.clone());
    put("model_name", model.model_name.clone());
    put("api_key_env", model.api_key_env.clone());
    put("mmproj", model.mmproj.as_ref().map(|path| path.to_string_lossy().into_owned()));
    put("reader", model.reader.then(|| "true".into()));
    put("profile", profile.profile.clone());
    if !profile.set.is_empty() {
        let pairs = profile.set.iter().map(|pair| {
            let (key, value) = pair.split_once('=').ok_or_else(|| {
                UsageError(format!("--set {pair}: write KEY=VALUE, as in safe.max_tokens=256"))
            })?;
            Ok((key.trim().to_owned(), toml::Value::String(value.to_owned())))
        });
        let pairs: anyhow::Result<toml::Table> = pairs.collect();
        values.insert("set".into(), toml::Value::Table(pairs?));
    }
    Ok(values)
}

/// Puts a value where its dotted key says.
fn place(table: &mut toml::Table, key: &str, value: toml::Value) -> Result<(), ()> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
            Ok(())
        }
        Some((group, rest)) => {
            let inner = table.entry(group).or_insert_with(|| toml::Table::new().into());
            place(inner.as_table_mut().ok_or(())?, rest, value)
        }
    }
}

/// Whether a model's name is meant for a server's URL. One without a scheme (`localhost:8000/v1`)
/// is too; the client says what to write.
pub(crate) fn is_url(name: &str) -> bool {
    let host = name.split('/').next().unwrap_or_default();
    let has_port = host.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
    });
    name.starts_with("http://") || name.starts_with("https://") || has_port
}

/// The settings that result for `ecso serve`.
pub(crate) fn load_serve(file: Option<&Path>, args: &ServeArgs) -> anyhow::Result<Settings> {
    if let Some(named) = args.upstream.as_ref().filter(|named| !is_url(named)) {
        return Err(UsageError(format!(
            "--upstream {named}: it is a server's URL, for instance http://localhost:8000/v1; a model in this process is --model"
        ))
        .into());
    }
    let mut layers = layers(file, &args.model, &args.profile)?;
    if args.is_own {
        let shown = BTreeMap::from([("gateway.trace".to_owned(), "full".into())]);
        layers.insert(1, Layer { origin: "ecso playground".into(), values: shown });
    }
    let own = [
        ("model", &args.upstream),
        ("listen", &args.listen),
        ("ext_proc", &args.ext_proc),
        ("gateway.mode", &args.mode),
    ];
    let given = own
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), toml::Value::from(value.clone()?))));
    layers.push(Layer { origin: "flag".into(), values: given.collect() });
    with_key(merge(&layers)?, &args.model)
}

/// The settings that result.
pub(crate) fn load(
    file: Option<&Path>,
    model: &ModelArgs,
    profile: &ProfileArgs,
) -> anyhow::Result<Settings> {
    with_key(merge(&layers(file, model, profile)?)?, model)
}

/// The settings that result where a program gives its own, as they stand in a file of settings.
pub(crate) fn load_given(
    given: toml::Table,
    api_key: Option<SecretString>,
) -> anyhow::Result<Settings> {
    let flags = ModelArgs {
        api_key_env: given.get("api_key_env").and_then(|name| name.as_str()).map(str::to_owned),
        ..ModelArgs::default()
    };
    let mut layers = below_flags(None)?;
    layers.push(Layer::new("argument", given));
    let settings = Settings { api_key, ..merge(&layers)? };
    if settings.api_key.is_some() { Ok(settings) } else { with_key(settings, &flags) }
}

/// The settings, if the variable with the API key is there, where somebody named one and a server
/// is asked.
fn with_key(settings: Settings, flags: &ModelArgs) -> anyhow::Result<Settings> {
    let name = settings.api_key_env.as_str();
    let is_named = flags.api_key_env.is_some() || !matches!(name, "" | API_KEY_ENV);
    if is_named
        && is_url(&settings.model)
        && std::env::var_os(name).is_none_or(|key| key.is_empty())
    {
        return Err(UsageError(format!(
            "--api-key-env {name}: this environment variable is not set"
        ))
        .into());
    }
    Ok(settings)
}

fn merge(layers: &[Layer]) -> anyhow::Result<Settings> {
    let mut whole = toml::Table::new();
    for layer in layers {
        for (key, value) in &layer.values {
            place(&mut whole, key, value.clone()).map_err(|()| {
                UsageError(format!("{key} ({}): it is no group of settings", layer.origin))
            })?;
        }
    }
    // Keys that hold no other: the builder applies its overrides in no order.
    let mut values = BTreeMap::new();
    flatten("", whole, &mut values);
    let mut builder = config::Config::builder();
    for (key, value) in &values {
        let value: config::Value =
            value.clone().try_into().map_err(|error| UsageError(format!("{key}: {error}")))?;
        builder = builder
            .set_override(key, value)
            .map_err(|error| UsageError(format!("{key}: {error}")))?;
    }
    let settings = builder.build().and_then(config::Config::try_deserialize);
    settings.map_err(|error| {
        let error = values
            .iter()
            .find_map(|(key, value)| no_choice(key, value))
            .unwrap_or_else(|| error.to_string());
        UsageError(format!("settings: {error}; `ecso config show` lists them all")).into()
    })
}

/// What is wrong with a setting that is none of those that can be chosen from: only this way serde
/// says which these are.
fn no_choice(key: &str, value: &toml::Value) -> Option<String> {
    let mut table = toml::Table::try_from(defaults().ok()?).ok()?;
    place(&mut table, key, value.clone()).ok()?;
    let error = table.try_into::<Settings>().err()?;
    error.message().starts_with("unknown variant").then(|| format!("{key}: {}", error.message()))
}

/// The profile that the settings name, with its fields changed.
pub(crate) fn profile(settings: &Settings) -> anyhow::Result<Profile> {
    Ok(chosen_profile(settings)?.0)
}

/// [`profile`], and why it is that one, where nobody named it, or where it is fitted to the model.
pub(crate) fn chosen_profile(
    settings: &Settings,
) -> anyhow::Result<(Profile, Option<&'static str>)> {
    let (mut profile, why) = match settings.profile.as_str() {
        "auto" | "hardened" => {
            let (profile, why) = calibration::profile(settings)?;
            (profile, (settings.profile == "auto" || why == calibration::FITTED).then_some(why))
        }
        named => (named_profile(named)?, None),
    };
    for (key, value) in &settings.set {
        profile = profile.with(key, value)?;
    }
    Ok((profile, why))
}

/// Tells of a profile that is fitted to the model: its name doesn't.
pub(crate) fn tell_fit(settings: &Settings) -> anyhow::Result<()> {
    if let (profile, Some(calibration::FITTED)) = chosen_profile(settings)? {
        say!(
            "profile {}: {}, as `ecso tune` or `ecso eval calibrate` kept it",
            profile.name,
            calibration::FITTED
        );
    }
    Ok(())
}

/// The profile that the settings name, and those of single models and clients.
pub(crate) fn profiles(settings: &Settings) -> anyhow::Result<ecso_gateway::Profiles> {
    let default = profile(settings)?;
    let named =
        settings.gateway.profile_names().map(|name| Ok((name.to_owned(), named_profile(name)?)));
    Ok(ecso_gateway::Profiles { default, named: named.collect::<anyhow::Result<_>>()? })
}

fn named_profile(named: &str) -> anyhow::Result<Profile> {
    let is_file = Path::new(named).extension().is_some_and(|extension| extension == "toml")
        || named.contains('/');
    if !is_file {
        return Ok(Profile::named(named)?);
    }
    let text = std::fs::read_to_string(named)
        .map_err(|error| UsageError(format!("profile {named}: {error}")))?;
    Ok(Profile::from_toml(&text)
        .map_err(|error| UsageError(format!("profile {named}: {error}")))?)
}

/// `ecso config show`.
pub(crate) fn show(
    file: Option<&Path>,
    model: &ModelArgs,
    profile_args: &ProfileArgs,
) -> anyhow::Result<()> {
    let layers = layers(file, model, profile_args)?;
    let settings = merge(&layers)?;
    let result = Layer::new("", toml::Table::try_from(&settings)?);
    for (key, value) in &result.values {
        let deeper = format!("{key}.");
        let sets =
            |layer: &&Layer| layer.values.keys().any(|set| set == key || set.starts_with(&deeper));
        let origin = layers.iter().rev().find(sets);
        let origin = origin.map_or("default", |layer| layer.origin.as_str());
        println!("{:<48} # {origin}", format!("{key} = {value}"));
    }
    let key_set = std::env::var_os(&settings.api_key_env).is_some();
    println!("# {} is {}", settings.api_key_env, if key_set { "set" } else { "not set" });
    println!("\n# the profile\n{}", profile(&settings)?.to_toml());
    Ok(())
}
