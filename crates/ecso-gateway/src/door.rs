//! `POST /v1/guard`: for people who serve their model themselves. Images, query and an answer in; verdict, captions and a safe
//! answer out.

use ecso::{Outcome, Step, Verdict};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::failure::Failure;

/// What is asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Question {
    /// Which model judges and answers; for a server behind us.
    #[serde(default)]
    model: String,
    /// A conversation as in chat completions; or `query` and `images`.
    #[serde(default)]
    messages: Vec<Value>,
    #[serde(default)]
    query: Option<String>,
    /// URLs; data URLs too.
    #[serde(default)]
    images: Vec<String>,
    /// The answer that is judged; without one, the model gives it.
    #[serde(default)]
    pub(crate) answer: Option<String>,
}

impl Question {
    pub(crate) fn read(body: &[u8]) -> Result<Self, Failure> {
        serde_json::from_slice(body)
            .map_err(|error| Failure::bad_request("invalid_request", format!("the body can't be read: {error}")))
    }

    /// The question as a chat request.
    pub(crate) fn chat(&self) -> Result<Vec<u8>, Failure> {
        let messages = match (&self.query, self.messages.is_empty()) {
            (None, false) => json!(self.messages),
            (Some(query), true) => {
                let images = self.images.iter().map(|url| json!({"type": "image_url", "image_url": {"url": url}}));
                let parts: Vec<Value> = images.chain([json!({"type": "text", "text": query})]).collect();
                json!([{"role": "user", "content": parts}])
            }
            _ => {
                return Err(Failure::bad_request(
                    "invalid_request",
                    "give either `messages`, or `query` with `images`",
                ));
            }
        };
        Ok(json!({"model": self.model, "messages": messages}).to_string().into_bytes())
    }
}

/// What is found.
#[derive(Debug, Serialize)]
pub(crate) struct Finding<'a> {
    pub(crate) request_id: &'a str,
    pub(crate) verdict: Verdict,
    pub(crate) score: Option<f64>,
    /// What may go out: the answer that was judged, or the safe one.
    pub(crate) answer: &'a str,
    /// The safe answer, if one was needed.
    pub(crate) safe_answer: Option<&'a str>,
    /// One for each image, if they were needed.
    pub(crate) captions: Vec<&'a str>,
    pub(crate) profile: &'a str,
    pub(crate) model: &'a str,
}

impl<'a> Finding<'a> {
    pub(crate) fn new(request_id: &'a str, outcome: &'a Outcome) -> Self {
        let captions = outcome.steps.iter().filter(|step| step.step == Step::Caption);
        Self {
            request_id,
            verdict: outcome.verdict,
            score: outcome.score,
            answer: &outcome.answer,
            safe_answer: outcome.rewritten.then_some(outcome.answer.as_str()),
            captions: captions.map(|step| step.reply.as_str()).collect(),
            profile: &outcome.profile,
            model: &outcome.model,
        }
    }
}
