//! A model for long-running work, and how that work is interrupted.

use std::{path::PathBuf, sync::Arc, time::Duration};

use ecso::{Mllm, ModelError};
use ecso_batch::{Cached, CallStats, IdentityCheck, Paced, Patience, check_cache};

use crate::{
    backend,
    error::{Interrupted, UsageError},
    settings::Settings,
};

/// How long to wait for a server that rejects every call.
const BUSY_TIMEOUT: Duration = Duration::from_hours(1);

/// How long a blocking thread may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

type PacedModel = Arc<Paced<Arc<dyn Mllm>>>;

/// Why work was stopped before its end.
pub(crate) enum Stopped {
    /// The model stayed unreachable.
    Unavailable(ModelError),
    /// The server came back with another model.
    OtherModel(ModelError),
}

/// A model for long-running work: asked no faster than it can answer, with replies from a cache.
pub(crate) struct Worker {
    cached: Arc<Cached<PacedModel>>,
    paced: PacedModel,
    /// See [`backend::identity()`]; of a server's model with its name.
    pub(crate) digest: String,
    /// See [`backend::description()`].
    pub(crate) server: Option<String>,
    identity: String,
}

impl Worker {
    /// Opens the model that the settings name. Replies are cached in the folder `cache`, if given.
    pub(crate) async fn open(
        settings: &Settings,
        concurrency: usize,
        cache: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        Self::with_model(backend::open(settings).await?, settings, concurrency, cache).await
    }

    /// [`Worker::open`] with a model that is already open.
    pub(crate) async fn with_model(
        model: Arc<dyn Mllm>,
        settings: &Settings,
        concurrency: usize,
        cache: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        if let Some(folder) = &cache {
            check_cache(folder)
                .map_err(|error| UsageError(format!("cache {}: {error}", folder.display())))?;
        }
        // A server that is unreachable from the start is not waited for.
        model.health().await?;
        let digest = backend::identity(&backend::named(settings).await?)?;
        let server = backend::description(settings).await?;
        let mut identity = digest.clone();
        if let Some(description) = &server {
            identity = format!("{identity} {description}");
        }
        let patience = Patience {
            busy: BUSY_TIMEOUT,
            away: Duration::from_secs(settings.server.away_timeout),
        };
        let mut paced = Paced::new(model, concurrency, patience);
        if settings.is_server() {
            paced = paced.with_identity_check(same_model_check(settings).await?);
        }
        let paced = Arc::new(paced);
        let cached = Arc::new(Cached::new(Arc::clone(&paced), identity.as_str(), cache));
        Ok(Self { cached, paced, digest, server, identity })
    }

    /// The model.
    pub(crate) fn model(&self) -> Arc<dyn Mllm> {
        Arc::clone(&self.cached) as Arc<dyn Mllm>
    }

    /// Identifies the model; replies are cached under this text.
    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    /// The calls so far.
    pub(crate) fn work(&self) -> CallStats {
        self.cached.stats()
    }

    /// Runs `work` until it ends, the user presses Ctrl-C, or the model stays unreachable.
    pub(crate) async fn run_interruptible<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> anyhow::Result<T> {
        let output = interruptible(self.run(Box::pin(work)), Interrupted::RESUMABLE).await?;
        output.map_err(|stopped| match stopped {
            Stopped::Unavailable(error) => anyhow::Error::new(error)
                .context("stopped; recorded work is kept, run the same command again to resume"),
            Stopped::OtherModel(error) => anyhow::Error::new(error).context(
                "some recorded replies may be another model's; use another --out and no --cache",
            ),
        })
    }

    /// Runs `work` until it ends or the model stays unreachable.
    pub(crate) async fn run<T>(&self, work: impl Future<Output = T>) -> Result<T, Stopped> {
        let checked = async {
            let output = work.await;
            self.paced.check_identity().await.map_err(Stopped::OtherModel)?;
            Ok(output)
        };
        tokio::select! {
            output = checked => output,
            error = self.paced.unavailable() => Err(Stopped::Unavailable(error)),
        }
    }
}

/// Returns a check that the server still has the model that it has now.
async fn same_model_check(settings: &Settings) -> anyhow::Result<IdentityCheck> {
    let settings = settings.clone();
    let before = backend::current_model(&settings).await?;
    Ok(Box::new(move || {
        let (settings, before) = (settings.clone(), before.clone());
        Box::pin(async move {
            // If the server is unreachable, the calls themselves fail.
            let Ok(now) = backend::current_model(&settings).await else { return Ok(()) };
            if now == before {
                return Ok(());
            }
            let message =
                format!("the server came back with another model: {now}, instead of {before}");
            Err(ModelError::Rejected(message.into()))
        })
    }))
}

/// Runs `work` until it ends or the user presses Ctrl-C, which is the error `interrupted`.
pub(crate) async fn interruptible<T>(
    work: impl Future<Output = T>,
    interrupted: Interrupted,
) -> anyhow::Result<T> {
    tokio::select! {
        output = work => Ok(output),
        _ = tokio::signal::ctrl_c() => Err(interrupted.into()),
    }
}

/// Runs `work`, which handles Ctrl-C itself, on a blocking thread. If the thread waits for a file
/// and does not end soon after Ctrl-C, it is abandoned.
pub(crate) async fn spawn_abandonable<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let stop_timeout = async {
        // Without a signal handler the work simply continues.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(STOP_TIMEOUT).await;
    };
    tokio::select! {
        output = tokio::task::spawn_blocking(work) => output?,
        () = stop_timeout => Err(Interrupted::RESUMABLE.into()),
    }
}
