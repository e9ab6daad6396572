//! The text reader in front of a model.

use std::sync::Arc;

use anyhow::Context;
use ecso::Mllm;

use crate::{
    error::UsageError,
    models::{
        catalogue::{Catalogue, Model},
        store::Store,
    },
    settings::Settings,
};

/// Puts the reader of `catalogued`, and its tagger if that is installed, in front of a text model.
pub(super) fn with_reader(
    settings: &Settings,
    catalogued: &Model,
    model: Arc<dyn Mllm>,
    name: String,
) -> anyhow::Result<Arc<dyn Mllm>> {
    let (catalogue, store) = (Catalogue::load()?, Store::new(&settings.models_dir));
    let files = catalogued
        .reader
        .as_ref()
        .with_context(|| format!("the catalogue's {} has no reader", catalogued.name))?;
    if !files.iter().all(|file| catalogue.file(file).is_ok_and(|file| store.has(file))) {
        return Err(UsageError(
            "the text reader is not installed; run `ecso models pull mini`".into(),
        )
        .into());
    }
    let [detector, recogniser, dictionary] = files.each_ref().map(|file| store.path(file));
    let reader = ecso_reader::Reader::load(&detector, &recogniser, &dictionary)?;
    let composed = ecso_reader::Composed::new(reader, model, name);
    let tagger = store.installed_tagger(&catalogue, catalogued)?.filter(|_| settings.tagger);
    Ok(match tagger {
        Some(file) => {
            let tagger = ecso_reader::Tagger::load(&store.path(&file.name))?;
            Arc::new(composed.with_tagger(tagger))
        }
        None => Arc::new(composed),
    })
}
