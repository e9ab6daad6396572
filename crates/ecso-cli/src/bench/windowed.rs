//! The model behind `ecso serve` with windowed streams, as clients see it.

use std::{net::Ipv4Addr, sync::Arc};

use ecso::{Chat, Mllm, Profile};
use ecso_gateway::{
    Gateway, Upstream,
    settings::{Limits, Streams},
};
use ecso_openai::{OpenAi, Options};
use futures::future::pending;
use tokio::{net::TcpListener, task::JoinSet};

use super::{
    meter::Metered,
    timing::{Timing, time_unguarded},
};
use crate::settings::Settings;

/// A server on a port of its own. Dropping it stops it.
pub(super) struct WindowedServer {
    pub(super) profile: String,
    client: Arc<dyn Mllm>,
    metered: Arc<Metered>,
    _server: JoinSet<std::io::Result<()>>,
}

impl WindowedServer {
    /// Serves `model` under `profile`, with the windows of the settings.
    pub(super) async fn start(
        model: &Arc<dyn Mllm>,
        profile: &Profile,
        settings: &Settings,
    ) -> anyhow::Result<Self> {
        let metered = Metered::new(model);
        let gateway_settings = ecso_gateway::Settings {
            stream: Streams::Windowed,
            windows: settings.gateway.windows,
            // No finding is taken from an earlier answer.
            limits: Limits { deadline: 3600, remembered: 0, ..Limits::default() },
            ..ecso_gateway::Settings::default()
        };
        let upstream = Upstream::Engine(Arc::<Metered>::clone(&metered));
        let gateway = Gateway::new(upstream, profile.clone(), gateway_settings, settings.images)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = format!("http://{}/v1", listener.local_addr()?);
        let mut server = JoinSet::new();
        server.spawn(ecso_gateway::serve(Arc::new(gateway), listener, pending()));
        let model = Some(model.name().to_owned());
        let options = Options { model, retries: 0, ..Options::default() };
        let client = Arc::new(OpenAi::new(&url, options)?);
        Ok(Self { profile: profile.name.clone(), client, metered, _server: server })
    }

    /// Measures an answer. Its calls and tokens are those that the guard needed in total.
    pub(super) async fn time_answer(
        &self,
        chat: &Chat,
        max_new_tokens: u32,
    ) -> anyhow::Result<Timing> {
        self.metered.take();
        let timing = time_unguarded(&self.client, chat, max_new_tokens).await?;
        let (calls, tokens) = self.metered.take();
        Ok(Timing { tokens, calls, ..timing })
    }
}
