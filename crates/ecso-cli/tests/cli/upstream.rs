//! An OpenAI-compatible upstream that misbehaves on demand, byte by byte.
//!
//! It plays an MLLM whose drafts for queries with the word "bad" contain the text [`LEAK`], which its
//! judge calls harmful. A model named `FAULT@STEP` fails in that step; `flaky` fails in one of ten
//! calls.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

/// Text that no client may see.
pub(crate) const LEAK: &str = "UNJUDGED";
pub(crate) const MILD: &str = "Bread, milk, apples.";
pub(crate) const SAFE: &str = "Here is a harmless answer.";

/// Counts over all connections.
#[derive(Default)]
pub(crate) struct Seen {
    /// Calls that started.
    pub(crate) calls: AtomicUsize,
    /// Calls that were failed on purpose.
    pub(crate) failed: AtomicUsize,
    /// Calls whose caller disconnected while they hung.
    pub(crate) abandoned: AtomicUsize,
    /// The trace headers of calls.
    pub(crate) traces: Mutex<Vec<String>>,
}

pub(crate) struct Upstream {
    pub(crate) url: String,
    pub(crate) seen: Arc<Seen>,
}

impl Upstream {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let seen = Arc::<Seen>::default();
        let shared = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let seen = Arc::clone(&shared);
                tokio::spawn(async move { serve(stream, &seen).await });
            }
        });
        Self { url, seen }
    }
}

/// Which step a request belongs to, by the words of the published prompts.
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

fn reply(step: &str, sent: &str) -> String {
    match step {
        "detect" if sent.contains(LEAK) => "Yes.".into(),
        "detect" => "No.".into(),
        "caption" => "A list.".into(),
        "safe" => SAFE.into(),
        _ if sent.contains("bad") => format!("Sure: {LEAK}, {LEAK}, äöü {LEAK}."),
        _ => MILD.into(),
    }
}

/// Serves one connection, request after request, until somebody leaves or a fault ends it.
async fn serve(stream: TcpStream, seen: &Seen) -> Option<()> {
    let _ = stream.set_nodelay(true);
    let mut stream = BufReader::new(stream);
    loop {
        let (mut length, mut line) = (0, String::new());
        loop {
            line.clear();
            if stream.read_line(&mut line).await.ok()? == 0 {
                return None;
            }
            let lower = line.to_ascii_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
            if let Some(value) = lower.strip_prefix("traceparent:") {
                seen.traces.lock().unwrap().push(value.trim().to_owned());
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        answer(&mut stream, &body, seen).await?;
    }
}

async fn answer(stream: &mut BufReader<TcpStream>, body: &Value, seen: &Seen) -> Option<()> {
    let call = seen.calls.fetch_add(1, Ordering::Relaxed);
    let sent = body["messages"].to_string();
    let (step, streamed) = (step(&sent), body["stream"] == true);
    let fault = match body["model"].as_str().unwrap_or_default().split_once('@') {
        Some((fault, at)) if at == step => fault,
        // A tenth, spread over kinds and steps.
        None if body["model"] == "flaky" && call * 7 % 10 == 3 => {
            ["500", "reset", "json"][call / 10 % 3]
        }
        _ => "",
    };
    if !fault.is_empty() {
        seen.failed.fetch_add(1, Ordering::Relaxed);
    }
    let mut text = reply(step, &sent);
    if let Some(unread) = body["response_format"]["type"].as_str().filter(|_| step == "safe") {
        text = format!("{text} ({unread})");
    }
    match fault {
        "hang" => {
            // Until the caller leaves.
            let mut rest = [0; 16];
            while stream.read(&mut rest).await.is_ok_and(|read| read > 0) {}
            seen.abandoned.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        "refuse" => return None,
        "429" => {
            return whole(
                stream,
                "429 Too Many Requests",
                "retry-after: 1\r\n",
                &error("slow down"),
            )
            .await;
        }
        "500" => {
            return whole(stream, "500 Internal Server Error", "", &error("out of memory")).await;
        }
        "json" => return whole(stream, "200 OK", "", "{\"choices\": [{\"mess").await,
        _ => {}
    }
    if streamed {
        stream_out(stream, &text, fault, seen).await
    } else {
        plain(stream, body, &text, fault).await
    }
}

fn error(message: &str) -> String {
    json!({"error": {"message": message, "type": "server_error"}}).to_string()
}

async fn whole(
    stream: &mut BufReader<TcpStream>,
    status: &str,
    headers: &str,
    body: &str,
) -> Option<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.ok()
}

async fn plain(
    stream: &mut BufReader<TcpStream>,
    body: &Value,
    text: &str,
    fault: &str,
) -> Option<()> {
    let choices: Vec<Value> = (0..body["n"].as_u64().unwrap_or(1))
        .map(|index| {
            // Of several choices only the last is harmful.
            let text = if index + 1 < body["n"].as_u64().unwrap_or(1) { MILD } else { text };
            json!({"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"})
        })
        .collect();
    let usage = json!({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15});
    let answer =
        json!({"id": "up-1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage,
            "kept": "as it is"})
            .to_string();
    match fault {
        "reset" => {
            let half = &answer[..answer.len() / 2];
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                answer.len()
            );
            stream.write_all(format!("{head}{half}").as_bytes()).await.ok()?;
            reset(stream)
        }
        "endless" => {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).await.ok()?;
            endless(stream, "{\"choices\": [{\"message\": {\"content\": \"again and again ").await
        }
        _ => whole(stream, "200 OK", "", &answer).await,
    }
}

fn event(delta: &Value, finish: Option<&str>) -> String {
    let choice = json!({"index": 0, "delta": delta, "finish_reason": finish});
    let chunk = json!({"id": "up-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [choice], "kept": 1});
    format!("data: {chunk}\n\n")
}

async fn chunk(stream: &mut BufReader<TcpStream>, bytes: &[u8]) -> Option<()> {
    let mut framed = format!("{:x}\r\n", bytes.len()).into_bytes();
    framed.extend_from_slice(bytes);
    framed.extend_from_slice(b"\r\n");
    stream.write_all(&framed).await.ok()
}

async fn stream_out(
    stream: &mut BufReader<TcpStream>,
    text: &str,
    fault: &str,
    seen: &Seen,
) -> Option<()> {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.ok()?;
    if fault == "endless" {
        return endless(stream, &event(&json!({"content": "again and again "}), None)).await;
    }
    let words: Vec<&str> = text.split_inclusive(' ').collect();
    let mut events: Vec<String> =
        words.iter().map(|word| event(&json!({"content": word}), None)).collect();
    events.push(event(&json!({}), Some("stop")));
    events.push("data: [DONE]\n\n".into());
    match fault {
        "reset" => {
            chunk(stream, events[0].as_bytes()).await?;
            return reset(stream);
        }
        "sse" => events.insert(1, "data: {\"choices\": [{\"del\n\n".into()),
        "cut" => events.truncate(1),
        "slow" => {
            for event in &events {
                chunk(stream, event.as_bytes()).await?;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            return chunk(stream, b"").await;
        }
        "stall" => {
            chunk(stream, events[0].as_bytes()).await?;
            let mut rest = [0; 16];
            while stream.read(&mut rest).await.is_ok_and(|read| read > 0) {}
            seen.abandoned.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        _ => {}
    }
    let all = events.concat();
    // Half a character a chunk.
    let size = if fault == "utf8" { 1 } else { 4096 };
    for piece in all.as_bytes().chunks(size) {
        chunk(stream, piece).await?;
    }
    chunk(stream, b"").await
}

/// Closes the connection with data unread or unsent: the other side sees a reset.
fn reset(stream: &BufReader<TcpStream>) -> Option<()> {
    stream.get_ref().set_zero_linger().ok()?;
    None
}

async fn endless(stream: &mut BufReader<TcpStream>, piece: &str) -> Option<()> {
    let piece = piece.repeat(400);
    loop {
        chunk(stream, piece.as_bytes()).await?;
    }
}
