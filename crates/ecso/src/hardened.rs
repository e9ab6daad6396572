//! `hardened`: the same steps, with more around them. The images become text first; what is asked for is judged before the draft, the draft
//! with it, and the last answer by the same rule. Nothing here is asked with eyes open but the draft itself, and, of a model that sees, step 3.

#![expect(clippy::many_single_char_names, reason = "the letters of paper.rs")]

use std::{collections::HashMap, mem};

use crate::{
    mllm::Seen,
    pipeline::{Halt, Pipeline},
    profile::{self, Hardened, Question, SafeStep, Way},
    prompt::{Answer, Query, hints},
    template::Template,
    trace::Step,
    verdict::{CERTAIN, Detection},
};

pub(crate) async fn run(w: &mut Pipeline<'_>, p: &Hardened, q: &Query<'_>) -> Result<(), Halt> {
    // 3 goes first, and whether harm is asked for; 1 beside it, where the model takes several calls at once. What surely asks for harm
    // gets no draft: no reply could make it safe.
    let (Looked { seen, known, request }, y) = looked_and_drafted(w, p, q).await?;
    let c: Vec<String> = hints(&seen).collect();
    let mut judge = Judge { p, q, seen: &seen, known };

    // 2. Is the reply harmful, to this request?
    let found = if let Some(y) = y {
        let reply = judge.weigh(w, Step::Detect, Some(q.draft(&y))).await?;
        if w.may_go_out(reply).await? {
            return w.release(y).await;
        }
        reply
    } else {
        w.may_go_out(request).await?;
        request
    };

    // 4. An answer with eyes closed, which is judged as the draft was.
    for template in tries(&w.profile.safe, q.has_hints(&c), found.is_harm() && found.score.is_some()) {
        let y = w.compose(q.safe(&c, template)).await?;
        if !judge.weigh(w, Step::ReplyCheck, Some(Answer::new(&y))).await?.is_harm() {
            return w.release(y).await;
        }
    }
    Err(Halt::Refuse)
}

/// What there is to know of a request before there is an answer to it.
#[derive(Debug, Clone)]
pub(crate) struct Looked {
    seen: Vec<Seen>,
    /// What questions have found, by name.
    known: HashMap<String, Detection>,
    /// Whether harm is asked for.
    request: Detection,
}

impl Looked {
    /// Whether no reply could make the request safe.
    pub(crate) fn is_harm(&self) -> bool {
        self.request.is_harm()
    }
}

/// Looks at a request: its images as text, and whether harm is asked for.
pub(crate) async fn look(w: &mut Pipeline<'_>, p: &Hardened, q: &Query<'_>) -> Result<Looked, Halt> {
    let seen = w.look(q).await?;
    let mut judge = Judge { p, q, seen: &seen, known: HashMap::new() };
    let request = judge.weigh(w, Step::RequestCheck, None).await?;
    let (known, request) = (judge.known, if w.was_filtered() { Detection::HARM } else { request });
    Ok(Looked { seen, known, request })
}

/// Step 2 alone, for the beginning of a draft. Where no reply could be safe it is harm, whatever it says.
pub(crate) async fn detect(w: &mut Pipeline<'_>, p: &Hardened, q: &Query<'_>, y: &str) -> Result<Detection, Halt> {
    let looked = mem::take(&mut w.looked);
    let Looked { seen, known, request } = if let Some(looked) = looked { looked } else { look(w, p, q).await? };
    if request.is_harm() {
        return Ok(request);
    }
    Judge { p, q, seen: &seen, known }.weigh(w, Step::Detect, Some(q.draft(y))).await
}

/// What is known of the request, and the draft, if one is of use.
async fn looked_and_drafted(
    w: &mut Pipeline<'_>,
    p: &Hardened,
    q: &Query<'_>,
) -> Result<(Looked, Option<String>), Halt> {
    if let Some(looked) = mem::take(&mut w.looked) {
        let y = if looked.is_harm() { None } else { Some(w.draft(q).await?) };
        return Ok((looked, y));
    }
    let mut ahead = w.fork();
    let found = w.draft_beside(q, look(&mut ahead, p, q), Looked::is_harm).await?;
    w.went_ahead(ahead);
    Ok(found)
}

/// Asks a profile's questions about a request, and about replies to it.
struct Judge<'a, 'q> {
    p: &'a Hardened,
    q: &'a Query<'q>,
    seen: &'a [Seen],
    /// What questions have found, by name.
    known: HashMap<String, Detection>,
}

impl Judge<'_, '_> {
    /// How harmful the request is, or the reply `y` to it: by the surest of the ways in which it can be.
    async fn weigh(&mut self, w: &mut Pipeline<'_>, step: Step, y: Option<Answer<'_>>) -> Result<Detection, Halt> {
        if let Some(found) = w.found_already(step) {
            return Ok(found);
        }
        if y.is_some_and(Answer::is_empty) {
            return Ok(Detection::SAFE);
        }
        // What was found about an earlier reply is not about this one.
        self.known.retain(|name, _| !self.p.questions.get(name).is_some_and(Question::is_about_reply));
        let mut surest = Detection::SAFE;
        for way in self.p.ways.iter().filter(|way| self.p.is_about_reply(way) == y.is_some()) {
            if let Some(found) = self.follow(w, way, step, y).await? {
                surest = surest.or(found);
            }
        }
        Ok(surest)
    }

    /// What one way comes to; none where a question of it does not apply. It is given up where probabilities say that it comes to nothing.
    async fn follow(
        &mut self,
        w: &mut Pipeline<'_>,
        way: &Way,
        step: Step,
        y: Option<Answer<'_>>,
    ) -> Result<Option<Detection>, Halt> {
        let reply = y.unwrap_or(Answer::new(""));
        let mut questions = way.terms.iter().filter_map(|term| self.p.question(term));
        if questions.any(|question| self.q.question(question, reply, self.seen).is_empty()) {
            return Ok(None);
        }
        let (mut sum, mut are_told) = (way.bias, true);
        for term in &way.terms {
            if self.p.spare && are_told && term.from.is_some_and(|from| sum < from) {
                return Ok(Some(Detection::given_up(self.p.threshold)));
            }
            let Some(question) = self.p.question(term) else { continue };
            let found = if let Some(found) = self.known.get(question.name.as_str()) {
                *found
            } else {
                let step = if question.is_about_reply() { step } else { Step::RequestCheck };
                let found = self.ask(w, step, question, reply).await?;
                self.known.insert(question.name.clone(), found);
                found
            };
            sum += term.adds(profile::log_odds(found.score, found.is_harm()));
            are_told &= found.score.is_some();
        }
        Ok(Some(Detection::weighed(sum, self.p.threshold, are_told)))
    }

    async fn ask(
        &self,
        w: &mut Pipeline<'_>,
        step: Step,
        question: &Question,
        y: Answer<'_>,
    ) -> Result<Detection, Halt> {
        w.ask(step, question, self.q.question(question, y, self.seen), CERTAIN).await
    }
}

/// What is tried in step 4, one after the other. Where probabilities say harm, only the strict template is.
fn tries(safe: &SafeStep, has_hints: bool, is_plain: bool) -> Vec<&Template> {
    let strict = Some(&safe.strict).filter(|strict| !strict.text().is_empty());
    let first = Some(safe.chosen(has_hints)).filter(|_| !is_plain || strict.is_none());
    first.into_iter().chain(strict).collect()
}
