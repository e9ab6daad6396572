//! The audit log: a JSON line for every answer that was judged. What people said stands in it only if the operator
//! wants that; else digests do.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use ecso::{Outcome, Step, Verdict};
use file_rotate::{ContentLimit, FileRotate, compression::Compression, suffix::AppendCount};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{chat::Report, request::Request, settings::Mode};

/// What is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The file; empty is none.
    pub path: PathBuf,
    /// Whether conversation, images, draft and answer are written too.
    pub content: bool,
    /// Bytes after which the file is set aside as `.1` and a new one is begun.
    pub bytes: usize,
    /// How many files that were set aside are kept.
    pub keep: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { path: PathBuf::new(), content: false, bytes: 256 << 20, keep: 8 }
    }
}

/// An answer that was judged.
pub(crate) struct Case<'a> {
    /// The request's name.
    pub(crate) id: &'a str,
    /// The name of the client's key; empty where nobody needs one.
    pub(crate) key: &'a str,
    pub(crate) mode: Mode,
    pub(crate) begun: Instant,
    /// The request as it came.
    pub(crate) body: &'a [u8],
    pub(crate) request: &'a Request,
    pub(crate) report: &'a Report,
    /// What the model said, by choice.
    pub(crate) drafts: BTreeMap<u64, String>,
}

/// An audit log that is open.
pub(crate) struct Audit {
    settings: Settings,
    file: Mutex<FileRotate<AppendCount>>,
}

impl Audit {
    /// Opens the log, if there is to be one.
    pub(crate) fn open(settings: &Settings) -> io::Result<Option<Self>> {
        if settings.path.as_os_str().is_empty() {
            return Ok(None);
        }
        if let Some(folder) = settings.path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)?;
        }
        // Opened once by ourselves: the library says nothing when it can't.
        std::fs::OpenOptions::new().create(true).append(true).open(&settings.path)?;
        let limit = ContentLimit::BytesSurpassed(settings.bytes.max(1));
        let file = FileRotate::new(&settings.path, AppendCount::new(settings.keep), limit, Compression::None, None);
        Ok(Some(Self { settings: settings.clone(), file: Mutex::new(file) }))
    }

    /// Writes a line for every choice. A log that can't be written is told, and the answer goes out all the same.
    pub(crate) fn write(&self, case: &Case<'_>, profile: &str) {
        let mut lines = Vec::new();
        for (choice, outcome) in case.report.outcomes() {
            let line = self.line(case, profile, choice, outcome);
            lines.extend_from_slice(line.to_string().as_bytes());
            lines.push(b'\n');
        }
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(&lines).and_then(|()| file.flush()) {
            tracing::error!(id = case.id, %error, "the audit log can't be written");
        }
    }

    fn line(&self, case: &Case<'_>, profile: &str, choice: u64, outcome: Option<&Outcome>) -> Value {
        let digest = |text: &str| blake3::hash(text.as_bytes()).to_hex()[..32].to_owned();
        let draft = case.drafts.get(&choice).map_or("", String::as_str);
        let query = case.request.chat.turns.iter().rev().find(|turn| turn.role == ecso::Role::User);
        let steps = outcome.map(|outcome| outcome.steps.as_slice()).unwrap_or_default();
        let images = case.request.chat.images().map(|image| image.digest().to_hex()[..32].to_owned());
        let mut line = json!({
            "at": OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            "request_id": case.id,
            "choice": choice,
            "key": case.key,
            "model": case.request.model,
            "profile": profile,
            "mode": case.mode,
            "verdict": outcome.map_or(Verdict::Unchecked, |outcome| outcome.verdict),
            "score": outcome.and_then(|outcome| outcome.score),
            "rewritten": outcome.is_some_and(|outcome| outcome.rewritten),
            "failure": case.report.failure(),
            "ms": u64::try_from(case.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "image_digests": images.collect::<Vec<_>>(),
            "query_digest": query.map(|turn| digest(&turn.query())),
            "draft_digest": digest(draft),
            "steps": steps.iter().map(|step| json!({
                "step": step.step, "ms": step.ms, "prompt_tokens": step.prompt_tokens,
                "completion_tokens": step.completion_tokens, "verdict": step.verdict, "score": step.score,
                "template": step.template,
            })).collect::<Vec<_>>(),
        });
        if self.settings.content {
            let body: Value = serde_json::from_slice(case.body).unwrap_or_default();
            line["messages"] = body["messages"].clone();
            line["draft"] = draft.into();
            line["answer"] =
                outcome.filter(|outcome| outcome.rewritten).map_or(draft, |outcome| &outcome.answer).into();
            let captions = steps.iter().filter(|step| step.step == Step::Caption);
            line["captions"] = captions.map(|step| step.reply.as_str()).collect();
        }
        line
    }
}
