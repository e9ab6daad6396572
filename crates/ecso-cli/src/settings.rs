//! Settings: defaults, then a TOML file, then `ECSO__…` in the environment, then flags. Unknown
//! keys are an error.

mod layers;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context;
use ecso::Limits;
use ecso_openai::MaxTokensField;
use etcetera::{AppStrategy, AppStrategyArgs, app_strategy::Xdg};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::{
    cli::{ModelArgs, ProfileArgs, ServeArgs},
    error::UsageError,
};
use layers::Layer;
pub(crate) use layers::Origins;

/// The default environment variable for the API key.
const API_KEY_ENV: &str = "OPENAI_API_KEY";

/// All settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    /// Catalogue name, .gguf file or URL.
    pub(crate) model: String,
    /// The model's name on a server; if empty, the only one the server lists.
    pub(crate) model_name: String,
    /// Environment variable with the API key.
    pub(crate) api_key_env: String,
    /// The API key, if a library caller passes it; never read from a file.
    #[serde(skip)]
    pub(crate) api_key: Option<SecretString>,
    /// Multimodal projector of a .gguf model; empty for none.
    pub(crate) mmproj: PathBuf,
    /// Whether the text reader replaces images by their text.
    pub(crate) reader: bool,
    /// Whether the tagger helps the reader, if it is installed.
    pub(crate) tagger: bool,
    /// Built-in profile, TOML file, or `auto`, which means `hardened`. `hardened` uses the
    /// calibration of the model, if there is one.
    pub(crate) profile: String,
    /// Profile fields to override.
    pub(crate) set: BTreeMap<String, String>,
    /// Folder of model files.
    pub(crate) models_dir: PathBuf,
    /// Folder of calibrations.
    pub(crate) calibrations_dir: PathBuf,
    pub(crate) images: Limits,
    pub(crate) engine: Engine,
    pub(crate) server: Server,
    /// Where `ecso serve` sends the guard's own calls, if not to the guarded server.
    pub(crate) checks: Checks,
    /// Address that `ecso serve` listens on.
    pub(crate) listen: String,
    /// Address that `ecso serve` listens on for Envoy's external processing; empty for none.
    pub(crate) ext_proc: String,
    pub(crate) gateway: ecso_gateway::Settings,
}

impl Settings {
    /// Whether the model is on a server.
    pub(crate) fn is_server(&self) -> bool {
        is_url(&self.model)
    }

    /// Rows in flight by default. With one, a reply of the engine depends on nothing but its prompt.
    pub(crate) fn default_concurrency(&self) -> usize {
        if self.is_server() { 8 } else { 1 }
    }

    /// The proxy for requests to servers, if one is set.
    pub(crate) fn proxy(&self) -> Option<SecretString> {
        Some(self.server.proxy.clone()).filter(|url| !url.is_empty()).map(Into::into)
    }
}

/// Settings of the engine in this process; 0 leaves the choice to the engine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Engine {
    /// Maximum tokens of one conversation.
    pub(crate) context: u32,
    pub(crate) threads: u32,
    /// Number of conversations that are computed at the same time, and whose prefix is kept.
    pub(crate) slots: u32,
    /// Whether to compute every prompt from its start.
    pub(crate) no_reuse: bool,
    /// Whether to reuse replies too, if a conversation continues.
    pub(crate) keep_replies: bool,
    /// Whether to cache common prompt prefixes on disk.
    pub(crate) keep_prefixes: bool,
    /// Layers on the GPU; -1 leaves the choice to the engine.
    pub(crate) gpu_layers: i64,
    /// Jinja file that replaces the model's own chat template; empty for none.
    pub(crate) chat_template: PathBuf,
}

/// Settings for a model behind a URL.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Server {
    /// Connect timeout in seconds.
    pub(crate) connect_timeout: u64,
    /// Reply timeout in seconds.
    pub(crate) reply_timeout: u64,
    /// Number of retries of a request.
    pub(crate) retries: usize,
    /// Name of the limit on new tokens: `auto`, `max_tokens` or `max_completion_tokens`.
    pub(crate) max_tokens_field: MaxTokensField,
    /// Request fields that are never sent, for models that refuse them; separated by commas in the
    /// environment.
    #[serde(deserialize_with = "comma_separated")]
    pub(crate) omit: Vec<String>,
    /// Seconds after which a model that refused log-probabilities is asked for them again.
    pub(crate) forget_after: u64,
    /// Seconds that `eval` and `synth` wait for a server that became unreachable.
    pub(crate) away_timeout: u64,
    /// URL of a proxy; if empty, the environment decides, and a server on this machine needs none.
    pub(crate) proxy: String,
    /// PEM file of certificates to trust besides the system's; empty for none.
    pub(crate) ca_file: PathBuf,
    /// PEM file with the client's certificate chain and key; empty for none.
    pub(crate) client_cert: PathBuf,
    /// Unix socket for all requests; empty for none.
    pub(crate) unix_socket: PathBuf,
}

/// A cheaper or closer replica of the guarded model, for the guard's own calls.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Checks {
    /// URL of its server; if empty, the guarded server is used.
    pub(crate) url: String,
    /// The model's name there; if empty, the name that the client asks for.
    pub(crate) model_name: String,
    /// Environment variable with its API key; if empty, no key is sent.
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

/// A list, or a string of its items separated by commas.
fn comma_separated<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum List {
        Text(String),
        Items(Vec<String>),
    }
    Ok(match List::deserialize(deserializer)? {
        List::Items(items) => items,
        List::Text(text) => text
            .split(',')
            .map(|item| item.trim().to_owned())
            .filter(|item| !item.is_empty())
            .collect(),
    })
}

fn folders() -> anyhow::Result<Xdg> {
    let names = AppStrategyArgs { app_name: "ecso".into(), ..AppStrategyArgs::default() };
    Xdg::new(names).context("the home folder is unknown; set HOME")
}

fn defaults() -> anyhow::Result<Settings> {
    let folders = folders()?;
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
        models_dir: folders.in_cache_dir("models"),
        calibrations_dir: folders.in_config_dir("calibrations"),
        images: Limits::default(),
        engine: Engine { keep_prefixes: true, gpu_layers: -1, ..Engine::default() },
        server: Server::default(),
        checks: Checks::default(),
        listen: "127.0.0.1:8080".into(),
        ext_proc: String::new(),
        gateway: ecso_gateway::Settings::default(),
    })
}

/// The layers that every command starts from: defaults, the settings file and the environment.
fn base_layers(file: Option<&Path>) -> anyhow::Result<Vec<Layer>> {
    let mut layers = vec![Layer::new("default", toml::Table::try_from(defaults()?)?)];
    let usual_file = folders()?.in_config_dir("config.toml");
    let file = file.or_else(|| usual_file.exists().then_some(&usual_file));
    layers.extend(file.map(Layer::from_file).transpose()?);
    layers.push(Layer::from_environment());
    Ok(layers)
}

fn flag_layer(model: &ModelArgs, profile: &ProfileArgs) -> Layer {
    let mut layer = Layer::new("flag", toml::Table::new());
    layer.set("model", model.model.as_deref());
    layer.set("model_name", model.model_name.as_deref());
    layer.set("api_key_env", model.api_key_env.as_deref());
    let mmproj = model.mmproj.as_deref().map(Path::to_string_lossy);
    layer.set("mmproj", mmproj.as_deref());
    layer.set("reader", model.reader.then_some("true"));
    layer.set("profile", profile.profile.as_deref());
    if !profile.set.is_empty() {
        let fields = profile.set.iter().map(|(key, value)| (key.clone(), value.clone().into()));
        layer.set("set", Some(fields.collect::<toml::Table>()));
    }
    layer
}

/// Loads the settings of a command.
pub(crate) fn load(
    file: Option<&Path>,
    model: &ModelArgs,
    profile: &ProfileArgs,
) -> anyhow::Result<Settings> {
    Ok(load_with_origins(file, model, profile)?.0)
}

/// [`load`], with where each setting comes from.
pub(crate) fn load_with_origins(
    file: Option<&Path>,
    model: &ModelArgs,
    profile: &ProfileArgs,
) -> anyhow::Result<(Settings, Origins)> {
    let mut layers = base_layers(file)?;
    layers.push(flag_layer(model, profile));
    let settings = check_api_key(layers::merge(&layers)?, model)?;
    Ok((settings, Origins::new(layers)))
}

/// Loads the settings of a command that chooses no model and no profile.
pub(crate) fn load_file(file: Option<&Path>) -> anyhow::Result<Settings> {
    load(file, &ModelArgs::default(), &ProfileArgs::default())
}

/// Loads the settings of `ecso serve`.
pub(crate) fn load_serve(file: Option<&Path>, args: &ServeArgs) -> anyhow::Result<Settings> {
    if let Some(upstream) = args.upstream.as_ref().filter(|upstream| !is_url(upstream)) {
        return Err(UsageError(format!(
            "--upstream {upstream}: expected the URL of a server, for instance \
             http://localhost:8000/v1; use --model for a model in this process"
        ))
        .into());
    }
    let mut layers = base_layers(file)?;
    if args.shows_steps {
        let mut playground = Layer::new("ecso playground", toml::Table::new());
        playground.set("gateway.trace", Some("full"));
        layers.insert(1, playground);
    }
    let mut flags = flag_layer(&args.model, &args.profile);
    flags.set("model", args.upstream.as_deref());
    flags.set("listen", args.listen.as_deref());
    flags.set("ext_proc", args.ext_proc.as_deref());
    flags.set("gateway.mode", args.mode.as_deref());
    layers.push(flags);
    check_api_key(layers::merge(&layers)?, &args.model)
}

/// Loads the settings of a library caller, who passes some as they would be in a settings file.
pub(crate) fn load_library(
    arguments: toml::Table,
    api_key: Option<SecretString>,
) -> anyhow::Result<Settings> {
    let name = arguments.get("api_key_env").and_then(|name| name.as_str()).map(str::to_owned);
    let flags = ModelArgs { api_key_env: name, ..ModelArgs::default() };
    let mut layers = base_layers(None)?;
    layers.push(Layer::new("argument", arguments));
    let settings = Settings { api_key, ..layers::merge(&layers)? };
    if settings.api_key.is_some() { Ok(settings) } else { check_api_key(settings, &flags) }
}

/// Checks that the variable with the API key is set, if a server is asked and the user named the
/// variable.
fn check_api_key(settings: Settings, flags: &ModelArgs) -> anyhow::Result<Settings> {
    let name = settings.api_key_env.as_str();
    let is_named = flags.api_key_env.is_some() || !matches!(name, "" | API_KEY_ENV);
    if is_named && settings.is_server() && std::env::var_os(name).is_none_or(|key| key.is_empty()) {
        return Err(UsageError(format!(
            "--api-key-env {name}: this environment variable is not set"
        ))
        .into());
    }
    Ok(settings)
}

/// Whether a model's name is meant as a server's URL. That includes one without a scheme
/// (`localhost:8000/v1`) and one with another; the client then reports that.
pub(crate) fn is_url(name: &str) -> bool {
    let host = name.split('/').next().unwrap_or_default();
    let has_port = host.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
    });
    let has_login = host.contains(':') && host.contains('@');
    name.contains("://") || has_port || has_login
}
