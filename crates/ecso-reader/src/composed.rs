//! A composed model: the reader over a text model.

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

/// How many pages are remembered; the steps of one answer look at the same image three times.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// A picture with so large a part of text is a page, whatever the tagger says: the most in a
/// photograph with a tag was .11.
const PAGE: f32 = 0.2;

/// A text model that knows of each image the text that a [`Reader`] reads in it, and what a
/// [`Tagger`] sees in it.
pub struct Composed<M> {
    reader: Arc<Reader>,
    tagger: Option<Arc<Tagger>>,
    model: M,
    name: String,
    pages: Mutex<LruCache<Digest, Arc<ImageText>>>,
}

impl<M: Mllm> Composed<M> {
    /// Puts `reader` in front of `model`; `name` is what traces and results call the pair.
    pub fn new(reader: Reader, model: M, name: impl Into<String>) -> Self {
        let pages = Mutex::new(LruCache::new(REMEMBERED));
        Self { reader: Arc::new(reader), tagger: None, model, name: name.into(), pages }
    }

    /// With a tagger beside the reader. Only of photographs it says more than the reader does.
    #[must_use]
    pub fn with_tagger(self, tagger: Tagger) -> Self {
        Self { tagger: Some(Arc::new(tagger)), ..self }
    }

    /// The conversation with the text of its images in their place.
    async fn read(&self, chat: &Chat) -> Result<Chat, ModelError> {
        let mut turns = Vec::with_capacity(chat.turns.len());
        for turn in &chat.turns {
            let mut parts = Vec::with_capacity(turn.parts.len());
            for part in &turn.parts {
                parts.push(match part {
                    Part::Text(text) => Part::Text(text.clone()),
                    Part::Image(image) => Part::Text(layout(&*self.page(image).await?)),
                });
            }
            turns.push(Turn { role: turn.role, parts });
        }
        Ok(Chat { turns, definitions: chat.definitions.clone(), head: chat.head })
    }

    /// What an image says and shows: by its description, where it has one.
    async fn page(&self, image: &Image) -> Result<Arc<ImageText>, ModelError> {
        if let Some(description) = image.description() {
            return Ok(Arc::new(ImageText {
                description: description.to_owned(),
                ..ImageText::default()
            }));
        }
        let digest = image.digest();
        let known = self.pages.lock().unwrap_or_else(PoisonError::into_inner).get(&digest).cloned();
        if let Some(page) = known {
            return Ok(page);
        }
        let (reader, tagger, image) =
            (Arc::clone(&self.reader), self.tagger.clone(), image.clone());
        let read = tokio::task::spawn_blocking(move || {
            let pixels =
                image.pixels().map_err(|error| ModelError::Rejected(Cause::from_error(error)))?;
            let page = reader
                .read(pixels)
                .map_err(|error| ModelError::Transport(Cause::from_error(error)))?;
            let tagger = tagger.filter(|_| page.part_of(pixels) < PAGE);
            let tags = tagger.map_or(Ok(Vec::new()), |tagger| tagger.tags(pixels));
            let tags = tags.map_err(|error| ModelError::Transport(Cause::from_error(error)))?;
            Ok(ImageText { words: page.text(), description: photograph(&tags) })
        });
        let page =
            Arc::new(read.await.map_err(|error| ModelError::Transport(Cause::from_error(error)))??);
        self.pages.lock().unwrap_or_else(PoisonError::into_inner).put(digest, Arc::clone(&page));
        Ok(page)
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
        Ok(Some(self.page(image).await?.as_ref().clone()))
    }

    fn is_concurrent(&self) -> bool {
        self.model.is_concurrent()
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        self.model.stream(&self.read(chat).await?, sampling).await
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        self.model.generate(&self.read(chat).await?, sampling).await
    }
}

/// What a picture may be a photograph of; empty where no tag is likely.
fn photograph(tags: &[Tag]) -> String {
    let names: Vec<&str> = tags.iter().map(|tag| tag.name).collect();
    if names.is_empty() {
        String::new()
    } else {
        format!("a photograph (perhaps: {})", names.join(", "))
    }
}

/// How a picture stands in a conversation.
fn layout(ImageText { words, description }: &ImageText) -> String {
    match (words.is_empty(), description.is_empty()) {
        (true, true) => "Image: a picture in which no text was found.".into(),
        (false, true) => format!("Image: a picture with the printed text \"{words}\""),
        (true, false) => format!("Image: {description}"),
        (false, false) => format!("Image: {description}, with the printed text \"{words}\""),
    }
}
