//! Long work: a model that is asked for hours, and what ends it before its time.

use std::{path::PathBuf, sync::Arc, time::Duration};

use ecso::{Mllm, ModelError};
use ecso_batch::{Cached, CallStats, IdentityCheck, Paced, Patience, check_cache};

use crate::{UsageError, config::Settings, open};

/// How long a server is waited for that turns every call away.
const BUSY: Duration = Duration::from_hours(1);

/// The user stopped the work; what is recorded stays.
#[derive(Debug, thiserror::Error)]
#[error("stopped; what is recorded stays, and the same command goes on from there")]
pub(crate) struct Stopped;

/// A model that is asked no faster than it can answer.
type Asked = Arc<Paced<Arc<dyn Mllm>>>;

/// A model for long work, with what it is.
pub(crate) struct Worker {
    cached: Arc<Cached<Asked>>,
    paced: Asked,
    /// See [`open::identity`].
    pub(crate) digest: String,
    /// See [`open::description`].
    pub(crate) server: Option<String>,
    kept_as: String,
}

impl Worker {
    /// Opens the model that the settings name; its replies are kept in `cache`, where that is a
    /// folder.
    pub(crate) async fn open(
        settings: &Settings,
        at_once: usize,
        cache: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        Self::of(open::model(settings).await?, settings, at_once, cache).await
    }

    /// The same of a model that is open.
    pub(crate) async fn of(
        model: Arc<dyn Mllm>,
        settings: &Settings,
        at_once: usize,
        cache: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        if let Some(folder) = &cache {
            check_cache(folder)
                .map_err(|error| UsageError(format!("--cache {}: {error}", folder.display())))?;
        }
        // One that is away from the start is not waited for.
        model.health().await?;
        let (digest, server) = (open::identity(settings)?, open::description(settings).await?);
        let mut kept_as = named(settings, &digest, model.name())?;
        if let Some(description) = &server {
            kept_as = format!("{kept_as} {description}");
        }
        let patience =
            Patience { busy: BUSY, away: Duration::from_secs(settings.server.away_timeout) };
        let paced = Paced::new(model, at_once, patience);
        let paced = Arc::new(if open::is_server(settings) {
            paced.with_identity_check(stays(settings).await?)
        } else {
            paced
        });
        let cached = Arc::new(Cached::new(Arc::clone(&paced), kept_as.as_str(), cache));
        Ok(Self { cached, paced, digest, server, kept_as })
    }

    /// The model.
    pub(crate) fn model(&self) -> Arc<dyn Mllm> {
        Arc::clone(&self.cached) as Arc<dyn Mllm>
    }

    /// What it is, in one text: by this its replies are kept.
    pub(crate) fn identity(&self) -> &str {
        &self.kept_as
    }

    /// What it did so far.
    pub(crate) fn work(&self) -> CallStats {
        self.cached.stats()
    }

    /// `work` to its end; an error where the user stops it, or the model goes away and does not
    /// come back.
    pub(crate) async fn done<T>(&self, work: impl Future<Output = T>) -> anyhow::Result<T> {
        stoppable(self.asked(Box::pin(work))).await?
    }

    /// `work` to its end; an error where the model goes away and does not come back.
    pub(crate) async fn asked<T>(&self, work: impl Future<Output = T>) -> anyhow::Result<T> {
        let checked = async {
            let done = work.await;
            self.paced.check_identity().await.map_err(|error| {
                anyhow::Error::new(error)
                    .context("some of what is recorded may be another model's; name another --out, and no --cache")
            })?;
            Ok(done)
        };
        tokio::select! {
            done = checked => done,
            gone = self.paced.unavailable() => {
                Err(anyhow::Error::new(gone).context("stopped; what is recorded stays, and the same command goes on from there"))
            }
        }
    }
}

/// Holds that a server goes on to have the model which it has now.
async fn stays(settings: &Settings) -> anyhow::Result<IdentityCheck> {
    let settings = settings.clone();
    let at_first = open::standing(&settings).await?;
    Ok(Box::new(move || {
        let (settings, at_first) = (settings.clone(), at_first.clone());
        Box::pin(async move {
            // Where nobody can be asked, the calls themselves tell.
            let Ok(now) = open::standing(&settings).await else { return Ok(()) };
            if now == at_first {
                return Ok(());
            }
            let told =
                format!("the server came back with another model: {now}, where it had {at_first}");
            Err(ModelError::Rejected(told.into()))
        })
    }))
}

/// `work` to its end; an error where the user stops it.
pub(crate) async fn stoppable<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    tokio::select! {
        done = work => Ok(done),
        _ = tokio::signal::ctrl_c() => Err(Stopped.into()),
    }
}

/// How long a stop may take.
const STOPPING: Duration = Duration::from_secs(3);

/// `work` on a thread of its own, to its end. It may wait for files, and then it hears of no stop;
/// where it has not ended soon after one, it is left behind.
pub(crate) async fn heard_in_time<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let stopped = async {
        // Who can't hear of a stop goes on.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(STOPPING).await;
    };
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => done?,
        () = stopped => Err(Stopped.into()),
    }
}

/// What a model is, with its `name` also where the server alone told it.
fn named(settings: &Settings, digest: &str, name: &str) -> anyhow::Result<String> {
    if !open::is_server(settings) || !settings.model_name.is_empty() {
        return Ok(digest.to_owned());
    }
    open::identity(&Settings { model_name: name.to_owned(), ..settings.clone() })
}
