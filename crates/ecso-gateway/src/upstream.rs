//! What stands behind the guard: another server, or a model in this process.

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
use ecso_openai::{Bodies, OpenAi, http_client, lenient};
use futures::{Stream, StreamExt, future::BoxFuture, stream};
use reqwest::Url;
use secrecy::SecretString;
use serde_json::Value;
use tower::{ServiceExt, service_fn};
use tower_http::decompression::Decompression;

use crate::{
    access, completion::Completion, context, error::ApiError, fields, request::Request as Chat,
    telemetry,
};

/// The guarded route.
pub(crate) const CHAT: &str = "/v1/chat/completions";

/// What stands behind the guard.
#[derive(Clone)]
pub enum Upstream {
    /// An OpenAI-compatible server.
    Server(Arc<Server>),
    /// A model in this process.
    Engine(Arc<dyn Mllm>),
}

/// An OpenAI-compatible server, reached in two ways: untouched for what passes through, as an
/// [`Mllm`] for the steps.
pub struct Server {
    /// For what passes through as it is.
    as_sent: reqwest::Client,
    /// For what is read here: replies are unpacked, whatever the server does.
    unpacked: reqwest::Client,
    key: Option<SecretString>,
    model: OpenAi,
    checks: Option<Checks>,
    proxy: Option<SecretString>,
}

/// Where the guard's own calls go, if not to the server that is guarded: a cheaper or closer
/// replica of the same model.
#[derive(Debug, Clone)]
pub struct Checks {
    /// The server; its key is its own, no client's.
    pub server: OpenAi,
    /// The model's name there; empty is the name that the client asks for.
    pub model: String,
}

impl Upstream {
    /// The server at `base` (`http://host:8000/v1`). With a `key`, it takes the place of the
    /// clients' own.
    ///
    /// # Errors
    /// When `base` is no http or https URL, or a certificate, proxy or socket can't be used.
    pub fn server(
        base: &str,
        key: Option<SecretString>,
        options: ecso_openai::Options,
        checks: Option<Checks>,
    ) -> Result<Self, ModelError> {
        let (as_sent, unpacked) =
            (http_client(&options, Bodies::AsSent)?, http_client(&options, Bodies::Unpacked)?);
        let proxy = options.proxy.clone();
        let model = OpenAi::new(base, options)?;
        Ok(Self::Server(Arc::new(Server { as_sent, unpacked, key, model, checks, proxy })))
    }

    /// The proxy by which it is reached.
    pub(crate) fn proxy(&self) -> Option<&SecretString> {
        match self {
            Self::Server(server) => server.proxy.as_ref(),
            Self::Engine(_) => None,
        }
    }

    /// Whether it could answer now.
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

    /// The model `name` whose answers are guarded; the steps may ask another.
    pub(crate) fn answering(&self, name: &str, headers: &HeaderMap) -> Arc<dyn Mllm> {
        match self {
            Self::Server(server) => Arc::new(server.answering(name, headers)),
            Self::Engine(model) => Arc::clone(model),
        }
    }

    /// By what, beside the model's name, a caller reaches another model than others.
    pub(crate) fn choosing(&self, headers: &HeaderMap) -> HeaderMap {
        match self {
            Self::Server(server) => server.choosing(headers),
            Self::Engine(_) => HeaderMap::new(),
        }
    }

    /// The name of the model to ask, where the client names none: the configured one, or the only
    /// one there is.
    pub(crate) async fn model_name(&self, headers: &HeaderMap) -> Result<String, ApiError> {
        match self {
            Self::Server(server) => {
                let model = server.answering(server.model.name(), headers).resolve_model().await;
                Ok(model.map_err(|error| ApiError::asking("no_model", error))?.name().to_owned())
            }
            Self::Engine(model) => Ok(model.name().to_owned()),
        }
    }
}

/// With whose key a request goes to the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// The operator's, if there is one; else the client's.
    Own,
    /// The client's alone.
    Clients,
}

/// What the upstream says to a chat request.
pub(crate) enum Answer {
    /// An answer, whole, and the headers that the client gets with it.
    Whole(Completion, HeaderMap),
    /// A stream of one that has begun.
    Stream(reqwest::Response),
}

/// Who carries a request to the upstream, and brings its answer, where our own client does not.
pub(crate) trait Carrier: Send + Sync {
    /// By which door such requests come in, as records and figures name it.
    fn door(&self) -> &'static str;

    /// Whether it carries to a model's server, whose routes are what the table of routes takes them
    /// for.
    fn knows_routes(&self) -> bool {
        true
    }

    /// Carries a request of a path below `/v1`, and says what comes back. Bodies that come packed
    /// are unpacked behind it, where they are read here.
    fn carry(
        &self,
        request: Request<reqwest::Body>,
    ) -> BoxFuture<'_, Result<reqwest::Response, ApiError>>;
}

/// On calls of the guard itself, where somebody else carries its clients' requests: that one may
/// bring them back to it.
pub(crate) const OWN_CALL: HeaderName = HeaderName::from_static("x-ecso-own-call");

/// The request, carried by `carrier`; the guard's own calls are marked for it. One that comes back
/// to the guard is refused.
pub(crate) fn carried_by(
    carrier: Arc<dyn Carrier>,
    mut request: Request<Body>,
) -> Result<Request<Body>, ApiError> {
    if request.headers().contains_key(OWN_CALL) {
        let message = "the guard's own calls come back to it: give it the model's own address, not one that leads through the guard";
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

/// By which door a request with these extensions came in.
pub(crate) fn door(extensions: &Extensions) -> &'static str {
    extensions.get::<Arc<dyn Carrier>>().map_or(HTTP, |carrier| carrier.door())
}

/// The way of a client's own request to the model, and of its answer back.
#[derive(Clone)]
pub(crate) enum Way {
    /// To the server behind the guard, by our own client.
    Own(Arc<Server>),
    /// Another carries it: the server behind the guard, or the model in this process, is for the
    /// guard's own calls.
    Carried(Arc<dyn Carrier>),
}

impl Way {
    /// See [`Carrier::knows_routes`].
    pub(crate) fn knows_routes(&self) -> bool {
        match self {
            Self::Own(_) => true,
            Self::Carried(carrier) => carrier.knows_routes(),
        }
    }

    /// Sends a request on, with the headers that concern the upstream. What is to be read here
    /// comes unpacked.
    pub(crate) async fn forward(
        &self,
        key: Key,
        method: Method,
        path_and_query: &str,
        headers: &HeaderMap,
        body: reqwest::Body,
        bodies: Bodies,
    ) -> Result<reqwest::Response, ApiError> {
        match self {
            Self::Own(server) => {
                server.forward(key, method, path_and_query, headers, body, bodies).await
            }
            Self::Carried(carrier) => {
                let mut headers = onward(headers, bodies);
                telemetry::tell(&mut headers);
                let mut request = Request::new(body);
                *request.method_mut() = method;
                *request.uri_mut() = path_and_query.parse().map_err(|_| {
                    ApiError::bad_request("invalid_request", "the path can't be read")
                })?;
                *request.headers_mut() = headers;
                match bodies {
                    Bodies::AsSent => carrier.carry(request).await,
                    Bodies::Unpacked => unpacked(carrier.as_ref(), request).await,
                }
            }
        }
    }

    /// Asks for the answer to a chat request: with bytes made of what was read of it.
    pub(crate) async fn answer(
        &self,
        headers: &HeaderMap,
        chat: &Chat,
        longest: usize,
    ) -> Result<Answer, ApiError> {
        let body = chat.body()?.into();
        let response =
            self.forward(Key::Own, Method::POST, CHAT, headers, body, Bodies::Unpacked).await?;
        if !response.status().is_success() {
            return Err(refused(response).await);
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
        let mut body = bounded(response, longest);
        let mut whole = Vec::new();
        while let Some(piece) = body.next().await {
            whole.extend_from_slice(&piece.map_err(|error| ApiError::upstream(error.to_string()))?);
        }
        let answer = Completion::whole(&whole).map_err(|error| error.with_head(&head))?;
        Ok(Answer::Whole(answer, head))
    }
}

impl Server {
    /// Sends a request on, with the headers that concern the upstream, and with the operator's key
    /// or the client's. What is to be read here comes unpacked.
    pub(crate) async fn forward(
        &self,
        key: Key,
        method: Method,
        path_and_query: &str,
        headers: &HeaderMap,
        body: reqwest::Body,
        bodies: Bodies,
    ) -> Result<reqwest::Response, ApiError> {
        let mut headers = onward(headers, bodies);
        let http = match bodies {
            Bodies::AsSent => &self.as_sent,
            Bodies::Unpacked => &self.unpacked,
        };
        let own = match (&self.key, headers.contains_key(header::AUTHORIZATION)) {
            _ if key == Key::Clients => None,
            (None, true) => None,
            _ => self
                .model
                .authorization()
                .map_err(|_| ApiError::upstream("the upstream's key can't be sent in a header"))?,
        };
        if let Some(own) = own {
            // With the operator's key nothing of the client's speaks for the operator.
            headers = headers
                .into_iter()
                .filter_map(|(name, value)| Some((name?, value)))
                .filter(|(name, _)| goes_with_own_key(name) || is_version(name))
                .collect();
            headers.insert(header::AUTHORIZATION, own);
        }
        telemetry::tell(&mut headers);
        let url = self.url(path_and_query, key);
        let sent = http.request(method, url).headers(headers).body(body).send().await;
        sent.map_err(|error| {
            if is_silent(&error) {
                return context::late();
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

    /// `/v1/x?y` of ours is `x?y` below the base; the base's own query, which may hold a key, goes
    /// where the operator's key does.
    fn url(&self, path_and_query: &str, key: Key) -> Url {
        let (path, query) = path_and_query
            .split_once('?')
            .map_or((path_and_query, None), |(path, query)| (path, Some(query)));
        let mut url = self.model.base().clone();
        let below = path.strip_prefix("/v1").unwrap_or(path);
        let path = format!("{}{below}", url.path().trim_end_matches('/'));
        url.set_path(&path);
        let own = url.query().filter(|_| key == Key::Own).map(str::to_owned);
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
            return server.with_model(name).with_headers(own_call(headers).collect());
        }
        self.answering(name, headers)
    }

    /// The client's headers that go with the guard's own calls too: its keys, and those that the
    /// operator lists; by them some servers choose the model. With the operator's key none does.
    pub(crate) fn choosing(&self, headers: &HeaderMap) -> HeaderMap {
        if self.has_own_key() {
            return HeaderMap::new();
        }
        let chooses = |name: &HeaderName| {
            !goes_with_own_key(name) && *name != header::AUTHORIZATION && *name != header::HOST
        };
        let kept = kept(headers);
        kept.iter()
            .filter(|(name, _)| chooses(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    }

    /// Whether the operator's key goes with requests.
    fn has_own_key(&self) -> bool {
        self.key.is_some() || self.model.authorization().is_ok_and(|own| own.is_some())
    }

    /// The model `name` on the server that is guarded.
    fn answering(&self, name: &str, headers: &HeaderMap) -> OpenAi {
        let key = self.key.clone().or_else(|| access::token(headers).map(SecretString::from));
        let mut own = self.choosing(headers);
        own.extend(own_call(headers));
        self.model.with_model_and_key(name, key).with_headers(own)
    }
}

/// What the client may know of an upstream's refusal: its status and, in our words, what it is
/// about. Its own words may quote what nobody has judged.
async fn refused(response: reqwest::Response) -> ApiError {
    const LONGEST: usize = 64 << 10;
    let (status, head) = (response.status(), answer_head(response.headers()));
    // What is no refusal either leads elsewhere, or has no body by its status.
    if status.as_u16() < 400 {
        return ApiError::upstream(format!(
            "the upstream's answer has the status {}",
            status.as_u16()
        ))
        .with_head(&head);
    }
    let mut body = bounded(response, LONGEST);
    let mut said = Vec::new();
    while let Some(Ok(piece)) = body.next().await {
        said.extend_from_slice(&piece);
    }
    let said = String::from_utf8_lossy(&said).into_owned();
    let told: Value = lenient::parse(&said).unwrap_or_default();
    let told = if told["error"].is_object() { &told["error"] } else { &told };
    let codes = [&told["code"], &told["type"]].into_iter().filter_map(Value::as_str);
    let by_code =
        codes.flat_map(|code| KNOWN.iter().filter(move |(known, _)| *known == code)).next();
    let lower = said.to_lowercase();
    let is_too_long =
        ["context length", "maximum context", "context size", "context window", "too many tokens"];
    let by_words = KNOWN.first().filter(|_| is_too_long.iter().any(|words| lower.contains(words)));
    let (code, about) = by_code
        .or(by_words)
        .copied()
        .unwrap_or(("upstream_refused", "its words are in the guard's log at level debug"));
    let param = told["param"].as_str().filter(|param| fields::is_known(param)).map(str::to_owned);
    let message = format!("the upstream refuses the request ({}): {about}", status.as_u16());
    ApiError { param, ..ApiError::new(status, code, message).because(said).with_head(&head) }
}

/// Codes of refusals that clients know, in our words.
const KNOWN: [(&str, &str); 14] = [
    ("context_length_exceeded", "it is longer than the model's maximum context length"),
    ("exceed_context_size_error", "it is longer than the model's maximum context length"),
    ("model_not_found", "it does not have this model"),
    ("invalid_api_key", "it does not know this key"),
    ("insufficient_quota", "the quota is used up"),
    ("rate_limit_exceeded", "too many requests, or too many tokens"),
    ("content_filter", "a content filter refuses it"),
    ("content_policy_violation", "a content filter refuses it"),
    ("unsupported_parameter", "a field is not supported by this model"),
    ("unsupported_value", "the value of a field is not supported by this model"),
    ("invalid_image", "an image can't be read"),
    ("invalid_image_format", "an image can't be read"),
    ("image_parse_error", "an image can't be read"),
    ("server_overloaded", "it is overloaded"),
];

/// A response's body, up to `longest` bytes.
pub(crate) fn bounded(
    response: reqwest::Response,
    longest: usize,
) -> futures::stream::BoxStream<'static, Result<Bytes, std::io::Error>> {
    let body = response.bytes_stream().scan(0_usize, move |read, piece| {
        let piece = piece.map_err(|_| std::io::Error::other("the upstream broke off"));
        *read = read.saturating_add(piece.as_ref().map_or(0, Bytes::len));
        let piece = if *read > longest {
            Err(std::io::Error::other("the upstream's answer has no end"))
        } else {
            piece
        };
        std::future::ready(Some(piece))
    });
    body.boxed()
}

/// Why a body broke off: nothing of it came.
#[derive(Debug)]
struct Silent;

impl fmt::Display for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing came for too long")
    }
}

impl Error for Silent {}

/// Whether that is behind an error.
fn is_silent(error: &(dyn Error + 'static)) -> bool {
    error.is::<Silent>() || error.source().is_some_and(is_silent)
}

/// A body whose next piece comes within `silence`, or never.
pub(crate) fn unbroken<E: Into<BoxError>>(
    pieces: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
    silence: Duration,
) -> impl Stream<Item = Result<Bytes, BoxError>> + Send + 'static {
    stream::unfold(Some(pieces), move |pieces| async move {
        let mut pieces = pieces?;
        match tokio::time::timeout(silence, pieces.next()).await {
            Ok(next) => Some((next?.map_err(Into::into), Some(pieces))),
            Err(_) => Some((Err(Silent.into()), None)),
        }
    })
}

/// A response as the client gets it; it breaks off where nothing of it comes for as long as
/// `silence`.
pub(crate) fn passed(response: reqwest::Response, silence: Duration) -> Response<Body> {
    let mut passed = Response::new(Body::empty());
    *passed.status_mut() = response.status();
    *passed.headers_mut() = kept(response.headers());
    *passed.body_mut() = Body::from_stream(unbroken(response.bytes_stream(), silence));
    passed
}

/// The headers of an upstream's answer that hold for the answer that is made of it: figures of
/// limits, what browsers need, and names of requests. What else stands there might be a text.
pub(crate) fn answer_head(headers: &HeaderMap) -> HeaderMap {
    const KNOWN: [&str; 5] =
        ["vary", "retry-after", "x-request-id", "request-id", "openai-processing-ms"];
    const STARTS: [&str; 5] = [
        "access-control-",
        "x-ratelimit-",
        "ratelimit",
        "anthropic-ratelimit-",
        "x-envoy-ratelimit",
    ];
    let is_known = |name: &HeaderName| {
        KNOWN.contains(&name.as_str())
            || STARTS.iter().any(|start| name.as_str().starts_with(start))
    };
    // A figure, a name, or a list of these is no sentence.
    let is_list =
        |value: &str| value.split(',').all(|entry| !entry.trim().contains(char::is_whitespace));
    let says_little = |value: &HeaderValue| value.len() <= 512 && value.to_str().is_ok_and(is_list);
    // Seconds; a date is not passed on.
    let is_time = |value: &HeaderValue| value.as_bytes().iter().all(u8::is_ascii_digit);
    let fits = |name: &HeaderName, value: &HeaderValue| {
        if *name == header::RETRY_AFTER { is_time(value) } else { says_little(value) }
    };
    let head = headers.iter().filter(|(name, value)| is_known(name) && fits(name, value));
    head.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// What tells a call of the guard's own, on its way with these headers.
fn own_call(headers: &HeaderMap) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    headers.get(OWN_CALL).map(|told| (OWN_CALL, told.clone())).into_iter()
}

/// Whether a client's header says which edition of an API it speaks. Guarded requests have none:
/// they become chats.
fn is_version(name: &HeaderName) -> bool {
    ["anthropic-version", "anthropic-beta", "openai-beta"].contains(&name.as_str())
}

/// Whether a client's header is known to say who asks, in which form, and nothing else.
pub(crate) fn is_known_header(name: &HeaderName) -> bool {
    goes_with_own_key(name)
        || ACCOUNT.contains(&name.as_str())
        || [header::HOST, header::CONNECTION].contains(name)
}

/// Headers that say who asks, and by which account.
pub(crate) const ACCOUNT: [&str; 5] =
    ["authorization", "api-key", "x-api-key", "openai-organization", "openai-project"];

/// Whether a client's header goes along where the operator's key speaks for it: nothing that names
/// an account.
fn goes_with_own_key(name: &HeaderName) -> bool {
    const KNOWN: [&str; 12] = [
        "accept",
        "accept-encoding",
        "accept-language",
        "content-encoding",
        "content-length",
        "content-type",
        "origin",
        "user-agent",
        "traceparent",
        "tracestate",
        "x-request-id",
        "access-control-request-method",
    ];
    KNOWN.contains(&name.as_str())
        || ["x-stainless-", "access-control-"].iter().any(|start| name.as_str().starts_with(start))
}

/// A request's headers as they go on.
fn onward(headers: &HeaderMap, bodies: Bodies) -> HeaderMap {
    let mut headers = kept(headers);
    headers.remove(header::HOST);
    if bodies == Bodies::Unpacked {
        // How replies are packed is between the upstream and us.
        headers.remove(header::ACCEPT_ENCODING);
        // The body may be another than the client's by now.
        headers.remove(header::CONTENT_LENGTH);
    }
    headers
}

/// What a carrier brings, its body unpacked; none that is packed is asked for.
async fn unpacked(
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

/// Headers that are not about one connection alone, and not ours.
fn kept(headers: &HeaderMap) -> HeaderMap {
    const OF_ONE_CONNECTION: [HeaderName; 8] = [
        header::CONNECTION,
        HeaderName::from_static("keep-alive"),
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ];
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    let is_kept = |name: &HeaderName| {
        !OF_ONE_CONNECTION.contains(name)
            && !name.as_str().starts_with("x-ecso-")
            && !named.iter().any(|other| name == other.as_str())
    };
    headers
        .iter()
        .filter(|(name, _)| is_kept(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}
