//! Foreign image files, which a separate process decodes.

use ecso::testing::pdf;
use serde_json::Value;

use crate::{ask::server, ecso, text};

#[tokio::test(flavor = "multi_thread")]
async fn every_page_of_a_document_is_sent() {
    let (server, home) = (server(false).await, tempfile::tempdir().unwrap());
    let file = home.path().join("list.pdf");
    std::fs::write(&file, pdf(&["BT /F 12 Tf 5 10 Td (Bread) Tj ET", ""])).unwrap();
    ecso(home.path())
        .args(["ask", "What is this?", "--model", &server.uri(), "--image"])
        .arg(&file)
        .assert()
        .success();
    let asked = server.received_requests().await.unwrap();
    let asked = asked.iter().find(|request| request.url.path().ends_with("completions")).unwrap();
    let asked: Value = serde_json::from_slice(&asked.body).unwrap();
    let parts = asked["messages"][0]["content"].as_array().unwrap();
    let urls: Vec<&str> =
        parts.iter().filter_map(|part| part["image_url"]["url"].as_str()).collect();
    assert!(
        urls.len() == 2 && urls.iter().all(|url| url.starts_with("data:image/png;base64,")),
        "{urls:?}"
    );
}

#[test]
fn a_document_that_exhausts_memory_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("dashes.pdf");
    std::fs::write(&file, pdf(&["[0.000001 0.000001] 0 d 0 0 m 72 36 l S"])).unwrap();
    let output = ecso(home.path())
        .args(["ask", "What is this?", "--model", "http://127.0.0.1:9", "--image"])
        .arg(&file)
        .assert();
    let output = output.code(2).get_output().clone();
    let said = text(&output.stderr);
    assert!(said.contains("dashes.pdf: this is a PDF that can't be shown as images"), "{said}");
    assert!(said.contains("takes more than 2 GiB of memory"), "{said}");
}
