//! The engine: a thread that owns the model and its context, and the handle that sends it jobs.

use std::{
    error::Error,
    io,
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::{LazyLock, mpsc},
    thread::JoinHandle,
};

use async_trait::async_trait;
use ecso::{
    Cause, Chat, Delta, Digest, FinishReason, Image, Mllm, ModelError, ReplyStream, Sampling,
    TopLogprob, Usage,
};
use futures::{StreamExt, stream};
use llama_cpp_2::{
    LogOptions,
    context::{LlamaContext, params::LlamaContextParams},
    llama_backend::LlamaBackend,
    llama_batch::LlamaBatch,
    model::{LlamaModel, params::LlamaModelParams},
    mtmd::{MtmdBitmap, MtmdContext, MtmdContextParams, MtmdInputText, mtmd_default_marker},
    sampling::LlamaSampler,
    token::LlamaToken,
};
use tokio::sync::{mpsc as pieces, oneshot};

use crate::{
    cache::Cache,
    heads::Heads,
    layout::{BLOCK, Segment, lay_out},
    template::{ChatTemplate, Vocabulary},
};

/// Image tokens that are computed together. Models with non-causal attention over an image need all
/// of its tokens in one batch.
const IMAGE_BATCH: u32 = 512;

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
    /// The number of conversations whose prefix is kept for reuse; `None` takes 3, for an answer
    /// and the guard's questions about it. Each needs memory for a whole context.
    pub slots: Option<NonZeroU32>,
    /// Computes every prompt from its start, even if an earlier one began the same. Replies are the
    /// same, but slower.
    pub no_reuse: bool,
    /// A folder for the shared beginnings of prompts ([`Chat::head`]), at most 512 MiB, so that
    /// other processes need not compute them; `None` keeps nothing.
    pub heads: Option<PathBuf>,
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

struct Job {
    chat: Chat,
    sampling: Sampling,
    reply: pieces::UnboundedSender<Result<Delta, ModelError>>,
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
    /// be used.
    pub async fn load(path: impl Into<PathBuf>, options: Options) -> Result<Self, ModelError> {
        let path = path.into();
        let stem = || path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = options.name.clone().unwrap_or_else(stem);
        let (jobs, inbox) = mpsc::channel();
        let (ready, loaded) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("llama".into())
            .spawn(move || serve(&path, options, ready, &inbox))
            .map_err(|error| ModelError::Transport(Cause::from_error(error)))?;
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

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        let (reply, mut receiver) = pieces::unbounded_channel();
        let job = Job { chat: chat.clone(), sampling: sampling.clone(), reply };
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).ok_or_else(thread_ended)?;
        Ok(stream::poll_fn(move |context| receiver.poll_recv(context)).boxed())
    }
}

fn thread_ended() -> ModelError {
    ModelError::Transport("the engine's thread has ended; the log says why".into())
}

fn failed(what: &str, error: impl Error + Send + Sync + 'static) -> ModelError {
    ModelError::Transport(Cause::new(format!("{what}: {error}"), error))
}

/// The backend, which is set up once in a process.
fn backend() -> Result<&'static LlamaBackend, ModelError> {
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
    let mut engine = match Engine::new(&model, path, options) {
        Ok(engine) => engine,
        Err(error) => return drop(ready.send(Err(error))),
    };
    if ready.send(Ok(())).is_err() {
        return;
    }
    while let Ok(job) = inbox.recv() {
        if let Err(error) = engine.reply(&job) {
            // Fails if the caller has dropped the stream.
            let _ = job.reply.send(Err(error));
        }
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

struct Engine<'m> {
    model: &'m LlamaModel,
    context: LlamaContext<'m>,
    vision: Option<MtmdContext>,
    template: ChatTemplate,
    cache: Cache,
    no_reuse: bool,
    heads: Option<Heads>,
    /// Tokens of one conversation.
    room: i32,
}

impl<'m> Engine<'m> {
    fn new(model: &'m LlamaModel, path: &Path, options: Options) -> Result<Self, ModelError> {
        let cores = || {
            std::thread::available_parallelism()
                .ok()
                .and_then(|cores| NonZeroU32::try_from(cores).ok())
        };
        let threads = options
            .threads
            .or_else(cores)
            .map_or(1, |n| i32::try_from(n.get()).unwrap_or(i32::MAX));
        let room =
            options.context.map_or_else(|| model.n_ctx_train().clamp(512, 8192), NonZeroU32::get);
        let slots = options.slots.map_or(3, NonZeroU32::get);
        let block = u32::try_from(BLOCK).unwrap_or(u32::MAX);
        let batch = if options.mmproj.is_some() { IMAGE_BATCH } else { block };
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(room.saturating_mul(slots)))
            .with_n_seq_max(slots)
            .with_n_batch(batch)
            .with_n_ubatch(batch)
            .with_n_threads(threads)
            .with_n_threads_batch(threads);
        let context = model.new_context(backend()?, params).map_err(|error| {
            failed("there is not enough memory for the context; try a smaller one", error)
        })?;
        let vision =
            options.mmproj.map(|path| load_projector(&path, model, threads)).transpose()?;
        let template = ChatTemplate::new(
            options.chat_template.or_else(|| model.chat_template(None).ok()?.to_string().ok()),
            vocabulary(model),
            mtmd_default_marker(),
        )?;
        let room = i32::try_from(room).unwrap_or(i32::MAX);
        let how = format!("{room} {slots} {batch} {:?}", options.gpu_layers);
        let folder = options.heads.filter(|_| !options.no_reuse);
        let heads = folder.and_then(|folder| {
            let heads = Heads::new(folder, path, &how);
            heads.inspect_err(|error| tracing::debug!(%error, "no heads of prompts are kept")).ok()
        });
        Ok(Self {
            model,
            context,
            vision,
            template,
            cache: Cache::new(slots as usize),
            no_reuse: options.no_reuse,
            heads,
            room,
        })
    }

    fn reply(&mut self, job: &Job) -> Result<(), ModelError> {
        let marker = mtmd_default_marker();
        let images: Vec<&Image> = job.chat.images().collect();
        if !images.is_empty() && self.vision.is_none() {
            return Err(ModelError::Rejected(
                "this model reads text only; give it its projector (mmproj), or put a text reader in front".into(),
            ));
        }
        let digests: Vec<Digest> = images.iter().map(|image| image.digest()).collect();
        let vocab = self.model.vocab();
        let tokens = |text: &str, first| vocab.tokenize(text.as_bytes(), first, true);
        let segments = lay_out(&self.template.render(&job.chat)?, marker, &digests, tokens);
        let head = self
            .rendered_head(&job.chat)
            .map(|head| lay_out(&head, marker, &[], tokens))
            .unwrap_or_default();
        let shared =
            segments.iter().zip(&head).take_while(|(segment, head)| segment.same_as(head)).count();
        let head = shared.min(segments.len().saturating_sub(1));
        let Some(prompt) = self.read(&segments, head, &images, job)? else {
            return Ok(()); // The caller has dropped the stream.
        };
        self.write(prompt, job)
    }

    /// The rendered head of a chat, if it has one that may be kept.
    fn rendered_head(&self, chat: &Chat) -> Option<String> {
        let turns = chat
            .turns
            .get(..chat.head)
            .filter(|turns| !turns.is_empty() && self.heads.is_some())?;
        let head = Chat { turns: turns.to_vec(), ..Chat::default() };
        self.template.render(&head).ok().filter(|_| head.image_count() == 0)
    }

    /// Computes the prompt behind its cached prefix. Its first `head` segments are read from disk,
    /// or kept there. `None` if the caller has dropped the stream.
    fn read(
        &mut self,
        segments: &[Segment],
        head: usize,
        images: &[&Image],
        job: &Job,
    ) -> Result<Option<Prompt>, ModelError> {
        let place = self.cache.place(segments, self.no_reuse);
        let sequence = i32::try_from(place.sequence).unwrap_or_default();
        let mut prompt = Prompt { sequence, position: place.position, logits: 0, tokens: 0 };
        let mut shared = place.shared;
        // Models with a recurrent state can't drop a part of it.
        let from = u32::try_from(prompt.position).ok();
        if !matches!(
            self.context.clear_kv_cache_seq(Some(sequence.unsigned_abs()), from, None),
            Ok(true)
        ) {
            self.clear(place.sequence)?;
            (shared, prompt.position) = (0, 0);
        }
        let mut to_keep = None;
        if let Some((heads, tokens)) =
            self.heads.as_ref().zip(Heads::tokens(&segments[..head])).filter(|_| shared < head)
        {
            match heads.find(&tokens) {
                Some(file) => {
                    (shared, prompt.position) =
                        self.load_head(&file, &segments[..head], &tokens, place.sequence)?;
                }
                None => to_keep = Some(tokens),
            }
        }
        for (number, segment) in segments.iter().enumerate() {
            let done = match segment {
                _ if job.reply.is_closed() => return Ok(None),
                _ if number < shared => Ok(()),
                Segment::Text(tokens) => self.read_text(tokens, &mut prompt),
                Segment::Image { before, number, .. } => {
                    self.read_image(before, images[*number], *number == 0, &mut prompt)
                }
            };
            if let Err(error) = done {
                self.clear(place.sequence)?;
                return Err(error);
            }
            if number >= shared {
                self.cache.sequence(place.sequence).push(segment.clone(), prompt.position);
            }
            if let Some(tokens) = to_keep.take_if(|_| number + 1 == head) {
                self.keep_head(&tokens, sequence);
            }
        }
        prompt.tokens = u32::try_from(prompt.position).unwrap_or_default();
        Ok(Some(prompt))
    }

    /// Replaces the content of a sequence by a head from its file. Returns the number of segments
    /// in the sequence, and their end position.
    fn load_head(
        &mut self,
        file: &Path,
        head: &[Segment],
        tokens: &[LlamaToken],
        sequence: usize,
    ) -> Result<(usize, i32), ModelError> {
        self.clear(sequence)?;
        let id = i32::try_from(sequence).unwrap_or_default();
        let read = self.context.state_seq_load_file(file, id, tokens.len());
        if !read.is_ok_and(|(read, _)| read == tokens) {
            tracing::debug!(?file, "a head can't be read");
            self.clear(sequence)?;
            return Ok((0, 0));
        }
        let mut end = 0;
        for segment in head {
            end += segment.tokens();
            self.cache.sequence(sequence).push(segment.clone(), end);
        }
        Ok((head.len(), end))
    }

    /// Keeps the head that is the whole content of a sequence on disk. If that fails, it is
    /// computed again another time.
    fn keep_head(&self, tokens: &[LlamaToken], sequence: i32) {
        let Some(heads) = &self.heads else { return };
        let kept = heads.keep(tokens, |file| {
            self.context
                .state_seq_save_file(file, sequence, tokens)
                .map(drop)
                .map_err(io::Error::other)
        });
        if let Err(error) = kept {
            tracing::debug!(%error, "a head of prompts can't be kept");
        }
    }

    fn clear(&mut self, sequence: usize) -> Result<(), ModelError> {
        self.cache.sequence(sequence).truncate(0);
        let id = u32::try_from(sequence).ok();
        self.context
            .clear_kv_cache_seq(id, None, None)
            .map_err(|error| failed("the engine's memory", error))?;
        Ok(())
    }

    fn read_text(&mut self, tokens: &[LlamaToken], prompt: &mut Prompt) -> Result<(), ModelError> {
        self.must_fit(prompt.position, tokens.len())?;
        let mut batch = LlamaBatch::new(BLOCK, 1);
        for (index, token) in (1..).zip(tokens) {
            let wants_logits = index == tokens.len();
            batch
                .add(*token, prompt.position, &[prompt.sequence], wants_logits)
                .map_err(|error| failed("a batch", error))?;
            prompt.position += 1;
        }
        prompt.logits = batch.n_tokens() - 1;
        self.context
            .decode(&mut batch)
            .map_err(|error| failed("the prompt could not be computed", error))
    }

    fn read_image(
        &mut self,
        before: &str,
        image: &Image,
        first: bool,
        prompt: &mut Prompt,
    ) -> Result<(), ModelError> {
        let pixels =
            image.pixels().map_err(|error| ModelError::Rejected(Cause::from_error(error)))?;
        let bitmap =
            MtmdBitmap::from_image_data(pixels.width(), pixels.height(), pixels.as_bytes())
                .map_err(|error| failed("an image", error))?;
        let text = MtmdInputText {
            text: format!("{before}{}", mtmd_default_marker()),
            add_special: first,
            parse_special: true,
        };
        let Some(vision) = self.vision.as_mut() else {
            return Err(ModelError::Rejected("this model reads text only".into()));
        };
        let chunks =
            vision.tokenize(text, &[&bitmap]).map_err(|error| failed("an image", error))?;
        let length = chunks.total_tokens();
        let room = self.room;
        must_fit(prompt.position, length, room)?;
        let batch = i32::try_from(IMAGE_BATCH).unwrap_or(i32::MAX);
        prompt.position = chunks
            .eval_chunks(vision, &mut self.context, prompt.position, prompt.sequence, batch, false)
            .map_err(|error| failed("an image could not be computed", error))?;
        Ok(())
    }

    fn must_fit(&self, position: i32, tokens: usize) -> Result<(), ModelError> {
        must_fit(position, tokens, self.room)
    }

    fn write(&mut self, prompt: Prompt, job: &Job) -> Result<(), ModelError> {
        let Prompt { sequence, mut position, mut logits, tokens } = prompt;
        let vocab = self.model.vocab();
        let mut sampler = sampler(&job.sampling);
        let mut text = Utf8::default();
        let mut batch = LlamaBatch::new(1, 1);
        let mut written = 0;
        let limit = job.sampling.max_tokens.unwrap_or(u32::MAX);
        let finish = loop {
            if written == 0 && job.sampling.top_logprobs > 0 {
                let top_logprobs = self.top_logprobs(logits, job.sampling.top_logprobs.into());
                let _ = job.reply.send(Ok(Delta::FirstToken(top_logprobs)));
            }
            let token = sampler.sample(&self.context, logits);
            if vocab.is_eog(token) {
                break FinishReason::Stop;
            }
            written += 1;
            let fresh = text.push(&vocab.token_to_piece(token, false, None));
            if !fresh.is_empty() && job.reply.send(Ok(Delta::Text(fresh))).is_err() {
                return Ok(());
            }
            if job.reply.is_closed() {
                return Ok(());
            }
            if written >= limit || position >= self.room {
                break FinishReason::Length;
            }
            batch.clear();
            batch
                .add(token, position, &[sequence], true)
                .map_err(|error| failed("a batch", error))?;
            self.context
                .decode(&mut batch)
                .map_err(|error| failed("the reply could not be computed", error))?;
            position += 1;
            logits = 0;
        };
        let rest = text.rest();
        if !rest.is_empty() {
            let _ = job.reply.send(Ok(Delta::Text(rest)));
        }
        let usage = Some(Usage { prompt_tokens: tokens, completion_tokens: written });
        let _ = job.reply.send(Ok(Delta::End { finish, usage, took: None }));
        Ok(())
    }

    /// The likeliest tokens of a row of logits, with their log-probabilities.
    fn top_logprobs(&self, row: i32, count: usize) -> Vec<TopLogprob> {
        let logits = self.context.get_logits_ith(row);
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
        let mut ranked: Vec<(i32, f32)> = (0..).zip(logits.iter().copied()).collect();
        let count = count.min(ranked.len());
        if count < ranked.len() {
            ranked.select_nth_unstable_by(count, |a, b| b.1.total_cmp(&a.1));
        }
        ranked.truncate(count);
        ranked.sort_unstable_by(|a, b| b.1.total_cmp(&a.1));
        let vocab = self.model.vocab();
        ranked
            .into_iter()
            .map(|(token, logit)| TopLogprob {
                token: String::from_utf8_lossy(&vocab.token_to_piece(
                    LlamaToken(token),
                    true,
                    None,
                ))
                .into_owned(),
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "a log-probability needs no more"
                )]
                logprob: (f64::from(logit - highest) - sum.ln()) as f32,
            })
            .collect()
    }
}

/// A prompt that was computed.
#[derive(Clone, Copy)]
struct Prompt {
    sequence: i32,
    /// The position of the reply's first token.
    position: i32,
    /// The row of the last batch with the logits for the reply's first token.
    logits: i32,
    tokens: u32,
}

fn must_fit(position: i32, tokens: usize, room: i32) -> Result<(), ModelError> {
    let needed = usize::try_from(position).unwrap_or_default() + tokens;
    if i32::try_from(needed).is_ok_and(|needed| needed < room) {
        return Ok(());
    }
    Err(ModelError::Rejected(format!(
        "the conversation is too long: at least {needed} tokens, and the context holds {room}; shorten it or raise the context"
    ).into()))
}

fn load_projector(
    path: &Path,
    model: &LlamaModel,
    threads: i32,
) -> Result<MtmdContext, ModelError> {
    let wrong = |why: &str| ModelError::Transport(format!("{}: {why}", path.display()).into());
    let params = MtmdContextParams {
        n_threads: threads,
        print_timings: false,
        ..MtmdContextParams::default()
    };
    let vision =
        path.to_str().and_then(|path| MtmdContext::init_from_file(path, model, &params).ok());
    let vision = vision.ok_or_else(|| wrong("not a projector that fits this model"))?;
    if vision.support_vision() {
        Ok(vision)
    } else {
        Err(wrong("this projector doesn't see images"))
    }
}

fn vocabulary(model: &LlamaModel) -> Vocabulary {
    let vocab = model.vocab();
    let text =
        |token| String::from_utf8_lossy(&vocab.token_to_piece(token, true, None)).into_owned();
    let name = model.meta_val_str("general.name").unwrap_or_default().to_lowercase();
    Vocabulary {
        bos: if vocab.should_add_bos() { text(vocab.bos()) } else { String::new() },
        eos: text(vocab.eos()),
        control: vocab.tokens().filter(|token| vocab.is_control(*token)).map(text).collect(),
        is_llava_1_5: name.contains("llava") && name.contains("1.5"),
    }
}

fn sampler(sampling: &Sampling) -> LlamaSampler {
    let Some(temperature) = sampling.temperature.filter(|temperature| *temperature > 0.0) else {
        return LlamaSampler::greedy();
    };
    let top_p = LlamaSampler::top_p(sampling.top_p.unwrap_or(1.0), 1);
    LlamaSampler::chain_simple([
        top_p,
        LlamaSampler::temp(temperature),
        LlamaSampler::dist(sampling.seed.unwrap_or(0)),
    ])
}

/// Joins the bytes of tokens, which may end within a character, to text.
#[derive(Default)]
struct Utf8 {
    held: Vec<u8>,
}

impl Utf8 {
    fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let at_end = done + chunk.invalid().len() == self.held.len();
            if chunk.invalid().is_empty() || (at_end && chunk.invalid().len() < 4) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            done += chunk.invalid().len();
        }
        self.held.drain(..done);
        text
    }

    fn rest(self) -> String {
        String::from_utf8_lossy(&self.held).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn characters_split_over_tokens_are_joined(text: String, size in 1..5_usize) {
            let mut utf8 = Utf8::default();
            let mut read: String = text.as_bytes().chunks(size).map(|token| utf8.push(token)).collect();
            read.push_str(&utf8.rest());
            proptest::prop_assert_eq!(read, text);
        }

        #[test]
        fn invalid_bytes_neither_panic_nor_accumulate(tokens: Vec<Vec<u8>>) {
            let mut utf8 = Utf8::default();
            for token in tokens {
                utf8.push(&token);
                proptest::prop_assert!(utf8.held.len() < 4);
            }
        }
    }
}
