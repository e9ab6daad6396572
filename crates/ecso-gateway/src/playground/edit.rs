//! A profile that was edited in the page: changed keys of an existing profile.

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
    json,
    server::{finish_response, request_id},
    state::AppState,
    telemetry,
    upstream::HTTP,
};

/// Longest name of a profile, in characters.
const MAX_NAME: usize = 60;
/// Maximum number of changed keys, and how long and how deeply nested a key may be.
const MAX_KEYS: usize = 200;
const MAX_KEY: usize = 100;
const MAX_DEPTH: usize = 8;
/// Longest new value, and how many placeholders a prompt may have: each is filled with the whole
/// request.
const MAX_VALUE: usize = 8000;
const MAX_PLACEHOLDERS: usize = 40;

/// The changes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Edit {
    /// The profile that is changed.
    base: String,
    /// The name of the result.
    name: String,
    /// New values by dotted key, such as `questions.words.template`.
    changes: Map<String, Value>,
}

impl Edit {
    /// Applies the changes.
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
            return invalid(
                "name",
                format!("a profile needs a name of 1 to {MAX_NAME} characters"),
            );
        }
        if name == "unguarded" || super::profiles(state).iter().any(|profile| profile.name == name)
        {
            return invalid("name", format!("{name:?} is the name of another profile"));
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
                    format!("a key may have at most {MAX_KEY} characters and {MAX_DEPTH} parts"),
                );
            }
            if written.chars().count() > MAX_VALUE
                || written.matches('{').count() > MAX_PLACEHOLDERS
            {
                return invalid(
                    key,
                    format!(
                        "a value may have at most {MAX_VALUE} characters and {MAX_PLACEHOLDERS} \
                         placeholders"
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

/// A value in TOML, on one line.
fn to_toml_value(value: &Value) -> String {
    // JSON writes texts, numbers and booleans like TOML does, except for this character.
    value.to_string().replace('\u{7f}', "\\u007f")
}

/// Checks an edited profile, and returns it as a file for `--profile`.
pub(super) async fn profile(
    State(page): State<PageState>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), page.gateway.state());
    let span = telemetry::request_span("playground", &id, request.headers());
    let response = async {
        let mut context = page.gateway.admit_page(&state, &id)?;
        let body = context.read(request.into_body()).await?;
        super::require_full_trace(&state)?;
        let profile = json::parse_as::<Edit>(&body)?.apply(&state)?;
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
