//! Model replies on disk, so that the same question is never asked twice.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ecso::{Chat, Delta, Image, ImageText, Mllm, ModelError, Part, Reply, ReplyStream, Sampling};
use futures::{StreamExt, stream};

tokio::task_local! {
    /// Set while a failed row is retried.
    static BYPASS_CACHE: ();
}

/// Runs `work` without replaying cached replies; the new replies replace the cached ones.
pub(crate) fn bypassing_cache<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    BYPASS_CACHE.scope((), work)
}

/// A model whose replies are cached in a folder. The cache key covers the model's digest, the text
/// of the conversation, the digests of its images and the sampling parameters. A replayed reply
/// reports the time that it took when it was generated. When a failed row is retried, its cached
/// replies are not used. Without a folder, this wrapper only measures time.
pub struct Cached<M> {
    model: M,
    /// Identifies the model exactly: the digest of its files, or a server's address and the model's
    /// name on it.
    identity: String,
    folder: Option<PathBuf>,
    clock: Mutex<BusyClock>,
    calls: AtomicU64,
    replayed: AtomicU64,
    write_warning: Once,
}

/// Checks that replies can be cached in `folder`, and creates it if it does not exist.
///
/// # Errors
/// The I/O error that prevents it.
pub fn check_cache(folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    tempfile::NamedTempFile::new_in(folder).map(drop)
}

/// Measures the time during which at least one call is in progress.
#[derive(Default)]
struct BusyClock {
    calls_in_progress: u32,
    since: Option<Instant>,
    busy: Duration,
}

/// Statistics about the calls to a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct CallStats {
    /// All calls, including replayed ones.
    pub calls: u64,
    /// Calls that were answered from the cache.
    pub replayed: u64,
    /// Time during which the model had at least one call in progress.
    pub busy: Duration,
}

impl<M: Mllm> Cached<M> {
    /// Puts a cache in front of `model`.
    pub fn new(model: M, identity: impl Into<String>, folder: Option<PathBuf>) -> Self {
        Self {
            model,
            identity: identity.into(),
            folder,
            clock: Mutex::default(),
            calls: 0.into(),
            replayed: 0.into(),
            write_warning: Once::new(),
        }
    }

    /// The statistics so far.
    pub fn stats(&self) -> CallStats {
        let clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        let running = clock.since.map_or(Duration::ZERO, |since| since.elapsed());
        CallStats {
            calls: self.calls.load(Ordering::Relaxed),
            replayed: self.replayed.load(Ordering::Relaxed),
            busy: clock.busy + running,
        }
    }

    /// The file that holds the reply to this call, if replies are cached.
    fn cache_path(&self, chat: &Chat, sampling: &Sampling) -> Option<PathBuf> {
        let mut key = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            key.update(&(bytes.len() as u64).to_le_bytes());
            key.update(bytes);
        };
        add(self.identity.as_bytes());
        for turn in &chat.turns {
            add(turn.role.as_str().as_bytes());
            add(&(turn.parts.len() as u64).to_le_bytes());
            for part in &turn.parts {
                match part {
                    Part::Text(text) => add(text.as_bytes()),
                    Part::Image(image) => add(image.digest().as_bytes()),
                }
            }
        }
        add(&serde_json::to_vec(sampling).ok()?);
        let name = key.finalize().to_hex();
        Some(self.folder.as_ref()?.join(&name[..2]).join(format!("{}.json", &name[2..])))
    }

    fn start_call(&self) -> CallInProgress<'_, M> {
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.calls_in_progress += 1;
        clock.since.get_or_insert_with(Instant::now);
        CallInProgress(self)
    }
}

/// A call in progress; stops the clock when it is dropped.
struct CallInProgress<'a, M>(&'a Cached<M>);

impl<M> Drop for CallInProgress<'_, M> {
    fn drop(&mut self) {
        let mut clock = self.0.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.calls_in_progress -= 1;
        if clock.calls_in_progress == 0
            && let Some(since) = clock.since.take()
        {
            clock.busy += since.elapsed();
        }
    }
}

#[async_trait]
impl<M: Mllm> Mllm for Cached<M> {
    fn name(&self) -> &str {
        self.model.name()
    }

    async fn health(&self) -> Result<(), ModelError> {
        self.model.health().await
    }

    async fn image_text(&self, image: &Image) -> Result<Option<ImageText>, ModelError> {
        self.model.image_text(image).await
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        let reply = self.generate(chat, sampling).await?;
        let pieces = [
            Delta::FirstToken(reply.first_token),
            Delta::Reasoning(reply.reasoning),
            Delta::Text(reply.text),
            Delta::End { finish: reply.finish, usage: reply.usage, took: reply.took },
        ];
        Ok(stream::iter(pieces.map(Ok)).boxed())
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let path = self.cache_path(chat, sampling);
        let replayable = path.as_ref().filter(|_| BYPASS_CACHE.try_get().is_err());
        // A reply that can't be read is generated again.
        let cached = replayable.filter(|path| path.is_file()).and_then(|path| fs::read(path).ok());
        let cached = cached.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some(reply) = cached {
            self.replayed.fetch_add(1, Ordering::Relaxed);
            return Ok(reply);
        }
        let call = self.start_call();
        let started = Instant::now();
        let mut reply = self.model.generate(chat, sampling).await?;
        drop(call);
        reply.took.get_or_insert(started.elapsed());
        if let Some(path) = path
            && let Err(error) = write_reply(&path, &reply)
        {
            self.write_warning.call_once(|| {
                tracing::warn!(
                    "can't write to the cache: {}: {error}; the run continues without caching",
                    path.display()
                );
            });
        }
        Ok(reply)
    }
}

/// Writes a reply to a temporary file and moves it into place, so that no half-written file is
/// read.
fn write_reply(path: &Path, reply: &Reply) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&serde_json::to_vec(reply)?)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use ecso::testing::Scripted;

    use super::*;

    #[tokio::test]
    async fn the_same_question_is_asked_only_once() {
        let folder = tempfile::tempdir().unwrap();
        let cached = |identity: &str| {
            Cached::new(Scripted::texts(["a", "b", "c", "d"]), identity, Some(folder.path().into()))
        };
        let ask = async |model: &Cached<Scripted>, text: &str, tokens| {
            let sampling = Sampling { max_tokens: Some(tokens), ..Sampling::default() };
            model.generate(&Chat::ask([], text), &sampling).await.unwrap()
        };
        let model = cached("m1");
        let first = ask(&model, "q", 1).await;
        assert_eq!(ask(&model, "q", 1).await, first);
        assert_eq!(ask(&model, "q", 2).await.text, "b");
        assert_eq!(ask(&model, "q2", 1).await.text, "c");
        assert_eq!((model.stats().calls, model.stats().replayed), (4, 1));
        // Another process with the same model; then another model.
        assert_eq!(ask(&cached("m1"), "q", 1).await, first);
        let other = cached("m2");
        assert_eq!((ask(&other, "q", 1).await.text, other.stats().replayed), ("a".into(), 0));
        // A call that bypasses the cache replaces the cached reply.
        assert_eq!(bypassing_cache(ask(&model, "q", 2)).await.text, "d");
        assert_eq!(ask(&model, "q", 2).await.text, "d");
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_named_pipe_in_the_cache_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let model = Cached::new(Scripted::texts(["a"]), "m", Some(folder.path().into()));
        let (chat, sampling) = (Chat::ask([], "q"), Sampling::default());
        let path = model.cache_path(&chat, &sampling).unwrap();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let kept = serde_json::to_vec(&Reply { text: "piped".into(), ..Reply::default() }).unwrap();
        // This blocks until somebody reads the pipe.
        std::thread::spawn(move || fs::write(path, kept));
        assert_eq!(model.generate(&chat, &sampling).await.unwrap().text, "a");
    }

    #[tokio::test]
    async fn a_reply_that_cannot_be_cached_is_still_returned() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(check_cache(file.path()).is_err());
        let model = Cached::new(Scripted::texts(["a"]), "m", Some(file.path().into()));
        assert_eq!(
            model.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap().text,
            "a"
        );
    }
}
