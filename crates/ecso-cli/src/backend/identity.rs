//! Identities of models: equal ones give equal replies, as far as that can be known.

use std::{fs, fs::File, path::Path};

use anyhow::Context;

use super::files::{is_file, non_empty};
use crate::{
    error::UsageError,
    models::{
        catalogue::{Catalogue, Model},
        store::Store,
    },
    settings::Settings,
};

/// Identifies the model that the settings name: the digests of its files, or its address and name
/// on a server, and the settings that change its replies.
pub(crate) fn identity(settings: &Settings) -> anyhow::Result<String> {
    let mut identity = base(settings)?;
    if settings.reader {
        identity += &reader(settings)?;
    }
    if settings.is_server() {
        return Ok(identity);
    }
    if let Some(path) = non_empty(&settings.engine.chat_template) {
        let text = fs::read(path).map_err(|error| UsageError::at(path, error))?;
        identity = format!("{identity} template {}", &blake3::hash(&text).to_hex()[..16]);
    }
    if settings.engine.context > 0 {
        identity = format!("{identity} context {}", settings.engine.context);
    }
    Ok(identity)
}

/// The model without what the settings add to it.
fn base(settings: &Settings) -> anyhow::Result<String> {
    if settings.is_server() {
        let omitted = settings.server.omit.join(" ");
        let omitted = if omitted.is_empty() { omitted } else { format!(" without {omitted}") };
        return Ok(format!("{} {}{omitted}", super::address(settings), settings.model_name));
    }
    if is_file(&settings.model) {
        let mut digest = blake3::Hasher::new();
        for path in [Path::new(&settings.model)].into_iter().chain(non_empty(&settings.mmproj)) {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            digest.update_reader(file)?;
        }
        return Ok(format!("blake3 {}", digest.finalize().to_hex()));
    }
    let catalogue = Catalogue::load()?;
    let model = catalogue.model(&settings.model)?;
    let files = catalogue.required_files(model)?;
    let digests: Vec<&str> = files.iter().map(|file| &file.sha256[..16]).collect();
    let tagger = tagger(settings, &catalogue, model)?;
    Ok(format!("sha256 {}{tagger}", digests.join(" ")))
}

/// The reader of `mini`, in front of another model.
fn reader(settings: &Settings) -> anyhow::Result<String> {
    let catalogue = Catalogue::load()?;
    let mini = catalogue.model("mini")?;
    let files = mini.reader.as_ref().context("the catalogue's mini has no reader")?;
    let digests = files.iter().map(|file| Ok(&catalogue.file(file)?.sha256[..16]));
    let digests = digests.collect::<anyhow::Result<Vec<_>>>()?.join(" ");
    Ok(format!(" with reader {digests}{}", tagger(settings, &catalogue, mini)?))
}

/// The tagger of a model; empty if it is not used.
fn tagger(settings: &Settings, catalogue: &Catalogue, model: &Model) -> anyhow::Result<String> {
    let store = Store::new(&settings.models_dir);
    let file = store.installed_tagger(catalogue, model)?.filter(|_| settings.tagger);
    Ok(file.map_or_else(String::new, |file| format!(" tagger {}", &file.sha256[..16])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings;

    #[test]
    fn an_installed_tagger_is_part_of_the_identity() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings::load_file(None).unwrap();
        (settings.model, settings.models_dir) = ("mini".into(), folder.path().to_owned());
        settings.tagger = true;
        let without = identity(&settings).unwrap();
        assert!(!without.contains("tagger"), "{without}");

        let catalogue = Catalogue::load().unwrap();
        let file =
            catalogue.file(catalogue.model("mini").unwrap().tagger.as_ref().unwrap()).unwrap();
        File::create(folder.path().join(&file.name)).unwrap().set_len(file.bytes.unwrap()).unwrap();
        assert_eq!(
            identity(&settings).unwrap(),
            format!("{without} tagger {}", &file.sha256[..16])
        );
        settings.tagger = false;
        assert_eq!(identity(&settings).unwrap(), without);
    }
}
