//! The guard as a part of Envoy: a client that behaves like Envoy, and enforces the rules that
//! Envoy enforces.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::body::Bytes;
use ecso_gateway::{
    Settings,
    ext_proc::{
        PATH,
        messages::{
            BodyResponse, FULL_DUPLEX_STREAMED, Header, HeaderMutation, Headers, HttpBody,
            HttpHeaders, HttpTrailers, Part, ProcessingRequest, ProcessingResponse,
            ProtocolConfiguration, Reply,
        },
    },
    settings::{Key, Mode, Streams, Windows},
};
use futures::channel::mpsc;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tonic::{Status, Streaming, client::Grpc};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::{
    answers::hidden_answers,
    support::{Harness, LEAK, Respond, merge, question},
};

const CHAT: &str = "/v1/chat/completions";

type Map = BTreeMap<String, String>;

/// The gateway gets the drafts.
fn no_draft() -> Respond {
    Arc::new(|_| panic!("the guard asks the gateway's model itself"))
}

/// A gateway with a guard.
struct Envoy {
    world: Harness,
    guard: hyper::client::conn::http2::SendRequest<tonic::body::Body>,
}

impl Envoy {
    async fn new(settings: Settings) -> Self {
        Self::before(Harness::new(settings, no_draft()).await).await
    }

    async fn before(world: Harness) -> Self {
        let door = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = door.local_addr().unwrap();
        tokio::spawn(ecso_gateway::ext_proc::serve(
            Arc::clone(&world.gateway),
            door,
            std::future::pending(),
        ));
        let stream = TokioIo::new(tokio::net::TcpStream::connect(address).await.unwrap());
        let (guard, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        Self { world, guard }
    }

    /// Begins an exchange without a message.
    async fn exchange(&self) -> Exchange {
        let guard = self.guard.clone();
        let call = service_fn(move |request| guard.clone().send_request(request));
        let (tell, told) = mpsc::unbounded();
        let mut grpc = Grpc::with_origin(call, "http://guard".parse().unwrap());
        let replies = grpc
            .streaming(tonic::Request::new(told), PATH.parse().unwrap(), ProstCodec::default())
            .await
            .unwrap()
            .into_inner();
        Exchange {
            tell: Some(tell),
            replies,
            request: Map::new(),
            answer: Map::new(),
            is_told: true,
            may_speak: [false; 2],
        }
    }

    /// A request with its body.
    async fn asked(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Exchange {
        let mut exchange = self.exchange().await;
        exchange.head(method, path, headers, body.is_empty());
        for piece in body.chunks(100_000) {
            exchange.body(piece, false);
        }
        if !body.is_empty() {
            exchange.body(b"", true);
        }
        exchange
    }

    async fn chat(&self, body: &Value) -> Exchange {
        self.asked("POST", CHAT, &[], body.to_string().as_bytes()).await
    }
}

/// One exchange, as Envoy sees it.
struct Exchange {
    tell: Option<mpsc::UnboundedSender<ProcessingRequest>>,
    replies: Streaming<ProcessingResponse>,
    /// The headers, as they were sent and as the guard changed them.
    request: Map,
    answer: Map,
    is_told: bool,
    /// Whether chunks of a body may be sent: not before one was received.
    may_speak: [bool; 2],
}

/// What the client gets.
#[derive(Debug, Default)]
struct TestResponse {
    head: Map,
    body: String,
    /// Whether it is an immediate response.
    at_once: bool,
}

impl TestResponse {
    fn status(&self) -> &str {
        &self.head[":status"]
    }

    fn code(&self) -> Value {
        serde_json::from_str::<Value>(&self.body).unwrap()["error"]["code"].clone()
    }
}

impl Exchange {
    fn tell(&mut self, part: Part) {
        let modes = ProtocolConfiguration {
            request_body_mode: FULL_DUPLEX_STREAMED,
            response_body_mode: FULL_DUPLEX_STREAMED,
        };
        let protocol_config = std::mem::take(&mut self.is_told).then_some(modes);
        let told =
            ProcessingRequest { part: Some(part), observability_mode: false, protocol_config };
        // If nobody listens any more, the answer is complete.
        let _ = self.tell.as_ref().unwrap().unbounded_send(told);
    }

    fn head(&mut self, method: &str, path: &str, headers: &[(&str, &str)], end_of_stream: bool) {
        let special = [
            (":method", method),
            (":path", path),
            (":authority", "model.example"),
            (":scheme", "http"),
        ];
        let usual = [
            ("content-type", "application/json"),
            ("x-forwarded-proto", "http"),
            ("x-unknown", "1"),
        ];
        let all = special.iter().chain(&usual).chain(headers);
        self.request = all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let headers = Some(told(&self.request));
        self.tell(Part::RequestHeaders(HttpHeaders { headers, end_of_stream }));
    }

    fn body(&mut self, piece: &[u8], end_of_stream: bool) {
        self.may_speak[0] = true;
        let body = Bytes::copy_from_slice(piece);
        self.tell(Part::RequestBody(HttpBody {
            body,
            end_of_stream,
            end_of_stream_without_message: false,
        }));
    }

    fn answer_head(&mut self, status: &str, headers: &[(&str, &str)], end_of_stream: bool) {
        let special = [(":status", status)];
        let all = headers.iter().chain(&special);
        self.answer = all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let headers = Some(told(&self.answer));
        self.tell(Part::ResponseHeaders(HttpHeaders { headers, end_of_stream }));
    }

    fn answer_body(&mut self, piece: &str, end_of_stream: bool) {
        self.may_speak[1] = true;
        let body = Bytes::copy_from_slice(piece.as_bytes());
        self.tell(Part::ResponseBody(HttpBody {
            body,
            end_of_stream,
            end_of_stream_without_message: false,
        }));
    }

    /// A whole answer of the model.
    fn answered(&mut self, status: &str, body: &str) {
        let length = body.len().to_string();
        let headers =
            [("content-type", "application/json"), ("content-length", &length), ("x-text", LEAK)];
        self.answer_head(status, &headers, false);
        self.answer_body(body, true);
    }

    /// A stream of these deltas, and its end.
    fn streamed(&mut self, deltas: &[&str]) {
        self.answer_head("200", &[("content-type", "text/event-stream")], false);
        for delta in deltas {
            let choice = json!({"index": 0, "delta": {"content": delta}, "finish_reason": null});
            self.answer_body(
                &format!("data: {}\n\n", json!({"id": "c", "choices": [choice]})),
                false,
            );
        }
        let end =
            json!({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]});
        self.answer_body(&format!("data: {end}\n\ndata: [DONE]\n\n"), true);
    }

    async fn reply(&mut self) -> Result<Option<Reply>, Status> {
        let next = tokio::time::timeout(Duration::from_secs(10), self.replies.message());
        let next = next.await.unwrap_or_else(|_| panic!("the guard says nothing"));
        Ok(next?.map(|message| message.reply.unwrap()))
    }

    fn piece(&self, which: usize, piece: BodyResponse) -> (Bytes, bool) {
        assert!(self.may_speak[which], "a spurious message: no piece of this body was told");
        let piece = piece.response.unwrap().body_mutation.unwrap().streamed_response.unwrap();
        assert!(piece.body.len() <= 64 << 10);
        (piece.body, piece.end_of_stream)
    }

    /// How the request continues: its headers and body.
    async fn sent(&mut self) -> (Map, String) {
        let Some(Reply::RequestHeaders(head)) = self.reply().await.unwrap() else {
            panic!("it does not go on")
        };
        let mut request = self.request.clone();
        change(&mut request, head.response.unwrap().header_mutation.unwrap());
        let mut whole = Vec::new();
        while self.may_speak[0] {
            match self.reply().await.unwrap() {
                Some(Reply::RequestBody(piece)) => {
                    let (piece, is_last) = self.piece(0, piece);
                    whole.extend_from_slice(&piece);
                    if is_last {
                        break;
                    }
                }
                Some(Reply::RequestTrailers(_)) => break,
                other => panic!("{other:?}"),
            }
        }
        (request, String::from_utf8(whole).unwrap())
    }

    /// What the client gets, or an error if Envoy would break off or answer itself.
    async fn got(&mut self) -> Result<TestResponse, Status> {
        let mut got = TestResponse { head: self.answer.clone(), ..TestResponse::default() };
        loop {
            match self.reply().await? {
                Some(Reply::Immediate(answer)) => {
                    got.head =
                        Map::from([(":status".into(), answer.status.unwrap().code.to_string())]);
                    change(&mut got.head, answer.headers.unwrap());
                    got.body = String::from_utf8(answer.body.to_vec()).unwrap();
                    got.at_once = true;
                }
                Some(Reply::ResponseHeaders(head)) => {
                    change(&mut got.head, head.response.unwrap().header_mutation.unwrap());
                }
                Some(Reply::ResponseBody(piece)) => {
                    got.body += std::str::from_utf8(&self.piece(1, piece).0).unwrap();
                }
                Some(Reply::ResponseTrailers(trailers)) => {
                    got.head.insert(
                        "removed trailers".into(),
                        trailers.header_mutation.unwrap().remove_headers.join(" "),
                    );
                }
                Some(other) => panic!("{other:?}"),
                None => break,
            }
        }
        assert!(
            !got.body.contains(LEAK) && !got.head.values().any(|value| value.contains(LEAK)),
            "{got:?}"
        );
        Ok(got)
    }
}

fn told(map: &Map) -> Headers {
    let header = |(name, value): (&String, &String)| Header {
        key: name.clone(),
        value: String::new(),
        raw_value: Bytes::copy_from_slice(value.as_bytes()),
    };
    Headers { headers: map.iter().map(header).collect() }
}

/// Changes headers as Envoy does.
fn change(head: &mut Map, change: HeaderMutation) {
    for name in change.remove_headers {
        assert!(head.remove(&name).is_some() && !name.starts_with(':'), "{name}");
    }
    for option in change.set_headers {
        let header = option.header.unwrap();
        assert!(
            !["host", ":authority", ":method", ":scheme"].contains(&header.key.as_str()),
            "Envoy does not allow it"
        );
        head.insert(header.key, String::from_utf8(header.raw_value.to_vec()).unwrap());
    }
}

fn completion(text: &str) -> String {
    json!({"id": "chatcmpl-1", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})
    .to_string()
}

fn with(mut body: Value, more: &Value) -> Value {
    merge(&mut body, more);
    body
}

#[tokio::test]
async fn answers_are_judged_before_the_client_gets_them() {
    let envoy = Envoy::new(Settings::default()).await;
    let mut exchange = envoy
        .asked(
            "POST",
            CHAT,
            &[("accept-encoding", "gzip"), ("authorization", "Bearer k")],
            question().to_string().as_bytes(),
        )
        .await;
    let (head, body) = exchange.sent().await;
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["messages"], question()["messages"]);
    assert_eq!(
        (head[":path"].as_str(), head["accept-encoding"].as_str(), head["authorization"].as_str()),
        (CHAT, "identity", "Bearer k")
    );
    assert_eq!(head["content-length"], body.len().to_string());
    assert!(!head.contains_key("x-unknown") && head.contains_key("x-forwarded-proto"), "{head:?}");
    assert!(!head.keys().any(|name| name.starts_with("x-ecso-")), "{head:?}");
    exchange.answered("200", &completion("Bread."));
    let got = exchange.got().await.unwrap();
    assert_eq!(
        (got.status(), got.head["x-ecso-verdict"].as_str(), got.at_once),
        ("200", "safe", false)
    );
    assert!(got.body.contains("Bread.") && !got.head.contains_key("x-text"), "{got:?}");
    let asked = envoy.world.take_requests();
    assert!(asked.iter().all(|call| call.headers["x-ecso-own-call"] == "true"
        && call.headers["authorization"] == "Bearer k"));

    let mut exchange = envoy.chat(&question()).await;
    exchange.sent().await;
    exchange.answered("200", &completion(LEAK));
    let got = exchange.got().await.unwrap();
    assert_eq!((got.status(), got.head["x-ecso-verdict"].as_str()), ("200", "unsafe"));
    assert!(got.body.contains("Here is a harmless answer."), "{got:?}");
    assert_eq!(got.head["content-length"], got.body.len().to_string());
}

/// This model has no tools, but the gateway's may have.
#[tokio::test]
async fn a_local_model_judges_but_does_not_answer() {
    let envoy = Envoy::before(Harness::with_engine(Settings::default(), no_draft()).await).await;
    let tools = json!([{"type": "function", "function": {"name": "bake", "parameters": {"type": "object"}}}]);
    for (body, stream) in
        [(question(), false), (with(question(), &json!({"stream": true, "tools": tools})), true)]
    {
        for (draft, told) in [("Bread.", "Bread."), (LEAK, "Here is a harmless answer.")] {
            let mut exchange = envoy.chat(&body).await;
            assert_eq!(exchange.sent().await.0[":path"], CHAT);
            if stream {
                exchange.streamed(&[draft]);
            } else {
                exchange.answered("200", &completion(draft));
            }
            let got = exchange.got().await.unwrap();
            assert!(got.status() == "200" && got.body.contains(told), "{got:?}");
        }
    }
    let mut exchange = envoy.asked("GET", "/v1/models", &[], b"").await;
    assert_eq!(exchange.sent().await.0[":path"], "/v1/models");
    exchange.answered("200", "{}");
}

#[tokio::test]
async fn streams_are_held() {
    let envoy = Envoy::new(Settings::default()).await;
    for (deltas, told) in [(["Bread", "."], "Bread"), ([LEAK, "."], "Here is a harmless answer.")] {
        let mut exchange = envoy.chat(&with(question(), &json!({"stream": true}))).await;
        exchange.sent().await;
        exchange.streamed(&deltas);
        let got = exchange.got().await.unwrap();
        assert_eq!((got.status(), got.head["content-type"].as_str()), ("200", "text/event-stream"));
        assert!(
            got.body.contains(told)
                && got.body.contains("being checked")
                && got.body.contains("[DONE]"),
            "{got:?}"
        );
    }
}

/// Windows don't release text if somebody else carries the request.
#[tokio::test]
async fn windowed_streams_are_held_too() {
    let windows = Windows { first: 1, most: 1, held: 0 };
    let envoy = Envoy::new(Settings {
        stream: Streams::Windowed,
        early_stop: true,
        windows,
        ..Settings::default()
    })
    .await;
    let mut exchange = envoy.chat(&with(question(), &json!({"stream": true}))).await;
    exchange.sent().await;
    exchange.streamed(&["Bread needs flour. ", "And water. ", LEAK]);
    let got = exchange.got().await.unwrap();
    assert!(
        !got.body.contains("flour") && got.body.contains("Here is a harmless answer."),
        "{got:?}"
    );
}

#[tokio::test]
async fn nothing_hides_in_an_answer() {
    let envoy = Envoy::new(Settings::default()).await;
    for (what, hidden) in hidden_answers() {
        let mut exchange = envoy.chat(&question()).await;
        exchange.sent().await;
        let mut answer: Value = serde_json::from_str(&completion("Bread.")).unwrap();
        merge(&mut answer, &hidden);
        exchange.answered("200", &answer.to_string());
        exchange.got().await.unwrap_or_else(|status| panic!("{what}: {status}"));
    }
}

#[tokio::test]
async fn other_formats_are_forwarded_as_chats() {
    let envoy = Envoy::new(Settings::default()).await;
    let source = json!({"type": "base64", "media_type": "image/png", "data": crate::support::IMAGE.split(',').nth(1)});
    let body = json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": [
        {"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]}]});
    let mut exchange = envoy
        .asked("POST", "/v1/messages?beta=true", &[("x-api-key", "k")], body.to_string().as_bytes())
        .await;
    let (head, _) = exchange.sent().await;
    assert_eq!(
        (head[":path"].as_str(), head["authorization"].as_str(), head.get("x-api-key")),
        (CHAT, "Bearer k", None)
    );
    exchange.answered("200", &completion(LEAK));
    let got = exchange.got().await.unwrap();
    assert_eq!(
        serde_json::from_str::<Value>(&got.body).unwrap()["content"][0]["text"],
        "Here is a harmless answer."
    );
}

#[tokio::test]
async fn unguardable_requests_are_refused() {
    let mut settings = Settings::default();
    settings.limits.body = 10_000;
    let envoy = Envoy::new(settings).await;
    let long = vec![b' '; 200_000];
    for (path, headers, body, told) in [
        (CHAT, [("content-length", "200000")], long.as_slice(), ("413", "body_too_large")),
        (CHAT, [("x", "1")], &long, ("413", "body_too_large")),
        (CHAT, [("x", "1")], b"{", ("400", "invalid_request")),
        (CHAT, [("x", "1")], b"", ("400", "invalid_request")),
        (CHAT, [("content-encoding", "gzip")], b"{}", ("415", "unsupported_encoding")),
        (CHAT, [("x-ecso-own-call", "true")], b"{}", ("421", "guard_loop")),
        ("/v1/completions", [("x", "1")], b"{}", ("404", "route_not_guarded")),
        ("/v1/chat/completions#x", [("x", "1")], b"{", ("400", "invalid_request")),
        ("/metrics", [("x", "1")], b"", ("404", "route_not_guarded")),
        ("//x", [("x", "1")], b"", ("404", "route_not_guarded")),
        ("http://x/v1/models", [("x", "1")], b"", ("400", "invalid_request")),
    ] {
        let got = envoy.asked("POST", path, &headers, body).await.got().await.unwrap();
        assert_eq!((got.status(), got.code().as_str().unwrap()), told, "{path} {got:?}");
        assert!(got.at_once);
    }
    assert!(envoy.world.take_requests().is_empty());
}

#[tokio::test]
async fn wrong_gateway_settings_are_reported() {
    let envoy = Envoy::new(Settings::default()).await;
    for (observability_mode, modes) in
        [(false, None), (false, Some([2, 2])), (false, Some([4, 0])), (true, Some([4, 4]))]
    {
        let mut exchange = envoy.exchange().await;
        let protocol_config = modes.map(|[request_body_mode, response_body_mode]| {
            ProtocolConfiguration { request_body_mode, response_body_mode }
        });
        let part = Some(Part::RequestHeaders(HttpHeaders { headers: None, end_of_stream: true }));
        let told = ProcessingRequest { part, observability_mode, protocol_config };
        exchange.tell.as_ref().unwrap().unbounded_send(told).unwrap();
        let got = exchange.got().await.unwrap();
        assert_eq!((got.status(), got.code().as_str().unwrap()), ("500", "gateway_setup"));
    }
}

#[tokio::test]
async fn model_errors_are_reworded() {
    let envoy = Envoy::new(Settings::default()).await;
    for stream in [false, true] {
        let mut exchange = envoy.chat(&with(question(), &json!({"stream": stream}))).await;
        exchange.sent().await;
        exchange.answered(
            "429",
            &json!({"error": {"message": LEAK, "code": "rate_limit_exceeded"}}).to_string(),
        );
        let got = exchange.got().await.unwrap();
        assert_eq!((got.status(), got.code().as_str().unwrap()), ("429", "rate_limit_exceeded"));
        let mut exchange = envoy.chat(&with(question(), &json!({"stream": stream}))).await;
        exchange.sent().await;
        exchange.answer_head("500", &[("x-text", LEAK)], true);
        let got = exchange.got().await.unwrap();
        assert_eq!(
            (got.status(), got.code().as_str().unwrap(), got.at_once),
            ("500", "upstream_refused", true)
        );
    }
}

#[tokio::test]
async fn failures_let_nothing_out() {
    let mut settings = Settings::default();
    settings.limits.deadline = 1;
    let envoy = Envoy::new(settings).await;
    // The judge fails.
    let broken = json!({"messages": [{"content": [{}, {"text": "judge-500"}]}]});
    for stream in [false, true] {
        let mut exchange =
            envoy.chat(&with(with(question(), &broken), &json!({"stream": stream}))).await;
        exchange.sent().await;
        if stream {
            exchange.streamed(&[LEAK]);
        } else {
            exchange.answered("200", &completion(LEAK));
        }
        let got = exchange.got().await.unwrap();
        assert!(
            got.body.contains("guard_failed") && got.status() == if stream { "200" } else { "502" },
            "{got:?}"
        );
    }
    // The model says nothing, or does not end.
    let mut exchange = envoy.chat(&question()).await;
    exchange.sent().await;
    assert_eq!(exchange.got().await.unwrap().code(), "guard_deadline");
    for begins in [false, true] {
        let mut exchange = envoy.chat(&with(question(), &json!({"stream": true}))).await;
        exchange.sent().await;
        exchange.answer_head("200", &[("content-type", "text/event-stream")], false);
        if begins {
            exchange.answer_body(LEAK, false);
        }
        let got = exchange.got().await.unwrap();
        assert!(got.body.contains("guard_deadline") && got.at_once != begins, "{got:?}");
    }
    // The gateway breaks off: no stream may end cleanly then, or Envoy would let the rest pass.
    for stream in [false, true] {
        let mut exchange = envoy.chat(&with(question(), &json!({"stream": stream}))).await;
        exchange.sent().await;
        exchange.answer_head(
            "200",
            &[("content-type", if stream { "text/event-stream" } else { "application/json" })],
            false,
        );
        exchange.answer_body(&completion(LEAK)[..20], false);
        exchange.tell = None;
        let got = exchange.got().await.unwrap();
        assert!(got.body.contains("upstream_failed"), "{got:?}");
    }
    let mut exchange = envoy.exchange().await;
    exchange.head("POST", CHAT, &[], false);
    exchange.tell = None;
    assert_eq!(exchange.got().await.unwrap().status(), "400");
    let mut exchange = envoy.exchange().await;
    exchange.tell = None;
    assert_eq!(exchange.got().await.unwrap_err().code(), tonic::Code::Aborted);
}

#[tokio::test]
async fn trailers_are_dropped() {
    let envoy = Envoy::new(Settings::default()).await;
    let mut exchange = envoy.exchange().await;
    exchange.head("POST", CHAT, &[], false);
    exchange.body(question().to_string().as_bytes(), false);
    let trailers =
        || HttpTrailers { trailers: Some(told(&Map::from([("x-text".into(), LEAK.into())]))) };
    exchange.tell(Part::RequestTrailers(trailers()));
    exchange.sent().await;
    exchange.answer_head("200", &[], false);
    exchange.answer_body(&completion("Bread."), false);
    exchange.tell(Part::ResponseTrailers(trailers()));
    let got = exchange.got().await.unwrap();
    assert_eq!((got.status(), got.head["removed trailers"].as_str()), ("200", "x-text"));
    assert!(got.body.contains("Bread."));
}

#[tokio::test]
async fn unguarded_answers_are_not_held() {
    let envoy = Envoy::new(Settings::default()).await;
    let text = json!({"model": "m", "messages": [{"role": "user", "content": "What is bread?"}], "stream": true});
    let mut exchange = envoy.chat(&text).await;
    exchange.sent().await;
    exchange.answer_head("200", &[("content-type", "text/event-stream"), ("x-own", "1")], false);
    exchange.answer_body("one ", false);
    assert!(matches!(exchange.reply().await.unwrap(), Some(Reply::ResponseHeaders(_))));
    let mut pieces = String::new();
    while pieces.is_empty() {
        let Some(Reply::ResponseBody(piece)) = exchange.reply().await.unwrap() else {
            panic!("it is held")
        };
        pieces += std::str::from_utf8(&exchange.piece(1, piece).0).unwrap();
    }
    assert_eq!(pieces, "one ");
    exchange.answer_body("two", true);
    assert_eq!(exchange.got().await.unwrap().body, "two");
    // A request without a body, and an answer without one.
    let mut exchange = envoy.asked("GET", "/v1/models?x=1", &[], b"").await;
    assert_eq!(exchange.sent().await.0[":path"], "/v1/models?x=1");
    exchange.answer_head("204", &[("x-own", "1")], true);
    let got = exchange.got().await.unwrap();
    assert_eq!(
        (got.status(), got.head["x-own"].as_str(), got.body.as_str(), got.at_once),
        ("204", "1", "", false)
    );
    // A body that nobody asked for is dropped.
    let mut exchange = envoy.asked("GET", "/v1/models", &[], LEAK.as_bytes()).await;
    assert_eq!(exchange.sent().await.1, "");
    assert!(envoy.world.take_requests().is_empty());
}

#[tokio::test]
async fn observed_answers_are_not_held() {
    let settings = Settings { mode: Mode::Observe, ..Settings::default() };
    let envoy = Envoy::new(settings).await;
    let mut exchange = envoy.chat(&question()).await;
    exchange.sent().await;
    exchange.answered("200", &completion("Bread."));
    exchange.answer.remove("x-text");
    let mut replies = Vec::new();
    while let Some(reply) = exchange.reply().await.unwrap() {
        replies.push(reply);
    }
    assert!(
        matches!(replies.as_slice(), [Reply::ResponseHeaders(_), Reply::ResponseBody(_), ..]),
        "{replies:?}"
    );
    for _ in 0..100 {
        if !envoy.world.take_requests().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nobody judged it");
}

#[tokio::test]
async fn client_keys_are_required_if_configured() {
    let mut settings = Settings::default();
    let (key, known) = Key::generate();
    settings.keys.insert("app".into(), known);
    let envoy = Envoy::new(settings).await;
    let got = envoy.chat(&question()).await.got().await.unwrap();
    assert_eq!((got.status(), got.code().as_str().unwrap()), ("401", "invalid_api_key"));
    let key = format!("Bearer {key}");
    let mut exchange = envoy
        .asked("POST", CHAT, &[("authorization", &key)], question().to_string().as_bytes())
        .await;
    assert!(!exchange.sent().await.0.contains_key("authorization"));
}

#[tokio::test]
async fn unread_bodies_do_not_block() {
    let envoy = Envoy::new(Settings::default()).await;
    let mut exchange = envoy.exchange().await;
    exchange.head("GET", "/v1/models", &[], false);
    for _ in 0..20 {
        exchange.body(b"0123456789", false);
    }
    exchange.body(b"", true);
    let (_, body) = exchange.sent().await;
    assert_eq!(body, "");
    exchange.answer_head("200", &[], false);
    exchange.answer_body("[]", true);
    let got = exchange.got().await.unwrap();
    assert_eq!((got.status(), got.body.as_str()), ("200", "[]"));
}

#[tokio::test]
async fn missing_headers_and_own_refusals_are_reported() {
    let envoy = Envoy::new(Settings::default()).await;
    let mut exchange = envoy.chat(&question()).await;
    exchange.sent().await;
    exchange.answer_body(&completion(LEAK), true);
    let got = exchange.got().await;
    assert!(got.as_ref().is_err() || got.as_ref().unwrap().status() == "502", "{got:?}");
    assert!(got.is_err() || !got.unwrap().body.contains(LEAK));

    let mut exchange = envoy.exchange().await;
    exchange.answer_head("403", &[], false);
    let got = exchange.got().await.unwrap();
    assert_eq!((got.status(), got.code()), ("403", json!("gateway_refused")));
}
