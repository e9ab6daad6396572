//! Attacks on resources of the server: memory, connections and file descriptors.

use std::time::{Duration, Instant};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{
    serve::{Served, ask, client, picture, post},
    upstream::Upstream,
};

/// Maximum memory during each attack, in MB.
const MOST: f64 = 300.0;

fn address(served: &Served) -> String {
    served.url.trim_start_matches("http://").trim_end_matches("/v1").to_owned()
}

async fn answers(served: &Served) {
    let begun = Instant::now();
    let got = post(&served.chat(), &ask("mock", "What is on the list?", false)).await;
    assert_eq!(got.status, 200, "{}", got.body);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_make_room() {
    let upstream = Upstream::start().await;
    let served = Served::with_descriptors(128, &upstream.url, &["gateway.limits.patience=2"]);
    let mut half = Vec::new();
    for _ in 0..130 {
        let mut stream = TcpStream::connect(address(&served)).await.unwrap();
        stream
            .write_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            .await
            .unwrap();
        half.push(stream);
    }
    answers(&served).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_take_bounded_memory() {
    let upstream = Upstream::start().await;
    let served = Served::start(&upstream.url, &[], &[]);
    // Many values, each of two bytes.
    let zeros = format!("{{\"messages\": [{}0]}}", "0,".repeat(15 << 20));
    let got = client()
        .post(served.chat())
        .header("content-type", "application/json")
        .body(zeros)
        .send()
        .await
        .unwrap();
    assert_eq!(got.status(), 400);
    // Deep values and long names.
    for body in ["[".repeat(20 << 20), format!("{{\"{}\": 1}}", "a".repeat(20 << 20))] {
        let request =
            client().post(served.chat()).header("content-type", "application/json").body(body);
        assert_eq!(request.send().await.unwrap().status(), 400);
    }
    assert!(served.peak() < MOST, "{} MB", served.peak());

    // Bodies that never end.
    let mut unfinished = Vec::new();
    for _ in 0..40 {
        let mut stream = TcpStream::connect(address(&served)).await.unwrap();
        let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                    Content-Length: 20000000\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        // Bodies that exceed the limit are cut off.
        let _ = stream.write_all(&vec![b' '; 8_600_000]).await;
        unfinished.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(served.peak() < MOST, "{} MB", served.peak());
    drop(unfinished);
    tokio::time::sleep(Duration::from_millis(300)).await;
    answers(&served).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_body_is_guarded_in_bounded_memory() {
    let upstream = Upstream::start().await;
    let served = Served::start(&upstream.url, &[], &[]);
    let part = |part: Value| {
        let mut body = ask("mock", "What is on the list?", false);
        body["messages"][0]["content"].as_array_mut().unwrap().push(part);
        body
    };
    let got =
        post(&served.chat(), &part(json!({"type": "text", "text": "x".repeat(24 << 20)}))).await;
    assert_eq!(got.status, 413, "{}", got.body);
    let got =
        post(&served.chat(), &part(json!({"type": "text", "text": "x".repeat(3 << 20)}))).await;
    assert_eq!(got.status, 200, "{}", got.body);
    // An image with many bytes after its end.
    let picture = BASE64_STANDARD.decode(picture().split_once(',').unwrap().1).unwrap();
    let long = BASE64_STANDARD.encode([picture, vec![0; 15 << 20]].concat());
    let url = format!("data:image/png;base64,{long}");
    let got =
        post(&served.chat(), &part(json!({"type": "image_url", "image_url": {"url": url}}))).await;
    assert_eq!(got.status, 200, "{}", got.body);
    assert!(served.peak() < MOST, "{} MB", served.peak());
}
