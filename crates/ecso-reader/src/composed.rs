//! A composed model: a reader, and perhaps a tagger, in front of a text model.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use ecso::{
    Cause, Chat, Digest, Image, ImageText, Mllm, ModelError, Part, Reply, ReplyStream, Sampling,
    Turn,
};
use lru::LruCache;

use crate::{
    reader::Reader,
    tagger::{Tag, Tagger},
};

/// The number of images whose text is kept; the steps of one answer read the same image three
/// times.
const CACHED: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// If text covers at least this share of an image, it is a page and gets no tags. The highest share
/// in a photograph with a tag was .11.
const PAGE_SHARE: f32 = 0.2;

/// A text model that gets each image as text: the words that a [`Reader`] reads in it, and the
/// classes that a [`Tagger`] finds.
pub struct Composed<M> {
    reader: Arc<Reader>,
    tagger: Option<Arc<Tagger>>,
    model: M,
    name: String,
    texts: Mutex<LruCache<Digest, Arc<ImageText>>>,
}

impl<M: Mllm> Composed<M> {
    /// Puts `reader` in front of `model`. `name` is the name of the pair in traces and results.
    pub fn new(reader: Reader, model: M, name: impl Into<String>) -> Self {
        let texts = Mutex::new(LruCache::new(CACHED));
        Self { reader: Arc::new(reader), tagger: None, model, name: name.into(), texts }
    }

    /// Adds a tagger. It adds information about photographs only.
    #[must_use]
    pub fn with_tagger(self, tagger: Tagger) -> Self {
        Self { tagger: Some(Arc::new(tagger)), ..self }
    }

    /// The conversation with each image replaced by its text.
    async fn without_images(&self, chat: &Chat) -> Result<Chat, ModelError> {
        let mut turns = Vec::with_capacity(chat.turns.len());
        for turn in &chat.turns {
            let mut parts = Vec::with_capacity(turn.parts.len());
            for part in &turn.parts {
                parts.push(match part {
                    Part::Text(text) => Part::Text(text.clone()),
                    Part::Image(image) => Part::Text(phrase(&*self.text_of(image).await?)),
                });
            }
            turns.push(Turn { role: turn.role, parts });
        }
        Ok(Chat { turns, definitions: chat.definitions.clone(), shared_turns: chat.shared_turns })
    }

    /// The text of an image; its description, if it is known by one.
    async fn text_of(&self, image: &Image) -> Result<Arc<ImageText>, ModelError> {
        if let Some(description) = image.description() {
            return Ok(Arc::new(ImageText {
                description: description.to_owned(),
                ..ImageText::default()
            }));
        }
        let digest = image.digest();
        let known = self.texts.lock().unwrap_or_else(PoisonError::into_inner).get(&digest).cloned();
        if let Some(text) = known {
            return Ok(text);
        }
        let (reader, tagger, image) =
            (Arc::clone(&self.reader), self.tagger.clone(), image.clone());
        let read = tokio::task::spawn_blocking(move || {
            let pixels =
                image.pixels().map_err(|error| ModelError::Rejected(Cause::from_error(error)))?;
            let page = reader
                .read(pixels)
                .map_err(|error| ModelError::Transport(Cause::from_error(error)))?;
            let tagger = tagger.filter(|_| page.share_of(pixels) < PAGE_SHARE);
            let tags = tagger.map_or(Ok(Vec::new()), |tagger| tagger.tags(pixels));
            let tags = tags.map_err(|error| ModelError::Transport(Cause::from_error(error)))?;
            Ok(ImageText { words: page.text(), description: photograph(&tags) })
        });
        let text =
            Arc::new(read.await.map_err(|error| ModelError::Transport(Cause::from_error(error)))??);
        self.texts.lock().unwrap_or_else(PoisonError::into_inner).put(digest, Arc::clone(&text));
        Ok(text)
    }
}

#[async_trait]
impl<M: Mllm> Mllm for Composed<M> {
    fn name(&self) -> &str {
        &self.name
    }

    async fn health(&self) -> Result<(), ModelError> {
        self.model.health().await
    }

    async fn image_text(&self, image: &Image) -> Result<Option<ImageText>, ModelError> {
        Ok(Some(self.text_of(image).await?.as_ref().clone()))
    }

    fn is_concurrent(&self) -> bool {
        self.model.is_concurrent()
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        self.model.stream(&self.without_images(chat).await?, sampling).await
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        self.model.generate(&self.without_images(chat).await?, sampling).await
    }
}

/// A description of a photograph by its tags; empty if there are none.
fn photograph(tags: &[Tag]) -> String {
    let names: Vec<&str> = tags.iter().map(|tag| tag.name).collect();
    if names.is_empty() {
        String::new()
    } else {
        format!("a photograph (perhaps: {})", names.join(", "))
    }
}

/// The sentence that replaces an image in a conversation.
fn phrase(ImageText { words, description }: &ImageText) -> String {
    match (words.is_empty(), description.is_empty()) {
        (true, true) => "Image: a picture in which no text was found.".into(),
        (false, true) => format!("Image: a picture with the printed text \"{words}\""),
        (true, false) => format!("Image: {description}"),
        (false, false) => format!("Image: {description}, with the printed text \"{words}\""),
    }
}
