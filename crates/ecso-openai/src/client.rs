//! The client: connections, time limits, retries, and the fall-back for servers that know less.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_stream::try_stream;
use async_trait::async_trait;
use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use ecso::{Chat, Mllm, ModelError, Piece, Reply, ReplyStream, Sampling};
use futures::{Stream, StreamExt};
use reqwest::{Response, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use sse_stream::SseStream;
use url::Url;

use crate::wire;

/// No reply is longer than this, in bytes; one that is comes from a server gone wrong.
const LONGEST_REPLY: usize = 16 << 20;

/// How the server is talked to.
#[derive(Debug, Clone)]
pub struct Options {
    /// The model's name on the server; `None` takes the one that the server lists, if it lists just one.
    pub model: Option<String>,
    /// Sent as a bearer token.
    pub api_key: Option<SecretString>,
    /// Longest wait for a connection. Keep it below ten seconds: it is how long an unreachable server goes unnoticed.
    pub connect_timeout: Duration,
    /// Longest wait for a whole reply, or for the next piece of a streamed one.
    pub reply_timeout: Duration,
    /// How often a request is tried again after 429, 5xx or a lost connection.
    pub retries: usize,
    /// First wait before trying again; it doubles each time, with jitter. A server's `Retry-After` takes its place.
    pub backoff: Duration,
    /// Longest `Retry-After` that is waited for; a server that asks for more is overloaded.
    pub longest_wait: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            model: None,
            api_key: None,
            connect_timeout: Duration::from_secs(8),
            reply_timeout: Duration::from_mins(10),
            retries: 3,
            backoff: Duration::from_millis(300),
            longest_wait: Duration::from_mins(1),
        }
    }
}

/// A model behind an OpenAI-compatible chat-completions endpoint.
#[derive(Debug, Clone)]
pub struct OpenAi {
    http: reqwest::Client,
    base: Url,
    model: String,
    options: Options,
    /// The server has refused log-probabilities or usage counts once, and answered without them.
    knows_less: Arc<AtomicBool>,
}

/// Chooses how TLS is done in this process, for clients of this crate and of others that leave it open. Set by whoever comes
/// first; a program that has its own provider keeps it.
pub fn install_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

impl OpenAi {
    /// Prepares a client for the server at `base` (`http://host:8000` or `http://host:8000/v1`). With no model named, the
    /// server is asked which it has.
    ///
    /// # Errors
    /// [`ModelError::Rejected`] if the URL is none or the server lists several models; [`ModelError::Transport`] if it
    /// can't be reached.
    pub async fn connect(base: &str, options: Options) -> Result<Self, ModelError> {
        Self::new(base, options)?.settled().await
    }

    /// The same without asking the server anything: for whoever names the model later, by [`OpenAi::with`].
    ///
    /// # Errors
    /// [`ModelError::Rejected`] if the URL is none.
    pub fn new(base: &str, options: Options) -> Result<Self, ModelError> {
        let base = endpoint(base)?;
        install_provider();
        let http = reqwest::Client::builder()
            .connect_timeout(options.connect_timeout)
            .read_timeout(options.reply_timeout)
            .user_agent(concat!("ecso/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| ModelError::Transport(chain(&error)))?;
        Ok(Self { http, base, model: options.model.clone().unwrap_or_default(), options, knows_less: Arc::default() })
    }

    /// The same server and connections, with another model and another caller's key.
    #[must_use]
    pub fn with(&self, model: impl Into<String>, api_key: Option<SecretString>) -> Self {
        let mut other = self.clone();
        other.model = model.into();
        other.options.api_key = api_key;
        other
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

    async fn only_model(&self) -> Result<String, ModelError> {
        let response = self.retrying(|| self.send(self.http.get(self.url("models")))).await?;
        let body = read(response).await?;
        let names = wire::model_names(&body)?;
        match names.as_slice() {
            [name] => Ok(name.clone()),
            [] => Err(ModelError::Rejected(format!("{} lists no model; name one", self.base))),
            _ => Err(ModelError::Rejected(format!(
                "{} has several models; name one of: {}",
                self.base,
                names.join(", ")
            ))),
        }
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        let path = format!("{}/{path}", url.path().trim_end_matches('/'));
        url.set_path(&path);
        url
    }

    /// Posts a chat. Where it wishes for more than every server knows and gets a 400, it asks once more without.
    async fn post(&self, chat: &Chat, sampling: &Sampling, stream: bool) -> Result<Response, ModelError> {
        let full = !self.knows_less.load(Ordering::Relaxed);
        let (request, wishes) = wire::request(&self.model, chat, sampling, stream, full);
        let first = self.post_once(&request).await;
        let Err(ModelError::Rejected(reason)) = first else {
            return first;
        };
        if !wishes {
            return Err(ModelError::Rejected(reason));
        }
        let (request, _) = wire::request(&self.model, chat, sampling, stream, false);
        let second = self.post_once(&request).await?;
        tracing::info!(%reason, "the server answers without log-probabilities only; it won't be asked for them again");
        self.knows_less.store(true, Ordering::Relaxed);
        Ok(second)
    }

    async fn post_once(&self, request: &serde_json::Value) -> Result<Response, ModelError> {
        let url = self.url("chat/completions");
        self.retrying(|| self.send(self.http.post(url.clone()).json(request))).await
    }

    async fn send(&self, mut request: reqwest::RequestBuilder) -> Result<Response, ModelError> {
        if let Some(key) = &self.options.api_key {
            request = request.bearer_auth(key.expose_secret());
        }
        let response = request.send().await.map_err(|error| self.lost(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = retry_after(&response);
        let body = read(response).await.unwrap_or_default();
        let reason = format!("{status}: {}", wire::reason(&body));
        Err(match status {
            StatusCode::TOO_MANY_REQUESTS => ModelError::Overloaded { retry_after },
            StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => ModelError::Overloaded { retry_after },
            _ if status.is_server_error() => ModelError::Transport(reason),
            _ => ModelError::Rejected(reason),
        })
    }

    async fn retrying<F>(&self, request: impl FnMut() -> F) -> Result<Response, ModelError>
    where
        F: Future<Output = Result<Response, ModelError>>,
    {
        let longest = self.options.longest_wait;
        request
            .retry(
                ExponentialBuilder::default()
                    .with_min_delay(self.options.backoff)
                    .with_max_times(self.options.retries)
                    .with_jitter(),
            )
            .when(|error| matches!(error, ModelError::Overloaded { .. } | ModelError::Transport(_)))
            .adjust(move |error, pause| match error {
                ModelError::Overloaded { retry_after: Some(wait) } => pause.and((*wait <= longest).then_some(*wait)),
                _ => pause,
            })
            .await
    }

    fn lost(&self, error: &reqwest::Error) -> ModelError {
        if error.is_timeout() {
            // Not tried again: whoever waited this long has waited enough.
            let waited = if error.is_connect() { self.options.connect_timeout } else { self.options.reply_timeout };
            return ModelError::Timeout(waited);
        }
        ModelError::Transport(format!("{}: {}", self.base, chain(error)))
    }
}

#[async_trait]
impl Mllm for OpenAi {
    fn name(&self) -> &str {
        &self.model
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        let whole = async {
            let body = read(self.post(chat, sampling, false).await?).await?;
            wire::reply(&body)
        };
        tokio::time::timeout(self.options.reply_timeout, whole)
            .await
            .unwrap_or(Err(ModelError::Timeout(self.options.reply_timeout)))
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        let response = self.post(chat, sampling, true).await?;
        Ok(pieces(response.bytes_stream()).boxed())
    }
}

/// Reads an SSE body, split anywhere, into pieces.
fn pieces<E: std::error::Error + Send + Sync + 'static>(
    body: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
) -> impl Stream<Item = Result<Piece, ModelError>> + Send {
    try_stream! {
        let mut events = SseStream::from_bytes_stream(bounded(body).boxed());
        let mut end = wire::End::default();
        while let Some(event) = events.next().await {
            let event = event.map_err(|error| ModelError::Protocol(chain(&error)))?;
            let Some(data) = event.data else { continue };
            if data.trim() == "[DONE]" {
                break;
            }
            let chunk = wire::chunk(&data)?;
            if let Some(alternatives) = end.first_token(&chunk) {
                yield Piece::FirstToken(alternatives);
            }
            if let Some(text) = end.text(chunk) {
                yield Piece::Text(text);
            }
        }
        yield end.piece()?;
    }
}

fn bounded<E: std::error::Error + Send + Sync + 'static>(
    body: impl Stream<Item = Result<Bytes, E>> + Send,
) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send {
    body.scan(0, |read, bytes| {
        let bytes = bytes.map_err(|error| std::io::Error::other(chain(&error)));
        *read += bytes.as_ref().map_or(0, Bytes::len);
        let bytes = if *read > LONGEST_REPLY { Err(std::io::Error::other("the reply has no end")) } else { bytes };
        std::future::ready(Some(bytes))
    })
}

async fn read(response: Response) -> Result<Vec<u8>, ModelError> {
    let body = bounded(response.bytes_stream());
    futures::pin_mut!(body);
    let mut whole = Vec::new();
    while let Some(bytes) = body.next().await {
        whole.extend_from_slice(&bytes.map_err(|error| ModelError::Transport(error.to_string()))?);
    }
    Ok(whole)
}

fn endpoint(base: &str) -> Result<Url, ModelError> {
    let not_a_url = |why: &str| ModelError::Rejected(format!("{base:?} is no http(s) URL: {why}"));
    let mut url = Url::parse(base).map_err(|error| not_a_url(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(not_a_url("its scheme is another"));
    }
    if url.path() == "/" {
        url.set_path("/v1");
    }
    Ok(url)
}

fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

/// An error with its causes, which say what really happened; without the URL, which may hold a secret.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut causes: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = match error.downcast_ref::<reqwest::Error>() {
            Some(error) if error.is_connect() => "connection failed".to_owned(),
            Some(_) => "connection lost".to_owned(),
            None => error.to_string(),
        };
        if !causes.iter().any(|cause| cause.contains(&text)) {
            causes.push(text);
        }
        next = error.source();
    }
    causes.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &str = concat!(
        ": keep-alive\r\n\r\n",
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\r\n\r\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"Äp\"},\"logprobs\":{\"content\":[{\"token\":\"Äp\",\"logprob\":-0.5,",
        "\"top_logprobs\":[{\"token\":\"Äp\",\"logprob\":-0.5}]}]}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"fel 🍏\"},\"finish_reason\":\"length\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\n\n",
        "data: [DONE]\n\n",
    );

    fn reply(parts: Vec<&[u8]>) -> Result<Reply, ModelError> {
        let parts: Vec<_> =
            parts.into_iter().map(|part| Ok::<_, std::io::Error>(Bytes::copy_from_slice(part))).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(ecso::collect(pieces(futures::stream::iter(parts)).boxed()))
    }

    proptest::proptest! {
        #[test]
        fn a_stream_split_at_any_byte_reads_the_same(cuts in proptest::collection::btree_set(0..BODY.len(), 0..40)) {
            let mut parts = Vec::new();
            let mut start = 0;
            for cut in cuts {
                parts.push(&BODY.as_bytes()[start..cut]);
                start = cut;
            }
            parts.push(&BODY.as_bytes()[start..]);
            let split = reply(parts).unwrap();
            proptest::prop_assert_eq!(&split.text, "Äpfel 🍏");
            proptest::prop_assert_eq!(&split, &reply(vec![BODY.as_bytes()]).unwrap());
            proptest::prop_assert_eq!(split.first_token.len(), 1);
            proptest::prop_assert_eq!(split.usage.unwrap().prompt_tokens, 7);
        }

        #[test]
        fn no_stream_panics(bytes: Vec<u8>) {
            let _ = reply(vec![&b"data: "[..], &bytes[..], &b"\n\n"[..]]);
        }
    }

    #[test]
    fn a_stream_that_breaks_off_is_an_error() {
        let half = BODY.split_once("data: {\"choices\":[{\"delta\":{\"content\":\"fel").unwrap().0;
        assert!(matches!(reply(vec![half.as_bytes()]), Err(ModelError::Protocol(_))));
        assert!(matches!(reply(vec![b"data: {\"error\":{\"message\":\"out of memory\"}}\n\n"]),
            Err(ModelError::Transport(reason)) if reason.contains("out of memory")));
    }

    #[test]
    fn an_endless_reply_ends() {
        let line = b"data: {\"choices\":[{\"delta\":{\"content\":\"again and again and again\"}}]}\n\n".repeat(1000);
        let parts = vec![&line[..]; LONGEST_REPLY / line.len() + 1];
        assert!(matches!(reply(parts), Err(ModelError::Protocol(reason)) if reason.contains("no end")));
    }

    #[test]
    fn base_urls() {
        assert_eq!(endpoint("http://host:1").unwrap().as_str(), "http://host:1/v1");
        assert_eq!(endpoint("https://host/v1/").unwrap().as_str(), "https://host/v1/");
        assert_eq!(endpoint("https://host/api/x").unwrap().as_str(), "https://host/api/x");
        assert!(endpoint("host:8000").is_err());
        assert!(endpoint("ftp://host").is_err());
    }
}
