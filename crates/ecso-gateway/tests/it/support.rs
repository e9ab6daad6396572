//! A gateway and what stands behind it.

use std::sync::{Arc, Mutex};

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::State,
    http::{HeaderMap, Request, Response, StatusCode, header},
    response::IntoResponse,
};
use ecso::Profile;
use ecso_gateway::{Gateway, Playground, Profiles, Settings, Upstream};
use serde_json::{Value, json};
use tokio::sync::watch;
use tower::ServiceExt;

/// What no client may ever see.
pub(crate) const LEAK: &str = "UNJUDGED";
/// A picture, as a data URL.
pub(crate) const PICTURE: &str = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==";

/// How the upstream answers a chat that is no question of the guard.
pub(crate) type Speaks = Arc<dyn Fn(&Value) -> Response<Body> + Send + Sync>;

/// What reached the upstream.
#[derive(Debug, Clone)]
pub(crate) struct Reached {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

pub(crate) struct World {
    pub(crate) gateway: Arc<Gateway>,
    router: Router,
    reached: Arc<Mutex<Vec<Reached>>>,
}

#[derive(Clone)]
struct Behind {
    speaks: Speaks,
    reached: Arc<Mutex<Vec<Reached>>>,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Got {
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

impl World {
    pub(crate) async fn new(settings: Settings, speaks: Speaks) -> Self {
        Self::with(settings, Profile::paper(), speaks).await
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
        speaks: Speaks,
    ) -> Self {
        Self::with_key(settings, profiles, speaks, None).await
    }

    /// With a page for people, and what opens it.
    pub(crate) async fn with_page(
        settings: Settings,
        profiles: impl Into<Profiles>,
        speaks: Speaks,
    ) -> (Self, watch::Receiver<String>) {
        let (url, reached) = Self::behind(speaks).await;
        let playground = Playground::new(None);
        let tokens = playground.tokens();
        let options = ecso_openai::Options {
            retries: 0,
            model: Some("m".into()),
            ..ecso_openai::Options::default()
        };
        let upstream = Upstream::server(&url, None, options, None).unwrap();
        let gateway = Gateway::new(upstream, profiles, settings, ecso::Limits::default()).unwrap();
        (Self::of(gateway.with_playground(playground), reached), tokens)
    }

    /// With an operator's key.
    pub(crate) async fn with_key(
        settings: Settings,
        profiles: impl Into<Profiles>,
        speaks: Speaks,
        key: Option<&str>,
    ) -> Self {
        let (url, reached) = Self::behind(speaks).await;
        Self::of(Self::gateway_with_key(settings, profiles, &url, key).unwrap(), reached)
    }

    /// With a model that is the guard's alone.
    #[cfg(feature = "ext-proc")]
    pub(crate) async fn with_engine(settings: Settings, speaks: Speaks) -> Self {
        let (url, reached) = Self::behind(speaks).await;
        let model = ecso_openai::OpenAi::new(&url, ecso_openai::Options::default())
            .unwrap()
            .with_model("m");
        let upstream = Upstream::Engine(Arc::new(model));
        Self::of(
            Gateway::new(upstream, Profile::paper(), settings, ecso::Limits::default()).unwrap(),
            reached,
        )
    }

    /// What stands behind a gateway: its URL, and what reached it.
    async fn behind(speaks: Speaks) -> (String, Arc<Mutex<Vec<Reached>>>) {
        let reached = Arc::<Mutex<Vec<Reached>>>::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let behind = Router::new()
            .fallback(answer)
            .with_state(Behind { speaks, reached: Arc::clone(&reached) });
        tokio::spawn(async move { axum::serve(listener, behind).await });
        (url, reached)
    }

    fn of(gateway: Gateway, reached: Arc<Mutex<Vec<Reached>>>) -> Self {
        let gateway = Arc::new(gateway);
        let router = Arc::clone(&gateway).router();
        Self { gateway, router, reached }
    }

    /// The guard as a layer around this service; what stands behind the guard is for its own
    /// questions.
    pub(crate) async fn around(settings: Settings, service: Router) -> Self {
        let world = Self::new(settings, Arc::new(|_| panic!("the guard asks nothing else"))).await;
        let layer = Arc::clone(&world.gateway).layer();
        Self { router: service.layer(layer), ..world }
    }

    /// The same beneath a layer of an application.
    pub(crate) fn beneath<L: Clone + Send + Sync + 'static>(
        self,
        layer: axum::Extension<L>,
    ) -> Self {
        Self { router: self.router.layer(layer), ..self }
    }

    /// The same below a path of an application.
    pub(crate) fn mounted(self, path: &str) -> Self {
        Self { router: Router::new().nest(path, self.router), ..self }
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Got {
        let (head, body) = self.open(method, path, headers, body).await.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
        Got {
            status: head.status,
            headers: head.headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        }
    }

    /// The same, with a body that is still to be read.
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

    pub(crate) async fn chat(&self, body: &Value) -> Got {
        self.send("POST", "/v1/chat/completions", &[], body.to_string()).await
    }

    /// What reached the upstream since the last time.
    pub(crate) fn taken(&self) -> Vec<Reached> {
        std::mem::take(&mut self.reached.lock().unwrap())
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

async fn answer(State(behind): State<Behind>, headers: HeaderMap, body: Bytes) -> Response<Body> {
    let sent = String::from_utf8_lossy(&body).into_owned();
    behind.reached.lock().unwrap().push(Reached { headers, body });
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
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    match step(&sent) {
        "detect" if sent.contains("judge-400") => failed(400),
        "detect" if sent.contains("judge-500") => failed(500),
        "caption" if sent.contains("caption-500") => failed(500),
        "detect" if sent.contains(LEAK) => plain("Yes."),
        "detect" => plain("No."),
        "caption" => plain("A list."),
        "safe" => plain("Here is a harmless answer."),
        _ => (behind.speaks)(&serde_json::from_str(&sent).unwrap_or(Value::String(sent))),
    }
}

/// A completion with this message, and more fields beside its choices.
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

/// Puts the fields of `more` into `value`, objects into objects, entries of lists into entries.
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

/// A question about a picture.
pub(crate) fn question() -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "What is this?"}]}]})
}
