//! Judging recorded traffic again: what would another profile have done?

use ecso::{Chat, Guard, GuardError, Mllm, Outcome, Verdict};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{request::Body, settings::Limits};

/// A line of an audit log with content.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The request's name.
    pub id: String,
    /// The profile that judged it.
    pub profile: String,
    /// What it said.
    pub verdict: Verdict,
    /// The model that was asked for.
    pub model: String,
    chat: Chat,
    /// None where nobody waited for one.
    draft: Option<String>,
}

#[derive(Deserialize)]
struct Line {
    request_id: String,
    profile: String,
    verdict: Verdict,
    #[serde(default)]
    model: String,
    #[serde(default)]
    messages: Value,
    #[serde(default)]
    draft: Option<String>,
}

impl Recorded {
    /// Reads a line.
    ///
    /// # Errors
    /// What is wrong with it: no line of an audit log, or one without content.
    pub fn parse(line: &str, images: ecso::Limits) -> Result<Self, String> {
        let line: Line = serde_json::from_str(line)
            .map_err(|error| format!("not a line of an audit log: {error}"))?;
        if line.messages.is_null() {
            return Err("it has no content; record with gateway.audit.content = true".into());
        }
        let body = json!({"model": line.model, "messages": line.messages});
        let body = Body::parse(body, &[]).map_err(|error| error.message)?;
        let request =
            body.request(&Limits::default(), images, true).map_err(|error| error.message)?;
        Ok(Self {
            id: line.request_id,
            profile: line.profile,
            verdict: line.verdict,
            model: request.model,
            chat: request.chat,
            draft: line.draft,
        })
    }

    /// Judges it again, from the draft that was recorded; where there was none, the model is asked
    /// for one.
    ///
    /// # Errors
    /// [`GuardError`] when the model fails.
    pub async fn review(&self, guard: &Guard<impl Mllm>) -> Result<Outcome, GuardError> {
        match &self.draft {
            Some(draft) => guard.review(&self.chat, draft).await,
            None => guard.answer(&self.chat).await,
        }
    }
}
