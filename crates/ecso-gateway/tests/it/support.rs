//! A gateway, and the upstream behind it.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::State,
    http::{HeaderMap, Request, Response, StatusCode, header},
    response::IntoResponse,
};
use ecso::{Mllm, Profile};
use ecso_gateway::{Gateway, Playground, Profiles, Settings, Upstream};
use serde_json::{Value, json};
use tokio::sync::watch;
use tower::ServiceExt;

/// A marker that no client may ever see.
pub(crate) const LEAK: &str = "UNJUDGED";
/// An image as a data URL.
pub(crate) const IMAGE: &str = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==";

/// How the upstream answers a chat that is not a question of the guard.
pub(crate) type Respond = Arc<dyn Fn(&Value) -> Response<Body> + Send + Sync>;

/// A request that reached the upstream.
#[derive(Debug, Clone)]
pub(crate) struct SentRequest {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

pub(crate) struct Harness {
    pub(crate) gateway: Arc<Gateway>,
    router: Router,
    sent_requests: Arc<Mutex<Vec<SentRequest>>>,
}

#[derive(Clone)]
struct UpstreamState {
    respond: Respond,
    sent_requests: Arc<Mutex<Vec<SentRequest>>>,
}

/// A response.
#[derive(Debug)]
pub(crate) struct TestResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl TestResponse {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    pub(crate) fn leaks(&self) -> bool {
        self.body.contains(LEAK)
            || self.headers.values().any(|value| {
                value.as_bytes().windows(LEAK.len()).any(|part| part == LEAK.as_bytes())
            })
    }
}

impl Harness {
    pub(crate) async fn new(settings: Settings, respond: Respond) -> Self {
        Self::with(settings, Profile::paper(), respond).await
    }

    pub(crate) fn gateway(
        settings: Settings,
        profiles: impl Into<Profiles>,
        url: &str,
    ) -> std::io::Result<Gateway> {
        Self::gateway_with_key(settings, profiles, url, None)
    }

    fn gateway_with_key(
        settings: Settings,
        profiles: impl Into<Profiles>,
        url: &str,
        key: Option<&str>,
    ) -> std::io::Result<Gateway> {
        let key = || key.map(Into::into);
        let options =
            ecso_openai::Options { retries: 0, api_key: key(), ..ecso_openai::Options::default() };
        let upstream = Upstream::server(url, key(), options, None).unwrap();
        Gateway::new(upstream, profiles, settings, ecso::Limits::default())
    }

    pub(crate) async fn with(
        settings: Settings,
        profiles: impl Into<Profiles>,
        respond: Respond,
    ) -> Self {
        Self::with_key(settings, profiles, respond, None).await
    }

    /// With a playground, and the tokens that open it.
    pub(crate) async fn with_page(
        settings: Settings,
        profiles: impl Into<Profiles>,
        respond: Respond,
    ) -> (Self, watch::Receiver<String>) {
        let (url, sent_requests) = Self::start_upstream(respond).await;
        let playground = Playground::new(None);
        let tokens = playground.tokens();
        let options = ecso_openai::Options {
            retries: 0,
            model: Some("m".into()),
            ..ecso_openai::Options::default()
        };
        let upstream = Upstream::server(&url, None, options, None).unwrap();
        let gateway = Gateway::new(upstream, profiles, settings, ecso::Limits::default()).unwrap();
        (Self::of(gateway.with_playground(playground), sent_requests), tokens)
    }

    /// With an upstream that is waited for this long.
    pub(crate) async fn with_reply_timeout(
        settings: Settings,
        respond: Respond,
        reply_timeout: Duration,
    ) -> Self {
        let (url, sent_requests) = Self::start_upstream(respond).await;
        let options =
            ecso_openai::Options { retries: 0, reply_timeout, ..ecso_openai::Options::default() };
        let upstream = Upstream::server(&url, None, options, None).unwrap();
        let limits = ecso::Limits::default();
        let gateway = Gateway::new(upstream, Profile::paper(), settings, limits).unwrap();
        Self::of(gateway, sent_requests)
    }

    /// With an operator's key.
    pub(crate) async fn with_key(
        settings: Settings,
        profiles: impl Into<Profiles>,
        respond: Respond,
        key: Option<&str>,
    ) -> Self {
        let (url, sent_requests) = Self::start_upstream(respond).await;
        Self::of(Self::gateway_with_key(settings, profiles, &url, key).unwrap(), sent_requests)
    }

    /// With a model that only the guard uses.
    #[cfg(feature = "ext-proc")]
    pub(crate) async fn with_engine(settings: Settings, respond: Respond) -> Self {
        let (url, sent_requests) = Self::start_upstream(respond).await;
        let model = ecso_openai::OpenAi::new(&url, ecso_openai::Options::default())
            .unwrap()
            .with_model("m");
        let upstream = Upstream::Engine(Arc::new(model));
        Self::of(
            Gateway::new(upstream, Profile::paper(), settings, ecso::Limits::default()).unwrap(),
            sent_requests,
        )
    }

    /// With a model in this process.
    pub(crate) fn with_model(settings: Settings, profile: Profile, model: Arc<dyn Mllm>) -> Self {
        let upstream = Upstream::Engine(model);
        let gateway = Gateway::new(upstream, profile, settings, ecso::Limits::default()).unwrap();
        Self::of(gateway, Arc::default())
    }

    /// Starts the upstream. Returns its URL, and the requests that reach it.
    async fn start_upstream(respond: Respond) -> (String, Arc<Mutex<Vec<SentRequest>>>) {
        let sent_requests = Arc::<Mutex<Vec<SentRequest>>>::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let start_upstream = Router::new()
            .fallback(answer)
            .with_state(UpstreamState { respond, sent_requests: Arc::clone(&sent_requests) });
        tokio::spawn(async move { axum::serve(listener, start_upstream).await });
        (url, sent_requests)
    }

    fn of(gateway: Gateway, sent_requests: Arc<Mutex<Vec<SentRequest>>>) -> Self {
        let gateway = Arc::new(gateway);
        let router = Arc::clone(&gateway).router();
        Self { gateway, router, sent_requests }
    }

    /// The guard as a layer around this service. The upstream is only for the guard's own
    /// questions.
    pub(crate) async fn around(settings: Settings, service: Router) -> Self {
        let world = Self::new(settings, Arc::new(|_| panic!("the guard asks nothing else"))).await;
        let layer = Arc::clone(&world.gateway).layer();
        Self { router: service.layer(layer), ..world }
    }

    /// Adds a layer of an application.
    pub(crate) fn with_extension<L: Clone + Send + Sync + 'static>(
        self,
        layer: axum::Extension<L>,
    ) -> Self {
        Self { router: self.router.layer(layer), ..self }
    }

    /// Mounts it at a path of an application.
    pub(crate) fn mounted_at(self, path: &str) -> Self {
        Self { router: Router::new().nest(path, self.router), ..self }
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> TestResponse {
        let (head, body) = self.open(method, path, headers, body).await.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
        TestResponse {
            status: head.status,
            headers: head.headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        }
    }

    /// Sends a request; the body of the response is still to be read.
    pub(crate) async fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(path);
        for usual in [("host", "127.0.0.1:8080"), ("content-type", "application/json")] {
            if !headers.iter().any(|(name, _)| *name == usual.0) {
                request = request.header(usual.0, usual.1);
            }
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.router.clone().oneshot(request.body(body.into()).unwrap()).await.unwrap()
    }

    pub(crate) async fn chat(&self, body: &Value) -> TestResponse {
        self.send("POST", "/v1/chat/completions", &[], body.to_string()).await
    }

    /// The requests that reached the upstream since the last call.
    pub(crate) fn take_requests(&self) -> Vec<SentRequest> {
        std::mem::take(&mut self.sent_requests.lock().unwrap())
    }
}

fn step(sent: &str) -> &'static str {
    if sent.contains("harmful, unsafe and unethical") {
        "detect"
    } else if sent.contains("describe the image") {
        "caption"
    } else if sent.contains("HARMLESS and ETHICAL") {
        "safe"
    } else {
        "direct"
    }
}

async fn answer(
    State(start_upstream): State<UpstreamState>,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let sent = String::from_utf8_lossy(&body).into_owned();
    start_upstream.sent_requests.lock().unwrap().push(SentRequest { headers, body });
    let plain = |text: &str| {
        let message = json!({"role": "assistant", "content": text});
        if sent.contains("\"stream\":true") {
            let choice = json!({"index": 0, "delta": message, "finish_reason": "stop"});
            return streamed(&[json!({"id": "c", "choices": [choice]}).to_string()]);
        }
        said(&message, &Value::Null)
    };
    let failed = |status: u16| {
        let body = json!({"error": {"message": LEAK}}).to_string();
        (StatusCode::from_u16(status).unwrap(), [(header::CONTENT_TYPE, "application/json")], body)
            .into_response()
    };
    if step(&sent) == "detect" && sent.contains("judge-slow") {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    if step(&sent) == "detect" && sent.contains("judge-hangs") {
        tokio::time::sleep(Duration::from_mins(1)).await;
    }
    match step(&sent) {
        "detect" if sent.contains("judge-400") => failed(400),
        "detect" if sent.contains("judge-500") => failed(500),
        "caption" if sent.contains("caption-500") => failed(500),
        "detect" if sent.contains(LEAK) => plain("Yes."),
        "detect" => plain("No."),
        "caption" => plain("A list."),
        "safe" => plain("Here is a harmless answer."),
        _ => (start_upstream.respond)(&serde_json::from_str(&sent).unwrap_or(Value::String(sent))),
    }
}

/// A completion with this message, and more fields next to its choices.
pub(crate) fn said(message: &Value, beside: &Value) -> Response<Body> {
    let mut completion = json!({"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}});
    merge(&mut completion, beside);
    ([(header::CONTENT_TYPE, "application/json")], completion.to_string()).into_response()
}

/// A stream of events with these data.
pub(crate) fn streamed(events: &[String]) -> Response<Body> {
    let text = events.iter().map(|event| format!("data: {event}\n\n")).collect::<Vec<_>>().concat();
    ([(header::CONTENT_TYPE, "text/event-stream")], text + "data: [DONE]\n\n").into_response()
}

/// Merges `more` into `value`: objects into objects, and list entries into entries.
pub(crate) fn merge(value: &mut Value, more: &Value) {
    match (value, more) {
        (Value::Object(fields), Value::Object(more)) => {
            for (name, more) in more {
                merge(fields.entry(name.clone()).or_insert(Value::Null), more);
            }
        }
        (Value::Array(list), Value::Array(more)) => {
            for (place, more) in more.iter().enumerate() {
                if place == list.len() {
                    list.push(Value::Null);
                }
                merge(&mut list[place], more);
            }
        }
        (_, Value::Null) => {}
        (value, more) => *value = more.clone(),
    }
}

/// A question about an image.
pub(crate) fn question() -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "What is this?"}]}]})
}
