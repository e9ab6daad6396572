//! The client: what is asked, how often, and what is made of answers that are none.

use std::{error::Error, sync::Arc, time::Duration};

use async_trait::async_trait;
use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use ecso::{Cause, Chat, ImageError, Mllm, ModelError, Reply, ReplyStream, Sampling};
use futures::{Stream, StreamExt};
use reqwest::{
    RequestBuilder, Response, StatusCode, Url,
    header::{self, HeaderMap, HeaderValue},
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value};

use crate::{
    base::{Base, without_query},
    complaint::Complaint,
    connect::{Bodies, http_client},
    options::Options,
    quirks::Memory,
    reply, request,
    search::Search,
    stream,
};

/// Longest wait for a sign of life.
const PATIENCE: Duration = Duration::from_secs(5);

/// A model behind an OpenAI-compatible chat-completions endpoint.
#[derive(Debug, Clone)]
pub struct OpenAi {
    http: reqwest::Client,
    base: Base,
    model: String,
    options: Options,
    memory: Arc<Memory>,
    /// What goes with every request beside the key.
    headers: HeaderMap,
}

/// Why a request got no good answer, and what the server said, if it did.
struct Failed {
    error: ModelError,
    complaint: Option<Box<Complaint>>,
}

impl From<ModelError> for Failed {
    fn from(error: ModelError) -> Self {
        Self { error, complaint: None }
    }
}

impl OpenAi {
    /// Prepares a client for the server at `base` (`http://host:8000` or `http://host:8000/v1`, or
    /// the URL of an endpoint of it). With no model named, the server is asked which it has.
    ///
    /// # Errors
    /// [`ModelError::Rejected`] if the URL is none or the server lists several models;
    /// [`ModelError::Transport`] if it can't be reached, or a file that `options` name can't be
    /// used.
    pub async fn connect(base: &str, options: Options) -> Result<Self, ModelError> {
        Self::new(base, options)?.settled().await
    }

    /// The same without asking the server anything: for whoever names the model later, by
    /// [`OpenAi::with`].
    ///
    /// # Errors
    /// Those of [`OpenAi::connect`] that need no server.
    pub fn new(base: &str, options: Options) -> Result<Self, ModelError> {
        Ok(Self {
            base: Base::parse(base)?,
            http: http_client(&options, Bodies::Unpacked)?,
            model: options.model.clone().unwrap_or_default(),
            memory: Arc::new(Memory::new(options.forget_after)),
            options,
            headers: HeaderMap::new(),
        })
    }

    /// The same server and connections, with another model and another caller's key.
    #[must_use]
    pub fn with(&self, model: impl Into<String>, api_key: Option<SecretString>) -> Self {
        let mut other = self.clone();
        other.model = model.into();
        other.options.api_key = api_key;
        other
    }

    /// The same with headers that go with every request: by them some servers choose the model.
    #[must_use]
    pub fn with_headers(mut self, headers: HeaderMap) -> Self {
        self.headers = headers;
        self
    }

    /// The same server, connections and key, with another model.
    #[must_use]
    pub fn with_model(&self, model: impl Into<String>) -> Self {
        self.with(model, self.options.api_key.clone())
    }

    /// The same with its model named: the server's only one, where none was.
    ///
    /// # Errors
    /// Those of [`OpenAi::connect`].
    pub async fn settled(mut self) -> Result<Self, ModelError> {
        if self.model.is_empty() {
            self.model = self.only_model().await?;
        }
        Ok(self)
    }

    /// The base of all endpoints (`http://host:8000/v1`), without `user:password@`. Its query goes
    /// with every request.
    #[must_use]
    pub fn base(&self) -> &Url {
        self.base.url()
    }

    /// The `Authorization` header that goes with every request: the key, else the `user:password@`
    /// of the base, else none.
    ///
    /// # Errors
    /// [`ModelError::Rejected`] if the key holds what no header can.
    pub fn authorization(&self) -> Result<Option<HeaderValue>, ModelError> {
        let value = match (&self.options.api_key, &self.base.login) {
            (Some(key), _) => format!("Bearer {}", key.expose_secret()),
            (None, Some(login)) => login.expose_secret().to_owned(),
            (None, None) => return Ok(None),
        };
        let mut value: HeaderValue = value
            .parse()
            .map_err(|_| ModelError::Rejected("the API key can't be sent in a header".into()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    async fn models(&self) -> Result<Vec<(String, Value)>, ModelError> {
        let url = self.base.to("models");
        let listed = self.retrying(
            self.options.retries,
            || self.send(self.http.get(url.clone()), &url),
            may_pass,
        );
        let response = listed.await.map_err(|failed| failed.error)?;
        reply::models(&stream::read(self.body(response)).await?)
    }

    async fn only_model(&self) -> Result<String, ModelError> {
        let models = self.models().await?;
        match models.as_slice() {
            [(name, _)] => Ok(name.clone()),
            [] => {
                Err(ModelError::Rejected(format!("{} lists no model; name one", self.base).into()))
            }
            _ => {
                let names: Vec<&str> = models.iter().map(|(name, _)| name.as_str()).collect();
                Err(ModelError::Rejected(
                    format!("{} has several models; name one of: {}", self.base, names.join(", "))
                        .into(),
                ))
            }
        }
    }

    /// What the server's list of models says of this one, as JSON: which files, which context.
    /// Another model that is served under the same name can be told by it. None where the server
    /// has no list, or says nothing.
    ///
    /// # Errors
    /// [`ModelError`] where the server could not be asked now: what it would have said is not
    /// known.
    pub async fn description(&self) -> Result<Option<String>, ModelError> {
        let models = match self.models().await {
            Err(ModelError::Rejected(_) | ModelError::Filtered(_) | ModelError::Protocol(_)) => {
                return Ok(None);
            }
            models => models?,
        };
        Ok(models
            .iter()
            .find(|(name, _)| *name == self.model)
            .and_then(|(_, model)| reply::tells(model)))
    }

    /// Which model is there now, in one text: what the list of models says of the one that is
    /// named, also that it has none of that name; where none is named, all that it has.
    ///
    /// # Errors
    /// [`ModelError`] where the server could not be asked now.
    pub async fn standing(&self) -> Result<String, ModelError> {
        let models = match self.models().await {
            Err(ModelError::Rejected(_) | ModelError::Filtered(_) | ModelError::Protocol(_)) => {
                return Ok(format!("{} without a list of models", self.model));
            }
            models => models?,
        };
        let told = |(name, model): &(String, Value)| match reply::tells(model) {
            Some(told) => format!("{name} {told}"),
            None => name.clone(),
        };
        if self.model.is_empty() {
            let mut all: Vec<String> = models.iter().map(told).collect();
            all.sort_unstable();
            return Ok(all.join(", "));
        }
        let named = models.iter().find(|(name, _)| *name == self.model);
        Ok(named.map_or_else(|| format!("{} not among its models", self.model), told))
    }

    /// Posts a chat, in the way in which the model takes it.
    async fn post(
        &self,
        chat: &Chat,
        sampling: &Sampling,
        stream: bool,
    ) -> Result<Response, ModelError> {
        if chat.images().any(|image| image.description().is_some()) {
            return Err(ModelError::Rejected(Cause::from_error(ImageError::OnlyDescribed)));
        }
        let mut search = Search::new(self.memory.of(&self.model));
        let mut retries = self.options.retries;
        loop {
            let body =
                request::body(&self.model, chat, sampling, stream, &search.quirks, &self.options);
            let failed = match self.ask(&body, retries).await {
                Ok(response) => {
                    if let Some(quirks) = search.doubted() {
                        let body = request::body(
                            &self.model,
                            chat,
                            sampling,
                            stream,
                            quirks,
                            &self.options,
                        );
                        if let Ok(response) = self.ask(&body, 0).await {
                            return Ok(response);
                        }
                    }
                    search.succeeded(&self.model, &self.memory);
                    return Ok(response);
                }
                Err(failed) => failed,
            };
            let Some(complaint) = failed.complaint else { return Err(failed.error) };
            if !search.goes_on(&complaint, &body, self.options.max_tokens_field) {
                return Err(failed.error);
            }
            if complaint.is_breakdown() {
                // It was tried again often enough.
                retries = 0;
            }
        }
    }

    async fn ask(&self, body: &Map<String, Value>, retries: usize) -> Result<Response, Failed> {
        let url = self.base.to("chat/completions");
        let send = || self.send(self.http.post(url.clone()).json(body), &url);
        let limit = self.options.max_tokens_field;
        let is_told = |failed: &Failed| {
            failed.complaint.as_ref().is_some_and(|said| said.quirk(body, limit).is_some())
        };
        self.retrying(retries, send, |failed| may_pass(failed) && !is_told(failed)).await
    }

    async fn send(&self, request: RequestBuilder, url: &Url) -> Result<Response, Failed> {
        let response = self
            .authorized(request)?
            .send()
            .await
            .map_err(|error| self.lost(error, self.options.reply_timeout))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = retry_after(&response);
        let complaint =
            Complaint::read(status, &stream::read(self.body(response)).await.unwrap_or_default());
        let asked = if status == StatusCode::NOT_FOUND {
            format!(" ({} was asked; the base URL usually ends in /v1)", without_query(url))
        } else {
            String::new()
        };
        let reason = format!("{status}: {}{asked}", complaint.told());
        let may_filter = matches!(status, StatusCode::BAD_REQUEST | StatusCode::FORBIDDEN);
        let error = match status {
            StatusCode::TOO_MANY_REQUESTS => ModelError::Overloaded { retry_after },
            StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => {
                ModelError::Overloaded { retry_after }
            }
            _ if status.is_server_error() => ModelError::Transport(reason.into()),
            _ if may_filter && complaint.is_of_a_filter() => ModelError::Filtered(reason.into()),
            _ => ModelError::Rejected(reason.into()),
        };
        Err(Failed { error, complaint: Some(Box::new(complaint)) })
    }

    fn authorized(&self, request: RequestBuilder) -> Result<RequestBuilder, ModelError> {
        let value = self.authorization()?;
        let request = request.headers(self.headers.clone());
        Ok(value
            .into_iter()
            .fold(request, |request, value| request.header(header::AUTHORIZATION, value)))
    }

    async fn retrying<F>(
        &self,
        retries: usize,
        request: impl FnMut() -> F,
        is_safe: impl FnMut(&Failed) -> bool,
    ) -> Result<Response, Failed>
    where
        F: Future<Output = Result<Response, Failed>>,
    {
        let longest = self.options.longest_wait;
        let waits = ExponentialBuilder::default()
            .with_min_delay(self.options.backoff)
            .with_max_times(retries)
            .with_jitter();
        request
            .retry(waits)
            .when(is_safe)
            .adjust(move |failed, pause| match failed.error {
                ModelError::Overloaded { retry_after: Some(wait) } => {
                    pause.and((wait <= longest).then_some(wait))
                }
                _ => pause,
            })
            .await
    }

    /// A response's body, unpacked; what breaks it is told as [`OpenAi::lost`] does.
    fn body(
        &self,
        response: Response,
    ) -> impl Stream<Item = Result<Bytes, ModelError>> + Send + use<> {
        let client = self.clone();
        response.bytes_stream().map(move |bytes| {
            bytes.map_err(|error| client.lost(error, client.options.reply_timeout))
        })
    }

    /// An error of the connection. The URL is left out of it: it may hold a secret.
    fn lost(&self, error: reqwest::Error, patience: Duration) -> ModelError {
        if error.is_timeout() {
            // Not tried again: whoever waited this long has waited enough.
            let connect = self.options.connect_timeout.min(patience);
            return ModelError::Timeout(if error.is_connect() { connect } else { patience });
        }
        let what = match &error {
            error if error.is_connect() => "connection failed",
            error if error.is_decode() => "the reply broke off",
            _ => "connection lost",
        };
        let socket = self
            .options
            .unix_socket
            .as_ref()
            .map(|path| format!(" by {}", path.display()))
            .unwrap_or_default();
        let causes = error
            .source()
            .map(|cause| format!(": {}", ecso::error_chain(cause)))
            .unwrap_or_default();
        ModelError::Transport(Cause::new(
            format!("{}{socket}: {what}{causes}", self.base),
            error.without_url(),
        ))
    }
}

#[async_trait]
impl Mllm for OpenAi {
    fn name(&self) -> &str {
        &self.model
    }

    /// Asks for the list of models. Any answer but a server's failure (5xx) is a sign of life, a
    /// refusal too.
    async fn health(&self) -> Result<(), ModelError> {
        let request = self.authorized(self.http.get(self.base.to("models")).timeout(PATIENCE))?;
        let status = request.send().await.map_err(|error| self.lost(error, PATIENCE))?.status();
        if status.is_server_error() {
            return Err(ModelError::Transport(format!("{}: {status}", self.base).into()));
        }
        Ok(())
    }

    fn is_concurrent(&self) -> bool {
        true
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        let whole = async {
            let response = self.post(chat, sampling, false).await?;
            let reply = reply::whole(&stream::read(self.body(response)).await?)?;
            if let Some(answering) = &reply.model {
                self.memory.answers(&self.model, answering);
            }
            Ok(reply)
        };
        tokio::time::timeout(self.options.reply_timeout, whole)
            .await
            .unwrap_or(Err(ModelError::Timeout(self.options.reply_timeout)))
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        let response = self.post(chat, sampling, true).await?;
        Ok(stream::deltas(self.body(response)).boxed())
    }
}

/// Whether trying again is safe and may help.
fn may_pass(failed: &Failed) -> bool {
    matches!(failed.error, ModelError::Overloaded { .. } | ModelError::Transport(_))
}

fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}
