//! Judging recorded traffic again: what would another profile have done?

use ecso::{Chat, Guard, GuardError, Mllm, Outcome, Verdict};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{request::Body, settings::Limits};

/// A line of an audit log with content.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The request id.
    pub id: String,
    /// The profile that judged it.
    pub profile: String,
    /// The verdict.
    pub verdict: Verdict,
    /// The requested model.
    pub model: String,
    chat: Chat,
    /// `None` if it was not waited for.
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
    /// Parses a line.
    ///
    /// # Errors
    /// A message that says what is wrong: not a line of an audit log, or one without content.
    pub fn parse(line: &str, images: ecso::Limits) -> Result<Self, String> {
        let line: Line = serde_json::from_str(line)
            .map_err(|error| format!("not a line of an audit log: {error}"))?;
        if line.messages.is_null() {
            return Err(
                "it has no content; set gateway.audit.content = true before you record".into()
            );
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

    /// Judges it again. If no draft was recorded, the model is asked for one.
    ///
    /// # Errors
    /// [`GuardError`] if the model fails.
    pub async fn review(&self, guard: &Guard<impl Mllm>) -> Result<Outcome, GuardError> {
        match &self.draft {
            Some(draft) => guard.review(&self.chat, draft).await,
            None => guard.answer(&self.chat).await,
        }
    }
}
