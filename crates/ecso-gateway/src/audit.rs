//! The audit log: a JSON line for every judged answer. It contains texts of the conversation only
//! if the operator wants that, and digests otherwise.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use ecso::{Step, Verdict};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    json::printable,
    report::{Finding, Report, UNFINISHED},
    request::Request,
    settings::{AuditSettings, Mode},
};

/// A request whose answer was judged.
pub(crate) struct JudgedRequest<'a> {
    /// The request id.
    pub(crate) id: &'a str,
    /// The door that it came in by.
    pub(crate) door: &'static str,
    /// The name of the client's key; empty if no keys are needed.
    pub(crate) key: &'a str,
    pub(crate) mode: Mode,
    /// The name of the profile, if the request chose one.
    pub(crate) profile: Option<&'a str>,
    pub(crate) started: Instant,
    /// The request, if it could be read.
    pub(crate) request: Option<&'a Request>,
    pub(crate) report: &'a Report,
    /// The drafts, by choice.
    pub(crate) drafts: &'a BTreeMap<u64, String>,
}

/// An open audit log.
pub(crate) struct Audit {
    settings: AuditSettings,
    file: Mutex<RotatingFile>,
}

impl Audit {
    /// Opens the log, if it is turned on.
    pub(crate) fn open(settings: &AuditSettings) -> io::Result<Option<Arc<Self>>> {
        if settings.path.as_os_str().is_empty() {
            return Ok(None);
        }
        let with_path = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("the audit log {}: {error}", settings.path.display()),
            )
        };
        Self::create(settings).map_err(with_path).map(|audit| Some(Arc::new(audit)))
    }

    fn create(settings: &AuditSettings) -> io::Result<Self> {
        if let Some(folder) = settings.path.parent().filter(|folder| !folder.as_os_str().is_empty())
        {
            std::fs::create_dir_all(folder)?;
        }
        let file = RotatingFile::open(settings)?;
        Ok(Self { settings: settings.clone(), file: Mutex::new(file) })
    }

    /// Writes a line for every choice. If that fails, the error is logged and the answer goes out
    /// anyway.
    pub(crate) fn write(&self, judged: &JudgedRequest<'_>, profile: &str) {
        let mut lines = Vec::new();
        for (choice, finding) in judged.report.findings() {
            let line = self.line(judged, profile, choice, finding);
            lines.extend_from_slice(line.to_string().as_bytes());
            lines.push(b'\n');
        }
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write(&self.settings, &lines) {
            tracing::error!(id = judged.id, %error, "the audit log could not be written: this line is lost");
        }
    }

    fn line(
        &self,
        judged: &JudgedRequest<'_>,
        profile: &str,
        choice: u64,
        finding: &Finding,
    ) -> Value {
        let outcome = finding.outcome();
        let digest = |text: &str| blake3::hash(text.as_bytes()).to_hex()[..32].to_owned();
        // `None` if it was not waited for, because no answer could have made the request safe.
        let draft = judged.drafts.get(&choice).map(String::as_str);
        let turns = judged.request.map(|request| request.chat.turns.as_slice()).unwrap_or_default();
        let query = turns.iter().rev().find(|turn| turn.role == ecso::Role::User);
        let steps = outcome.map(|outcome| outcome.steps.as_slice()).unwrap_or_default();
        let images = turns
            .iter()
            .flat_map(ecso::Turn::images)
            .map(|image| image.digest().to_hex()[..32].to_owned());
        let mut line = json!({
            "at": OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            "request_id": judged.id,
            "door": judged.door,
            "choice": choice,
            "key": judged.key,
            "model": judged.request.map(|request| printable(&request.model)),
            "profile": profile,
            "mode": judged.mode,
            "verdict": finding.verdict(),
            "score": outcome.and_then(|outcome| outcome.score),
            "rewritten": outcome.is_some_and(|outcome| outcome.rewritten),
            "failure": judged.report.failure,
            "early": judged.report.early_of(choice),
            "ms": u64::try_from(judged.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "image_digests": images.collect::<Vec<_>>(),
            "query_digest": query.map(|turn| digest(&turn.joined_text())),
            "draft_digest": draft.map(digest),
            "steps": steps.iter().map(|step| json!({
                "step": step.step, "ms": step.ms, "prompt_tokens": step.prompt_tokens,
                "completion_tokens": step.completion_tokens, "verdict": step.verdict, "score": step.score,
                "template": step.template,
            })).collect::<Vec<_>>(),
        });
        if self.settings.content {
            line["messages"] = judged.request.map(Request::messages).into();
            line["draft"] = draft.into();
            let safe =
                outcome.filter(|outcome| outcome.rewritten).map(|outcome| outcome.answer.as_str());
            let sent = judged
                .report
                .early_of(choice)
                .map(|early| early.characters)
                .filter(|characters| *characters > 0);
            let is_unsafe = finding.verdict() == Verdict::Unsafe;
            let is_cut = is_unsafe || judged.report.failure == Some(UNFINISHED);
            line["answer"] = match (sent.filter(|_| is_cut), safe) {
                // Text that went out can't be replaced, so the safe answer has a field of its own.
                (Some(sent), _) => {
                    line["safe_answer"] = safe.into();
                    draft.map(|draft| draft.chars().take(sent).collect::<String>()).into()
                }
                (None, Some(safe)) => safe.into(),
                // The answer was to be replaced, but there is no replacement.
                (None, None) if is_unsafe && judged.mode == Mode::Enforce => Value::Null,
                (None, None) => draft.into(),
            };
            let captions = steps.iter().filter(|step| step.step == Step::Caption);
            line["captions"] = captions.map(|step| step.reply.as_str()).collect();
        }
        line
    }
}

/// A file that is rotated when it is full.
struct RotatingFile {
    file: File,
    bytes: u64,
}

impl RotatingFile {
    fn open(settings: &AuditSettings) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        // It shows who asked what, so only its owner may read it.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&settings.path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }

    /// Writes whole lines. If the file can't be rotated, it keeps growing, so that no line is lost.
    fn write(&mut self, settings: &AuditSettings, lines: &[u8]) -> io::Result<()> {
        if self.bytes >= settings.bytes.max(1) as u64 {
            match Self::rotate(settings).and_then(|()| Self::open(settings)) {
                Ok(fresh) => *self = fresh,
                Err(error) => {
                    tracing::error!(%error, "the audit log could not be rotated: it keeps growing");
                }
            }
        }
        self.bytes += lines.len() as u64;
        self.file.write_all(lines)?;
        self.file.flush()
    }

    /// Renames the files: the last one becomes `.1`, and the oldest is dropped.
    fn rotate(settings: &AuditSettings) -> io::Result<()> {
        let numbered = |number: usize| {
            let mut name = settings.path.clone().into_os_string();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        if settings.keep == 0 {
            return std::fs::remove_file(&settings.path);
        }
        for number in (1..settings.keep).rev() {
            match std::fs::rename(numbered(number), numbered(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        std::fs::rename(&settings.path, numbered(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_is_lost_when_files_are_rotated() {
        let folder =
            std::env::temp_dir().join(format!("ecso-audit-{}", uuid::Uuid::new_v4().simple()));
        let path = folder.join("audit.jsonl");
        let settings = AuditSettings { path: path.clone(), content: false, bytes: 10, keep: 2 };
        let audit = Audit::open(&settings).unwrap().unwrap();
        // Existing files are renamed like the others; a file that can't be renamed stays.
        std::fs::write(folder.join("audit.jsonl.1"), "stray\n").unwrap();
        let write =
            |line: &str| audit.file.lock().unwrap().write(&settings, line.as_bytes()).unwrap();
        ["one, two\n", "three\n", "four\n"].into_iter().for_each(write);
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        assert_eq!(
            (read("audit.jsonl"), read("audit.jsonl.1")),
            ("four\n".into(), "one, two\nthree\n".into())
        );
        assert_eq!(read("audit.jsonl.2"), "stray\n");
        std::fs::remove_file(folder.join("audit.jsonl.2")).unwrap();
        std::fs::create_dir(folder.join("audit.jsonl.2")).unwrap();
        ["five, six\n", "seven\n"].into_iter().for_each(write);
        assert_eq!(read("audit.jsonl"), "four\nfive, six\nseven\n");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
