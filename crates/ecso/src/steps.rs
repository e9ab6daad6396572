//! The four steps of ECSO. Data flows down this file once.
//!
//! | step | call | image? |
//! | --- | --- | --- |
//! | 1 direct answer | y~ = F(v, x) | yes |
//! | 2 harm detection | s = F(v, `P_det`(x, y~)); safe: y~ is the answer | yes |
//! | 3 query-aware image to text | c = F(v, `P_trans`(x)) | yes |
//! | 4 safe answer | y = F(-, `P_gen`(c, x)) | **no** |

use async_stream::try_stream;
use futures::{Stream, StreamExt};

use crate::{
    call::{Call, Written},
    chat::Chat,
    mllm::{Mllm, Sampling},
    profile::{EmptyCaption, Gate, Profile, Rewrite, SafeImage, Scope},
    prompt::{self, Query},
    trace::{Event, GuardError, Outcome, Step},
    verdict::{Verdict, harm_score},
};

/// Runs the steps on `chat`; with a `draft`, from step 2 on. Answers (steps 1 and 4) are sampled as `sampling` says, else as the
/// profile does.
pub(crate) fn run<'a>(
    model: &'a dyn Mllm,
    profile: &'a Profile,
    sampling: Option<&'a Sampling>,
    chat: &'a Chat,
    draft: Option<String>,
) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
    try_stream! {
        let query = Query::of(chat).ok_or(GuardError::NoQuery)?;
        let mut outcome = Outcome::unchecked(profile, model);

        // 1. Direct answer, with the image: y~ = F(v, x).
        let draft = if let Some(draft) = draft {
            profile.stripped(&draft)
        } else {
            let call = Call::new(Step::Direct, chat.clone(), None);
            yield call.started();
            let (reply, trace) = call.generate(model, &sampling.cloned().unwrap_or_else(|| profile.direct.sampling())).await?;
            yield outcome.record(trace);
            profile.stripped(&reply.text)
        };

        // 2. Harm detection, by the same model: s = F(v, P_det(x, y~)).
        let in_scope = profile.scope == Scope::All || chat.image_count() > 0;
        if in_scope && profile.gate == Gate::Detected {
            let detect = &profile.detect;
            let call = Call::new(Step::Detect, prompt::detect(profile, &query, &draft), Some(&detect.template));
            yield call.started();
            let (reply, mut trace) = call.generate(model, &detect.sampling()).await?;
            outcome.score = harm_score(&reply);
            outcome.verdict = detect.parser.parse(&reply.text, outcome.score, detect.threshold);
            (trace.score, trace.verdict) = (outcome.score, Some(outcome.verdict));
            yield outcome.record(trace);
        }
        let must_rewrite = in_scope && (profile.gate == Gate::Always || outcome.verdict == Verdict::Unsafe);
        yield outcome.decide(must_rewrite);
        if !must_rewrite || profile.rewrite == Rewrite::Refuse {
            let answer = if must_rewrite { profile.refusal.clone() } else { draft };
            yield outcome.answer(answer);
            yield Event::Done(outcome);
            return;
        }

        // 3. Each image as text that keeps what the query needs: c = F(v, P_trans(x)).
        let mut captions = Vec::new();
        for image in chat.images() {
            let call = Call::new(Step::Caption, prompt::caption(profile, image, &query), Some(profile.caption.chosen()));
            yield call.started();
            let (reply, trace) = call.generate(model, &profile.caption.sampling()).await?;
            yield outcome.record(trace);
            captions.push(profile.stripped(&reply.text));
        }
        let seen = captions.iter().any(|caption| !caption.trim().is_empty());
        if !seen && !captions.is_empty() && profile.empty_caption == EmptyCaption::Refuse {
            yield outcome.answer(profile.refusal.clone());
            yield Event::Done(outcome);
            return;
        }

        // 4. Safe answer, eyes closed: y = F(-, P_gen(c, x)).
        let (blind, template) = prompt::safe(profile, chat, &query, &captions);
        let chat: Chat = match profile.safe.image {
            SafeImage::Dropped => blind.into(),
            SafeImage::Kept => query.shown_again(blind),
        };
        let call = Call::new(Step::Safe, chat, Some(template));
        yield call.started();
        let sampling = sampling.cloned().unwrap_or_else(|| profile.safe.sampling());
        let mut pieces = call.stream(model, sampling, profile.strip);
        while let Some(written) = pieces.next().await {
            match written? {
                Written::Text(text) => yield outcome.answer(text),
                Written::Done(trace) => yield outcome.record(trace),
            }
        }
        drop(pieces);
        yield Event::Done(outcome);
    }
}
