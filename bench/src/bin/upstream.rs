//! A mock of an OpenAI-compatible server, as fast as one core allows: `upstream PORT`. Every answer
//! is the same; a question that asks for yes or no is answered with no. For `bench/gateway.py`.

use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"mock","choices":[{"index":0,"message":{"role":"assistant","content":"Bread, milk and apples are on the list."},"finish_reason":"stop"}],"usage":{"prompt_tokens":10,"completion_tokens":9,"total_tokens":19}}"#;
const NO: &str = r#"{"id":"chatcmpl-2","object":"chat.completion","created":1,"model":"mock","choices":[{"index":0,"message":{"role":"assistant","content":"No"},"finish_reason":"stop"}],"usage":{"prompt_tokens":10,"completion_tokens":1,"total_tokens":11}}"#;
const EVENT: &str = r#"data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"mock","choices":[{"index":0,"delta":{"content":"Bread "},"finish_reason":null}]}"#;
const END: &str = r#"data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"mock","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
const MODELS: &str =
    r#"{"object":"list","data":[{"id":"mock","object":"model","created":1,"owned_by":"bench"}]}"#;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let port: u16 = std::env::args().nth(1).and_then(|port| port.parse().ok()).unwrap_or(9000);
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(serve(stream));
    }
}

async fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(1 << 16);
    loop {
        let head = loop {
            if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
        let length =
            text.lines().find_map(|line| line.strip_prefix("content-length:")).map(str::trim);
        let chunked = text.contains("transfer-encoding: chunked");
        let length: usize = length.and_then(|length| length.parse().ok()).unwrap_or(0);
        let is_whole = |buffer: &[u8]| {
            if chunked { buffer.ends_with(b"0\r\n\r\n") } else { buffer.len() >= head + length }
        };
        while !is_whole(&buffer) {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        // The question stands at the end.
        let tail = &buffer[buffer.len().saturating_sub(600).max(head)..];
        let says = |words: &[u8]| tail.windows(words.len()).any(|window| window == words);
        let reply = if text.starts_with("get") {
            whole(MODELS)
        } else if says(b"\"stream\": true") || says(b"\"stream\":true") {
            let events = format!("{}{END}\n\ndata: [DONE]\n\n", format!("{EVENT}\n\n").repeat(8));
            format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {}\r\n\r\n{events}",
                events.len()
            )
        } else if says(b"Answer yes or no") {
            whole(NO)
        } else {
            whole(ANSWER)
        };
        stream.write_all(reply.as_bytes()).await?;
        buffer.clear();
    }
}

fn whole(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}
