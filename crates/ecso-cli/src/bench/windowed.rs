//! The model behind `ecso serve` with windowed streams, as clients see it.

use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use ecso::{
    Chat, Delta, Image, ImageText, Mllm, ModelError, Profile, Reply, ReplyStream, Sampling, Usage,
};
use ecso_gateway::{
    Gateway, Upstream,
    settings::{Limits, Streams},
};
use ecso_openai::{OpenAi, Options};
use futures::{StreamExt, future::pending};
use tokio::{net::TcpListener, task::JoinSet};

use super::timing::{Timing, time_unguarded};
use crate::settings::Settings;

/// A server on a port of its own. Dropping it stops it.
pub(super) struct WindowedServer {
    pub(super) profile: String,
    client: Arc<dyn Mllm>,
    meter: Arc<Meter>,
    _server: JoinSet<std::io::Result<()>>,
}

impl WindowedServer {
    /// Serves `model` under `profile`, with the windows of the settings.
    pub(super) async fn start(
        model: &Arc<dyn Mllm>,
        profile: &Profile,
        settings: &Settings,
    ) -> anyhow::Result<Self> {
        let meter = Arc::new(Meter::default());
        let metered = Metered { model: Arc::clone(model), meter: Arc::clone(&meter) };
        let gateway_settings = ecso_gateway::Settings {
            stream: Streams::Windowed,
            windows: settings.gateway.windows,
            // No finding is taken from an earlier answer.
            limits: Limits { deadline: 3600, remembered: 0, ..Limits::default() },
            ..ecso_gateway::Settings::default()
        };
        let upstream = Upstream::Engine(Arc::new(metered));
        let gateway = Gateway::new(upstream, profile.clone(), gateway_settings, settings.images)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = format!("http://{}/v1", listener.local_addr()?);
        let mut server = JoinSet::new();
        server.spawn(ecso_gateway::serve(Arc::new(gateway), listener, pending()));
        let model = Some(model.name().to_owned());
        let options = Options { model, retries: 0, ..Options::default() };
        let client = Arc::new(OpenAi::new(&url, options)?);
        Ok(Self { profile: profile.name.clone(), client, meter, _server: server })
    }

    /// Measures an answer. Its calls and tokens are those that the guard needed in total.
    pub(super) async fn time_answer(
        &self,
        chat: &Chat,
        max_new_tokens: u32,
    ) -> anyhow::Result<Timing> {
        self.meter.take();
        let timing = time_unguarded(&self.client, chat, max_new_tokens).await?;
        let Counts { begun, ended, tokens } = self.meter.take();
        // What a stopped call has used is not known.
        let tokens = tokens.filter(|_| begun == ended);
        Ok(Timing { calls: begun, tokens, ..timing })
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

/// A model whose calls are counted.
struct Metered {
    model: Arc<dyn Mllm>,
    meter: Arc<Meter>,
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
