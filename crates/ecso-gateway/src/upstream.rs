//! What stands behind the guard: another server, or a model in this process.

use std::sync::Arc;

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, Method, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use ecso::{Mllm, ModelError};
use ecso_openai::{Bodies, OpenAi, http_client};
use futures::StreamExt;
use reqwest::Url;
use secrecy::SecretString;

use crate::{access, draft::Draft, failure::Failure, request::Request, telemetry};

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

/// An OpenAI-compatible server, reached in two ways: untouched for what passes through, as an [`Mllm`] for the steps.
pub struct Server {
    /// For what passes through as it is.
    as_sent: reqwest::Client,
    /// For what is read here: replies are unpacked, whatever the server does.
    unpacked: reqwest::Client,
    key: Option<SecretString>,
    model: OpenAi,
    checks: Option<Checks>,
}

/// Where the guard's own calls go, if not to the server that is guarded: a cheaper or closer replica of the same model.
#[derive(Debug, Clone)]
pub struct Checks {
    /// The server; its key is its own, no client's.
    pub server: OpenAi,
    /// The model's name there; empty is the name that the client asks for.
    pub model: String,
}

impl Upstream {
    /// The server at `base` (`http://host:8000/v1`). With a `key`, it takes the place of the clients' own.
    ///
    /// # Errors
    /// When `base` is no http or https URL, or a certificate, proxy or socket can't be used.
    pub fn server(
        base: &str,
        key: Option<SecretString>,
        options: ecso_openai::Options,
        checks: Option<Checks>,
    ) -> Result<Self, ModelError> {
        let (as_sent, unpacked) = (http_client(&options, Bodies::AsSent)?, http_client(&options, Bodies::Unpacked)?);
        let model = OpenAi::new(base, options)?;
        Ok(Self::Server(Arc::new(Server { as_sent, unpacked, key, model, checks })))
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

    /// The model `name` whose answers are guarded, where the steps ask another.
    pub(crate) fn guarded(&self, name: &str, headers: &HeaderMap) -> Option<Arc<dyn Mllm>> {
        match self {
            Self::Server(server) if server.checks.is_some() => Some(Arc::new(server.answering(name, headers))),
            Self::Server(_) | Self::Engine(_) => None,
        }
    }

    /// The name of the model to ask, where the client names none: the configured one, or the only one there is.
    pub(crate) async fn model_name(&self, headers: &HeaderMap) -> Result<String, Failure> {
        match self {
            Self::Server(server) => {
                let model = server.answering(server.model.name(), headers).settled().await;
                Ok(model.map_err(|error| Failure::asking("no_model", error))?.name().to_owned())
            }
            Self::Engine(model) => Ok(model.name().to_owned()),
        }
    }
}

/// What the upstream says to a chat request.
pub(crate) enum Answer {
    /// An answer, whole, and the headers that the client gets with it.
    Draft(Draft, HeaderMap),
    /// A stream of one that has begun.
    Stream(reqwest::Response),
    /// An error of its own, which the client gets as it is.
    Refused(Response),
}

impl Server {
    /// Sends a request on, with the headers that concern the upstream. What is to be read here comes unpacked.
    pub(crate) async fn forward(
        &self,
        method: Method,
        path_and_query: &str,
        headers: &HeaderMap,
        body: reqwest::Body,
        bodies: Bodies,
    ) -> Result<reqwest::Response, Failure> {
        let mut headers = kept(headers);
        headers.remove(header::HOST);
        let http = match bodies {
            Bodies::AsSent => &self.as_sent,
            Bodies::Unpacked => {
                // How replies are packed is between the upstream and us.
                headers.remove(header::ACCEPT_ENCODING);
                // The body may be another than the client's by now.
                headers.remove(header::CONTENT_LENGTH);
                &self.unpacked
            }
        };
        let own = match (&self.key, headers.contains_key(header::AUTHORIZATION)) {
            (None, true) => None,
            _ => self
                .model
                .authorization()
                .map_err(|_| Failure::upstream("the upstream's key can't be sent in a header"))?,
        };
        if let Some(own) = own {
            headers.insert(header::AUTHORIZATION, own);
        }
        telemetry::tell(&mut headers);
        let url = self.url(path_and_query);
        let sent = http.request(method, url).headers(headers).body(body).send().await;
        sent.map_err(|error| {
            let why = if error.is_timeout() { "it does not answer" } else { "it can't be reached" };
            let error = error.without_url();
            tracing::debug!(error = ecso::chain(&error), "upstream");
            let status = if error.is_timeout() { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::BAD_GATEWAY };
            Failure::new(status, "upstream_failed", format!("the upstream failed: {why}"))
        })
    }

    /// `/v1/x?y` of ours is `x?y` below the base.
    fn url(&self, path_and_query: &str) -> Url {
        let (path, query) =
            path_and_query.split_once('?').map_or((path_and_query, None), |(path, query)| (path, Some(query)));
        let mut url = self.model.base().clone();
        let below = path.strip_prefix("/v1").unwrap_or(path);
        let path = format!("{}{below}", url.path().trim_end_matches('/'));
        url.set_path(&path);
        if query.is_some() {
            url.set_query(query);
        }
        url
    }

    /// The model `name` for the steps of one caller.
    fn model(&self, name: &str, headers: &HeaderMap) -> OpenAi {
        if let Some(Checks { server, model }) = &self.checks {
            let name = if model.is_empty() { name } else { model };
            return server.with_model(name);
        }
        self.answering(name, headers)
    }

    /// The model `name` on the server that is guarded.
    fn answering(&self, name: &str, headers: &HeaderMap) -> OpenAi {
        let key = self.key.clone().or_else(|| access::token(headers).map(SecretString::from));
        self.model.with(name, key)
    }

    /// Asks for the answer to a chat request: the client's own bytes.
    pub(crate) async fn answer(
        &self,
        headers: &HeaderMap,
        body: Bytes,
        request: &Request,
        longest: usize,
    ) -> Result<Answer, Failure> {
        let response = self.forward(Method::POST, CHAT, headers, body.into(), Bodies::Unpacked).await?;
        if !response.status().is_success() {
            return Ok(Answer::Refused(passed(response)));
        }
        if request.stream {
            let kind = response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
            if kind.is_none_or(|kind| !kind.starts_with("text/event-stream")) {
                return Err(Failure::upstream("the upstream was asked for a stream and sent none"));
            }
            return Ok(Answer::Stream(response));
        }
        let head = answer_head(response.headers());
        let mut body = bounded(response, longest);
        let mut whole = Vec::new();
        while let Some(piece) = body.next().await {
            whole.extend_from_slice(&piece.map_err(|error| Failure::upstream(error.to_string()))?);
        }
        let draft = Draft::whole(&whole).map_err(|failure| failure.with_head(&head))?;
        Ok(Answer::Draft(draft, head))
    }
}

/// A response's body, up to `longest` bytes.
pub(crate) fn bounded(
    response: reqwest::Response,
    longest: usize,
) -> futures::stream::BoxStream<'static, Result<Bytes, std::io::Error>> {
    let body = response.bytes_stream().scan(0_usize, move |read, piece| {
        let piece = piece.map_err(|_| std::io::Error::other("the upstream broke off"));
        *read = read.saturating_add(piece.as_ref().map_or(0, Bytes::len));
        let piece =
            if *read > longest { Err(std::io::Error::other("the upstream's answer has no end")) } else { piece };
        std::future::ready(Some(piece))
    });
    body.boxed()
}

/// A response as the client gets it.
pub(crate) fn passed(response: reqwest::Response) -> Response {
    let mut passed = Response::new(Body::empty());
    *passed.status_mut() = response.status();
    *passed.headers_mut() = kept(response.headers());
    *passed.body_mut() = Body::from_stream(response.bytes_stream());
    passed
}

/// The headers of an upstream's answer that hold for the answer that is made of it: all but those about its bytes.
pub(crate) fn answer_head(headers: &HeaderMap) -> HeaderMap {
    let mut head = kept(headers);
    for about_bytes in [
        header::CONTENT_TYPE,
        header::CONTENT_LENGTH,
        header::CONTENT_ENCODING,
        header::CONTENT_RANGE,
        header::ACCEPT_RANGES,
        header::ETAG,
        header::LAST_MODIFIED,
        HeaderName::from_static("content-md5"),
        HeaderName::from_static("digest"),
    ] {
        head.remove(about_bytes);
    }
    head
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
    headers.iter().filter(|(name, _)| is_kept(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}
