//! The guard as a `tower` layer around a service of your own: here an application that answers
//! chats itself.
//!
//! Clients use the base URL `http://127.0.0.1:8080/v1`. The service's answers to chats with images
//! are judged by the model on port 8000 before they go out.

use std::{error::Error, sync::Arc};

use axum::{Router, http::header::CONTENT_TYPE, response::IntoResponse, routing::post};
use ecso::{Limits, Profile};
use ecso_gateway::{Gateway, Settings, Upstream};
use serde_json::json;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let upstream =
        Upstream::server("http://127.0.0.1:8000/v1", None, ecso_openai::Options::default(), None)?;
    let gateway =
        Gateway::new(upstream, Profile::hardened(), Settings::default(), Limits::default())?;
    let model =
        Router::new().route("/v1/chat/completions", post(answer)).layer(Arc::new(gateway).layer());
    axum::serve(tokio::net::TcpListener::bind("127.0.0.1:8080").await?, model).await?;
    Ok(())
}

/// A model of your own.
async fn answer(_asked: String) -> impl IntoResponse {
    let message = json!({"role": "assistant", "content": "A list of kinds of bread."});
    let choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
    (
        [(CONTENT_TYPE, "application/json")],
        json!({"object": "chat.completion", "choices": [choice]}).to_string(),
    )
}
