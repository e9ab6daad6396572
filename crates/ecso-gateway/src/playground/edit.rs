//! A profile that is changed in the page: by keys, over one that is there.

use std::sync::Arc;

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use ecso::Profile;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::Instrument;

use super::{Visit, threshold};
use crate::{
    error::ApiError,
    server::{request_id, signed},
    state::AppState,
    telemetry,
    upstream::HTTP,
};

/// Longest name of a profile.
const NAME: usize = 60;
/// Most keys that are changed, and how long and how deep one is.
const KEYS: usize = 200;
const KEY: usize = 100;
const DEPTH: usize = 8;
/// Longest new value, and how many holes a prompt may have: each is filled with all that is asked.
const VALUE: usize = 8000;
const HOLES: usize = 40;

/// What is changed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Edit {
    /// The profile that it begins from.
    base: String,
    /// What the result is called.
    name: String,
    /// New values by dotted key, as in `questions.words.template`.
    changes: Map<String, Value>,
}

impl Edit {
    /// The profile that results.
    pub(super) fn apply(&self, state: &AppState) -> Result<Profile, ApiError> {
        let name = self.name.trim();
        let refused = |key: &str, message: String| {
            Err(ApiError {
                param: Some(key.to_owned()),
                ..ApiError::bad_request("invalid_profile", message)
            })
        };
        if name.is_empty() || name.chars().count() > NAME || name.chars().any(char::is_control) {
            return refused("name", format!("a profile has a name of 1 to {NAME} characters"));
        }
        if name == "unguarded" || super::profiles(state).iter().any(|profile| profile.name == name)
        {
            return refused("name", format!("{name:?} is another profile's name"));
        }
        if self.changes.len() > KEYS {
            return refused("changes", format!("at most {KEYS} keys can be changed"));
        }
        let mut profile = super::profile(state, &self.base)?;
        for (key, value) in &self.changes {
            let written = written(value);
            if key.len() > KEY || key.matches('.').count() >= DEPTH {
                return refused(
                    "changes",
                    format!("a key has at most {KEY} letters and {DEPTH} parts"),
                );
            }
            if written.chars().count() > VALUE || written.matches('{').count() > HOLES {
                return refused(
                    key,
                    format!("a value has at most {VALUE} characters, and {HOLES} holes"),
                );
            }
            match profile.with(key, &written) {
                Ok(changed) => profile = changed,
                Err(error) => return refused(key, error.to_string()),
            }
        }
        name.clone_into(&mut profile.name);
        Ok(profile)
    }
}

/// A value as TOML writes it, on one line.
fn written(value: &Value) -> String {
    // JSON writes texts, numbers and switches as TOML does, but for one letter.
    value.to_string().replace('\u{7f}', "\\u007f")
}

/// Checks a profile that is changed in the page, and writes it as a file that `--profile` reads.
pub(super) async fn profile(
    State(visit): State<Visit>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), visit.gateway.state());
    let span = telemetry::span("playground", &id, request.headers());
    let checked = async {
        let mut context = visit.gateway.receive(&state, &id);
        let body = context.read(request.into_body()).await?;
        super::needs_full(&state)?;
        let profile = read::<Edit>(&body)?.apply(&state)?;
        let told = json!({"toml": profile.to_toml(), "threshold": threshold(&profile)});
        Ok(([(header::CONTENT_TYPE, "application/json")], told.to_string()).into_response())
    };
    signed(&id, (HTTP, "playground"), &Arc::clone(&state).metrics, checked.instrument(span)).await
}

/// A body of the page's.
pub(super) fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let unreadable =
        |why| ApiError::bad_request("invalid_request", format!("the body can't be read: {why}"));
    let body = crate::json::read(body).map_err(unreadable)?;
    serde_json::from_value(body).map_err(|error| unreadable(error.to_string()))
}
