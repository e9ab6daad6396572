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

use super::{PageState, threshold};
use crate::{
    error::ApiError,
    server::{finish_response, request_id},
    state::AppState,
    telemetry,
    upstream::HTTP,
};

/// Longest name of a profile.
const MAX_NAME: usize = 60;
/// Most keys that are changed, and how long and how deep one is.
const MAX_KEYS: usize = 200;
const MAX_KEY: usize = 100;
const MAX_DEPTH: usize = 8;
/// Longest new value, and how many holes a prompt may have: each is filled with all that is asked.
const MAX_VALUE: usize = 8000;
const MAX_PLACEHOLDERS: usize = 40;

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
        let invalid = |key: &str, message: String| {
            Err(ApiError {
                param: Some(key.to_owned()),
                ..ApiError::bad_request("invalid_profile", message)
            })
        };
        if name.is_empty() || name.chars().count() > MAX_NAME || name.chars().any(char::is_control)
        {
            return invalid("name", format!("a profile has a name of 1 to {MAX_NAME} characters"));
        }
        if name == "unguarded" || super::profiles(state).iter().any(|profile| profile.name == name)
        {
            return invalid("name", format!("{name:?} is another profile's name"));
        }
        if self.changes.len() > MAX_KEYS {
            return invalid("changes", format!("at most {MAX_KEYS} keys can be changed"));
        }
        let mut profile = super::profile(state, &self.base)?;
        for (key, value) in &self.changes {
            let written = to_toml_value(value);
            if key.len() > MAX_KEY || key.matches('.').count() >= MAX_DEPTH {
                return invalid(
                    "changes",
                    format!("a key has at most {MAX_KEY} letters and {MAX_DEPTH} parts"),
                );
            }
            if written.chars().count() > MAX_VALUE
                || written.matches('{').count() > MAX_PLACEHOLDERS
            {
                return invalid(
                    key,
                    format!(
                        "a value has at most {MAX_VALUE} characters, and {MAX_PLACEHOLDERS} holes"
                    ),
                );
            }
            match profile.with(key, &written) {
                Ok(changed) => profile = changed,
                Err(error) => return invalid(key, error.to_string()),
            }
        }
        name.clone_into(&mut profile.name);
        Ok(profile)
    }
}

/// A value as TOML writes it, on one line.
fn to_toml_value(value: &Value) -> String {
    // JSON writes texts, numbers and switches as TOML does, but for one letter.
    value.to_string().replace('\u{7f}', "\\u007f")
}

/// Checks a profile that is changed in the page, and writes it as a file that `--profile` reads.
pub(super) async fn profile(
    State(page): State<PageState>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), page.gateway.state());
    let span = telemetry::request_span("playground", &id, request.headers());
    let response = async {
        let mut context = page.gateway.admit_page(&state, &id);
        let body = context.read(request.into_body()).await?;
        super::require_full_trace(&state)?;
        let profile = read::<Edit>(&body)?.apply(&state)?;
        let checked = json!({"toml": profile.to_toml(), "threshold": threshold(&profile)});
        Ok(([(header::CONTENT_TYPE, "application/json")], checked.to_string()).into_response())
    };
    finish_response(
        &id,
        (HTTP, "playground"),
        &Arc::clone(&state).metrics,
        response.instrument(span),
    )
    .await
}

/// A body of the page's.
pub(super) fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let unreadable =
        |why| ApiError::bad_request("invalid_request", format!("the body can't be read: {why}"));
    let body = crate::json::parse(body).map_err(unreadable)?;
    serde_json::from_value(body).map_err(|error| unreadable(error.to_string()))
}
