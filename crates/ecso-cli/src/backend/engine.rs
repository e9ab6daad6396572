//! Models in this process.

#[cfg(not(feature = "engine"))]
pub(super) use absent::open;
#[cfg(feature = "engine")]
pub(super) use present::open;

#[cfg(feature = "engine")]
mod present {
    use std::{num::NonZeroU32, path::PathBuf, sync::Arc};

    use ecso::Mllm;
    use ecso_llama::{Llama, Options};

    use crate::{
        backend::{
            files::{is_file, non_empty},
            reader::with_reader,
        },
        error::UsageError,
        models::{catalogue::Catalogue, store::Store},
        settings::{Engine, Settings},
    };

    pub(crate) async fn open(settings: &Settings) -> anyhow::Result<Arc<dyn Mllm>> {
        let store = Store::new(&settings.models_dir);
        let mut options = options(&settings.engine, store.prefix_folder())?;
        options.mmproj = non_empty(&settings.mmproj).map(Into::into);
        if is_file(&settings.model) {
            return Ok(Arc::new(Llama::load(&settings.model, options).await?));
        }
        let catalogue = Catalogue::load()?;
        let model = catalogue.model(&settings.model)?;
        store.installed_files(&catalogue, model)?;
        options.name = Some(model.name.clone());
        if let Some(mmproj) = &model.mmproj {
            options.mmproj = Some(store.path(mmproj));
        }
        let llama = Arc::new(Llama::load(store.path(&model.weights), options).await?);
        if model.reader.is_none() {
            return Ok(llama);
        }
        with_reader(settings, model, llama, model.name.clone())
    }

    fn options(engine: &Engine, prefix_folder: PathBuf) -> anyhow::Result<Options> {
        let chat_template = non_empty(&engine.chat_template)
            .map(|path| std::fs::read_to_string(path).map_err(|error| UsageError::at(path, error)));
        Ok(Options {
            name: None,
            mmproj: None,
            context: NonZeroU32::new(engine.context),
            slots: NonZeroU32::new(engine.slots),
            threads: NonZeroU32::new(engine.threads),
            no_reuse: engine.no_reuse,
            keep_replies: engine.keep_replies,
            prefix_folder: engine.keep_prefixes.then_some(prefix_folder),
            gpu_layers: u32::try_from(engine.gpu_layers).ok(),
            chat_template: chat_template.transpose()?,
        })
    }
}

#[cfg(not(feature = "engine"))]
mod absent {
    use std::sync::Arc;

    use ecso::Mllm;

    use crate::{error::UsageError, settings::Settings};

    pub(crate) async fn open(settings: &Settings) -> anyhow::Result<Arc<dyn Mllm>> {
        Err(UsageError(format!(
            "`{}` runs in this process, but this build has no engine; name a server by its URL, \
             or build with the feature `engine`",
            settings.model
        ))
        .into())
    }
}
