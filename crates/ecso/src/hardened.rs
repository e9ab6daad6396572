//! `hardened`: the four steps, with more checks around them. Images become text first (step 3). A
//! request check comes before the draft, a reply check after it, and the answer of step 4 gets the
//! same reply check. Only the draft and step 3 see the images.

use std::{collections::HashMap, mem};

use crate::{
    mllm::ImageText,
    pipeline::{Halt, Pipeline},
    profile::{self, Detector, Hardened, Question, SafeStep},
    prompt::{Answer, Query, hints},
    template::Template,
    trace::Step,
    verdict::{CERTAIN, Detection},
};

pub(crate) async fn run(
    pipeline: &mut Pipeline<'_>,
    method: &Hardened,
    query: &Query<'_>,
) -> Result<(), Halt> {
    // Step 3 and the request check; step 1 runs at the same time if the model takes concurrent
    // calls. A harmful request gets no draft.
    let (RequestFindings { images, known, request }, draft) =
        check_request_and_draft(pipeline, method, query).await?;
    let hints: Vec<String> = hints(&images).collect();
    let mut judge = Judge { method, query, images: &images, known };

    // Step 2: is the request harmful, or the draft as a reply to it?
    let found = if let Some(draft) = draft {
        let found =
            judge.detect(pipeline, Step::Detect, Some(query.draft(&draft)), request).await?;
        if pipeline.decide(found).await? {
            return pipeline.release(draft).await;
        }
        found
    } else {
        pipeline.decide(request).await?;
        request
    };

    // Step 4: an answer with eyes closed, judged as the draft was.
    let is_plain = found.is_harmful() && found.score.is_some();
    for template in templates(&pipeline.profile.safe, query.has_hints(&hints), is_plain) {
        let answer = pipeline.compose(query.safe(&hints, template)).await?;
        let reply = Some(Answer::new(&answer));
        // An empty answer counts as no answer.
        if !answer.trim().is_empty()
            && !judge.detect(pipeline, Step::ReplyCheck, reply, Detection::SAFE).await?.is_harmful()
        {
            return pipeline.release(answer).await;
        }
    }
    Err(Halt::Refuse)
}

/// What is known about a request before there is an answer to it.
#[derive(Debug, Clone)]
pub(crate) struct RequestFindings {
    images: Vec<ImageText>,
    /// Findings of questions, by name.
    known: HashMap<String, Detection>,
    /// The verdict of the request check.
    request: Detection,
}

impl RequestFindings {
    /// Whether the request itself is harmful, so that no reply could be safe.
    pub(crate) fn is_harmful(&self) -> bool {
        self.request.is_harmful()
    }
}

/// The request check: the images as text (step 3), and whether the request is harmful.
pub(crate) async fn check_request(
    pipeline: &mut Pipeline<'_>,
    method: &Hardened,
    query: &Query<'_>,
) -> Result<RequestFindings, Halt> {
    let images = pipeline.image_texts(query).await?;
    let mut judge = Judge { method, query, images: &images, known: HashMap::new() };
    let request = judge.detect(pipeline, Step::RequestCheck, None, Detection::SAFE).await?;
    let (known, request) =
        (judge.known, if pipeline.was_filtered() { Detection::HARM } else { request });
    Ok(RequestFindings { images, known, request })
}

/// Step 2 alone, for the beginning of a draft. If the request is harmful, so is any draft.
pub(crate) async fn detect(
    pipeline: &mut Pipeline<'_>,
    method: &Hardened,
    query: &Query<'_>,
    draft: &str,
) -> Result<Detection, Halt> {
    let RequestFindings { images, known, request } = match mem::take(&mut pipeline.findings) {
        Some(findings) => findings,
        None => check_request(pipeline, method, query).await?,
    };
    if request.is_harmful() {
        return Ok(request);
    }
    let mut judge = Judge { method, query, images: &images, known };
    judge.detect(pipeline, Step::Detect, Some(query.draft(draft)), request).await
}

/// The request check, and the draft unless the request is harmful.
async fn check_request_and_draft(
    pipeline: &mut Pipeline<'_>,
    method: &Hardened,
    query: &Query<'_>,
) -> Result<(RequestFindings, Option<String>), Halt> {
    if let Some(findings) = mem::take(&mut pipeline.findings) {
        let draft = if findings.is_harmful() { None } else { Some(pipeline.draft(query).await?) };
        return Ok((findings, draft));
    }
    let mut checking = pipeline.fork();
    let found = pipeline
        .draft_while(
            query,
            check_request(&mut checking, method, query),
            RequestFindings::is_harmful,
        )
        .await?;
    pipeline.prepend_steps(checking);
    Ok(found)
}

/// Asks the profile's questions about a request and about replies to it, and combines the findings.
struct Judge<'a, 'q> {
    method: &'a Hardened,
    query: &'a Query<'q>,
    images: &'a [ImageText],
    /// Findings of questions, by name. Each question is asked once.
    known: HashMap<String, Detection>,
}

impl Judge<'_, '_> {
    /// Whether the request is harmful, or the `reply` to it: the detector with the highest
    /// probability decides. `found` is what other detectors have found already.
    async fn detect(
        &mut self,
        pipeline: &mut Pipeline<'_>,
        step: Step,
        reply: Option<Answer<'_>>,
        found: Detection,
    ) -> Result<Detection, Halt> {
        if let Some(found) = pipeline.found_already(step) {
            return Ok(found);
        }
        if reply.is_some_and(Answer::is_empty) {
            return Ok(found);
        }
        // Findings about an earlier reply do not hold for this one.
        self.known.retain(|name, _| {
            !self.method.questions.get(name).is_some_and(Question::is_about_reply)
        });
        let mut highest = found;
        for detector in self
            .method
            .detectors
            .iter()
            .filter(|detector| self.method.is_about_reply(detector) == reply.is_some())
        {
            if let Some(found) = self.run(pipeline, detector, step, reply).await? {
                highest = highest.or(found);
            }
        }
        Ok(highest)
    }

    /// The finding of one detector; `None` if one of its questions does not apply. It stops early
    /// once the log-odds fall below what its next term needs.
    async fn run(
        &mut self,
        pipeline: &mut Pipeline<'_>,
        detector: &Detector,
        step: Step,
        reply: Option<Answer<'_>>,
    ) -> Result<Option<Detection>, Halt> {
        let text = reply.unwrap_or(Answer::new(""));
        let mut questions = detector.terms.iter().filter_map(|term| self.method.question(term));
        if questions.any(|question| self.query.question(question, text, self.images).is_empty()) {
            return Ok(None);
        }
        let (mut log_odds, mut has_scores) = (detector.bias, true);
        for term in &detector.terms {
            if !self.method.asks(term, log_odds, has_scores) {
                return Ok(Some(Detection::stopped_early(self.method.threshold)));
            }
            let Some(question) = self.method.question(term) else { continue };
            let found = if let Some(found) = self.known.get(question.name.as_str()) {
                *found
            } else {
                let step = if question.is_about_reply() { step } else { Step::RequestCheck };
                let found = self.ask(pipeline, step, question, text).await?;
                self.known.insert(question.name.clone(), found);
                found
            };
            // What a filter refused is harm: the request, or the reply. That it refused the request
            // says nothing about this reply.
            if found.is_filtered && (reply.is_none() || question.is_about_reply()) {
                return Ok(Some(found));
            }
            log_odds += term.adds(profile::log_odds(found.score, found.is_harmful()));
            has_scores &= found.score.is_some();
        }
        Ok(Some(Detection::from_log_odds(log_odds, self.method.threshold, has_scores)))
    }

    async fn ask(
        &self,
        pipeline: &mut Pipeline<'_>,
        step: Step,
        question: &Question,
        reply: Answer<'_>,
    ) -> Result<Detection, Halt> {
        pipeline
            .ask(step, question, self.query.question(question, reply, self.images), CERTAIN)
            .await
    }
}

/// The templates that step 4 tries in order. If probabilities said harm, only the strict one.
fn templates(safe: &SafeStep, has_hints: bool, is_plain: bool) -> Vec<&Template> {
    let strict = Some(&safe.strict).filter(|strict| !strict.text().is_empty());
    let first = Some(safe.chosen(has_hints)).filter(|_| !is_plain || strict.is_none());
    first.into_iter().chain(strict).collect()
}
