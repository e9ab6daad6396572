//! Streams that are judged while they are written: what goes out, when, and when the model is
//! stopped.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{body::Body, http::Response, response::IntoResponse};
use bytes::Bytes;
use ecso::{Chat, Delta, FinishReason, Mllm, ModelError, ReplyStream, Sampling};
use ecso_gateway::{
    Settings,
    settings::{AuditSettings, Limits, OnFailure, Streams, Windows},
};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::{
    answers::hidden_answers,
    support::{Harness, IMAGE, LEAK, TestResponse, merge, question},
};

/// A model that writes chunk by chunk.
#[derive(Clone, Default)]
struct ScriptedModel {
    pieces: Vec<Value>,
    /// The chunk before which it waits for a signal.
    pause_before: Option<usize>,
    goes_on: Arc<Notify>,
    /// Whether it was stopped before its end.
    is_stopped: Arc<AtomicBool>,
}

/// Records that the stream that holds it was dropped before its end.
struct DropFlag(Option<Arc<AtomicBool>>);

impl Drop for DropFlag {
    fn drop(&mut self) {
        if let Some(told) = &self.0 {
            told.store(true, Ordering::SeqCst);
        }
    }
}

impl ScriptedModel {
    /// These words, and an end.
    fn of<T: Into<String>>(words: impl IntoIterator<Item = T>) -> Self {
        let role =
            json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]});
        let words = words.into_iter().map(|word| content(&word.into()));
        let end = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]});
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 99, "total_tokens": 108}});
        Self {
            pieces: [role].into_iter().chain(words).chain([end, usage]).collect(),
            ..Self::default()
        }
    }

    /// Pauses before this chunk.
    fn pause_before(self, piece: usize) -> Self {
        Self { pause_before: Some(piece), ..self }
    }

    fn response(&self) -> Response<Body> {
        let Self { pieces, pause_before, goes_on, is_stopped } = self.clone();
        let body = async_stream::stream! {
            let mut guard = DropFlag(Some(is_stopped));
            for (place, piece) in pieces.iter().enumerate() {
                if pause_before == Some(place) {
                    goes_on.notified().await;
                }
                // Lets the judge keep up.
                tokio::time::sleep(Duration::from_millis(2)).await;
                yield Ok::<_, std::io::Error>(format!("data: {piece}\n\n"));
            }
            yield Ok("data: [DONE]\n\n".to_owned());
            guard.0 = None;
        };
        ([("content-type", "text/event-stream")], Body::from_stream(body)).into_response()
    }

    async fn world(&self, settings: Settings) -> Harness {
        let model = self.clone();
        Harness::new(settings, Arc::new(move |_: &Value| model.response())).await
    }

    /// Whether the model is stopped soon.
    async fn is_stopped(&self) -> bool {
        for _ in 0..100 {
            if self.is_stopped.load(Ordering::SeqCst) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }
}

fn content(text: &str) -> Value {
    json!({"choices": [{"index": 0, "delta": {"content": text}}]})
}

/// This many harmless words.
fn words(count: usize) -> Vec<String> {
    (0..count)
        .map(|place| format!("bread{place}{}", if place % 7 == 6 { ". " } else { " " }))
        .collect()
}

fn windowed() -> Settings {
    let windows = Windows { first: 8, most: 32, held: 3 };
    let limits = Limits { deadline: 20, ..Limits::default() };
    Settings { stream: Streams::Windowed, windows, limits, ..Settings::default() }
}

fn asked() -> Value {
    let mut asked = question();
    merge(&mut asked, &json!({"stream": true, "stream_options": {"include_usage": true}}));
    asked
}

/// The events of a stream.
fn events(body: &str) -> Vec<Value> {
    let data = body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]");
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

/// The text that a client collects from a field.
fn said(body: &str, field: &str) -> String {
    events(body)
        .iter()
        .filter_map(|event| event["choices"][0]["delta"][field].as_str().map(str::to_owned))
        .collect()
}

fn finishes(body: &str) -> Vec<String> {
    let events = events(body);
    events
        .iter()
        .filter_map(|event| Some(event["choices"][0]["finish_reason"].as_str()?.to_owned()))
        .collect()
}

fn found(body: &str) -> Value {
    events(body).pop().unwrap()["ecso"].clone()
}

async fn stream(world: &Harness, asked: &Value) -> TestResponse {
    let got = tokio::time::timeout(Duration::from_secs(20), world.chat(asked)).await;
    got.unwrap()
}

/// Reads a stream until it contains a text.
async fn read_until(
    response: Response<Body>,
    text: &str,
) -> (String, impl StreamExt<Item = Bytes> + Unpin) {
    let mut body = response.into_body().into_data_stream().map(Result::unwrap);
    let mut read = String::new();
    while !read.contains(text) {
        let piece =
            tokio::time::timeout(Duration::from_secs(20), body.next()).await.unwrap().unwrap();
        read.push_str(&String::from_utf8_lossy(&piece));
    }
    (read, body)
}

#[tokio::test]
async fn windows_go_out_while_the_model_writes() {
    let model = ScriptedModel::of(words(60)).pause_before(40);
    let world = model.world(windowed()).await;
    let response = world.open("POST", "/v1/chat/completions", &[], asked().to_string()).await;
    // The model only continues because the client has words already.
    let (mut read, mut rest) = read_until(response, "bread3 ").await;
    assert!(!read.contains("bread39"), "{read}");
    model.goes_on.notify_one();
    while let Some(piece) = rest.next().await {
        read.push_str(&String::from_utf8_lossy(&piece));
    }
    assert_eq!(said(&read, "content"), words(60).concat());
    let all = events(&read);
    // It is the stream that clients know: the role once, at the beginning; one end; the usage last.
    assert_eq!(said(&read, "role"), "assistant");
    assert_eq!(all[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(finishes(&read), ["stop"]);
    assert_eq!(all.last().unwrap()["usage"]["total_tokens"], 108);
    assert!(read.ends_with("data: [DONE]\n\n"));
    assert!(
        all.iter()
            .all(|event| event["id"] == all[0]["id"] && event["object"] == "chat.completion.chunk")
    );
    let found = found(&read);
    assert_eq!((&found["verdict"], &found["early"]["stopped"]), (&json!("safe"), &json!(false)));
    assert!(found["early"]["words"].as_u64().unwrap() > 20, "{found}");
    assert!(found["usage"].is_object() && found.get("safe_answer").is_none());
    assert!(!model.is_stopped.load(Ordering::SeqCst));
    // Each check covers all text, and the windows grow.
    let judged: Vec<usize> = world
        .take_requests()
        .iter()
        .map(|reached| String::from_utf8_lossy(&reached.body).into_owned())
        .filter(|sent| sent.contains("harmful, unsafe and unethical"))
        .map(|sent| sent.matches("bread").count())
        .collect();
    assert!(judged.len() > 2 && judged.is_sorted() && *judged.last().unwrap() == 60, "{judged:?}");
}

/// `hardened`, with questions that a script can distinguish.
const HARDENED: &str = r#"
extends = "hardened"
name = "plain"
[caption]
template = "LOOK"
[questions.wants]
template = "ASKS {x}"
[questions.helps]
template = "HELPS {y}"
[[detectors]]
name = "wants"
bias = 0.0
terms = [{ question = "wants", weight = 1.0 }]
[[detectors]]
name = "helps"
bias = 0.0
terms = [{ question = "helps", weight = 1.0 }]
"#;

/// A gateway under [`HARDENED`] whose request check takes this long.
async fn hardened_gateway(model: &ScriptedModel, settings: Settings, look: Duration) -> Harness {
    let model = model.clone();
    let respond = move |sent: &Value| {
        let prompt =
            sent["messages"].as_array().and_then(|messages| messages.last()).unwrap()["content"]
                .to_string();
        let text = match () {
            () if prompt.contains("ASKS") && prompt.contains("do harm") => "Yes",
            () if prompt.contains("HELPS") && prompt.contains(LEAK) => "Yes",
            () if prompt.contains("ASKS") || prompt.contains("HELPS") => "No",
            () if prompt.contains("LOOK") => "WORDS: none\nSHOWS: none",
            () if sent["stream"] == true => return model.response(),
            () => "Here is a harmless answer.",
        };
        let wait = if prompt.contains("ASKS") { look } else { Duration::ZERO };
        let message = json!({"role": "assistant", "content": text});
        let answer = json!({"id": "c", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]});
        let body = futures::stream::once(async move {
            tokio::time::sleep(wait).await;
            Ok::<_, std::io::Error>(answer.to_string())
        });
        ([("content-type", "application/json")], Body::from_stream(body)).into_response()
    };
    Harness::with(settings, ecso::Profile::from_toml(HARDENED).unwrap(), Arc::new(respond)).await
}

#[tokio::test]
async fn nothing_goes_out_before_the_request_check() {
    let folder = tempfile::tempdir().unwrap();
    let slow = Duration::from_millis(300);
    // A harmless request: the whole draft is there before the request check is done.
    let model = ScriptedModel::of(words(40)).pause_before(41);
    let world = hardened_gateway(&model, windowed(), slow).await;
    let begun = std::time::Instant::now();
    let response = world.open("POST", "/v1/chat/completions", &[], asked().to_string()).await;
    let (mut read, mut rest) = read_until(response, "bread3 ").await;
    assert!(begun.elapsed() > slow);
    model.goes_on.notify_one();
    while let Some(piece) = rest.next().await {
        read.push_str(&String::from_utf8_lossy(&piece));
    }
    assert_eq!(
        (said(&read, "content"), &found(&read)["verdict"]),
        (words(40).concat(), &json!("safe"))
    );
    // One for which no answer could be safe, and one whose draft turns out harmful.
    let mut harmful = words(60);
    harmful[40] = format!("{LEAK} ");
    for (early_stop, query, draft, out) in [
        (false, "do harm", words(60), false),
        (true, "do harm", words(60), false),
        (false, "What is this?", harmful.clone(), true),
        (true, "What is this?", harmful, false),
    ] {
        let path = folder.path().join(format!("{early_stop} {query}.jsonl"));
        let audit = AuditSettings { path: path.clone(), content: true, ..AuditSettings::default() };
        let stream_as = if early_stop { Streams::Hold } else { Streams::Windowed };
        // After all words: the next window is full, whenever the last check was.
        let model = ScriptedModel::of(draft).pause_before(61);
        let settings = Settings { audit, early_stop, stream: stream_as, ..windowed() };
        let world = hardened_gateway(&model, settings, Duration::ZERO).await;
        let mut asked = asked();
        asked["messages"][0]["content"][1]["text"] = query.into();
        let got = stream(&world, &asked).await;
        assert!(!got.leaks() && model.is_stopped().await, "{}", got.body);
        assert_eq!(got.body.contains("bread"), out, "{early_stop} {query} {}", got.body);
        assert_eq!(finishes(&got.body), [if out { "content_filter" } else { "stop" }]);
        assert!(got.body.contains("Here is a harmless answer."), "{}", got.body);
        let line: Value =
            serde_json::from_str(std::fs::read_to_string(&path).unwrap().trim()).unwrap();
        assert_eq!(
            (&line["verdict"], &line["early"]["stopped"]),
            (&json!("unsafe"), &json!(true)),
            "{line}"
        );
        assert_eq!(line["draft"].is_null(), query == "do harm", "{line}");
        // The request was checked once, whatever was asked about the draft.
        let looks = world
            .take_requests()
            .into_iter()
            .filter(|reached| String::from_utf8_lossy(&reached.body).contains("ASKS"));
        assert_eq!(looks.count(), 1);
    }
}

/// The model in this process, which answers one call after the other.
struct LocalModel {
    draft: ScriptedModel,
    /// What it was asked: for the draft, for a request check, or about this many words.
    calls: Arc<Mutex<Vec<String>>>,
}

#[async_trait::async_trait]
impl Mllm for LocalModel {
    fn name(&self) -> &'static str {
        "local"
    }

    async fn stream(&self, chat: &Chat, _: &Sampling) -> Result<ReplyStream, ModelError> {
        let prompt = chat.turns.last().unwrap().joined_text();
        let (call, reply) = match () {
            () if prompt.contains("ASKS") && prompt.contains("do harm") => ("ASKS", "Yes"),
            () if prompt.contains("ASKS") => ("ASKS", "No"),
            () if prompt.contains("HELPS") && prompt.contains(LEAK) => ("HELPS", "Yes"),
            () if prompt.contains("HELPS") => ("HELPS", "No"),
            () if prompt.contains("LOOK") => ("LOOK", "WORDS: none\nSHOWS: none"),
            () if chat.image_count() > 0 => ("draft", ""),
            () => ("safe", "Here is a harmless answer."),
        };
        self.calls.lock().unwrap().push(call.to_owned());
        let end = Delta::End { finish: FinishReason::Stop, usage: None, took: None };
        if call != "draft" {
            return Ok(futures::stream::iter([Ok(Delta::Text(reply.into())), Ok(end)]).boxed());
        }
        let ScriptedModel { pieces, pause_before, goes_on, is_stopped } = self.draft.clone();
        let deltas = async_stream::stream! {
            let mut guard = DropFlag(Some(is_stopped));
            for (place, piece) in pieces.iter().enumerate() {
                if pause_before == Some(place) {
                    goes_on.notified().await;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
                if let Some(text) = piece["choices"][0]["delta"]["content"].as_str() {
                    yield Ok(Delta::Text(text.to_owned()));
                }
            }
            guard.0 = None;
            yield Ok(end);
        };
        Ok(deltas.boxed())
    }
}

#[tokio::test]
async fn the_draft_of_a_model_in_this_process_is_judged_while_it_is_written() {
    let mut harmful = words(60);
    harmful[40] = format!("{LEAK} ");
    for (early_stop, query, draft, out) in [
        (false, "What is this?", words(60), true),
        (true, "What is this?", words(60), true),
        (false, "do harm", words(60), false),
        (false, "What is this?", harmful.clone(), true),
        (true, "What is this?", harmful.clone(), false),
    ] {
        let is_harmless = query != "do harm" && draft != harmful;
        let draft = ScriptedModel::of(draft).pause_before(if is_harmless { 50 } else { 61 });
        let calls = Arc::<Mutex<Vec<String>>>::default();
        let model = LocalModel { draft: draft.clone(), calls: Arc::clone(&calls) };
        let stream_as = if early_stop { Streams::Hold } else { Streams::Windowed };
        let settings = Settings { early_stop, stream: stream_as, ..windowed() };
        let profile = ecso::Profile::from_toml(HARDENED).unwrap();
        let world = Harness::with_model(settings, profile, Arc::new(model));
        let mut asked = asked();
        asked["messages"][0]["content"][1]["text"] = query.into();
        let response = world.open("POST", "/v1/chat/completions", &[], asked.to_string()).await;
        // What is out while the model writes lets it go on.
        let shown = if is_harmless && !early_stop { "bread3 " } else { ": " };
        let (mut read, mut rest) = read_until(response, shown).await;
        if is_harmless {
            draft.goes_on.notify_one();
        }
        while let Some(piece) = rest.next().await {
            read.push_str(&String::from_utf8_lossy(&piece));
        }
        assert!(
            !read.contains(LEAK) && read.contains("bread") == out,
            "{early_stop} {query} {read}"
        );
        let found = found(&read);
        assert_eq!(found["verdict"], if is_harmless { "safe" } else { "unsafe" }, "{read}");
        assert_eq!(found["early"]["stopped"], !is_harmless && query != "do harm", "{read}");
        let all = events(&read);
        assert!(all[0]["created"].as_u64().unwrap() > 1_000_000_000, "{read}");
        assert_eq!((said(&read, "role"), finishes(&read).len()), ("assistant".into(), 1), "{read}");
        if is_harmless {
            assert_eq!(said(&read, "content"), words(60).concat());
        } else {
            assert!(read.contains("Here is a harmless answer."), "{read}");
        }
        // It is asked for nothing else before the request is checked.
        let calls = calls.lock().unwrap().clone();
        let place = |call: &str| calls.iter().position(|made| made == call);
        assert!(place("draft").is_none_or(|draft| place("ASKS").unwrap() < draft), "{calls:?}");
        let is_asked = query != "do harm";
        assert_eq!(place("draft").is_some(), is_asked, "{calls:?}");
        assert_eq!(is_asked && draft.is_stopped().await, is_asked && !is_harmless);
    }
}

#[tokio::test]
async fn harm_in_the_first_window_is_replaced() {
    let mut draft = words(60);
    draft[2] = format!("{LEAK} ");
    let model = ScriptedModel::of(draft).pause_before(50);
    let world = model.world(windowed()).await;
    let got = stream(&world, &asked()).await;
    assert!(!got.leaks() && !got.body.contains("bread"), "{}", got.body);
    assert_eq!(said(&got.body, "content"), "Here is a harmless answer.");
    assert_eq!(
        (said(&got.body, "role"), finishes(&got.body)),
        ("assistant".into(), vec!["stop".to_owned()])
    );
    let found = found(&got.body);
    assert_eq!(
        (&found["verdict"], &found["early"]),
        (&json!("unsafe"), &json!({"words": 0, "characters": 0, "stopped": true}))
    );
    assert!(model.is_stopped().await);
}

#[tokio::test]
async fn harm_in_a_later_window_stops_the_model_and_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = AuditSettings { path: path.clone(), content: true, ..AuditSettings::default() };
    let mut draft = words(90);
    draft[45] = format!("{LEAK} ");
    let model = ScriptedModel::of(draft).pause_before(80);
    let world = model.world(Settings { audit, metrics: true, ..windowed() }).await;
    let got = stream(&world, &asked()).await;
    assert!(!got.leaks(), "{}", got.body);
    assert!(model.is_stopped().await);
    let out = said(&got.body, "content");
    assert!(words(45).concat().starts_with(&out) && out.contains("bread9 "), "{out}");
    // In the protocol's own terms: a refusal, and the end.
    assert_eq!(finishes(&got.body), ["content_filter"]);
    assert!(!said(&got.body, "refusal").is_empty());
    let all = events(&got.body);
    let refused =
        all.iter().position(|event| event["choices"][0]["delta"]["refusal"].is_string()).unwrap();
    assert!(all[refused..].iter().all(|event| event["choices"][0]["delta"]["content"].is_null()));
    assert!(got.body.ends_with("data: [DONE]\n\n"));
    let found = found(&got.body);
    let early =
        json!({"words": out.split_whitespace().count(), "characters": out.len(), "stopped": true});
    assert_eq!((&found["verdict"], &found["early"]), (&json!("unsafe"), &early));
    assert_eq!(found["safe_answer"], "Here is a harmless answer.");
    let line: Value = serde_json::from_str(std::fs::read_to_string(&path).unwrap().trim()).unwrap();
    assert_eq!(
        (&line["verdict"], &line["early"], &line["failure"]),
        (&json!("unsafe"), &early, &Value::Null)
    );
    // What was judged harmful is recorded, and no more.
    assert!(
        line["draft"].as_str().unwrap().contains(LEAK)
            && !line["draft"].as_str().unwrap().contains("bread80")
    );
    let metrics = world.send("GET", "/metrics", &[], "").await.body;
    assert!(metrics.contains("ecso_harm_out_words_count 1"), "{metrics}");
}

#[tokio::test]
async fn harm_found_at_the_end_ends_the_stream() {
    let mut draft = words(60);
    draft[59] = LEAK.to_owned();
    for step in ["", "caption-500"] {
        let model = ScriptedModel::of(draft.clone());
        let mut asked = asked();
        if !step.is_empty() {
            asked["model"] = step.into();
        }
        let got = stream(&model.world(windowed()).await, &asked).await;
        assert!(!got.leaks(), "{}", got.body);
        assert!(said(&got.body, "content").contains("bread20"));
        assert_eq!(finishes(&got.body), ["content_filter"]);
        let found = found(&got.body);
        assert_eq!(
            (&found["verdict"], &found["early"]["stopped"]),
            (&json!("unsafe"), &json!(false)),
            "{found}"
        );
        // If steps after the verdict fail, only the safe answer is missing.
        assert_eq!(found["safe_answer"].is_string(), step.is_empty());
        assert_eq!(found["failure"].is_string(), !step.is_empty());
    }
}

#[tokio::test]
async fn a_failing_judge_ends_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    for (place, on_failure) in
        [(40, OnFailure::Closed), (2, OnFailure::Closed), (40, OnFailure::Open)]
    {
        let path = folder.path().join(format!("{place}-{on_failure:?}.jsonl"));
        let audit = AuditSettings { path: path.clone(), ..AuditSettings::default() };
        let mut draft = words(90);
        draft[place] = "judge-500 ".to_owned();
        let opens = on_failure == OnFailure::Open;
        let model = if opens {
            ScriptedModel::of(draft.clone())
        } else {
            ScriptedModel::of(draft.clone()).pause_before(80)
        };
        let got =
            stream(&model.world(Settings { on_failure, audit, ..windowed() }).await, &asked())
                .await;
        let out = said(&got.body, "content");
        if opens {
            // As the operator wants it, and it is reported.
            assert_eq!(out, draft.concat());
            assert_eq!(found(&got.body)["verdict"], "unchecked");
            continue;
        }
        assert!(!out.contains("judge-500") && !out.contains("bread50"), "{out}");
        assert!(got.body.contains("\"error\"") && finishes(&got.body).is_empty(), "{}", got.body);
        assert!(!got.body.contains("\"safe\"") && model.is_stopped().await);
        let lines = std::fs::read_to_string(&path).unwrap_or_default();
        // What went out is recorded.
        assert_eq!(lines.lines().count(), usize::from(place == 40), "{lines}");
        assert!(
            place < 40 || (lines.contains("\"unchecked\"") && lines.contains("unfinished")),
            "{lines}"
        );
    }
}

#[tokio::test]
async fn harm_that_was_found_counts_although_the_last_check_fails() {
    // The first check takes long: the draft is complete when it finds harm, and the last one fails.
    let begin = [format!("judge-slow {LEAK} and so on ")];
    let draft = begin.into_iter().chain(words(20)).chain(["judge-500".to_owned()]);
    let model = ScriptedModel::of(draft);
    for settings in [windowed(), Settings { early_stop: true, stream: Streams::Hold, ..windowed() }]
    {
        let settings = Settings { on_failure: OnFailure::Open, ..settings };
        let got = stream(&model.world(settings).await, &asked()).await;
        assert!(!got.body.contains(LEAK), "{}", got.body);
        assert_eq!(found(&got.body)["verdict"], "unsafe", "{}", got.body);
    }
}

#[tokio::test]
async fn a_failed_check_waits_for_the_last_verdict() {
    // The only early check fails.
    let text = words(20).concat() + "judge-500";
    for (settings, opens) in [
        (Settings { on_failure: OnFailure::Open, ..windowed() }, true),
        (Settings { early_stop: true, stream: Streams::Hold, ..windowed() }, false),
        (
            Settings {
                early_stop: true,
                stream: Streams::Hold,
                on_failure: OnFailure::Open,
                ..windowed()
            },
            true,
        ),
    ] {
        let got = stream(&ScriptedModel::of([text.clone()]).world(settings).await, &asked()).await;
        if opens {
            assert_eq!(
                (said(&got.body, "content"), &found(&got.body)["verdict"]),
                (text.clone(), &json!("unchecked"))
            );
        } else {
            assert!(!got.body.contains("bread") && got.body.contains("\"error\""), "{}", got.body);
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_stops_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = AuditSettings { path: path.clone(), ..AuditSettings::default() };
    let model = ScriptedModel::of(words(60)).pause_before(50);
    let world = model.world(Settings { audit, ..windowed() }).await;
    let response = world.open("POST", "/v1/chat/completions", &[], asked().to_string()).await;
    let (_, rest) = read_until(response, "bread9 ").await;
    drop(rest);
    assert!(model.is_stopped().await);
    let line: Value = serde_json::from_str(std::fs::read_to_string(&path).unwrap().trim()).unwrap();
    assert_eq!((&line["verdict"], &line["failure"]), (&json!("unchecked"), &json!("unfinished")));
    assert!(line["early"]["words"].as_u64().unwrap() > 5, "{line}");
}

#[tokio::test]
async fn a_broken_upstream_stream_ends_the_stream() {
    let mut model = ScriptedModel::of(words(60));
    // Neither an end nor a usage, but an error.
    model.pieces.truncate(50);
    model.pieces.push(json!({"error": {"message": LEAK}}));
    let got = stream(&model.world(windowed()).await, &asked()).await;
    assert!(!got.leaks() && got.body.contains("upstream_failed"), "{}", got.body);
    assert!(said(&got.body, "content").contains("bread9 ") && finishes(&got.body).is_empty());
}

#[tokio::test]
async fn a_slow_judge_is_waited_for() {
    let mut draft = words(60);
    draft[0] = "judge-slow ".to_owned();
    let model = ScriptedModel::of(draft.clone()).pause_before(62);
    let world = model.world(windowed()).await;
    let response = world.open("POST", "/v1/chat/completions", &[], asked().to_string()).await;
    // The model has written all but its end; the judge has not answered yet.
    tokio::time::sleep(Duration::from_millis(190)).await;
    let (mut read, mut rest) = read_until(response, "judge-slow").await;
    model.goes_on.notify_one();
    while let Some(piece) = rest.next().await {
        read.push_str(&String::from_utf8_lossy(&piece));
    }
    assert_eq!(said(&read, "content"), draft.concat());
    // What arrived meanwhile was judged at once.
    let judged = world.take_requests().into_iter().filter(|reached| {
        String::from_utf8_lossy(&reached.body).contains("harmful, unsafe and unethical")
    });
    assert!(judged.count() <= 4);
}

#[tokio::test]
async fn only_plain_text_is_windowed() {
    let mut draft = words(60);
    draft[59] = LEAK.to_owned();
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
    let settings = Settings { mode_header: true, ..windowed() };
    for (more, headers) in [
        (json!({"n": 2}), vec![]),
        (json!({"tools": [tool]}), vec![]),
        (json!({"functions": [{"name": "f"}]}), vec![]),
        (json!({"response_format": {"type": "json_object"}}), vec![]),
        (json!({"logprobs": true}), vec![]),
        (json!({"prediction": {"type": "content", "content": "x"}}), vec![]),
        (json!({}), vec![("x-ecso-stream", "hold")]),
        (json!({}), vec![("x-ecso-stream", "windowed"), ("x-ecso-stream", "hold")]),
    ] {
        let mut asked = asked();
        merge(&mut asked, &more);
        let world = ScriptedModel::of(draft.clone()).world(settings.clone()).await;
        let got = world.send("POST", "/v1/chat/completions", &headers, asked.to_string()).await;
        assert!(
            !got.body.contains("bread") && got.body.contains("harmless answer"),
            "{more} {}",
            got.body
        );
    }
    // Fields that only turn these features off don't prevent windows.
    for more in [
        json!({"logprobs": false, "n": 1, "tools": null}),
        json!({"response_format": {"type": "text"}}),
    ] {
        let mut asked = asked();
        merge(&mut asked, &more);
        let got =
            stream(&ScriptedModel::of(draft.clone()).world(settings.clone()).await, &asked).await;
        assert!(got.body.contains("bread") && !got.leaks(), "{more} {}", got.body);
    }
}

/// The same question in other formats.
fn formats() -> [(&'static str, Value); 2] {
    let data = IMAGE.split(',').nth(1).unwrap();
    let image = json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}});
    [
        (
            "/v1/responses",
            json!({"model": "m", "stream": true, "input": [{"role": "user", "content": [
                {"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": "What is this?"}]}]}),
        ),
        (
            "/v1/messages",
            json!({"model": "m", "max_tokens": 9, "stream": true, "messages": [
                {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}]}),
        ),
    ]
}

#[tokio::test]
async fn clients_choose_windows_only_if_allowed() {
    let mut draft = words(60);
    draft[59] = LEAK.to_owned();
    for (mode_header, wish, goes_out) in
        [(false, "windowed", false), (true, "windowed", true), (true, "hold", false)]
    {
        let settings = Settings { mode_header, stream: Streams::Hold, ..windowed() };
        let world = ScriptedModel::of(draft.clone()).world(settings).await;
        let headers = [("x-ecso-stream", wish)];
        let got = world.send("POST", "/v1/chat/completions", &headers, asked().to_string()).await;
        assert_eq!(got.body.contains("bread"), goes_out, "{mode_header} {wish}");
    }
    let world = ScriptedModel::of(draft).world(windowed()).await;
    let got = world
        .send("POST", "/v1/chat/completions", &[("x-ecso-stream", "fast")], asked().to_string())
        .await;
    assert_eq!((got.status.as_u16(), &got.json()["error"]["code"]), (400, &json!("invalid_mode")));
}

/// What an upstream hides in the middle of a windowed draft.
#[tokio::test]
async fn nothing_hides_between_windows() {
    for (name, more) in hidden_answers() {
        let mut odd = json!({"choices": [{"index": 0, "delta": {}}]});
        let mut choice = more["choices"][0].clone();
        if let Some(message) = choice.as_object_mut().and_then(|choice| choice.remove("message")) {
            choice["delta"] = message;
        }
        merge(&mut odd["choices"][0], &choice);
        for (name_of_frame, value) in
            more.as_object().into_iter().flatten().filter(|(name, _)| *name != "choices")
        {
            odd[name_of_frame] = value.clone();
        }
        let mut model = ScriptedModel::of(words(24));
        model.pieces.insert(16, odd);
        let got = stream(&model.world(windowed()).await, &asked()).await;
        assert!(!got.leaks(), "{name}: {}", got.body);
        assert!(got.body.contains("bread3 "), "{name}: {}", got.body);
    }
}

#[tokio::test]
async fn reasoning_is_windowed_too() {
    let thought =
        |text: &str| json!({"choices": [{"index": 0, "delta": {"reasoning_content": text}}]});
    for harm in [None, Some(55)] {
        let mut model = ScriptedModel::of(words(30));
        let thoughts = words(60).into_iter().enumerate();
        let thoughts =
            thoughts.map(|(place, word)| thought(if harm == Some(place) { LEAK } else { &word }));
        model.pieces.splice(1..1, thoughts);
        let got = stream(&model.world(windowed()).await, &asked()).await;
        assert!(!got.leaks(), "{}", got.body);
        assert!(said(&got.body, "reasoning_content").contains("bread20"), "{}", got.body);
        match harm {
            None => {
                assert_eq!(said(&got.body, "reasoning_content"), words(60).concat());
                assert_eq!(said(&got.body, "content"), words(30).concat());
                // In order.
                let all = events(&got.body);
                let field =
                    |event: &Value, name: &str| event["choices"][0]["delta"][name].is_string();
                let last = all.iter().rposition(|event| field(event, "reasoning_content")).unwrap();
                let first = all.iter().position(|event| field(event, "content")).unwrap();
                assert!(last < first);
            }
            Some(_) => assert_eq!(
                (said(&got.body, "content"), finishes(&got.body)),
                (String::new(), vec!["content_filter".to_owned()])
            ),
        }
    }
}

#[tokio::test]
async fn unrequested_tool_calls_wait_for_the_end() {
    let call = |arguments: &str| {
        json!({"choices": [{"index": 0, "delta": {"tool_calls": [
            {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}]}}]})
    };
    for (arguments, goes_out) in [("{\"a\": 1}", true), (LEAK, false)] {
        let mut model = ScriptedModel::of(words(60));
        model.pieces.insert(30, call(arguments));
        let got = stream(&model.world(windowed()).await, &asked()).await;
        assert!(!got.leaks() && got.body.contains("bread3 "), "{}", got.body);
        assert_eq!(got.body.contains("tool_calls"), goes_out, "{}", got.body);
        if goes_out {
            assert_eq!(said(&got.body, "content"), words(60).concat());
        }
    }
}

#[tokio::test]
async fn other_choices_wait_for_the_end() {
    let mut model = ScriptedModel::of(words(60));
    let other =
        json!({"choices": [{"index": 1, "delta": {"content": LEAK}, "finish_reason": "stop"}]});
    model.pieces.insert(30, other);
    let got = stream(&model.world(windowed()).await, &asked()).await;
    assert!(!got.leaks() && said(&got.body, "content").contains("bread3 "), "{}", got.body);
}

#[tokio::test]
async fn split_characters_are_joined() {
    let mut model = ScriptedModel::of(words(0));
    let half = |half: &str| {
        format!(
            "data: {{\"choices\": [{{\"index\": 0, \"delta\": {{\"content\": \"{half}\"}}}}]}}\n\n"
        )
    };
    let mut text = String::new();
    for place in 0..40 {
        text += &(half(&format!("Brot{place} \\ud83d")) + &half("\\ude00 面包。"));
    }
    text += &half("\\ud83d");
    let last: Vec<String> =
        model.pieces.drain(1..).map(|piece| format!("data: {piece}\n\n")).collect();
    let text = text + &last.concat() + "data: [DONE]\n\n";
    let respond = move |_: &Value| {
        // Split anywhere, even inside characters.
        let bytes: Vec<Bytes> = text.as_bytes().chunks(11).map(Bytes::copy_from_slice).collect();
        let body = futures::stream::iter(bytes).then(|piece| async {
            tokio::time::sleep(Duration::from_micros(200)).await;
            Ok::<_, std::io::Error>(piece)
        });
        ([("content-type", "text/event-stream")], Body::from_stream(body)).into_response()
    };
    let world = Harness::new(windowed(), Arc::new(respond)).await;
    let got = stream(&world, &asked()).await;
    let whole: Vec<String> = (0..40).map(|place| format!("Brot{place} 😀 面包。")).collect();
    assert_eq!(said(&got.body, "content"), whole.concat() + "\u{FFFD}");
    assert!(found(&got.body)["early"]["characters"].as_u64().unwrap() > 100, "{}", got.body);
    assert_eq!(finishes(&got.body), ["stop"]);
}

#[tokio::test]
async fn a_held_draft_is_stopped_at_the_first_harm() {
    let mut draft = words(90);
    draft[20] = format!("{LEAK} ");
    let settings = Settings { stream: Streams::Hold, early_stop: true, ..windowed() };
    let mut doors = vec![("/v1/chat/completions", asked())];
    doors.extend(formats());
    for (path, body) in doors {
        let model = ScriptedModel::of(draft.clone()).pause_before(80);
        let world = model.world(settings.clone()).await;
        let got = world.send("POST", path, &[], body.to_string());
        let got = tokio::time::timeout(Duration::from_secs(20), got).await.unwrap();
        assert!(!got.leaks() && !got.body.contains("bread"), "{path} {}", got.body);
        assert!(got.body.contains("Here is a harmless answer.") && model.is_stopped().await);
        assert!(got.body.contains("\"stopped\":true"), "{}", got.body);
        // Findings from early checks are not asked for again.
        let judged = world.take_requests().into_iter().filter(|reached| {
            let sent = String::from_utf8_lossy(&reached.body).into_owned();
            sent.contains("harmful, unsafe and unethical") && sent.contains(LEAK)
        });
        assert_eq!(judged.count(), 1, "{path}");
        // Harmless answers go out as usual.
        let got = ScriptedModel::of(words(60))
            .world(settings.clone())
            .await
            .send("POST", path, &[], body.to_string())
            .await;
        assert!(
            got.body.contains("bread0 ") && got.body.contains("bread59"),
            "{path} {}",
            got.body
        );
    }
}

#[tokio::test]
async fn complete_answers_are_not_judged_twice() {
    let text = words(20).concat();
    let world = ScriptedModel::of([text.clone()]).world(windowed()).await;
    let got = stream(&world, &asked()).await;
    assert_eq!(said(&got.body, "content"), text);
    // The answer, and one check.
    assert_eq!((world.take_requests().len(), found(&got.body)["choices"].is_null()), (2, true));
}

/// The text that clients of the other formats collect.
fn said_elsewhere(body: &str) -> String {
    let texts = events(body);
    let text = |event: &Value| {
        let delta = &event["delta"];
        delta["text"].as_str().or(delta.as_str()).map(str::to_owned)
    };
    texts
        .iter()
        .filter(|event| event["type"] != "response.refusal.delta")
        .filter_map(text)
        .collect()
}

/// Holds that a stream is whole: one beginning, one end, and numbers without gaps.
fn is_well_formed(body: &str) -> Vec<String> {
    let all = events(body);
    for (number, event) in all.iter().enumerate() {
        assert_eq!(
            event.get("sequence_number").unwrap_or(&json!(number)),
            &json!(number),
            "{body}"
        );
    }
    let kinds: Vec<String> =
        all.iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect();
    let begins = ["message_start", "response.created"].map(str::to_owned);
    assert!(begins.contains(&kinds[0]) && !kinds[1..].iter().any(|kind| begins.contains(kind)));
    kinds
}

#[tokio::test]
async fn other_formats_are_windowed_too() {
    for (route, asked) in formats() {
        let model = ScriptedModel::of(words(60)).pause_before(40);
        let world = model.world(windowed()).await;
        let response = world.open("POST", route, &[], asked.to_string()).await;
        let (mut read, mut rest) = read_until(response, "bread3 ").await;
        assert!(!read.contains("bread39"), "{read}");
        model.goes_on.notify_one();
        while let Some(piece) = rest.next().await {
            read.push_str(&String::from_utf8_lossy(&piece));
        }
        assert_eq!(said_elsewhere(&read), words(60).concat(), "{read}");
        let kinds = is_well_formed(&read);
        let deltas = kinds.iter().filter(|kind| kind.ends_with("delta")).count();
        assert!(deltas > 2, "{kinds:?}");
        let last = events(&read).pop().unwrap();
        let whole = &last["response"]["output"][0]["content"][0]["text"];
        assert!(whole.is_null() || *whole == words(60).concat(), "{whole}");
    }
}

#[tokio::test]
async fn harm_ends_the_streams_of_other_formats() {
    for (route, asked) in formats() {
        for at in [2, 40, 59] {
            // Text goes out up to the end of a line.
            let mut draft: Vec<String> =
                words(60).iter().map(|word| word.replace(". ", ".\n")).collect();
            draft[at] = format!("{LEAK} ");
            let mut model = ScriptedModel::of(draft);
            let thoughts =
                json!({"choices": [{"index": 0, "delta": {"reasoning": "I think of dough. "}}]});
            model.pieces.splice(1..1, vec![thoughts; 20]);
            let world = model.world(windowed()).await;
            let got = world.send("POST", route, &[], asked.to_string()).await;
            assert!(!got.leaks(), "{route} {at} {}", got.body);
            let kinds = is_well_formed(&got.body);
            let said = said_elsewhere(&got.body);
            let last = events(&got.body).pop().unwrap();
            let end = events(&got.body).into_iter().rev().nth(1).unwrap();
            if at == 2 {
                assert_eq!(said, "Here is a harmless answer.", "{route} {}", got.body);
                continue;
            }
            // Some words are out: the format's own refusal, and the new answer beside it.
            assert!(said.starts_with("bread0 "), "{said}");
            let ecso = if route == "/v1/messages" {
                assert_eq!(end["delta"]["stop_reason"], "refusal", "{end}");
                &last["ecso"]
            } else {
                assert_eq!(kinds.last().unwrap(), "response.incomplete");
                assert_eq!(last["response"]["incomplete_details"]["reason"], "content_filter");
                assert!(kinds.iter().any(|kind| kind == "response.refusal.done"), "{kinds:?}");
                &last["response"]["ecso"]
            };
            assert_eq!(ecso["safe_answer"], "Here is a harmless answer.", "{ecso}");
            assert_eq!(ecso["verdict"], "unsafe");
            // Reasoning was left out, so it is not counted.
            assert!(!got.body.contains("dough"), "{}", got.body);
            let out = said.split("I'm sorry").next().unwrap();
            assert_eq!(ecso["early"]["words"], out.split_whitespace().count(), "{ecso}");
        }
    }
}

#[tokio::test]
async fn a_failure_ends_the_streams_of_other_formats_once() {
    for (route, asked) in formats() {
        let mut model = ScriptedModel::of(words(60));
        // A draft that breaks off in the middle.
        model.pieces.truncate(50);
        model.pieces.push(json!({"error": {"message": "broken"}}));
        let world = model.world(windowed()).await;
        let got = world.send("POST", route, &[], asked.to_string()).await;
        let kinds = is_well_formed(&got.body);
        assert!(said_elsewhere(&got.body).starts_with("bread0 "), "{}", got.body);
        let failures =
            kinds.iter().filter(|kind| ["error", "response.failed"].contains(&kind.as_str()));
        assert_eq!(failures.count(), 1, "{kinds:?}");
        assert!(["error", "response.failed"].contains(&kinds.last().unwrap().as_str()));
    }
}
