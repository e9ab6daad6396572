//! The client: requests, retries, and errors.

use std::{
    error::Error,
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

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
    connect::{self, Bodies},
    options::Options,
    quirks::Memory,
    reply, request,
    search::Search,
    stream,
};

/// Longest wait for a health check.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);

/// A model behind an OpenAI-compatible chat-completions endpoint. A clone shares connections and
/// what was learned about the server.
///
/// ```
/// use ecso::Mllm as _;
/// use ecso_openai::{OpenAi, Options};
///
/// let options = Options { model: Some("qwen2.5-vl-7b".into()), ..Options::default() };
/// let model = OpenAi::new("http://localhost:8000", options)?;
/// assert_eq!(model.name(), "qwen2.5-vl-7b");
/// assert_eq!(model.base().as_str(), "http://localhost:8000/v1");
/// # Ok::<(), ecso::ModelError>(())
/// ```
#[derive(Debug, Clone)]
pub struct OpenAi {
    http: reqwest::Client,
    base: Base,
    model: String,
    options: Options,
    memory: Arc<Memory>,
    /// Further headers of every request.
    headers: HeaderMap,
}

/// Why a request failed, and the server's error message, if it sent one.
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
    /// A client for the server at `base`: `http://host:8000`, `http://host:8000/v1`, or the URL of
    /// one of its endpoints. If `options` name no model, the server is asked for its only one.
    ///
    /// # Errors
    /// [`ModelError::Rejected`] if the URL is invalid, or the server lists no model or several;
    /// [`ModelError::Transport`] if the server can't be reached, or a file named in `options` can't
    /// be used.
    pub async fn connect(base: &str, options: Options) -> Result<Self, ModelError> {
        Self::new(base, options)?.resolve_model().await
    }

    /// As [`OpenAi::connect`], without a request to the server. If `options` name no model, choose
    /// one with [`OpenAi::with_model`] or [`OpenAi::resolve_model`].
    ///
    /// # Errors
    /// Those of [`OpenAi::connect`] that involve no server.
    pub fn new(base: &str, options: Options) -> Result<Self, ModelError> {
        let base = Base::parse(base)?;
        Ok(Self {
            http: connect::client(&base, &options, Bodies::Unpacked)?,
            base,
            model: options.model.clone().unwrap_or_default(),
            memory: Arc::new(Memory::new(options.forget_after)),
            options,
            headers: HeaderMap::new(),
        })
    }

    /// The same server and connections, with another model and another key; `None` sends no key.
    #[must_use]
    pub fn with_model_and_key(
        &self,
        model: impl Into<String>,
        api_key: Option<SecretString>,
    ) -> Self {
        let mut other = self.clone();
        other.model = model.into();
        other.options.api_key = api_key;
        other
    }

    /// The same client with further headers in every request. Some servers choose the model by
    /// them.
    #[must_use]
    pub fn with_headers(mut self, headers: HeaderMap) -> Self {
        self.headers = headers;
        self
    }

    /// The same server, connections and key, with another model.
    #[must_use]
    pub fn with_model(&self, model: impl Into<String>) -> Self {
        self.with_model_and_key(model, self.options.api_key.clone())
    }

    /// The same client; if it has no model yet, with the server's only one.
    ///
    /// # Errors
    /// Those of [`OpenAi::connect`].
    pub async fn resolve_model(mut self) -> Result<Self, ModelError> {
        if self.model.is_empty() {
            self.model = self.only_model().await?;
        }
        Ok(self)
    }

    /// The base of all endpoints (`http://host:8000/v1`), without `user:password@`. Its query is
    /// part of every request.
    #[must_use]
    pub fn base(&self) -> &Url {
        self.base.url()
    }

    /// The `Authorization` header of every request: the key, else the `user:password@` of the base,
    /// else none.
    ///
    /// # Errors
    /// [`ModelError::Rejected`] if the key contains characters that a header can't have.
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
        let url = self.base.join("models");
        let listed = self.retrying(
            self.options.retries,
            || self.send(self.http.get(url.clone()), &url),
            is_transient,
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

    /// The server's description of this model in its list of models, as JSON: files, context. It
    /// distinguishes models that are served under the same name. `None` if the server has no such
    /// list or description.
    ///
    /// # Errors
    /// [`ModelError`] if the server could not be asked, so that the description is not known.
    pub async fn model_description(&self) -> Result<Option<String>, ModelError> {
        let models = match self.models().await {
            Err(ModelError::Rejected(_) | ModelError::Filtered(_) | ModelError::Protocol(_)) => {
                return Ok(None);
            }
            models => models?,
        };
        Ok(models
            .iter()
            .find(|(name, _)| *name == self.model)
            .and_then(|(_, model)| reply::description(model)))
    }

    /// A text that changes if the server's model does: name and description of the chosen model, or
    /// that the server does not list it; without a chosen model, all models of the server.
    ///
    /// # Errors
    /// [`ModelError`] if the server could not be asked.
    pub async fn identity(&self) -> Result<String, ModelError> {
        let models = match self.models().await {
            Err(ModelError::Rejected(_) | ModelError::Filtered(_) | ModelError::Protocol(_)) => {
                return Ok(format!("{} without a list of models", self.model));
            }
            models => models?,
        };
        let described = |(name, model): &(String, Value)| match reply::description(model) {
            Some(description) => format!("{name} {description}"),
            None => name.clone(),
        };
        if self.model.is_empty() {
            let mut all: Vec<String> = models.iter().map(described).collect();
            all.sort_unstable();
            return Ok(all.join(", "));
        }
        let named = models.iter().find(|(name, _)| *name == self.model);
        Ok(named.map_or_else(|| format!("{} not among its models", self.model), described))
    }

    /// Posts a chat. What the server refuses is sent in another form.
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
                    if let Some(quirks) = search.without_guess() {
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
            if !search.has_next(&complaint, &body, self.options.max_tokens_field) {
                return Err(failed.error);
            }
            if complaint.is_breakdown() {
                // It was retried often enough already.
                retries = 0;
            }
        }
    }

    async fn ask(&self, body: &Map<String, Value>, retries: usize) -> Result<Response, Failed> {
        let url = self.base.join("chat/completions");
        let send = || self.send(self.http.post(url.clone()).json(body), &url);
        let limit = self.options.max_tokens_field;
        let names_quirk = |failed: &Failed| {
            let complaint = failed.complaint.as_ref();
            complaint.is_some_and(|complaint| complaint.quirk(body, limit).is_some())
        };
        self.retrying(retries, send, |failed| is_transient(failed) && !names_quirk(failed)).await
    }

    async fn send(&self, request: RequestBuilder, url: &Url) -> Result<Response, Failed> {
        let start = Instant::now();
        let response = self
            .authorized(request)?
            .send()
            .await
            .map_err(|error| self.connection_error(error, self.options.reply_timeout))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = retry_after(&response);
        let complaint =
            Complaint::read(status, &stream::read(self.body(response)).await.unwrap_or_default());
        let hint = match status {
            StatusCode::NOT_FOUND => {
                format!(" ({} was asked; the base URL usually ends in /v1)", without_query(url))
            }
            StatusCode::UNAUTHORIZED if self.authorization()?.is_none() => {
                " (no API key was sent)".to_owned()
            }
            _ => String::new(),
        };
        let reason = format!("{status}: {}{hint}", complaint.summary());
        let may_filter = matches!(status, StatusCode::BAD_REQUEST | StatusCode::FORBIDDEN);
        let error = match status {
            StatusCode::TOO_MANY_REQUESTS => ModelError::Overloaded { retry_after },
            StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => {
                ModelError::Overloaded { retry_after }
            }
            // A proxy in front of the model lost patience.
            StatusCode::GATEWAY_TIMEOUT => ModelError::Timeout(start.elapsed()),
            _ if status.is_server_error() => ModelError::Transport(reason.into()),
            _ if may_filter && complaint.is_from_filter() => ModelError::Filtered(reason.into()),
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

    /// A response's body, decompressed; errors are those of [`OpenAi::connection_error`].
    fn body(
        &self,
        response: Response,
    ) -> impl Stream<Item = Result<Bytes, ModelError>> + Send + use<> {
        let client = self.clone();
        response.bytes_stream().map(move |bytes| {
            bytes.map_err(|error| client.connection_error(error, client.options.reply_timeout))
        })
    }

    /// The error for a failed connection. The URL is left out, since it may contain a secret.
    fn connection_error(&self, error: reqwest::Error, timeout: Duration) -> ModelError {
        if error.is_timeout() {
            // Not retried: the caller has waited long enough.
            let connect = self.options.connect_timeout.min(timeout);
            return ModelError::Timeout(if error.is_connect() { connect } else { timeout });
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
        let failed = format!("{}{socket}: {what}", self.base);
        ModelError::Transport(match error.source() {
            // The source would only repeat it, in the words of four libraries.
            Some(cause) if is_refused(cause) => {
                format!("{failed}: nothing is listening there").into()
            }
            Some(cause) => {
                let message = format!("{failed}: {}", ecso::error_chain(cause));
                Cause::new(message, error.without_url())
            }
            None => Cause::new(failed, error.without_url()),
        })
    }
}

#[async_trait]
impl Mllm for OpenAi {
    fn name(&self) -> &str {
        &self.model
    }

    /// Requests the list of models. Any answer except a server error (5xx) counts as healthy, also
    /// a refusal.
    async fn health(&self) -> Result<(), ModelError> {
        let request =
            self.authorized(self.http.get(self.base.join("models")).timeout(HEALTH_TIMEOUT))?;
        let status = request
            .send()
            .await
            .map_err(|error| self.connection_error(error, HEALTH_TIMEOUT))?
            .status();
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
            let reply = reply::complete(&stream::read(self.body(response)).await?)?;
            if let Some(answering) = &reply.model {
                self.memory.note_answering_model(&self.model, answering);
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

/// Whether a retry is safe and may help.
fn is_transient(failed: &Failed) -> bool {
    match failed.error {
        ModelError::Overloaded { .. } | ModelError::Transport(_) => true,
        // A proxy's 504 may come from a server that is still starting. The client's own limit on
        // time is not waited for twice.
        ModelError::Timeout(_) => failed.complaint.is_some(),
        _ => false,
    }
}

/// Whether the machine was reached, and no server listens at the port.
fn is_refused(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().map_or_else(
        || error.source().is_some_and(is_refused),
        |cause| cause.kind() == io::ErrorKind::ConnectionRefused,
    )
}

/// The wait that `Retry-After` requests, in seconds or as a date.
fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let seconds = value.parse().ok().map(Duration::from_secs);
    seconds.or_else(|| {
        let date = httpdate::parse_http_date(value).ok()?;
        Some(date.duration_since(SystemTime::now()).unwrap_or_default())
    })
}
