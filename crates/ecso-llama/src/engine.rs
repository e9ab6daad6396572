//! The engine: the model with its context, and the prompts in its sequences.

use std::{fs, io, num::NonZeroU32, path::Path, sync::Arc};

use ecso::{Cause, Chat, Digest, Image, ModelError, TopLogprob};
use llama_cpp_2::{
    context::{LlamaContext, params::LlamaContextParams, session::LlamaStateSeqFlags},
    llama_batch::LlamaBatch,
    model::LlamaModel,
    mtmd::{MtmdBitmap, MtmdContext, MtmdContextParams, MtmdInputText, mtmd_default_marker},
    sampling::LlamaSampler,
    token::LlamaToken,
};

use crate::{
    cache::{Cache, Place},
    layout::{BLOCK, End, Segment, lay_out},
    llama::{Options, backend, failed},
    prefixes::Prefixes,
    reply::{Next, Written},
    template::{ChatTemplate, Vocabulary},
};

/// Image tokens that are computed together. Models with non-causal attention over an image need all
/// of its tokens in one batch.
const IMAGE_BATCH: u32 = 512;
/// Sequences without a setting: conversations that are computed at the same time.
const SLOTS: u32 = 4;
/// Most tokens of a conversation without a setting.
const CONTEXT: u32 = 8192;
/// Most characters of a prompt for each token of the context. Text that fits has about 4.
const CHARACTERS: usize = 16;
/// Bytes of stack for each character of a prompt. llama.cpp splits text by regular expressions
/// that recurse for each character of a match, and take up to 400 bytes (530 unoptimized) each.
const STACK: usize = 1024;
/// Bytes of stack for everything else.
const BASE_STACK: usize = 8 << 20;

/// Bytes of stack that no prompt exceeds. Memory is taken only for what a prompt uses.
pub(crate) fn stack_size(options: &Options) -> usize {
    let room = options.context.map_or(CONTEXT, NonZeroU32::get) as usize;
    room.saturating_mul(CHARACTERS * STACK).saturating_add(BASE_STACK)
}

/// The model, its context and its sequences. Each sequence has the prompt of one conversation and
/// its reply.
pub(crate) struct Engine<'m> {
    model: &'m LlamaModel,
    context: LlamaContext<'m>,
    vision: Option<MtmdContext>,
    template: ChatTemplate,
    cache: Cache,
    no_reuse: bool,
    keep_replies: bool,
    prefixes: Option<Prefixes>,
    /// Tokens of one conversation.
    room: usize,
}

/// A prompt as it is computed.
#[derive(Debug, Clone)]
pub(crate) struct Prompt {
    pub(crate) segments: Arc<[Segment]>,
    /// The number of leading segments that are kept on disk.
    prefix: usize,
}

/// A prompt of which a part was computed.
#[derive(Debug)]
pub(crate) struct Reading {
    prompt: Prompt,
    pub(crate) sequence: usize,
    /// The number of segments that were computed, and where they end.
    done: usize,
    pub(crate) end: End,
    /// The tokens of its prefix, if that is to be kept on disk once it was computed.
    to_keep: Option<Vec<LlamaToken>>,
}

impl<'m> Engine<'m> {
    pub(crate) fn new(
        model: &'m LlamaModel,
        path: &Path,
        options: Options,
    ) -> Result<Self, ModelError> {
        let slots = options.slots.map_or(SLOTS, NonZeroU32::get);
        // A block has a token of each reply.
        if slots as usize > BLOCK {
            return Err(ModelError::Rejected(
                format!("{slots} slots are too many; set at most {BLOCK}").into(),
            ));
        }
        let cores = || {
            std::thread::available_parallelism()
                .ok()
                .and_then(|cores| NonZeroU32::try_from(cores).ok())
        };
        let threads = options
            .threads
            .or_else(cores)
            .map_or(1, |n| i32::try_from(n.get()).unwrap_or(i32::MAX));
        let trained = || model.n_ctx_train().clamp(512, CONTEXT);
        let room = options.context.map_or_else(trained, NonZeroU32::get);
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
        let how = format!("{room} {slots} {batch} {:?}", options.gpu_layers);
        let folder = options.prefix_folder.filter(|_| !options.no_reuse);
        let prefixes = folder.and_then(|folder| {
            let prefixes = Prefixes::new(folder, path, &how);
            prefixes
                .inspect_err(|error| tracing::debug!(%error, "no prefixes of prompts are kept"))
                .ok()
        });
        Ok(Self {
            model,
            context,
            vision,
            template,
            cache: Cache::new(slots as usize),
            no_reuse: options.no_reuse,
            keep_replies: options.keep_replies,
            prefixes,
            room: room as usize,
        })
    }

    /// The segments of a conversation.
    ///
    /// # Errors
    /// [`ModelError::Rejected`] if the model can't reply to it, or if it is clearly too long.
    pub(crate) fn prompt(&self, chat: &Chat) -> Result<Prompt, ModelError> {
        let digests: Vec<Digest> = chat.images().map(Image::digest).collect();
        if !digests.is_empty() && self.vision.is_none() {
            return Err(ModelError::Rejected(
                "this model reads text only; give it its projector (mmproj), or put a text reader in front".into(),
            ));
        }
        let segments = self.segments(&self.template.render(chat)?, &digests)?;
        must_end_in_text(&segments)?;
        must_fit(End::default(), &segments, self.room)?;
        let prefix = self
            .rendered_prefix(chat)
            .and_then(|prefix| self.segments(&prefix, &[]).ok())
            .unwrap_or_default();
        let shared = segments
            .iter()
            .zip(&prefix)
            .take_while(|(segment, prefix)| segment.same_as(prefix))
            .count();
        let prefix = shared.min(segments.len().saturating_sub(1));
        Ok(Prompt { segments: segments.into(), prefix })
    }

    /// The segments of a rendered prompt. All text for the tokenizer comes through here, and is
    /// short enough for the thread's stack.
    fn segments(&self, rendered: &str, digests: &[Digest]) -> Result<Vec<Segment>, ModelError> {
        let characters = rendered.chars().count();
        if characters > self.room.saturating_mul(CHARACTERS) {
            return Err(too_long(&format!("{characters} characters"), self.room));
        }
        let vocab = self.model.vocab();
        let tokens = |text: &str, first| vocab.tokenize(text.as_bytes(), first, true);
        Ok(lay_out(rendered, mtmd_default_marker(), digests, tokens))
    }

    /// The rendered prefix of a chat, if it has one that may be kept.
    fn rendered_prefix(&self, chat: &Chat) -> Option<String> {
        let turns = chat
            .turns
            .get(..chat.shared_turns)
            .filter(|turns| !turns.is_empty() && self.prefixes.is_some())?;
        let prefix = Chat { turns: turns.to_vec(), ..Chat::default() };
        self.template.render(&prefix).ok().filter(|_| prefix.image_count() == 0)
    }

    /// Begins to compute a prompt: in a free sequence, after the part that is already computed.
    /// `None` if it has to wait for a free sequence, or for another prompt that begins the same.
    pub(crate) fn start(&mut self, prompt: &Prompt) -> Result<Option<Reading>, ModelError> {
        let Some(place) = self.cache.place(&prompt.segments, self.no_reuse) else {
            return Ok(None);
        };
        let sequence = place.sequence;
        let started = self.start_at(prompt, &place);
        if started.is_err() {
            self.release(sequence);
        }
        started.map(Some)
    }

    fn start_at(&mut self, prompt: &Prompt, place: &Place) -> Result<Reading, ModelError> {
        let Place { sequence, copied_from, shared, end } = *place;
        let prompt = prompt.clone();
        let mut reading = Reading { prompt, sequence, done: shared, end, to_keep: None };
        let prefix = &reading.prompt.segments[..reading.prompt.prefix];
        if let Some((prefixes, tokens)) =
            self.prefixes.as_ref().zip(Prefixes::tokens(prefix)).filter(|_| shared < prefix.len())
        {
            if let Some(file) = prefixes.find(&tokens) {
                let loaded = self.load_prefix(&file, prefix, &tokens, sequence)?;
                reading.to_keep = loaded.is_none().then_some(tokens);
                (reading.done, reading.end) = loaded.unwrap_or_default();
                return Ok(reading);
            }
            reading.to_keep = Some(tokens);
        }
        let copied = copied_from.is_none_or(|from| self.copy(from, sequence));
        // Models with a recurrent state can't drop a part of it.
        let id = u32::try_from(sequence).ok();
        let from = u32::try_from(end.position).ok();
        if !copied || !matches!(self.context.clear_kv_cache_seq(id, from, None), Ok(true)) {
            self.clear(sequence)?;
            (reading.done, reading.end) = (0, End::default());
        }
        Ok(reading)
    }

    /// Copies all that was computed in a sequence to another one.
    fn copy(&mut self, from: usize, to: usize) -> bool {
        let [from, to] = [from, to].map(|sequence| i32::try_from(sequence).unwrap_or_default());
        let state = self.context.state_seq_get(from, LlamaStateSeqFlags::empty());
        state.and_then(|state| self.context.state_seq_set(&state, to)).is_ok()
    }

    /// Computes the next segment of a prompt. After the last one, returns the row of the batch with
    /// the logits for the first token of the reply.
    pub(crate) fn read(
        &mut self,
        reading: &mut Reading,
        chat: &Chat,
    ) -> Result<Option<i32>, ModelError> {
        let rest = &reading.prompt.segments[reading.done..];
        must_fit(reading.end, rest, self.room)?;
        let segment = &rest[0];
        let (end, row) = match segment {
            Segment::Text(tokens) => self.read_text(tokens, reading.end, reading.sequence)?,
            Segment::Image { before, number, .. } => {
                let image = chat.images().nth(*number);
                let image =
                    image.ok_or_else(|| ModelError::Rejected("an image is missing".into()))?;
                // Its logits are of no use.
                (self.read_image(before, image, *number == 0, reading)?, 0)
            }
        };
        self.cache.push(reading.sequence, segment.clone(), end);
        reading.end = end;
        reading.done += 1;
        if let Some(tokens) = reading.to_keep.take_if(|_| reading.done == reading.prompt.prefix) {
            self.keep_prefix(&tokens, reading.sequence);
        }
        Ok((reading.done == reading.prompt.segments.len()).then_some(row))
    }

    /// Computes one token of each of several replies, each in its own sequence. The logits of each
    /// are in the row with its number.
    pub(crate) fn decode(&mut self, tokens: &[Next]) -> Result<(), ModelError> {
        let mut batch = LlamaBatch::new(tokens.len(), 1);
        for next in tokens {
            let sequence = i32::try_from(next.sequence).unwrap_or_default();
            batch
                .add(next.token, next.at.position, &[sequence], true)
                .map_err(|error| failed("a batch", error))?;
        }
        self.context
            .decode(&mut batch)
            .map_err(|error| failed("the reply could not be computed", error))
    }

    /// Frees a sequence whose reply has ended.
    pub(crate) fn release_written(&mut self, sequence: usize, written: Written) {
        let Written { mut computed, last } = written;
        // A single word, such as a check's reply, is not a turn of a conversation.
        if self.keep_replies && !computed.is_empty() {
            if let Some(last) = last.filter(|last| self.has_room(last.at))
                && self.decode(&[last]).is_ok()
            {
                computed.push(last.token);
            }
            self.cache.push_reply(sequence, &computed);
        }
        self.release(sequence);
    }

    /// Frees a sequence. Its prompt is kept for others that begin the same.
    pub(crate) fn release(&mut self, sequence: usize) {
        self.cache.release(sequence);
    }

    /// Frees a sequence after an error, when its content is unknown.
    pub(crate) fn discard(&mut self, sequence: usize) {
        // If this fails, the next prompt clears it, or fails.
        let _ = self.clear(sequence);
        self.cache.release(sequence);
    }

    /// Replaces the content of a sequence by a prefix from its file. Returns the number of segments
    /// in the sequence, and where they end; `None` if the file can't be used, and was removed.
    fn load_prefix(
        &mut self,
        file: &Path,
        prefix: &[Segment],
        tokens: &[LlamaToken],
        sequence: usize,
    ) -> Result<Option<(usize, End)>, ModelError> {
        self.clear(sequence)?;
        let id = i32::try_from(sequence).unwrap_or_default();
        let read = self.context.state_seq_load_file(file, id, tokens.len());
        if !read.is_ok_and(|(read, _)| read == tokens) {
            tracing::debug!(?file, "a prefix that can't be read is removed");
            let _ = fs::remove_file(file);
            self.clear(sequence)?;
            return Ok(None);
        }
        let mut end = End::default();
        for segment in prefix {
            end = end.after_text(segment.tokens());
            self.cache.push(sequence, segment.clone(), end);
        }
        Ok(Some((prefix.len(), end)))
    }

    /// Keeps the prefix that is the whole content of a sequence on disk. If that fails, it is
    /// computed again another time.
    fn keep_prefix(&self, tokens: &[LlamaToken], sequence: usize) {
        let Some(prefixes) = &self.prefixes else { return };
        let sequence = i32::try_from(sequence).unwrap_or_default();
        let kept = prefixes.keep(tokens, |file| {
            self.context.state_seq_save_file(file, sequence, tokens).map_err(io::Error::other)
        });
        if let Err(error) = kept {
            tracing::debug!(%error, "a prefix of prompts can't be kept");
        }
    }

    fn clear(&mut self, sequence: usize) -> Result<(), ModelError> {
        self.cache.truncate(sequence, 0);
        let id = u32::try_from(sequence).ok();
        self.context
            .clear_kv_cache_seq(id, None, None)
            .map_err(|error| failed("the engine's memory", error))?;
        Ok(())
    }

    /// Computes text. Returns where it ends, and the row of its last token.
    fn read_text(
        &mut self,
        tokens: &[LlamaToken],
        from: End,
        sequence: usize,
    ) -> Result<(End, i32), ModelError> {
        let sequence = i32::try_from(sequence).unwrap_or_default();
        let mut batch = LlamaBatch::new(BLOCK, 1);
        for ((index, token), position) in (1..).zip(tokens).zip(from.position..) {
            let wants_logits = index == tokens.len();
            batch
                .add(*token, position, &[sequence], wants_logits)
                .map_err(|error| failed("a batch", error))?;
        }
        self.context
            .decode(&mut batch)
            .map_err(|error| failed("the prompt could not be computed", error))?;
        Ok((from.after_text(tokens.len()), batch.n_tokens() - 1))
    }

    /// Computes an image with the text before it, the next segment of a prompt. Returns where it
    /// ends.
    fn read_image(
        &mut self,
        before: &str,
        image: &Image,
        is_first: bool,
        reading: &Reading,
    ) -> Result<End, ModelError> {
        let pixels =
            image.pixels().map_err(|error| ModelError::Rejected(Cause::from_error(error)))?;
        let bitmap =
            MtmdBitmap::from_image_data(pixels.width(), pixels.height(), pixels.as_bytes())
                .map_err(|error| failed("an image", error))?;
        let text = MtmdInputText {
            text: format!("{before}{}", mtmd_default_marker()),
            add_special: is_first,
            parse_special: true,
        };
        let Some(vision) = self.vision.as_mut() else {
            return Err(ModelError::Rejected("this model reads text only".into()));
        };
        let chunks =
            vision.tokenize(text, &[&bitmap]).map_err(|error| failed("an image", error))?;
        let from = reading.end;
        let end = from.after_image(chunks.total_tokens(), from.position);
        must_fit(end, &reading.prompt.segments[reading.done + 1..], self.room)?;
        let batch = i32::try_from(IMAGE_BATCH).unwrap_or(i32::MAX);
        let sequence = i32::try_from(reading.sequence).unwrap_or_default();
        let position = chunks
            .eval_chunks(vision, &mut self.context, from.position, sequence, batch, false)
            .map_err(|error| failed("an image could not be computed", error))?;
        Ok(End { position, ..end })
    }

    /// The number of conversations that are computed at the same time.
    pub(crate) fn slots(&self) -> usize {
        self.cache.sequences()
    }

    /// Whether another token fits after this end.
    pub(crate) fn has_room(&self, end: End) -> bool {
        end.cells < self.room
    }

    /// The next token by a row of the last batch.
    pub(crate) fn sample(&self, sampler: &mut LlamaSampler, row: i32) -> LlamaToken {
        sampler.sample(&self.context, row)
    }

    /// The bytes of a token, which may end within a character; `None` if it ends the reply.
    pub(crate) fn spelled(&self, token: LlamaToken) -> Option<Vec<u8>> {
        let vocab = self.model.vocab();
        (!vocab.is_eog(token)).then(|| vocab.token_to_piece(token, false, None))
    }

    /// The likeliest tokens of a row of logits, with their log-probabilities.
    pub(crate) fn likeliest(&self, row: i32, count: usize) -> Vec<TopLogprob> {
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

/// Fails if the rest of a prompt and a token of a reply don't fit after `end`. Of images that are
/// not decoded, it counts one token.
fn must_fit(end: End, rest: &[Segment], room: usize) -> Result<(), ModelError> {
    let images = rest.iter().filter(|segment| segment.is_image()).count();
    let needed = end.cells + rest.iter().map(Segment::tokens).sum::<usize>() + images;
    if needed < room {
        return Ok(());
    }
    let at_least = if images > 0 { "at least " } else { "" };
    Err(too_long(&format!("{at_least}{needed} tokens"), room))
}

fn too_long(size: &str, room: usize) -> ModelError {
    ModelError::Rejected(format!(
        "the conversation is too long: {size}, and the context holds {room} tokens; shorten it or raise the context"
    ).into())
}

/// Fails if a prompt has no last token, after which a reply could begin.
fn must_end_in_text(segments: &[Segment]) -> Result<(), ModelError> {
    let why = match segments.last() {
        Some(Segment::Text(_)) => return Ok(()),
        Some(Segment::Image { .. }) => "ends with an image; put text after it",
        None => "is empty; write a message",
    };
    Err(ModelError::Rejected(
        format!("there is nothing to reply to: the prompt by the model's chat template {why}")
            .into(),
    ))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_counted_in_cells_and_not_in_positions() {
        let text = |tokens| Segment::Text(vec![LlamaToken(0); tokens]);
        // A picture of 30x30 patches that moves the position on by 30.
        let end = End::default().after_text(10).after_image(900, 40);
        must_fit(end, &[text(100), text(13)], 1024).unwrap();
        let error = must_fit(end, &[text(100), text(14)], 1024).unwrap_err();
        assert!(error.to_string().contains("too long: 1024 tokens"), "{error}");
    }

    #[test]
    fn images_to_come_count_at_least_one_token() {
        let digest = Image::from_url("u").digest();
        let image = Segment::Image { before: "It:".into(), tokens: 3, number: 0, digest };
        let error = must_fit(End::default(), &[image.clone(), image], 8).unwrap_err();
        assert!(error.to_string().contains("at least 8 tokens"), "{error}");
    }
}
