//! A model whose calls are counted.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use ecso::{Chat, Delta, Image, ImageText, Mllm, ModelError, Reply, ReplyStream, Sampling, Usage};
use futures::StreamExt;

/// A model whose calls are counted, those that are stopped before their end included.
pub(super) struct Metered {
    model: Arc<dyn Mllm>,
    meter: Arc<Meter>,
}

impl Metered {
    pub(super) fn new(model: &Arc<dyn Mllm>) -> Arc<Self> {
        Arc::new(Self { model: Arc::clone(model), meter: Arc::default() })
    }

    /// The number of calls since the last time, and their prompt and reply tokens if these are
    /// known.
    pub(super) fn take(&self) -> (usize, Option<(u32, u32)>) {
        let Counts { begun, ended, tokens } = self.meter.take();
        // What a stopped call has used is not known.
        (begun, tokens.filter(|_| begun == ended))
    }
}

/// What a model was asked, and what that took.
#[derive(Default)]
struct Meter(Mutex<Counts>);

#[derive(Clone, Copy)]
struct Counts {
    /// Calls that were begun, and that were not stopped before their end.
    begun: usize,
    ended: usize,
    /// Prompt and reply tokens; none if a call did not tell.
    tokens: Option<(u32, u32)>,
}

impl Default for Counts {
    fn default() -> Self {
        Self { begun: 0, ended: 0, tokens: Some((0, 0)) }
    }
}

impl Meter {
    /// Returns the counts so far, and resets them.
    fn take(&self) -> Counts {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn begin(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).begun += 1;
    }

    fn end(&self, usage: Option<Usage>) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.ended += 1;
        counts.tokens = counts.tokens.zip(usage).map(|((prompt, reply), usage)| {
            (prompt + usage.prompt_tokens, reply + usage.completion_tokens)
        });
    }
}

#[async_trait]
impl Mllm for Metered {
    fn name(&self) -> &str {
        self.model.name()
    }

    async fn health(&self) -> Result<(), ModelError> {
        self.model.health().await
    }

    async fn image_text(&self, image: &Image) -> Result<Option<ImageText>, ModelError> {
        let text = self.model.image_text(image).await?;
        if text.is_some() {
            // A step of the guard that takes no tokens.
            self.meter.begin();
            self.meter.end(Some(Usage::default()));
        }
        Ok(text)
    }

    fn is_concurrent(&self) -> bool {
        self.model.is_concurrent()
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        let meter = Arc::clone(&self.meter);
        meter.begin();
        let deltas = self.model.stream(chat, sampling).await?;
        let counted = deltas.inspect(move |delta| {
            if let Ok(Delta::End { usage, .. }) = delta {
                meter.end(*usage);
            }
        });
        Ok(counted.boxed())
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        self.meter.begin();
        let reply = self.model.generate(chat, sampling).await?;
        self.meter.end(reply.usage);
        Ok(reply)
    }
}
