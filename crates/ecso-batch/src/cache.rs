//! Replies on disk: what a model was asked once, it is not asked again.

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
    /// Set while a row is tried again that failed before.
    static AFRESH: ();
}

/// `work`, to which no cache replays what it kept: the new replies are kept in their place.
pub(crate) fn afresh<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    AFRESH.scope((), work)
}

/// A model whose replies are kept in a folder, by the model's digest, the conversation's bytes, the
/// images' digests and the sampling. A replayed reply says how long it took when it was made. A row
/// that failed before is asked about anew. Without a folder it only keeps the clock.
pub struct Cached<M> {
    model: M,
    /// What the model is, to the bit: the digest of its files, or a server's address and the
    /// model's name on it.
    identity: String,
    folder: Option<PathBuf>,
    clock: Mutex<Clock>,
    calls: AtomicU64,
    replayed: AtomicU64,
    is_full: Once,
}

/// Whether replies can be kept in `folder`, which is made if it is not there.
///
/// # Errors
/// Why they can't.
pub fn check_cache(folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    tempfile::NamedTempFile::new_in(folder).map(drop)
}

/// How long at least one call was under way.
#[derive(Default)]
struct Clock {
    under_way: u32,
    since: Option<Instant>,
    busy: Duration,
}

/// What a model did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Work {
    /// Calls, replayed ones included.
    pub calls: u64,
    /// Calls that the folder answered.
    pub replayed: u64,
    /// Time during which the model had at least one call to answer.
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
            is_full: Once::new(),
        }
    }

    /// What the model did so far.
    pub fn work(&self) -> Work {
        let clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        let running = clock.since.map_or(Duration::ZERO, |since| since.elapsed());
        Work {
            calls: self.calls.load(Ordering::Relaxed),
            replayed: self.replayed.load(Ordering::Relaxed),
            busy: clock.busy + running,
        }
    }

    fn path(&self, chat: &Chat, sampling: &Sampling) -> Option<PathBuf> {
        let mut key = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            key.update(&(bytes.len() as u64).to_le_bytes());
            key.update(bytes);
        };
        part(self.identity.as_bytes());
        for turn in &chat.turns {
            part(turn.role.as_str().as_bytes());
            part(&(turn.parts.len() as u64).to_le_bytes());
            for piece in &turn.parts {
                match piece {
                    Part::Text(text) => part(text.as_bytes()),
                    Part::Image(image) => part(image.digest().as_bytes()),
                }
            }
        }
        part(&serde_json::to_vec(sampling).ok()?);
        let name = key.finalize().to_hex();
        Some(self.folder.as_ref()?.join(&name[..2]).join(format!("{}.json", &name[2..])))
    }

    fn begin(&self) -> Busy<'_, M> {
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.under_way += 1;
        clock.since.get_or_insert_with(Instant::now);
        Busy(self)
    }
}

/// A call under way.
struct Busy<'a, M>(&'a Cached<M>);

impl<M> Drop for Busy<'_, M> {
    fn drop(&mut self) {
        let mut clock = self.0.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.under_way -= 1;
        if clock.under_way == 0
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
        let path = self.path(chat, sampling);
        let replayable = path.as_ref().filter(|_| AFRESH.try_get().is_err());
        // What can't be read is made anew.
        let kept = replayable.filter(|path| path.is_file()).and_then(|path| fs::read(path).ok());
        let kept = kept.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some(reply) = kept {
            self.replayed.fetch_add(1, Ordering::Relaxed);
            return Ok(reply);
        }
        let busy = self.begin();
        let begun = Instant::now();
        let mut reply = self.model.generate(chat, sampling).await?;
        drop(busy);
        reply.took.get_or_insert(begun.elapsed());
        if let Some(path) = path
            && let Err(error) = keep(&path, &reply)
        {
            let told = || {
                tracing::warn!("cache: {}: {error}; replies are used and not kept", path.display())
            };
            self.is_full.call_once(told);
        }
        Ok(reply)
    }
}

/// Writes a file in one move.
fn keep(path: &Path, reply: &Reply) -> std::io::Result<()> {
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
    async fn the_same_question_is_asked_once() {
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
        assert_eq!((model.work().calls, model.work().replayed), (4, 1));
        // Another process, the same model; another model.
        assert_eq!(ask(&cached("m1"), "q", 1).await, first);
        let other = cached("m2");
        assert_eq!((ask(&other, "q", 1).await.text, other.work().replayed), ("a".into(), 0));
        // What is asked afresh takes the place of what was kept.
        assert_eq!(afresh(ask(&model, "q", 2)).await.text, "d");
        assert_eq!(ask(&model, "q", 2).await.text, "d");
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_pipe_in_the_cache_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let model = Cached::new(Scripted::texts(["a"]), "m", Some(folder.path().into()));
        let (chat, sampling) = (Chat::ask([], "q"), Sampling::default());
        let path = model.path(&chat, &sampling).unwrap();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let kept = serde_json::to_vec(&Reply { text: "piped".into(), ..Reply::default() }).unwrap();
        // Waits for a reader.
        std::thread::spawn(move || fs::write(path, kept));
        assert_eq!(model.generate(&chat, &sampling).await.unwrap().text, "a");
    }

    #[tokio::test]
    async fn a_reply_that_cant_be_kept_is_a_reply() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(check_cache(file.path()).is_err());
        let model = Cached::new(Scripted::texts(["a"]), "m", Some(file.path().into()));
        assert_eq!(
            model.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap().text,
            "a"
        );
    }
}
