//! Judging a draft while the model writes it. In a windowed stream, text goes out as soon as it was
//! judged together with everything before it; in a held stream, nothing does. In both, the model is
//! stopped at the first harm.

use std::{collections::VecDeque, future::pending, mem, sync::Arc};

use axum::http::HeaderMap;
use ecso::{Chat, CheckedDraft, Guard, Mllm, Reply, RequestCheck, Verdict};
use futures::{FutureExt, future::BoxFuture};
use serde_json::{Map, Value, json};
use tracing::{Instrument, Span};

use crate::{
    chat::{Draft, now},
    completion::{Completion, Events, quarter_tokens},
    error::ApiError,
    report::Early,
    settings::{self, OnFailure},
};

/// The choice that is judged while it is written. Others wait for the end.
pub(crate) const CHOICE: u64 = 0;

/// The field of a chunk that holds text of the answer.
const CONTENT: &str = "content";
/// Fields of a chunk that hold plain text, in the order in which models write them.
const TEXT_FIELDS: [&str; 3] = ["reasoning", "reasoning_content", CONTENT];

/// The draft so far. This is the one place that releases text before the last verdict: as much as a
/// [`CheckedDraft`] covers, which only a check can create.
struct Windows {
    sizes: settings::Windows,
    /// Whether reasoning goes out, too.
    with_reasoning: bool,
    /// Tokens of the next window.
    size: usize,
    draft: Completion,
    /// Chunks that were taken from the draft.
    taken: usize,
    /// Their text that has not gone out, with its field.
    unreleased: VecDeque<(&'static str, String)>,
    /// Bytes of text that were taken, and that went out.
    received: usize,
    released: usize,
    /// Whether something other than plain text arrived. It waits for the last verdict, and so does
    /// everything after it.
    is_closed: bool,
    /// Length of the draft when it was last found safe, or blank, in quarters of a token.
    seen_length: usize,
    pending_check: Option<PendingCheck>,
    early: Early,
}

/// A check that is running.
struct PendingCheck {
    text: String,
    /// Bytes of text that had arrived by then.
    received: usize,
    length: usize,
}

impl Windows {
    /// With `is_closed`, nothing goes out before the last verdict.
    fn new(sizes: settings::Windows, is_closed: bool, with_reasoning: bool) -> Self {
        Self {
            sizes,
            with_reasoning,
            size: sizes.first.max(1),
            draft: Completion::default(),
            taken: 0,
            unreleased: VecDeque::new(),
            received: 0,
            released: 0,
            is_closed,
            seen_length: 0,
            pending_check: None,
            early: Early::default(),
        }
    }

    /// Takes an event of the model's stream.
    fn add(&mut self, event: Value) {
        self.draft.add(event);
        if self.is_closed {
            return;
        }
        for chunk in self.draft.chunks_after(CHOICE, self.taken) {
            let Some(texts) = plain_texts(chunk) else {
                self.is_closed = true;
                break;
            };
            self.taken += 1;
            self.received += texts.iter().map(|(_, text)| text.len()).sum::<usize>();
            self.unreleased.extend(texts);
        }
    }

    /// The text to check, if a window is full and no check is running.
    fn next_check(&mut self) -> Option<String> {
        let length = self.draft.length(CHOICE);
        // A long draft waits for an eighth more: each look reads the whole draft, and the total
        // work must stay proportional.
        let full = self.size.saturating_mul(4).max(self.seen_length / 8);
        if self.pending_check.is_some() || length < self.seen_length.saturating_add(full) {
            return None;
        }
        let text = self.text();
        if text.trim().is_empty() {
            // White space alone says nothing. It waits for the words of a later window.
            self.seen_length = length;
            return None;
        }
        self.pending_check =
            Some(PendingCheck { text: text.clone(), received: self.received, length });
        Some(text)
    }

    /// All text so far.
    fn text(&self) -> String {
        self.draft.texts().remove(&CHOICE).unwrap_or_default()
    }

    /// Whether the running check covers all text.
    fn is_fully_covered(&self) -> bool {
        self.pending_check.as_ref().is_some_and(|check| check.text == self.text())
    }

    /// The chunks that may go out after a check: the text that it covers and found safe, without
    /// its last words. If the draft was not judged, nothing goes out early.
    fn release(&mut self, checked: &CheckedDraft) -> Vec<Value> {
        let check = self.pending_check.take().filter(|check| check.text == checked.draft());
        let Some(check) = check.filter(|_| checked.verdict() == Verdict::Safe) else {
            self.close();
            return Vec::new();
        };
        self.seen_length = check.length;
        self.size = self.size.saturating_mul(2).min(self.sizes.most.max(self.sizes.first.max(1)));
        let text: String = self.unreleased.iter().map(|(_, text)| text.as_str()).collect();
        let judged = text.get(..check.received - self.released).unwrap_or_default();
        let end = release_boundary(judged, self.sizes.held);
        self.take_chunks(if judged[..end].trim().is_empty() { 0 } else { end })
    }

    /// From now on nothing is checked, and everything waits for the last verdict.
    fn close(&mut self) {
        (self.is_closed, self.size, self.pending_check) = (true, usize::MAX, None);
    }

    /// Takes this many bytes of the unreleased text, as chunks of the client's stream.
    fn take_chunks(&mut self, mut bytes: usize) -> Vec<Value> {
        let mut runs: Vec<(&str, String)> = Vec::new();
        self.released += bytes;
        while bytes > 0
            && let Some((field, mut text)) = self.unreleased.pop_front()
        {
            if text.len() > bytes {
                self.unreleased.push_front((field, text.split_off(bytes)));
            }
            bytes -= text.len();
            if field != CONTENT && !self.with_reasoning {
                continue;
            }
            match runs.last_mut() {
                Some((last, run)) if *last == field => run.push_str(&text),
                _ => runs.push((field, text)),
            }
        }
        let mut chunks = Vec::new();
        for (field, text) in runs {
            let role = Some(("role".to_owned(), "assistant".into()))
                .filter(|_| self.early.characters == 0);
            self.early.words += text.split_whitespace().count();
            self.early.characters += text.chars().count();
            let delta: Map<String, Value> =
                role.into_iter().chain([(field.to_owned(), text.into())]).collect();
            chunks.push(json!({"index": CHOICE, "delta": delta, "finish_reason": null}));
        }
        chunks
    }

    /// The whole draft, and the chunks that have not gone out.
    fn finish(mut self, events: &Events) -> Result<(Completion, Vec<Value>), ApiError> {
        self.draft = mem::take(&mut self.draft).finish(events)?;
        let mut rest = self.take_chunks(self.received - self.released);
        rest.extend(self.draft.chunks_after(CHOICE, self.taken));
        let needs_role = self.taken > 0 && self.early.characters == 0;
        if let Some(first) = rest.first_mut().filter(|_| needs_role) {
            first["delta"]["role"] = "assistant".into();
        }
        Ok((self.draft, rest))
    }
}

/// The texts of a chunk, or `None` if it holds anything else.
fn plain_texts(mut chunk: Value) -> Option<Vec<(&'static str, String)>> {
    let Value::Object(mut fields) = chunk["delta"].take() else { return None };
    fields.remove("role");
    fields.retain(|_, value| !value.is_null());
    let mut texts = Vec::new();
    for field in TEXT_FIELDS {
        match fields.remove(field) {
            None => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => texts.push((field, text)),
            Some(_) => return None,
        }
    }
    (fields.is_empty() && chunk["finish_reason"].is_null()).then_some(texts)
}

/// Where the released part of a judged text ends: before its last `held` tokens, after a sentence
/// if one ends in the second half of that, otherwise after a word, otherwise anywhere.
fn release_boundary(judged: &str, held: usize) -> usize {
    let mut left = held.saturating_mul(4);
    let last = judged.char_indices().rev().take_while(|(_, letter)| {
        let is_held = left > 0;
        left = left.saturating_sub(quarter_tokens(*letter));
        is_held
    });
    let text = &judged[..last.last().map_or(judged.len(), |(at, _)| at)];
    let mut word = None;
    for (at, letter) in text.char_indices().rev().take_while(|(at, _)| *at >= text.len() / 2) {
        let (before, after) = (&text[..at], at + letter.len_utf8());
        let ends = match letter {
            '\n' | '。' | '！' | '？' => true,
            _ => letter.is_whitespace() && before.ends_with(['.', '!', '?', ':', ';']),
        };
        if ends {
            return after;
        }
        word = word.or(Some(after).filter(|_| letter.is_whitespace()));
    }
    word.unwrap_or(text.len())
}

/// Reads a draft as it arrives, and has it judged meanwhile.
pub(crate) struct WindowedDraft<'a> {
    guard: &'a Guard<Arc<dyn Mllm>>,
    chat: &'a Chat,
    options: WindowOptions,
    /// The span of the call that writes the draft.
    draft_span: Span,
    events: Events,
    is_complete: bool,
    /// Why the draft can't be read any further.
    broken: Option<ApiError>,
    windows: Windows,
    request_task: Option<BoxFuture<'a, Result<RequestCheck, ApiError>>>,
    request_check: Result<RequestCheck, ApiError>,
    check_task: Option<BoxFuture<'a, Result<(RequestCheck, CheckedDraft), ApiError>>>,
    end: Option<Ending>,
}

/// How a draft is judged while it is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WindowOptions {
    pub(crate) sizes: settings::Windows,
    /// Whether text goes out before the end.
    pub(crate) releases: bool,
    /// Whether the client's format has a place for reasoning that goes out early.
    pub(crate) with_reasoning: bool,
    /// Whether the model is asked for the draft only after the request check.
    pub(crate) checks_request_first: bool,
    /// Whether unjudged answers may go out if a check fails.
    pub(crate) on_failure: OnFailure,
}

impl WindowOptions {
    fn fails_open(self) -> bool {
        self.on_failure == OnFailure::Open
    }
}

/// Why nothing more is waited for.
enum Ending {
    /// The draft is complete.
    Whole,
    /// No answer could make the request safe.
    Skipped,
    /// The text is harmful.
    Stopped(CheckedDraft),
    /// A check failed.
    Failed,
}

impl<'a> WindowedDraft<'a> {
    /// Starts reading. `request_task` is the check of the request, which runs meanwhile.
    pub(crate) fn new(
        guard: &'a Guard<Arc<dyn Mllm>>,
        chat: &'a Chat,
        options: WindowOptions,
        (events, draft_span): (Events, Span),
        request_task: BoxFuture<'a, Result<RequestCheck, ApiError>>,
    ) -> Self {
        Self {
            guard,
            chat,
            options,
            draft_span,
            events,
            is_complete: false,
            broken: None,
            windows: Windows::new(options.sizes, !options.releases, options.with_reasoning),
            request_task: Some(request_task),
            request_check: Ok(RequestCheck::default()),
            check_task: None,
            end: None,
        }
    }

    /// The next chunks that may go out, or `None` when there are no more.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<Value>>, ApiError> {
        while self.end.is_none() {
            let mut chunks = Vec::new();
            let waits = self.options.checks_request_first && self.request_task.is_some();
            let reads = !self.is_complete && self.broken.is_none() && !waits;
            tokio::select! {
                biased;
                request_check = output_of(&mut self.request_task) => self.request_check = request_check,
                checked = output_of(&mut self.check_task) => chunks = self.checked(checked),
                event = self.events.next().instrument(self.draft_span.clone()), if reads => match event {
                    Ok(Some(event)) => self.windows.add(event),
                    Ok(None) => self.is_complete = true,
                    Err(error) => self.broken = Some(error),
                },
            }
            self.advance();
            // If the request is harmful, the draft is not needed.
            if self.end.is_none()
                && self.request_task.is_none()
                && let Some(error) = self.broken.take()
            {
                return Err(error);
            }
            if !chunks.is_empty() {
                return Ok(Some(chunks));
            }
        }
        Ok(None)
    }

    /// Takes the result of a check.
    fn checked(&mut self, checked: Result<(RequestCheck, CheckedDraft), ApiError>) -> Vec<Value> {
        match checked {
            Ok((request_check, checked)) => {
                self.request_check = Ok(request_check);
                let chunks = self.windows.release(&checked);
                // A complete draft need not be stopped. But a last check that fails may let it out, so
                // what was found counts then.
                let counts = !self.is_complete || self.options.fails_open();
                if checked.verdict() == Verdict::Unsafe && counts {
                    self.end = Some(Ending::Stopped(checked));
                }
                chunks
            }
            Err(error) if self.options.releases && !self.options.fails_open() => {
                (self.request_check, self.end) = (Err(error), Some(Ending::Failed));
                Vec::new()
            }
            Err(error) => {
                tracing::warn!(
                    code = error.code,
                    "a check of a stream failed: the rest waits for the last verdict"
                );
                self.windows.close();
                Vec::new()
            }
        }
    }

    /// Starts the next check, or ends.
    fn advance(&mut self) {
        if self.end.is_some() || self.request_task.is_some() {
            return;
        }
        if self.is_complete
            && !self.windows.is_fully_covered()
            && (!self.options.fails_open() || self.check_task.is_none())
        {
            // The last verdict covers all of it. If unjudged answers may go out, a check that is
            // running is waited for.
            self.end = Some(Ending::Whole);
        } else if let Ok(request_check) = &self.request_check {
            if request_check.is_harmful() {
                self.end = Some(Ending::Skipped);
            } else if let Some(text) = self.windows.next_check() {
                let (guard, chat, mut request_check) =
                    (self.guard, self.chat, request_check.clone());
                let check = async move {
                    let checked = guard.check_draft(chat, &mut request_check, &text).await?;
                    Ok((request_check, checked))
                };
                self.check_task = Some(check.boxed());
            }
        } else if self.options.checks_request_first && !self.options.fails_open() {
            // Without a finding nothing goes out, so the draft isn't asked for.
            self.end = Some(Ending::Failed);
        }
    }

    /// The draft, as far as it was waited for.
    pub(crate) fn finish(self) -> Result<Draft, ApiError> {
        let Self { options, windows, events, request_check, end, .. } = self;
        let is_skipped = matches!(end, Some(Ending::Skipped));
        let is_begun = !(is_skipped && options.checks_request_first);
        let stopped = is_begun && !matches!(end, Some(Ending::Whole));
        let early = Early { stopped, ..windows.early };
        let (answer, rest) = match end {
            Some(Ending::Whole) => windows.finish(&events)?,
            Some(Ending::Skipped) => {
                (Completion::from_replies(&[Reply::default()], now()), Vec::new())
            }
            Some(Ending::Stopped(checked)) => {
                (windows.draft.truncated(CHOICE, checked.draft()), Vec::new())
            }
            Some(Ending::Failed) | None => {
                let text = windows.text();
                (windows.draft.truncated(CHOICE, &text), Vec::new())
            }
        };
        Ok(Draft {
            answer,
            head: HeaderMap::new(),
            request_check,
            is_skipped,
            early: Some((early, rest)),
        })
    }

    /// All text so far, how much of it went out, and the answer it belongs to.
    pub(crate) fn so_far(&self) -> (String, Early, &Completion) {
        (self.windows.text(), self.windows.early, &self.windows.draft)
    }
}

/// The output of a task; never ready if there is none.
async fn output_of<T>(task: &mut Option<BoxFuture<'_, T>>) -> T {
    let Some(running) = task else { return pending().await };
    let output = running.await;
    *task = None;
    output
}

#[cfg(test)]
mod tests {
    use ecso::{Profile, profile::Scope, testing::Scripted};
    use futures::executor::block_on;
    use proptest::prelude::*;

    use super::*;
    use crate::completion::tests::{answers, markers};

    const SIZES: settings::Windows = settings::Windows { first: 4, most: 16, held: 2 };

    /// What a judge with this reply finds about a text.
    fn checked(text: &str, says: &str) -> CheckedDraft {
        let mut profile = Profile::paper();
        profile.scope = Scope::All;
        let guard = Guard::new(Scripted::texts([says]), profile);
        let chat = Chat::ask([], "What is this?");
        block_on(guard.check_draft(&chat, &mut RequestCheck::default(), text)).unwrap()
    }

    fn chunk(field: &str, text: &str) -> Value {
        json!({"choices": [{"delta": {field: text}}]})
    }

    fn joined(chunks: &[Value]) -> String {
        let texts = chunks.iter().flat_map(|chunk| {
            TEXT_FIELDS.into_iter().filter_map(|field| chunk["delta"][field].as_str())
        });
        texts.collect()
    }

    #[test]
    fn a_window_goes_out_only_by_its_own_verdict() {
        let text = "Bread needs flour, water and salt. It needs time and heat as well.";
        let full = || {
            let mut windows = Windows::new(SIZES, false, true);
            windows.add(chunk("content", text));
            let checked = windows.next_check().unwrap();
            assert_eq!((checked.as_str(), windows.next_check()), (text, None));
            windows
        };
        let chunks = full().release(&checked(text, "No."));
        assert_eq!(joined(&chunks), "Bread needs flour, water and salt. ");
        assert_eq!(chunks[0]["delta"]["role"], "assistant");
        // About another text, about harm, and without a verdict.
        let unguarded = {
            let guard = Guard::new(Scripted::texts(["No."]), Profile::paper());
            let chat = Chat::ask([], "Hi");
            block_on(guard.check_draft(&chat, &mut RequestCheck::default(), text)).unwrap()
        };
        for finding in [checked("Bread needs", "No."), checked(text, "Yes."), unguarded] {
            let mut windows = full();
            assert!(windows.release(&finding).is_empty());
            windows.add(chunk("content", &text.repeat(9)));
            assert_eq!(windows.next_check(), None);
        }
        // One check releases one window.
        let mut windows = full();
        let finding = checked(text, "No.");
        windows.release(&finding);
        windows.add(chunk("content", &text.repeat(9)));
        assert!(windows.release(&finding).is_empty());
    }

    #[test]
    fn a_blank_draft_is_not_read_again_at_every_event() {
        for is_closed in [false, true] {
            for blank in [" ", "\u{3000}"] {
                let mut windows = Windows::new(SIZES, is_closed, true);
                let mut looks = Vec::new();
                for _ in 0..20_000 {
                    windows.add(chunk("content", blank));
                    assert_eq!(windows.next_check(), None);
                    looks.push(windows.seen_length);
                }
                looks.dedup();
                assert!((10..200).contains(&looks.len()), "{blank:?}: {}", looks.len());
                // Words after it are checked with all of it, and go out only then.
                let mut text = blank.repeat(20_000);
                let checked_text = loop {
                    windows.add(chunk("content", "bread "));
                    text.push_str("bread ");
                    if let Some(checked_text) = windows.next_check() {
                        break checked_text;
                    }
                };
                assert_eq!(checked_text, text);
                let sent = joined(&windows.release(&checked(&text, "No.")));
                assert_eq!(sent.is_empty(), is_closed);
                assert!(text.starts_with(&sent), "{sent:?}");
            }
        }
    }

    #[test]
    fn windows_end_after_sentences_or_words() {
        for (text, held, out) in [
            ("One two three. Four five six seven", 2, "One two three. "),
            ("One two three four five", 2, "One two three "),
            ("One. Two three four five six", 2, "One. Two three four "),
            ("One two\nthree four five", 3, "One two\n"),
            ("面包需要面粉。还要水和盐", 2, "面包需要面粉。"),
            ("面包需要面粉还要水和盐", 2, "面包需要面粉还要水"),
            ("Bread", 2, ""),
            ("Bread", 0, "Bread"),
            ("", 2, ""),
        ] {
            assert_eq!(&text[..release_boundary(text, held)], out, "{text}");
        }
    }

    /// Events of a model's stream, ordinary and unusual.
    fn events() -> impl Strategy<Value = Vec<Value>> {
        let text = prop_oneof!["[a-z]{1,7}[ .\n]{0,2}", "\\PC{0,6}", "[面包。 ]{1,4}"];
        let field = prop_oneof![4 => Just("content"), 1 => Just("reasoning"), 1 => Just("reasoning_content"), 1 => Just("refusal")];
        let event = prop_oneof![
            40 => (field, text).prop_map(|(field, text)| chunk(field, &text)),
            1 => Just(json!({"choices": [{"delta": {"role": "assistant", "content": null}}]})),
            1 => Just(json!({"choices": [{"delta": {}, "finish_reason": "stop"}]})),
            1 => Just(json!({"choices": [{"index": 1, "delta": {"content": "other"}}]})),
            1 => Just(json!({"usage": {"total_tokens": 1}})),
        ];
        prop::collection::vec(event, 0..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_unjudged_text_leaves_a_window(unusual in prop::collection::vec(answers(), 0..6)) {
            let mut windows = Windows::new(SIZES, false, true);
            let mut judged = String::new();
            let words = (0..30).map(|index| chunk("content", ["MILDBREADS ", "MILDFLOURS. "][index % 2]));
            let mut events: Vec<Value> = words.collect();
            for (index, event) in unusual.into_iter().enumerate() {
                events.insert(4 * index + 3, event);
            }
            for event in events {
                windows.add(event);
                let Some(text) = windows.next_check() else { continue };
                let sent = Value::from(windows.release(&checked(&text, "No."))).to_string();
                judged.push_str(&text);
                for marker in markers(&sent) {
                    prop_assert!(judged.contains(marker), "{marker} in {sent} is not in {judged}");
                }
            }
        }

        #[test]
        fn all_text_goes_out_once_it_is_judged(events in events(), held in 0..9_usize) {
            let mut windows = Windows::new(settings::Windows { held, ..SIZES }, false, true);
            let (mut out, mut sizes) = (Vec::new(), Vec::new());
            let finish = json!({"choices": [{"delta": {}, "finish_reason": "stop"}]});
            for event in events.into_iter().chain([finish]) {
                windows.add(event);
                let Some(checked_text) = windows.next_check() else { continue };
                sizes.push(windows.size);
                let chunks = windows.release(&checked(&checked_text, "No."));
                for field in TEXT_FIELDS {
                    let texts = out.iter().chain(&chunks).filter_map(|chunk: &Value| chunk["delta"][field].as_str());
                    let text: String = texts.collect();
                    // Everything is part of what was judged; white space alone says nothing.
                    prop_assert!(checked_text.contains(&text) || text.trim().is_empty(), "{text:?} in {checked_text:?}");
                }
                out.extend(chunks);
            }
            prop_assert!(sizes.is_sorted() && sizes.iter().all(|size| (4..=16).contains(size)));
            let text_of = |chunks: &[Value], field: &str| -> String {
                chunks.iter().filter_map(|chunk| chunk["delta"][field].as_str()).collect()
            };
            let draft = windows.draft.clone();
            let Ok((answer, rest)) = windows.finish(&Events::new(futures::stream::empty::<Result<_, std::io::Error>>())) else {
                // Another choice did not end.
                return Ok(());
            };
            let whole: Vec<Value> = answer.chunks(CHOICE).collect();
            out.extend(rest);
            for field in ["content", "reasoning", "reasoning_content", "refusal"] {
                prop_assert_eq!(text_of(&out, field), text_of(&whole, field));
            }
            let needs_role = out.iter().filter(|chunk| chunk["delta"]["role"].is_string()).count();
            prop_assert!(needs_role <= 1 || draft.chunks(CHOICE).filter(|chunk| chunk["delta"]["role"].is_string()).count() > 0);
            let ends = |chunks: &[Value]| chunks.iter().filter(|chunk| chunk["finish_reason"].is_string()).count();
            prop_assert_eq!(ends(&out), ends(&whole));
        }
    }
}
