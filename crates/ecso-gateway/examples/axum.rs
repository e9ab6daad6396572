//! The guard in an application of your own: mounted below a path of an axum router, next to other
//! routes.
//!
//! Clients use the base URL `http://127.0.0.1:8080/guarded/v1`. `ecso serve` limits connections
//! with `ecso_gateway::serve`; here the application has to do that.

use std::{error::Error, sync::Arc};

use axum::{Router, routing::get};
use ecso::{Limits, Profile};
use ecso_gateway::{Gateway, Settings, Upstream};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let upstream =
        Upstream::server("http://127.0.0.1:8000/v1", None, ecso_openai::Options::default(), None)?;
    let gateway =
        Gateway::new(upstream, Profile::hardened(), Settings::default(), Limits::default())?;
    let app = Router::new()
        .route("/", get(|| async { "Bread." }))
        .nest("/guarded", Arc::new(gateway).router());
    axum::serve(tokio::net::TcpListener::bind("127.0.0.1:8080").await?, app).await?;
    Ok(())
}
