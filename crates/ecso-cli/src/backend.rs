//! From settings to a model that answers: one on a server, or one in this process.

mod engine;
mod files;
mod identity;
mod reader;

use std::{path::Path, sync::Arc, time::Duration};

use ecso::Mllm;
use ecso_openai::OpenAi;

use crate::{error::UsageError, models::catalogue::Catalogue, settings::Settings};
use files::{check_gguf, non_empty};
pub(crate) use identity::identity;

/// Opens the model that the settings name: a URL, a .gguf file, or a name from the catalogue.
pub(crate) async fn open(settings: &Settings) -> anyhow::Result<Arc<dyn Mllm>> {
    let model: Arc<dyn Mllm> = if settings.is_server() {
        Arc::new(server(settings)?.resolve_model().await?)
    } else {
        check_gguf(settings)?;
        engine::open(settings).await?
    };
    if !settings.reader {
        return Ok(model);
    }
    let name = format!("reader+{}", model.name());
    reader::with_reader(settings, Catalogue::load()?.model("mini")?, model, name)
}

/// The settings with the name of the server's only model, if they name none.
pub(crate) async fn named(settings: &Settings) -> anyhow::Result<Settings> {
    let mut settings = settings.clone();
    if settings.is_server() && settings.model_name.is_empty() {
        let model = server(&settings)?.resolve_model().await?;
        model.name().clone_into(&mut settings.model_name);
    }
    Ok(settings)
}

/// The server's address as it is called: without login, with /v1 if it has no path.
pub(crate) fn address(settings: &Settings) -> String {
    let base = server(settings).map(|server| server.base().to_string());
    base.as_deref().unwrap_or(&settings.model).trim_end_matches('/').to_owned()
}

fn server(settings: &Settings) -> anyhow::Result<OpenAi> {
    let server = OpenAi::new(&settings.model, server_options(settings));
    Ok(server.map_err(|error| connection_error(&error))?)
}

/// What the server says about the model besides its name, to tell it from another one of that
/// name. None for a model in this process.
pub(crate) async fn description(settings: &Settings) -> anyhow::Result<Option<String>> {
    if !settings.is_server() {
        return Ok(None);
    }
    Ok(server(settings)?.resolve_model().await?.model_description().await?)
}

/// Which model the server has now: what its list says about the named model, or about all models
/// if none is named.
///
/// # Errors
/// The server can't be asked now.
pub(crate) async fn current_model(settings: &Settings) -> anyhow::Result<String> {
    Ok(server(settings)?.identity().await?)
}

/// Flags that make another command use the same model; empty for the default one.
pub(crate) fn flags(settings: &Settings) -> String {
    let quoted = |text: &str| {
        if text.contains(char::is_whitespace) { format!("'{text}'") } else { text.to_owned() }
    };
    let flag = |name: &str, value: &str| {
        if value.is_empty() { String::new() } else { format!(" {name} {}", quoted(value)) }
    };
    let model = if settings.model == "mini" { "" } else { settings.model.as_str() };
    format!("{}{}", flag("--model", model), flag("--model-name", &settings.model_name))
}

/// An error that occurred before the server was asked anything: its address, a file or a proxy is
/// wrong.
pub(crate) fn connection_error(error: &ecso::ModelError) -> UsageError {
    match error {
        ecso::ModelError::Rejected(cause) | ecso::ModelError::Transport(cause) => {
            UsageError(cause.to_string())
        }
        other => UsageError(other.to_string()),
    }
}

/// How to talk to the server.
pub(crate) fn server_options(settings: &Settings) -> ecso_openai::Options {
    let key_in_environment =
        || std::env::var(&settings.api_key_env).ok().filter(|key| !key.is_empty()).map(Into::into);
    let file = |path| non_empty(path).map(Path::to_owned);
    ecso_openai::Options {
        model: Some(settings.model_name.clone()).filter(|name| !name.is_empty()),
        api_key: settings.api_key.clone().or_else(key_in_environment),
        connect_timeout: Duration::from_secs(settings.server.connect_timeout),
        reply_timeout: Duration::from_secs(settings.server.reply_timeout),
        retries: settings.server.retries,
        max_tokens_field: settings.server.max_tokens_field,
        omit: settings.server.omit.clone(),
        forget_after: Duration::from_secs(settings.server.forget_after),
        proxy: settings.proxy(),
        ca_file: file(&settings.server.ca_file),
        client_cert: file(&settings.server.client_cert),
        unix_socket: file(&settings.server.unix_socket),
        ..ecso_openai::Options::default()
    }
}
