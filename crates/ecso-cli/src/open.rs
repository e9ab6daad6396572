//! From settings to a model that answers.

use std::{
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use ecso::Mllm;

use crate::{
    UsageError,
    config::{self, Settings},
    models::{
        catalogue::{Catalogue, Model},
        store::Store,
        tagger_here,
    },
};

/// Opens the model that the settings name: a URL, a .gguf file, or a name from the catalogue.
pub(crate) async fn model(settings: &Settings) -> anyhow::Result<Arc<dyn Mllm>> {
    let model = if is_server(settings) {
        server(settings).await?
    } else {
        are_models(settings)?;
        engine::model(settings).await?
    };
    if settings.reader { with_reader(model, settings) } else { Ok(model) }
}

/// Holds that the files of a model are what they should be, as far as their first bytes tell.
fn are_models(settings: &Settings) -> Result<(), UsageError> {
    let weights = Some(Path::new(&settings.model)).filter(|_| is_file(&settings.model));
    for path in weights.into_iter().chain(named(&settings.mmproj).as_deref()) {
        let mut mark = Vec::new();
        let read = std::fs::File::open(path).and_then(|file| file.take(4).read_to_end(&mut mark));
        read.map_err(|error| UsageError(format!("{}: {error}", path.display())))?;
        if mark != b"GGUF" {
            return Err(UsageError(format!("{}: it is no GGUF file", path.display())));
        }
    }
    Ok(())
}

/// Whether the settings name a server.
pub(crate) fn is_server(settings: &Settings) -> bool {
    config::is_url(&settings.model)
}

/// How many rows are asked about at once, where nobody says: the engine answers one after the
/// other.
pub(crate) fn at_once(settings: &Settings) -> usize {
    if is_server(settings) { 8 } else { 1 }
}

/// What the model is, to the bit where that can be known: the digests of its files, or the address
/// and name on a server; and what of the settings changes its replies.
pub(crate) fn identity(settings: &Settings) -> anyhow::Result<String> {
    let mut reader = String::new();
    if settings.reader {
        let catalogue = Catalogue::load()?;
        let mini = catalogue.model("mini")?;
        let files = mini.reader.as_ref().context("the catalogue's mini has no reader")?;
        let digests = files.iter().map(|file| Ok(catalogue.file(file)?.sha256[..16].to_owned()));
        let digests = digests.collect::<anyhow::Result<Vec<_>>>()?.join(" ");
        reader = format!(" with reader {digests}{}", tagger_identity(settings, &catalogue, mini)?);
    }
    if is_server(settings) {
        let omitted = settings.server.omit.join(" ");
        let omitted = if omitted.is_empty() { omitted } else { format!(" without {omitted}") };
        return Ok(format!("{} {}{omitted}{reader}", settings.model, settings.model_name));
    }
    let engine = &settings.engine;
    if !engine.chat_template.as_os_str().is_empty() {
        let path = &engine.chat_template;
        let text = std::fs::read(path)
            .map_err(|error| UsageError(format!("{}: {error}", path.display())))?;
        reader = format!("{reader} template {}", &blake3::hash(&text).to_hex()[..16]);
    }
    if engine.context > 0 {
        reader = format!("{reader} context {}", engine.context);
    }
    if !is_file(&settings.model) {
        let catalogue = Catalogue::load()?;
        let model = catalogue.model(&settings.model)?;
        let files = catalogue.needed(model)?;
        let digests: Vec<&str> = files.iter().map(|file| &file.sha256[..16]).collect();
        let tagger = tagger_identity(settings, &catalogue, model)?;
        return Ok(format!("sha256 {}{tagger}{reader}", digests.join(" ")));
    }
    let mut digest = blake3::Hasher::new();
    for file in [Path::new(&settings.model), &settings.mmproj] {
        if !file.as_os_str().is_empty() {
            digest.update_reader(
                std::fs::File::open(file).with_context(|| file.display().to_string())?,
            )?;
        }
    }
    Ok(format!("blake3 {}{reader}", digest.finalize().to_hex()))
}

/// The digest of the tagger that a model has under these settings; empty if it has none.
fn tagger_identity(
    settings: &Settings,
    catalogue: &Catalogue,
    model: &Model,
) -> anyhow::Result<String> {
    let store = Store::new(&settings.models_dir);
    let file = tagger_here(catalogue, &store, model)?.filter(|_| settings.tagger);
    Ok(file.map_or_else(String::new, |file| format!(" tagger {}", &file.sha256[..16])))
}

/// What the server says of the model beside its name, by which another one of that name is told.
/// None of a model in this process.
pub(crate) async fn description(settings: &Settings) -> anyhow::Result<Option<String>> {
    if !is_server(settings) {
        return Ok(None);
    }
    let server = ecso_openai::OpenAi::new(&settings.model, server_options(settings))
        .map_err(|error| misuse(&error))?;
    Ok(server.resolve_model().await?.model_description().await?)
}

/// The flags by which another command asks the same model; empty where it is the usual one.
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

/// Which model a server has now, in one text: what its list says of the one that is named, or
/// whatever it has where none is.
///
/// # Errors
/// It can't be asked now.
pub(crate) async fn standing(settings: &Settings) -> anyhow::Result<String> {
    let server = ecso_openai::OpenAi::new(&settings.model, server_options(settings))
        .map_err(|error| misuse(&error))?;
    Ok(server.identity().await?)
}

/// Whether a model's name is a file's.
pub(crate) fn is_file(name: &str) -> bool {
    let path = Path::new(name);
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
        || path.components().count() > 1
}

async fn server(settings: &Settings) -> anyhow::Result<Arc<dyn Mllm>> {
    let server = ecso_openai::OpenAi::new(&settings.model, server_options(settings))
        .map_err(|error| misuse(&error))?;
    Ok(Arc::new(server.resolve_model().await?))
}

/// What is wrong before a server is asked anything: its address, a file, a proxy.
pub(crate) fn misuse(error: &ecso::ModelError) -> UsageError {
    match error {
        ecso::ModelError::Rejected(cause) | ecso::ModelError::Transport(cause) => {
            UsageError(cause.to_string())
        }
        other => UsageError(other.to_string()),
    }
}

/// How a server is talked to.
pub(crate) fn server_options(settings: &Settings) -> ecso_openai::Options {
    let key =
        || std::env::var(&settings.api_key_env).ok().filter(|key| !key.is_empty()).map(Into::into);
    ecso_openai::Options {
        model: Some(settings.model_name.clone()).filter(|name| !name.is_empty()),
        api_key: settings.api_key.clone().or_else(key),
        connect_timeout: Duration::from_secs(settings.server.connect_timeout),
        reply_timeout: Duration::from_secs(settings.server.reply_timeout),
        retries: settings.server.retries,
        max_tokens_field: settings.server.max_tokens_field,
        omit: settings.server.omit.clone(),
        forget_after: Duration::from_secs(settings.server.forget_after),
        proxy: Some(settings.server.proxy.clone()).filter(|url| !url.is_empty()).map(Into::into),
        ca_file: named(&settings.server.ca_file),
        client_cert: named(&settings.server.client_cert),
        unix_socket: named(&settings.server.unix_socket),
        ..ecso_openai::Options::default()
    }
}

/// An empty path is none.
fn named(path: &Path) -> Option<PathBuf> {
    Some(path.to_owned()).filter(|path| !path.as_os_str().is_empty())
}

/// The reader of `mini` in front of another model.
fn with_reader(model: Arc<dyn Mllm>, settings: &Settings) -> anyhow::Result<Arc<dyn Mllm>> {
    let name = format!("reader+{}", model.name());
    composed(settings, Catalogue::load()?.model("mini")?, model, name)
}

/// A text model behind the reader of `composed`, and behind its tagger, if that is here.
fn composed(
    settings: &Settings,
    composed: &Model,
    model: Arc<dyn Mllm>,
    name: String,
) -> anyhow::Result<Arc<dyn Mllm>> {
    let (catalogue, store) = (Catalogue::load()?, Store::new(&settings.models_dir));
    let files = composed
        .reader
        .as_ref()
        .with_context(|| format!("the catalogue's {} has no reader", composed.name))?;
    if !files.iter().all(|file| catalogue.file(file).is_ok_and(|file| store.has(file))) {
        return Err(UsageError(
            "the text reader is not here yet; get it with `ecso models pull mini`".into(),
        )
        .into());
    }
    let [detector, recogniser, dictionary] = files.each_ref().map(|file| store.path(file));
    let reader = ecso_reader::Reader::load(&detector, &recogniser, &dictionary)?;
    let reading = ecso_reader::Composed::new(reader, model, name);
    Ok(match tagger_here(&catalogue, &store, composed)?.filter(|_| settings.tagger) {
        Some(file) => {
            Arc::new(reading.with_tagger(ecso_reader::Tagger::load(&store.path(&file.name))?))
        }
        None => Arc::new(reading),
    })
}

#[cfg(feature = "engine")]
mod engine {
    use std::{num::NonZeroU32, path::PathBuf, sync::Arc};

    use ecso::Mllm;
    use ecso_llama::{Llama, Options};

    use crate::{
        UsageError,
        config::{Engine, Settings},
        models,
    };

    pub(super) async fn model(settings: &Settings) -> anyhow::Result<Arc<dyn Mllm>> {
        let name = settings.model.as_str();
        let mut options =
            options(&settings.engine, super::Store::new(&settings.models_dir).heads_folder())?;
        options.mmproj = Some(settings.mmproj.clone()).filter(|path| !path.as_os_str().is_empty());
        if super::is_file(name) {
            return Ok(Arc::new(Llama::load(name, options).await?));
        }
        let (model, store) = models::find(name, &settings.models_dir)?;
        options.name = Some(model.name.clone());
        if let Some(mmproj) = &model.mmproj {
            options.mmproj = Some(store.path(mmproj));
        }
        let llama: Arc<dyn Mllm> =
            Arc::new(Llama::load(store.path(&model.weights), options).await?);
        let name = model.name.clone();
        if model.reader.is_some() {
            super::composed(settings, &model, llama, name)
        } else {
            Ok(llama)
        }
    }

    fn options(engine: &Engine, heads: PathBuf) -> anyhow::Result<Options> {
        let own_template = !engine.chat_template.as_os_str().is_empty();
        let chat_template = own_template.then(|| read(&engine.chat_template)).transpose()?;
        Ok(Options {
            name: None,
            mmproj: None,
            context: NonZeroU32::new(engine.context),
            slots: NonZeroU32::new(engine.slots),
            threads: NonZeroU32::new(engine.threads),
            no_reuse: engine.no_reuse,
            heads: (!engine.no_heads).then_some(heads),
            gpu_layers: u32::try_from(engine.gpu_layers).ok(),
            chat_template,
        })
    }

    fn read(path: &PathBuf) -> anyhow::Result<String> {
        std::fs::read_to_string(path)
            .map_err(|error| UsageError(format!("{}: {error}", path.display())).into())
    }
}

#[cfg(not(feature = "engine"))]
mod engine {
    use std::sync::Arc;

    use ecso::Mllm;

    use crate::{UsageError, config::Settings};

    #[expect(clippy::unused_async, reason = "stands in for the real one")]
    pub(super) async fn model(settings: &Settings) -> anyhow::Result<Arc<dyn Mllm>> {
        Err(UsageError(format!(
            "`{}` runs in this process, and this build has no engine for that; name a server by its URL, or build with \
             the feature `engine`",
            settings.model
        ))
        .into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{ModelArgs, ProfileArgs};

    #[test]
    fn a_tagger_that_is_here_and_wanted_is_part_of_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings =
            config::load(None, &ModelArgs::default(), &ProfileArgs::default()).unwrap();
        (settings.model, settings.models_dir) = ("mini".into(), folder.path().to_owned());
        settings.tagger = true;
        let without = identity(&settings).unwrap();
        assert!(!without.contains("tagger"), "{without}");

        let catalogue = Catalogue::load().unwrap();
        let file =
            catalogue.file(catalogue.model("mini").unwrap().tagger.as_ref().unwrap()).unwrap();
        std::fs::File::create(folder.path().join(&file.name))
            .unwrap()
            .set_len(file.bytes.unwrap())
            .unwrap();
        assert_eq!(
            identity(&settings).unwrap(),
            format!("{without} tagger {}", &file.sha256[..16])
        );
        settings.tagger = false;
        assert_eq!(identity(&settings).unwrap(), without);
    }
}
