//! From settings to a guard, for programs that use this crate as a library. Everything works as it
//! does on the command line.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context;
use ecso::{Limits, Mllm, Profile};
use ecso_gateway::settings::ImageUrls;
use ecso_openai::Fetcher;
use secrecy::SecretString;

use crate::{
    backend,
    error::UsageError,
    profiles,
    settings::{self, Settings},
    worker::{Stopped, Worker},
};

/// Whether an error means that the request itself was wrong: a setting, a profile or a file.
#[must_use]
pub fn is_usage_error(error: &anyhow::Error) -> bool {
    error.is::<UsageError>() || error.is::<ecso::ProfileError>()
}

/// Whether this build can run models in this process.
pub const HAS_ENGINE: bool = cfg!(feature = "engine");

/// Settings and profile of a guard whose model is not open yet.
#[derive(Debug, Clone)]
pub struct Setup {
    settings: Settings,
    profile: Profile,
}

impl Setup {
    /// Loads the settings. `arguments` are settings as in `config.toml`; they override that file
    /// and the environment. `api_key` overrides the one in the environment.
    ///
    /// # Errors
    /// A setting or the profile is wrong.
    pub fn new(arguments: toml::Table, api_key: Option<SecretString>) -> anyhow::Result<Self> {
        let names: Vec<String> = arguments.keys().cloned().collect();
        let settings = settings::load_library(arguments, api_key);
        let settings = settings.map_err(|error| of_profile(&names, error))?;
        let profile = profiles::load(&settings)?;
        Ok(Self { settings, profile })
    }

    /// The profile.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The limits on images.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.settings.images
    }

    /// How images behind URLs are handled.
    #[must_use]
    pub fn image_urls(&self) -> ImageUrls {
        self.settings.gateway.image_urls
    }

    /// Returns a fetcher for images, as the settings allow.
    ///
    /// # Errors
    /// The HTTP client can't be built.
    pub fn fetcher(&self) -> anyhow::Result<Fetcher> {
        Fetcher::with_hosts(self.settings.proxy().as_ref(), &self.settings.gateway.image_hosts)
            .context("can't fetch images")
    }

    /// Number of rows in flight, if the caller names none.
    #[must_use]
    pub fn default_concurrency(&self) -> usize {
        self.settings.default_concurrency()
    }

    /// Opens the model.
    ///
    /// # Errors
    /// The model can't be opened.
    pub async fn open_model(&self) -> anyhow::Result<Arc<dyn Mllm>> {
        backend::open(&self.settings).await
    }

    /// Prepares an open model for long-running work. Replies are cached in the folder `cache`, if
    /// given.
    ///
    /// # Errors
    /// The model does not answer.
    pub async fn batch_model(
        &self,
        model: Arc<dyn Mllm>,
        concurrency: usize,
        cache: Option<PathBuf>,
    ) -> anyhow::Result<BatchModel> {
        Ok(BatchModel(Worker::with_model(model, &self.settings, concurrency, cache).await?))
    }
}

/// The error of a wrong setting, which says so if its name is that of a field of the profile.
fn of_profile(names: &[String], error: anyhow::Error) -> anyhow::Error {
    let fields = Profile::hardened().to_toml().parse::<toml::Table>().unwrap_or_default();
    let text = error.to_string();
    let is_meant = |name: &&String| {
        fields.contains_key(name.as_str()) && text.contains(&format!("unknown field `{name}`"))
    };
    match names.iter().find(is_meant) {
        Some(name) => UsageError(format!(
            "`{name}` is a field of the profile, not a setting: pass it in `set`"
        ))
        .into(),
        None => error,
    }
}

/// A model for long-running work: asked no faster than it can answer, and waited for if it becomes
/// unreachable.
pub struct BatchModel(Worker);

impl BatchModel {
    /// The model.
    #[must_use]
    pub fn model(&self) -> Arc<dyn Mllm> {
        self.0.model()
    }

    /// Identifies the model.
    #[must_use]
    pub fn identity(&self) -> &str {
        self.0.identity()
    }

    /// Runs `work` to its end.
    ///
    /// # Errors
    /// The model stayed unreachable, or the server came back with another model.
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> anyhow::Result<T> {
        self.0.run(work).await.map_err(|stopped| match stopped {
            Stopped::Unavailable(error) => anyhow::Error::new(error)
                .context("stopped; what a journal or a cache has recorded is kept"),
            Stopped::OtherModel(error) => anyhow::Error::new(error).context(
                "some recorded answers may be another model's; use a new journal and cache",
            ),
        })
    }
}
