//! A draft that is judged while the model writes it. Of a stream that is windowed, text goes out as
//! soon as it was judged with all that came before it; of one that is held nothing does. In both
//! the model is stopped at the first harm.

use std::{collections::VecDeque, future::pending, mem, sync::Arc};

use axum::http::HeaderMap;
use ecso::{Chat, CheckedDraft, Guard, Mllm, Reply, RequestCheck, Verdict};
use futures::{FutureExt, future::BoxFuture};
use serde_json::{Map, Value, json};
use tracing::{Instrument, Span};

use crate::{
    chat::{Drafted, now},
    completion::{Completion, Events, quarters},
    error::ApiError,
    report::Early,
    settings,
};

/// The choice that is judged while it is written; others wait for the end.
pub(crate) const CHOICE: u64 = 0;

/// Fields of a piece that are plain text, in the order in which a model writes them.
const TEXTS: [&str; 3] = ["reasoning", "reasoning_content", "content"];

/// The draft so far, and the one place that lets text of it out before its end: as much as a
/// [`CheckedDraft`] covers, which is made by a judgement alone.
struct Windows {
    sizes: settings::Windows,
    /// Tokens of the next window.
    size: usize,
    draft: Completion,
    /// Pieces that were taken from the draft.
    taken: usize,
    /// Their text that is not out, by its field.
    held: VecDeque<(&'static str, String)>,
    /// Bytes of text that were taken, and that are out.
    came: usize,
    gone: usize,
    /// Whether something came that is no plain text. It waits for the last verdict, and so does all
    /// behind it.
    is_closed: bool,
    /// How long the draft was when it was last found safe, in quarters of a token.
    judged: usize,
    asked: Option<Asked>,
    early: Early,
}

/// What is being judged.
struct Asked {
    said: String,
    /// How much of the text had come by then.
    came: usize,
    length: usize,
}

impl Windows {
    /// `is_closed`: nothing goes out before the last verdict.
    fn new(sizes: settings::Windows, is_closed: bool) -> Self {
        Self {
            sizes,
            size: sizes.first.max(1),
            draft: Completion::default(),
            taken: 0,
            held: VecDeque::new(),
            came: 0,
            gone: 0,
            is_closed,
            judged: 0,
            asked: None,
            early: Early::default(),
        }
    }

    /// Takes an event of the model's stream.
    fn add(&mut self, event: Value) {
        self.draft.add(event);
        if self.is_closed {
            return;
        }
        for piece in self.draft.pieces_behind(CHOICE, self.taken) {
            let Some(texts) = plain(piece) else {
                self.is_closed = true;
                break;
            };
            self.taken += 1;
            self.came += texts.iter().map(|(_, text)| text.len()).sum::<usize>();
            self.held.extend(texts);
        }
    }

    /// What there is to be judged, if a window is full and nothing is being judged.
    fn due(&mut self) -> Option<String> {
        let length = self.draft.length(CHOICE);
        // Of what is long already an eighth more: all of it is judged again, and that is to stay in
        // proportion.
        let full = self.size.saturating_mul(4).max(self.judged / 8);
        if self.asked.is_some() || length < self.judged.saturating_add(full) {
            return None;
        }
        // White space alone says nothing.
        let said = Some(self.said()).filter(|said| !said.trim().is_empty())?;
        self.asked = Some(Asked { said: said.clone(), came: self.came, length });
        Some(said)
    }

    /// All that is said so far.
    fn said(&self) -> String {
        self.draft.said().remove(&CHOICE).unwrap_or_default()
    }

    /// Whether what is being judged is all that is said.
    fn is_all_asked(&self) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.said == self.said())
    }

    /// What may go out by a finding: text that it covers and calls safe, up to its last words.
    /// Where nobody judges, nothing goes out early.
    fn release(&mut self, found: &CheckedDraft) -> Vec<Value> {
        let asked = self.asked.take().filter(|asked| asked.said == found.draft());
        let Some(asked) = asked.filter(|_| found.verdict() == Verdict::Safe) else {
            self.close();
            return Vec::new();
        };
        self.judged = asked.length;
        self.size = self.size.saturating_mul(2).min(self.sizes.most.max(self.sizes.first.max(1)));
        let text: String = self.held.iter().map(|(_, text)| text.as_str()).collect();
        let judged = text.get(..asked.came - self.gone).unwrap_or_default();
        let end = bound(judged, self.sizes.held);
        self.pieces(if judged[..end].trim().is_empty() { 0 } else { end })
    }

    /// From here on nothing is asked, and all waits for the last verdict.
    fn close(&mut self) {
        (self.is_closed, self.size, self.asked) = (true, usize::MAX, None);
    }

    /// So many bytes of the text that is held, as pieces of the client's stream.
    fn pieces(&mut self, mut bytes: usize) -> Vec<Value> {
        let mut runs: Vec<(&str, String)> = Vec::new();
        self.gone += bytes;
        while bytes > 0
            && let Some((place, mut text)) = self.held.pop_front()
        {
            if text.len() > bytes {
                self.held.push_front((place, text.split_off(bytes)));
            }
            bytes -= text.len();
            match runs.last_mut() {
                Some((last, run)) if *last == place => run.push_str(&text),
                _ => runs.push((place, text)),
            }
        }
        let mut pieces = Vec::new();
        for (place, text) in runs {
            let role = Some(("role".to_owned(), "assistant".into()))
                .filter(|_| self.early.characters == 0);
            self.early.words += text.split_whitespace().count();
            self.early.characters += text.chars().count();
            let delta: Map<String, Value> =
                role.into_iter().chain([(place.to_owned(), text.into())]).collect();
            pieces.push(json!({"index": CHOICE, "delta": delta, "finish_reason": null}));
        }
        pieces
    }

    /// The draft, whole, and what of it is not out.
    fn end(mut self, events: &Events) -> Result<(Completion, Vec<Value>), ApiError> {
        self.draft = mem::take(&mut self.draft).ended(events)?;
        let mut rest = self.pieces(self.came - self.gone);
        rest.extend(self.draft.pieces_behind(CHOICE, self.taken));
        let begins = self.taken > 0 && self.early.characters == 0;
        if let Some(first) = rest.first_mut().filter(|_| begins) {
            first["delta"]["role"] = "assistant".into();
        }
        Ok((self.draft, rest))
    }
}

/// The texts of a piece that has nothing else.
fn plain(mut piece: Value) -> Option<Vec<(&'static str, String)>> {
    let Value::Object(mut fields) = piece["delta"].take() else { return None };
    fields.remove("role");
    fields.retain(|_, value| !value.is_null());
    let mut texts = Vec::new();
    for place in TEXTS {
        match fields.remove(place) {
            None => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => texts.push((place, text)),
            Some(_) => return None,
        }
    }
    (fields.is_empty() && piece["finish_reason"].is_null()).then_some(texts)
}

/// Where a judged text may end that goes out: before its last `held` tokens; behind a sentence if
/// one ends in its second half, else behind a word, else where it is.
fn bound(judged: &str, held: usize) -> usize {
    let mut left = held.saturating_mul(4);
    let last = judged.char_indices().rev().take_while(|(_, letter)| {
        let is_held = left > 0;
        left = left.saturating_sub(quarters(*letter));
        is_held
    });
    let text = &judged[..last.last().map_or(judged.len(), |(at, _)| at)];
    let mut word = None;
    for (at, letter) in text.char_indices().rev().take_while(|(at, _)| *at >= text.len() / 2) {
        let (before, behind) = (&text[..at], at + letter.len_utf8());
        let ends = match letter {
            '\n' | '。' | '！' | '？' => true,
            _ => letter.is_whitespace() && before.ends_with(['.', '!', '?', ':', ';']),
        };
        if ends {
            return behind;
        }
        word = word.or(Some(behind).filter(|_| letter.is_whitespace()));
    }
    word.unwrap_or(text.len())
}

/// Reads a draft as it comes, and has it judged meanwhile.
pub(crate) struct Writing<'a> {
    guard: &'a Guard<Arc<dyn Mllm>>,
    chat: &'a Chat,
    how: How,
    /// Of the call that the draft comes from.
    direct: Span,
    events: Events,
    is_read: bool,
    windows: Windows,
    considering: Option<BoxFuture<'a, Result<RequestCheck, ApiError>>>,
    request_check: Result<RequestCheck, ApiError>,
    checking: Option<BoxFuture<'a, Result<(RequestCheck, CheckedDraft), ApiError>>>,
    end: Option<End>,
}

/// What is done with a draft that is judged while it is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub(crate) sizes: settings::Windows,
    /// Whether text goes out before the end.
    pub(crate) releases: bool,
    /// Whether a judgement that fails on the way is the end.
    pub(crate) gives_up: bool,
}

/// Why there is no more to wait for.
enum End {
    /// The draft is whole.
    Whole,
    /// No answer could make the request safe.
    Spared,
    /// There is harm in what is said.
    Stopped(CheckedDraft),
    /// Nobody could judge it.
    Failed,
}

impl<'a> Writing<'a> {
    /// Begins; `considering` is what is found about the request meanwhile.
    pub(crate) fn new(
        guard: &'a Guard<Arc<dyn Mllm>>,
        chat: &'a Chat,
        how: How,
        (events, direct): (Events, Span),
        considering: BoxFuture<'a, Result<RequestCheck, ApiError>>,
    ) -> Self {
        Self {
            guard,
            chat,
            how,
            direct,
            events,
            is_read: false,
            windows: Windows::new(how.sizes, !how.releases),
            considering: Some(considering),
            request_check: Ok(RequestCheck::default()),
            checking: None,
            end: None,
        }
    }

    /// Pieces that may go out next; none when there is no more to wait for.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<Value>>, ApiError> {
        while self.end.is_none() {
            let mut pieces = Vec::new();
            tokio::select! {
                biased;
                request_check = done(&mut self.considering) => self.request_check = request_check,
                checked = done(&mut self.checking) => pieces = self.checked(checked),
                event = self.events.next().instrument(self.direct.clone()), if !self.is_read => match event? {
                    Some(event) => self.windows.add(event),
                    None => self.is_read = true,
                },
            }
            self.goes_on();
            if !pieces.is_empty() {
                return Ok(Some(pieces));
            }
        }
        Ok(None)
    }

    /// Takes what was found about the draft so far.
    fn checked(&mut self, checked: Result<(RequestCheck, CheckedDraft), ApiError>) -> Vec<Value> {
        match checked {
            Ok((request_check, checked)) => {
                self.request_check = Ok(request_check);
                let pieces = self.windows.release(&checked);
                // What is whole already need not be stopped.
                if checked.verdict() == Verdict::Unsafe && !self.is_read {
                    self.end = Some(End::Stopped(checked));
                }
                pieces
            }
            Err(error) if self.how.gives_up => {
                (self.request_check, self.end) = (Err(error), Some(End::Failed));
                Vec::new()
            }
            Err(error) => {
                tracing::warn!(
                    code = error.code,
                    "a judgement on the way failed: what is left waits for the last one"
                );
                self.windows.close();
                Vec::new()
            }
        }
    }

    /// Asks about what was said, or ends.
    fn goes_on(&mut self) {
        if self.end.is_some() || self.considering.is_some() {
            return;
        }
        if self.is_read
            && !self.windows.is_all_asked()
            && (self.how.gives_up || self.checking.is_none())
        {
            // The last verdict is about all of it. Where answers go out that nobody could judge,
            // harm that is being found is waited for.
            self.end = Some(End::Whole);
        } else if let Ok(request_check) = &self.request_check {
            if request_check.is_harm() {
                self.end = Some(End::Spared);
            } else if let Some(said) = self.windows.due() {
                let (guard, chat, mut request_check) =
                    (self.guard, self.chat, request_check.clone());
                let check = async move {
                    let checked = guard.check_draft(chat, &mut request_check, &said).await?;
                    Ok((request_check, checked))
                };
                self.checking = Some(check.boxed());
            }
        }
    }

    /// The draft, as far as it was waited for.
    pub(crate) fn end(self) -> Result<Drafted, ApiError> {
        let Self { windows, events, request_check, end, .. } = self;
        let early = Early { stopped: !matches!(end, Some(End::Whole)), ..windows.early };
        let is_spared = matches!(end, Some(End::Spared));
        let (answer, rest) = match end {
            Some(End::Whole) => windows.end(&events)?,
            Some(End::Spared) => (Completion::replies(&[Reply::default()], now()), Vec::new()),
            Some(End::Stopped(checked)) => {
                (windows.draft.stopped(CHOICE, checked.draft()), Vec::new())
            }
            Some(End::Failed) | None => {
                let said = windows.said();
                (windows.draft.stopped(CHOICE, &said), Vec::new())
            }
        };
        Ok(Drafted {
            answer,
            head: HeaderMap::new(),
            request_check,
            is_spared,
            early: Some((early, rest)),
        })
    }

    /// All that was said so far, how much of it is out, and the answer that it belongs to.
    pub(crate) fn so_far(&self) -> (String, Early, &Completion) {
        (self.windows.said(), self.windows.early, &self.windows.draft)
    }
}

/// What work comes to; never, where there is none.
async fn done<T>(work: &mut Option<BoxFuture<'_, T>>) -> T {
    let Some(under_way) = work else { return pending().await };
    let found = under_way.await;
    *work = None;
    found
}

#[cfg(test)]
mod tests {
    use ecso::{Profile, profile::Scope, testing::Scripted};
    use futures::executor::block_on;
    use proptest::prelude::*;

    use super::*;
    use crate::completion::tests::{answers, markers};

    const SIZES: settings::Windows = settings::Windows { first: 4, most: 16, held: 2 };

    /// What a judge that says this finds about a text.
    fn checked(text: &str, says: &str) -> CheckedDraft {
        let mut profile = Profile::paper();
        profile.scope = Scope::All;
        let guard = Guard::new(Scripted::texts([says]), profile);
        let chat = Chat::ask([], "What is this?");
        block_on(guard.check_draft(&chat, &mut RequestCheck::default(), text)).unwrap()
    }

    fn piece(place: &str, text: &str) -> Value {
        json!({"choices": [{"delta": {place: text}}]})
    }

    fn joined(pieces: &[Value]) -> String {
        let texts = pieces
            .iter()
            .flat_map(|piece| TEXTS.into_iter().filter_map(|place| piece["delta"][place].as_str()));
        texts.collect()
    }

    #[test]
    fn a_window_goes_out_by_its_own_verdict_alone() {
        let text = "Bread needs flour, water and salt. It needs time and heat as well.";
        let full = || {
            let mut windows = Windows::new(SIZES, false);
            windows.add(piece("content", text));
            let due = windows.due().unwrap();
            assert_eq!((due.as_str(), windows.due()), (text, None));
            windows
        };
        let pieces = full().release(&checked(text, "No."));
        assert_eq!(joined(&pieces), "Bread needs flour, water and salt. ");
        assert_eq!(pieces[0]["delta"]["role"], "assistant");
        // Of another text, of harm, and where nobody judges.
        let unguarded = {
            let guard = Guard::new(Scripted::texts(["No."]), Profile::paper());
            let chat = Chat::ask([], "Hi");
            block_on(guard.check_draft(&chat, &mut RequestCheck::default(), text)).unwrap()
        };
        for found in [checked("Bread needs", "No."), checked(text, "Yes."), unguarded] {
            let mut windows = full();
            assert!(windows.release(&found).is_empty());
            windows.add(piece("content", &text.repeat(9)));
            assert_eq!(windows.due(), None);
        }
        // One finding lets out one window.
        let mut windows = full();
        let found = checked(text, "No.");
        windows.release(&found);
        windows.add(piece("content", &text.repeat(9)));
        assert!(windows.release(&found).is_empty());
    }

    #[test]
    fn windows_end_where_sentences_and_words_do() {
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
            assert_eq!(&text[..bound(text, held)], out, "{text}");
        }
    }

    /// Events of a model's stream, plain and odd.
    fn events() -> impl Strategy<Value = Vec<Value>> {
        let text = prop_oneof!["[a-z]{1,7}[ .\n]{0,2}", "\\PC{0,6}", "[面包。 ]{1,4}"];
        let place = prop_oneof![4 => Just("content"), 1 => Just("reasoning"), 1 => Just("reasoning_content"), 1 => Just("refusal")];
        let event = prop_oneof![
            40 => (place, text).prop_map(|(place, text)| piece(place, &text)),
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
        fn no_text_goes_out_of_windows_that_is_not_judged(odd in prop::collection::vec(answers(), 0..6)) {
            let mut windows = Windows::new(SIZES, false);
            let mut judged = String::new();
            let words = (0..30).map(|place| piece("content", ["MILDBREADS ", "MILDFLOURS. "][place % 2]));
            let mut events: Vec<Value> = words.collect();
            for (place, event) in odd.into_iter().enumerate() {
                events.insert(4 * place + 3, event);
            }
            for event in events {
                windows.add(event);
                let Some(due) = windows.due() else { continue };
                let sent = Value::from(windows.release(&checked(&due, "No."))).to_string();
                judged.push_str(&due);
                for marker in markers(&sent) {
                    prop_assert!(judged.contains(marker), "{marker} in {sent} is not in {judged}");
                }
            }
        }

        #[test]
        fn what_goes_out_is_judged_and_in_the_end_all_does(events in events(), held in 0..9_usize) {
            let mut windows = Windows::new(settings::Windows { held, ..SIZES }, false);
            let (mut out, mut sizes) = (Vec::new(), Vec::new());
            let finish = json!({"choices": [{"delta": {}, "finish_reason": "stop"}]});
            for event in events.into_iter().chain([finish]) {
                windows.add(event);
                let Some(due) = windows.due() else { continue };
                sizes.push(windows.size);
                let pieces = windows.release(&checked(&due, "No."));
                for place in TEXTS {
                    let texts = out.iter().chain(&pieces).filter_map(|piece: &Value| piece["delta"][place].as_str());
                    let text: String = texts.collect();
                    // All of it stands in what was judged; white space alone says nothing.
                    prop_assert!(due.contains(&text) || text.trim().is_empty(), "{text:?} in {due:?}");
                }
                out.extend(pieces);
            }
            prop_assert!(sizes.is_sorted() && sizes.iter().all(|size| (4..=16).contains(size)));
            let said = |pieces: &[Value], place: &str| -> String {
                pieces.iter().filter_map(|piece| piece["delta"][place].as_str()).collect()
            };
            let draft = windows.draft.clone();
            let Ok((answer, rest)) = windows.end(&Events::of(futures::stream::empty::<Result<_, std::io::Error>>())) else {
                // Another choice has no end.
                return Ok(());
            };
            let whole: Vec<Value> = answer.pieces(CHOICE).collect();
            out.extend(rest);
            for place in ["content", "reasoning", "reasoning_content", "refusal"] {
                prop_assert_eq!(said(&out, place), said(&whole, place));
            }
            let begins = out.iter().filter(|piece| piece["delta"]["role"].is_string()).count();
            prop_assert!(begins <= 1 || draft.pieces(CHOICE).filter(|piece| piece["delta"]["role"].is_string()).count() > 0);
            let ends = |pieces: &[Value]| pieces.iter().filter(|piece| piece["finish_reason"].is_string()).count();
            prop_assert_eq!(ends(&out), ends(&whole));
        }
    }
}
