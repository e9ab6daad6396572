//! The handle that sends jobs to the engine, and the thread that owns the model.

use std::{
    error::Error,
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::{LazyLock, mpsc},
    thread::JoinHandle,
};

use async_trait::async_trait;
use ecso::{Cause, Chat, Mllm, ModelError, ReplyStream, Sampling};
use futures::{StreamExt, stream};
use llama_cpp_2::{
    LogOptions,
    llama_backend::LlamaBackend,
    model::{LlamaModel, params::LlamaModelParams},
};
use tokio::sync::{mpsc as pieces, oneshot};

use crate::{
    engine::{Engine, stack_size},
    schedule::{Job, Schedule},
};

/// Options for loading a model.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The model's name in traces and results; `None` takes the file's name.
    pub name: Option<String>,
    /// The projector (mmproj GGUF) of a vision model; without it the model reads text only.
    pub mmproj: Option<PathBuf>,
    /// Most tokens of one conversation, prompt and reply; `None` takes the model's training
    /// context, at most 8,192.
    pub context: Option<NonZeroU32>,
    /// The number of conversations that are computed at the same time, and whose prefix is kept for
    /// reuse; `None` takes 4, and 128 is the most. Each needs memory for a whole context. One of
    /// several is left to checks (see [`Sampling::top_logprobs`]), so that they need not wait for
    /// long replies.
    pub slots: Option<NonZeroU32>,
    /// Computes every prompt from its start, even if an earlier one began the same. Replies are the
    /// same, but slower.
    pub no_reuse: bool,
    /// Reuses replies too, if a conversation continues. They were computed token by token, and not
    /// in blocks as prompts are. So what follows is no longer bit-identical, and on a CPU
    /// log-probabilities can differ by 0.15.
    pub keep_replies: bool,
    /// A folder for the shared beginnings of prompts ([`Chat::shared_turns`]), at most 512 MiB, so that
    /// other processes need not compute them; `None` keeps nothing.
    pub prefix_folder: Option<PathBuf>,
    /// The number of threads; `None` takes one for each core.
    pub threads: Option<NonZeroU32>,
    /// The number of layers on the GPU, if support for one is built in; `None` puts all there.
    pub gpu_layers: Option<u32>,
    /// A Jinja chat template that replaces the model's own.
    pub chat_template: Option<String>,
}

/// A model in this process. Dropping it stops its thread and frees its memory.
pub struct Llama {
    name: String,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

static BACKEND: LazyLock<Result<LlamaBackend, Cause>> = LazyLock::new(|| {
    llama_cpp_2::send_logs_to_tracing(LogOptions::default());
    LlamaBackend::init().map_err(Cause::from_error)
});

impl Llama {
    /// Loads a GGUF file.
    ///
    /// # Errors
    /// [`ModelError::Transport`] if a file is missing or damaged, if the projector does not fit the
    /// model, or if there is not enough memory; [`ModelError::Rejected`] if the chat template can't
    /// be used, or if there are too many slots.
    pub async fn load(path: impl Into<PathBuf>, options: Options) -> Result<Self, ModelError> {
        let path = path.into();
        let stem = || path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = options.name.clone().unwrap_or_else(stem);
        let (jobs, inbox) = mpsc::channel();
        let (ready, loaded) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("llama".into())
            .stack_size(stack_size(&options))
            .spawn(move || serve(&path, options, ready, &inbox))
            .map_err(|error| failed("no thread for the engine; try a smaller context", error))?;
        // From here on the handle owns the thread: if this future is dropped, the thread ends.
        let llama = Self { name, jobs: Some(jobs), thread: Some(thread) };
        loaded.await.unwrap_or_else(|_| Err(thread_ended()))?;
        Ok(llama)
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

#[async_trait]
impl Mllm for Llama {
    fn name(&self) -> &str {
        &self.name
    }

    /// Whether the engine's thread runs.
    async fn health(&self) -> Result<(), ModelError> {
        let has_ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        if has_ended { Err(thread_ended()) } else { Ok(()) }
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        let (reply, mut receiver) = pieces::unbounded_channel();
        let job = Job { chat: chat.clone(), sampling: sampling.clone(), reply };
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).ok_or_else(thread_ended)?;
        Ok(stream::poll_fn(move |context| receiver.poll_recv(context)).boxed())
    }
}

fn thread_ended() -> ModelError {
    ModelError::Transport(
        "the engine's thread has ended; the log says why, and a new process helps".into(),
    )
}

pub(crate) fn failed(what: &str, error: impl Error + Send + Sync + 'static) -> ModelError {
    ModelError::Transport(Cause::new(format!("{what}: {error}"), error))
}

/// The backend, which is set up once in a process.
pub(crate) fn backend() -> Result<&'static LlamaBackend, ModelError> {
    BACKEND.as_ref().map_err(|cause| failed("llama.cpp", cause.clone()))
}

fn serve(
    path: &Path,
    options: Options,
    ready: oneshot::Sender<Result<(), ModelError>>,
    inbox: &mpsc::Receiver<Job>,
) {
    let loaded = load(path, &options);
    let model = match loaded {
        Ok(model) => model,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let engine = match Engine::new(&model, path, options) {
        Ok(engine) => engine,
        Err(error) => return drop(ready.send(Err(error))),
    };
    if ready.send(Ok(())).is_ok() {
        Schedule::new(engine).run(inbox);
    }
}

fn load(path: &Path, options: &Options) -> Result<LlamaModel, ModelError> {
    for file in [Some(path), options.mmproj.as_deref()].into_iter().flatten() {
        std::fs::File::open(file).map_err(|error| failed(&file.display().to_string(), error))?;
    }
    let mut params = LlamaModelParams::default();
    if let Some(layers) = options.gpu_layers {
        params = params.with_n_gpu_layers(layers);
    }
    LlamaModel::load_from_file(backend()?, path, &params).map_err(|error| {
        let path = path.display();
        let message = format!("{path}: not a GGUF model that can be loaded (damaged or cut off?)");
        ModelError::Transport(Cause::new(message, error))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_whose_thread_has_ended_is_not_healthy() {
        let (go_on, waits) = mpsc::channel::<()>();
        let (jobs, _inbox) = mpsc::channel();
        let thread = std::thread::spawn(move || waits.recv().unwrap_or(()));
        let llama = Llama { name: "tiny".into(), jobs: Some(jobs), thread: Some(thread) };
        let health = || futures::executor::block_on(llama.health());
        health().unwrap();
        drop(go_on);
        while llama.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            std::thread::yield_now();
        }
        let error = health().unwrap_err();
        assert!(error.to_string().contains("has ended"), "{error}");
    }
}
