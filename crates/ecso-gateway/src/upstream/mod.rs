//! What is behind the guard: another server, or a model in this process.

mod headers;
mod refusal;

use std::{error::Error, fmt, sync::Arc, time::Duration};

use axum::{
    BoxError,
    body::Body,
    http::{
        Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
        header,
    },
};
use bytes::Bytes;
use ecso::{Mllm, ModelError};
use ecso_openai::{Bodies, OpenAi, http_client};
use futures::{Stream, StreamExt, future::BoxFuture, stream};
use reqwest::Url;
use secrecy::SecretString;
use tower::{ServiceExt, service_fn};
use tower_http::decompression::Decompression;

use crate::{
    access, completion::Completion, context, error::ApiError, request::Request as Chat, telemetry,
};

pub(crate) use headers::{CREDENTIAL_HEADERS, answer_head, is_known_header};
use headers::{
    end_to_end_headers, forwarded_headers, is_safe_with_operator_key, is_version, own_call_header,
};
use refusal::refusal;

/// The guarded route.
pub(crate) const CHAT: &str = "/v1/chat/completions";

/// What is behind the guard.
#[derive(Clone)]
pub enum Upstream {
    /// An OpenAI-compatible server.
    Server(Arc<Server>),
    /// A model in this process.
    Engine(Arc<dyn Mllm>),
}

/// An OpenAI-compatible server. Requests that pass through reach it unchanged; the guard's steps
/// use it as an [`Mllm`].
pub struct Server {
    /// For bodies that pass through unchanged.
    raw_client: reqwest::Client,
    /// For bodies that are read here: it decompresses replies, whatever the server sends.
    unpacking_client: reqwest::Client,
    key: Option<SecretString>,
    model: OpenAi,
    checks: Option<Checks>,
    proxy: Option<SecretString>,
}

/// Where the guard's own calls go, if not to the guarded server: a cheaper or closer replica of the
/// same model.
#[derive(Debug, Clone)]
pub struct Checks {
    /// The server. Its key is its own, never a client's.
    pub server: OpenAi,
    /// The name of the model there. If empty, the name that the client asks for.
    pub model: String,
}

impl Upstream {
    /// The server at `base` (`http://host:8000/v1`). A `key` replaces the clients' own keys.
    ///
    /// # Errors
    /// If `base` is not an http or https URL, or if a certificate, proxy or socket can't be used.
    pub fn server(
        base: &str,
        key: Option<SecretString>,
        options: ecso_openai::Options,
        checks: Option<Checks>,
    ) -> Result<Self, ModelError> {
        let raw_client = http_client(base, &options, Bodies::AsSent)?;
        let unpacking_client = http_client(base, &options, Bodies::Unpacked)?;
        let proxy = options.proxy.clone();
        let model = OpenAi::new(base, options)?;
        Ok(Self::Server(Arc::new(Server {
            raw_client,
            unpacking_client,
            key,
            model,
            checks,
            proxy,
        })))
    }

    /// The proxy for this upstream.
    pub(crate) fn proxy(&self) -> Option<&SecretString> {
        match self {
            Self::Server(server) => server.proxy.as_ref(),
            Self::Engine(_) => None,
        }
    }

    /// Checks that it can answer now.
    pub(crate) async fn health(&self) -> Result<(), ModelError> {
        match self {
            Self::Server(server) => server.model.health().await,
            Self::Engine(model) => model.health().await,
        }
    }

    /// The model `name` for the steps of one caller.
    pub(crate) fn model(&self, name: &str, headers: &HeaderMap) -> Arc<dyn Mllm> {
        match self {
            Self::Server(server) => Arc::new(server.model(name, headers)),
            Self::Engine(model) => Arc::clone(model),
        }
    }

    /// The model `name` whose answers are guarded. The guard's steps may ask another one.
    pub(crate) fn guarded_model(&self, name: &str, headers: &HeaderMap) -> Arc<dyn Mllm> {
        match self {
            Self::Server(server) => Arc::new(server.guarded_model(name, headers)),
            Self::Engine(model) => Arc::clone(model),
        }
    }

    /// The headers that can make the upstream use another model, in addition to the model's name.
    pub(crate) fn model_headers(&self, headers: &HeaderMap) -> HeaderMap {
        match self {
            Self::Server(server) => server.model_headers(headers),
            Self::Engine(_) => HeaderMap::new(),
        }
    }

    /// The name of the model to ask if the client names none: the configured one, or the only one
    /// there is.
    pub(crate) async fn model_name(&self, headers: &HeaderMap) -> Result<String, ApiError> {
        match self {
            Self::Server(server) => {
                let model =
                    server.guarded_model(server.model.name(), headers).resolve_model().await;
                Ok(model.map_err(|error| ApiError::asking("no_model", error))?.name().to_owned())
            }
            Self::Engine(model) => Ok(model.name().to_owned()),
        }
    }
}

/// Whose key goes with a request to the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Credentials {
    /// The operator's, if there is one; otherwise the client's.
    Operator,
    /// Only the client's.
    Client,
}

/// The upstream's answer to a chat request.
pub(crate) enum Answer {
    /// A whole answer, and the headers that the client gets with it.
    Whole(Completion, HeaderMap),
    /// A stream that has begun.
    Stream(reqwest::Response),
}

/// Takes requests to the upstream and returns its answers, in place of our own client.
pub(crate) trait Carrier: Send + Sync {
    /// The door of these requests, for records and metrics.
    fn door(&self) -> &'static str;

    /// Whether it leads to a model server, which serves the table of routes as we understand it.
    fn knows_routes(&self) -> bool {
        true
    }

    /// Sends a request with a path below `/v1` and returns the response. Compressed bodies that are
    /// read here are decompressed afterwards.
    fn carry(
        &self,
        request: Request<reqwest::Body>,
    ) -> BoxFuture<'_, Result<reqwest::Response, ApiError>>;
}

/// Marks the guard's own calls when a carrier takes the clients' requests, because the carrier may
/// lead them back to the guard.
pub(crate) const OWN_CALL: HeaderName = HeaderName::from_static("x-ecso-own-call");

/// Attaches a carrier to a request, and marks the guard's own calls for it. Refuses a call of the
/// guard that came back to it.
pub(crate) fn attach_carrier(
    carrier: Arc<dyn Carrier>,
    mut request: Request<Body>,
) -> Result<Request<Body>, ApiError> {
    if request.headers().contains_key(OWN_CALL) {
        let message = "the guard's own calls come back to the guard: set its upstream to the \
                       model's own address, not to one that leads through the guard";
        let error = ApiError::new(StatusCode::MISDIRECTED_REQUEST, "guard_loop", message);
        error.log("-");
        return Err(error);
    }
    request.headers_mut().insert(OWN_CALL, HeaderValue::from_static("true"));
    request.extensions_mut().insert(carrier);
    Ok(request)
}

/// The door of our own HTTP server.
pub(crate) const HTTP: &str = "http";

/// The door of a request with these extensions.
pub(crate) fn door(extensions: &Extensions) -> &'static str {
    extensions.get::<Arc<dyn Carrier>>().map_or(HTTP, |carrier| carrier.door())
}

/// A request to the upstream.
pub(crate) struct Outgoing<'a> {
    pub(crate) credentials: Credentials,
    pub(crate) method: Method,
    pub(crate) path_and_query: &'a str,
    /// The client's headers.
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: reqwest::Body,
    /// Bodies of answers that are read here are decompressed.
    pub(crate) bodies: Bodies,
}

/// How a client's own request reaches the model, and its answer comes back.
#[derive(Clone)]
pub(crate) enum Transport {
    /// Our own client sends it to the server behind the guard.
    Server(Arc<Server>),
    /// A carrier takes it. The server behind the guard, or the model in this process, is only for
    /// the guard's own calls.
    Carrier(Arc<dyn Carrier>),
}

impl Transport {
    /// See [`Carrier::knows_routes`].
    pub(crate) fn knows_routes(&self) -> bool {
        match self {
            Self::Server(_) => true,
            Self::Carrier(carrier) => carrier.knows_routes(),
        }
    }

    /// Forwards a request, with those headers that are for the upstream.
    pub(crate) async fn forward(
        &self,
        request: Outgoing<'_>,
    ) -> Result<reqwest::Response, ApiError> {
        match self {
            Self::Server(server) => server.forward(request).await,
            Self::Carrier(carrier) => {
                let Outgoing { method, path_and_query, headers, body, bodies, .. } = request;
                let mut headers = forwarded_headers(headers, bodies);
                telemetry::inject(&mut headers);
                let mut request = Request::new(body);
                *request.method_mut() = method;
                *request.uri_mut() = path_and_query.parse().map_err(|_| {
                    ApiError::bad_request("invalid_request", "the path can't be read")
                })?;
                *request.headers_mut() = headers;
                match bodies {
                    Bodies::AsSent => carrier.carry(request).await,
                    Bodies::Unpacked => carry_unpacked(carrier.as_ref(), request).await,
                }
            }
        }
    }

    /// Asks for the answer to a chat request. The body is written from what was read of the
    /// request.
    pub(crate) async fn answer(
        &self,
        headers: &HeaderMap,
        chat: &Chat,
        max_bytes: usize,
    ) -> Result<Answer, ApiError> {
        let request = Outgoing {
            credentials: Credentials::Operator,
            method: Method::POST,
            path_and_query: CHAT,
            headers,
            body: chat.body()?.into(),
            bodies: Bodies::Unpacked,
        };
        let response = self.forward(request).await?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        let head = answer_head(response.headers());
        if chat.stream {
            let kind =
                response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
            if kind.is_none_or(|kind| !kind.starts_with("text/event-stream")) {
                let error = ApiError::upstream("the upstream was asked for a stream and sent none");
                return Err(error.with_head(&head));
            }
            return Ok(Answer::Stream(response));
        }
        let mut body = limited_body(response, max_bytes);
        let mut whole = Vec::new();
        while let Some(chunk) = body.next().await {
            whole.extend_from_slice(&chunk.map_err(|error| ApiError::upstream(error.to_string()))?);
        }
        let answer = Completion::parse(&whole).map_err(|error| error.with_head(&head))?;
        Ok(Answer::Whole(answer, head))
    }
}

impl Server {
    /// Forwards a request, with the operator's key or the client's.
    async fn forward(&self, request: Outgoing<'_>) -> Result<reqwest::Response, ApiError> {
        let Outgoing { credentials, method, path_and_query, headers, body, bodies } = request;
        let mut headers = forwarded_headers(headers, bodies);
        let http = match bodies {
            Bodies::AsSent => &self.raw_client,
            Bodies::Unpacked => &self.unpacking_client,
        };
        let own = match (&self.key, headers.contains_key(header::AUTHORIZATION)) {
            _ if credentials == Credentials::Client => None,
            (None, true) => None,
            _ => self
                .model
                .authorization()
                .map_err(|_| ApiError::upstream("the upstream's key can't be sent in a header"))?,
        };
        if let Some(own) = own {
            // Next to the operator's key, no header of the client may speak for the operator.
            headers = headers
                .into_iter()
                .filter_map(|(name, value)| Some((name?, value)))
                .filter(|(name, _)| is_safe_with_operator_key(name) || is_version(name))
                .collect();
            headers.insert(header::AUTHORIZATION, own);
        }
        telemetry::inject(&mut headers);
        let url = self.url(path_and_query, credentials);
        let sent = http.request(method, url).headers(headers).body(body).send().await;
        sent.map_err(|error| {
            if is_idle_timeout(&error) {
                return context::body_timeout();
            }
            let why = if error.is_timeout() { "it does not answer" } else { "it can't be reached" };
            let error = error.without_url();
            tracing::debug!(error = ecso::error_chain(&error), "upstream");
            let status = if error.is_timeout() {
                StatusCode::GATEWAY_TIMEOUT
            } else {
                StatusCode::BAD_GATEWAY
            };
            ApiError::new(status, "upstream_failed", format!("the upstream failed: {why}"))
        })
    }

    /// Maps `/v1/x?y` to `x?y` below the base URL. The query of the base URL, which may hold a key,
    /// is sent only with the operator's credentials.
    fn url(&self, path_and_query: &str, credentials: Credentials) -> Url {
        let (path, query) = path_and_query
            .split_once('?')
            .map_or((path_and_query, None), |(path, query)| (path, Some(query)));
        let mut url = self.model.base().clone();
        let below = path.strip_prefix("/v1").unwrap_or(path);
        let path = format!("{}{below}", url.path().trim_end_matches('/'));
        url.set_path(&path);
        let own = url.query().filter(|_| credentials == Credentials::Operator).map(str::to_owned);
        let both: Vec<&str> = [own.as_deref(), query]
            .into_iter()
            .flatten()
            .filter(|query| !query.is_empty())
            .collect();
        url.set_query((!both.is_empty()).then(|| both.join("&")).as_deref());
        url
    }

    /// The model `name` for the steps of one caller.
    fn model(&self, name: &str, headers: &HeaderMap) -> OpenAi {
        if let Some(Checks { server, model }) = &self.checks {
            let name = if model.is_empty() { name } else { model };
            return server.with_model(name).with_headers(own_call_header(headers).collect());
        }
        self.guarded_model(name, headers)
    }

    /// The client's headers that also go with the guard's own calls: its keys, and those that the
    /// operator lists. Some servers choose the model by them. With the operator's key, none are
    /// sent.
    pub(crate) fn model_headers(&self, headers: &HeaderMap) -> HeaderMap {
        if self.has_operator_key() {
            return HeaderMap::new();
        }
        let chooses = |name: &HeaderName| {
            !is_safe_with_operator_key(name)
                && *name != header::AUTHORIZATION
                && *name != header::HOST
        };
        let headers = end_to_end_headers(headers);
        headers
            .iter()
            .filter(|(name, _)| chooses(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    }

    /// Whether the operator's key is used.
    fn has_operator_key(&self) -> bool {
        self.key.is_some() || self.model.authorization().is_ok_and(|own| own.is_some())
    }

    /// The model `name` on the guarded server.
    fn guarded_model(&self, name: &str, headers: &HeaderMap) -> OpenAi {
        let key = self.key.clone().or_else(|| access::token(headers).map(SecretString::from));
        let mut own = self.model_headers(headers);
        own.extend(own_call_header(headers));
        self.model.with_model_and_key(name, key).with_headers(own)
    }
}

/// The body of a response, limited to `max_bytes` bytes.
pub(crate) fn limited_body(
    response: reqwest::Response,
    max_bytes: usize,
) -> futures::stream::BoxStream<'static, Result<Bytes, std::io::Error>> {
    let body = response.bytes_stream().scan(0_usize, move |read, chunk| {
        let chunk = chunk.map_err(|_| std::io::Error::other("the upstream broke off"));
        *read = read.saturating_add(chunk.as_ref().map_or(0, Bytes::len));
        let chunk = if *read > max_bytes {
            Err(std::io::Error::other("the upstream's answer is longer than `limits.answer`"))
        } else {
            chunk
        };
        std::future::ready(Some(chunk))
    });
    body.boxed()
}

/// A body sent nothing for too long.
#[derive(Debug)]
struct IdleTimeout;

impl fmt::Display for IdleTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no data arrived for too long")
    }
}

impl Error for IdleTimeout {}

/// Whether an error was caused by [`IdleTimeout`].
fn is_idle_timeout(error: &(dyn Error + 'static)) -> bool {
    error.is::<IdleTimeout>() || error.source().is_some_and(is_idle_timeout)
}

/// A body that ends with an error if its next chunk takes longer than `silence`.
pub(crate) fn with_idle_timeout<E: Into<BoxError>>(
    chunks: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
    silence: Duration,
) -> impl Stream<Item = Result<Bytes, BoxError>> + Send + 'static {
    stream::unfold(Some(chunks), move |chunks| async move {
        let mut chunks = chunks?;
        match tokio::time::timeout(silence, chunks.next()).await {
            Ok(next) => Some((next?.map_err(Into::into), Some(chunks))),
            Err(_) => Some((Err(IdleTimeout.into()), None)),
        }
    })
}

/// A response for the client. It is cut off if the upstream sends nothing for `silence`.
pub(crate) fn relay(response: reqwest::Response, silence: Duration) -> Response<Body> {
    let mut relayed = Response::new(Body::empty());
    *relayed.status_mut() = response.status();
    *relayed.headers_mut() = end_to_end_headers(response.headers());
    *relayed.body_mut() = Body::from_stream(with_idle_timeout(response.bytes_stream(), silence));
    relayed
}

/// Sends a request through a carrier, asks for an uncompressed reply, and decompresses it if
/// needed.
async fn carry_unpacked(
    carrier: &dyn Carrier,
    mut request: Request<reqwest::Body>,
) -> Result<reqwest::Response, ApiError> {
    request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let carry = service_fn(|request| async {
        carrier.carry(request).await.map(Response::<reqwest::Body>::from)
    });
    let response = Decompression::new(carry).oneshot(request).await?;
    Ok(response.map(reqwest::Body::wrap).into())
}
