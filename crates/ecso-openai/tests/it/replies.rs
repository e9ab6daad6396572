//! Replies as servers really send them.

use std::io::Write;

use ecso::{Chat, Mllm, Reply, Usage};
use ecso_openai::{Bodies, http_client};
use flate2::{Compression, write};
use wiremock::{Mock, MockServer, ResponseTemplate, matchers::method};

use super::{client, options, sampling};

async fn reply(body: ResponseTemplate, stream: bool) -> Reply {
    let server = MockServer::start().await;
    Mock::given(method("POST")).respond_with(body).mount(&server).await;
    let client = client(&server).await;
    let chat = Chat::ask([], "q");
    if stream {
        ecso::collect(client.stream(&chat, &sampling()).await.unwrap()).await.unwrap()
    } else {
        client.generate(&chat, &sampling()).await.unwrap()
    }
}

fn odd() -> Reply {
    Reply {
        text: "a 😀".into(),
        reasoning: "Hm.".into(),
        usage: Some(Usage { prompt_tokens: 10, completion_tokens: 0 }),
        ..Reply::default()
    }
}

#[tokio::test]
async fn an_odd_reply_is_read() {
    let body = r#"{"choices": [{
        "message": {"content": [{"type": "text", "text": "a \ud83d"}, {"type": "text", "text": "\ude00"}], "reasoning": "Hm."},
        "logprobs": {"content": [{"token": "Hm", "logprob": -Infinity, "top_logprobs": [{"token": "Hm", "logprob": NaN}]}]},
        "finish_reason": ""
    }], "usage": {"prompt_tokens": 10.0, "completion_tokens": "none"}}"#;
    assert_eq!(reply(ResponseTemplate::new(200).set_body_string(body), false).await, odd());
}

#[tokio::test]
async fn an_odd_stream_is_read() {
    let events = [
        r#"{"choices": [{"delta": {"role": "assistant", "content": null, "reasoning_content": "Hm."}, "finish_reason": ""}]}"#,
        r#"{"choices": [{"delta": {"content": [{"type": "text", "text": "a \ud83d"}]}, "logprobs": {"content": -Infinity}}]}"#,
        r#"{"choices": [{"delta": {"content": "\ude00"}, "logprobs": null}], "usage": null}"#,
        r#"{"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": "none"}"#,
        r#"{"choices": null, "usage": {"prompt_tokens": 10.0, "completion_tokens": -1}}"#,
    ];
    let body = events.map(|event| format!("data: {event}\n\n")).concat();
    assert_eq!(reply(ResponseTemplate::new(200).set_body_string(body), true).await, odd());
}

const PLAIN: &str = r#"{"choices": [{"message": {"content": "packed"}, "finish_reason": "stop"}]}"#;

fn gzipped() -> Vec<u8> {
    let mut packed = write::GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(PLAIN.as_bytes()).unwrap();
    packed.finish().unwrap()
}

/// A Zstandard frame (RFC 8878) of one raw block.
fn zstandard() -> Vec<u8> {
    let length = u8::try_from(PLAIN.len()).unwrap();
    let block = (u32::from(length) << 3 | 1).to_le_bytes();
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x20, length];
    frame.extend(&block[..3]);
    frame.extend(PLAIN.as_bytes());
    frame
}

#[tokio::test]
async fn compressed_replies_are_unpacked() {
    let mut deflated = write::ZlibEncoder::new(Vec::new(), Compression::default());
    deflated.write_all(PLAIN.as_bytes()).unwrap();
    for (coding, body) in
        [("gzip", gzipped()), ("deflate", deflated.finish().unwrap()), ("zstd", zstandard())]
    {
        let packed = ResponseTemplate::new(200)
            .insert_header("content-encoding", coding)
            .set_body_bytes(body);
        assert_eq!(reply(packed, false).await.text, "packed", "{coding}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_bodies_alone_asks_for_nothing_and_unpacks_nothing() {
    let server = MockServer::start().await;
    let packed = ResponseTemplate::new(200)
        .insert_header("content-encoding", "gzip")
        .set_body_bytes(gzipped());
    Mock::given(method("GET")).respond_with(packed).mount(&server).await;
    let as_sent = http_client(&server.uri(), &options(), Bodies::AsSent).unwrap();
    let response = as_sent.get(server.uri()).send().await.unwrap();
    assert_eq!(response.headers()["content-encoding"], "gzip");
    assert_eq!(response.headers()["content-length"], gzipped().len().to_string().as_str());
    assert_eq!(response.bytes().await.unwrap(), gzipped());
    let unpacked = http_client(&server.uri(), &options(), Bodies::Unpacked)
        .unwrap()
        .get(server.uri())
        .send()
        .await
        .unwrap();
    assert_eq!(unpacked.text().await.unwrap(), PLAIN);
    let requests = server.received_requests().await.unwrap();
    assert!(
        !requests[0].headers.contains_key("accept-encoding")
            && !requests[0].headers.contains_key("user-agent")
    );
    let asked = requests[1].headers["accept-encoding"].to_str().unwrap().to_owned();
    assert!(
        ["gzip", "deflate", "br", "zstd"].iter().all(|coding| asked.contains(coding)),
        "{asked}"
    );
}
