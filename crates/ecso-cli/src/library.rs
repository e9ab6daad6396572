//! The way from settings to a guard for programs that call this as a library: the same as the
//! command line's.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context;
use ecso::{Limits, Mllm, Profile};
use ecso_gateway::settings::ImageUrls;
use ecso_openai::Fetcher;
use secrecy::SecretString;

use crate::{
    UsageError,
    config::{self, Settings},
    open,
    work::Worker,
};

/// Whether an error says that something was asked for which can't be done as it was asked: a
/// setting, a profile, a file that is named.
#[must_use]
pub fn is_misuse(error: &anyhow::Error) -> bool {
    error.is::<UsageError>() || error.is::<ecso::ProfileError>()
}

/// Whether models run in this process.
pub const HAS_ENGINE: bool = cfg!(feature = "engine");

/// What a guard is made of. Nothing is opened yet.
#[derive(Debug, Clone)]
pub struct Setup {
    settings: Settings,
    profile: Profile,
}

impl Setup {
    /// `given` are settings as they stand in `config.toml`; they count before that file and the
    /// environment. A key that is given here counts before the environment's.
    ///
    /// # Errors
    /// A setting or the profile is wrong.
    pub fn new(given: toml::Table, api_key: Option<SecretString>) -> anyhow::Result<Self> {
        let settings = config::load_given(given, api_key)?;
        let profile = config::profile(&settings)?;
        Ok(Self { settings, profile })
    }

    /// The profile.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Which images are taken.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.settings.images
    }

    /// What is done about images behind URLs.
    #[must_use]
    pub fn image_urls(&self) -> ImageUrls {
        self.settings.gateway.image_urls
    }

    /// Fetches images, as the settings allow it.
    ///
    /// # Errors
    /// No client can be made.
    pub fn fetcher(&self) -> anyhow::Result<Fetcher> {
        let proxy =
            Some(self.settings.server.proxy.clone()).filter(|url| !url.is_empty()).map(Into::into);
        Fetcher::with_hosts(proxy.as_ref(), &self.settings.gateway.image_hosts)
            .context("no client for images")
    }

    /// How many rows are asked about at once, where nobody says.
    #[must_use]
    pub fn at_once(&self) -> usize {
        open::at_once(&self.settings)
    }

    /// Opens the model.
    ///
    /// # Errors
    /// It can't be opened.
    pub async fn model(&self) -> anyhow::Result<Arc<dyn Mllm>> {
        open::model(&self.settings).await
    }

    /// That model, as long work asks it. Its replies are kept in `cache`, if that is a folder.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn patient(
        &self,
        model: Arc<dyn Mllm>,
        at_once: usize,
        cache: Option<PathBuf>,
    ) -> anyhow::Result<Patient> {
        Ok(Patient(Worker::of(model, &self.settings, at_once, cache).await?))
    }
}

/// A model that is asked no faster than it can answer, and waited for.
pub struct Patient(Worker);

impl Patient {
    /// The model.
    #[must_use]
    pub fn model(&self) -> Arc<dyn Mllm> {
        self.0.model()
    }

    /// What it is, in one text.
    #[must_use]
    pub fn identity(&self) -> &str {
        self.0.identity()
    }

    /// `work` to its end.
    ///
    /// # Errors
    /// The model went away and did not come back, or another came in its place.
    pub async fn asked<T>(&self, work: impl Future<Output = T>) -> anyhow::Result<T> {
        self.0.asked(work).await
    }
}
