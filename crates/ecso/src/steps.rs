//! The four steps of ECSO. Data flows down this file once.
//!
//! | step | call | image? |
//! | --- | --- | --- |
//! | 1 direct answer | y~ = F(v, x) | yes |
//! | 2 harm detection | s = F(v, `P_det`(x, y~)); safe: y~ is the answer | yes |
//! | 3 query-aware image to text | c = F(v, `P_trans`(x)) | yes |
//! | 4 safe answer | y = F(-, `P_gen`(c, x)) | **no** |
//!
//! A profile may put a look at the request before them (`look`) and one at step 4's answer behind them (`check`).

use crate::{
    call::Work,
    chat::Chat,
    mllm::Sampling,
    profile::{EmptyCaption, Eyes, Gate, Refusals, Rewrite, Scope},
    prompt::{self, Query},
    refusal::declines,
    trace::{GuardError, Step},
    verdict::{Finding, Verdict},
};

/// Runs the steps on `chat`; with a `draft`, from step 2 on. Answers (steps 1 and 4) are sampled as `sampling` says, else as the
/// profile does.
pub(crate) async fn run(
    work: &mut Work<'_>,
    sampling: Option<&Sampling>,
    chat: &Chat,
    draft: Option<String>,
) -> Result<(), GuardError> {
    let profile = work.profile;
    let query = Query::of(chat, profile.turns).ok_or(GuardError::NoQuery)?;
    let in_scope = profile.scope == Scope::All || chat.image_count() > 0;
    let is_judged = in_scope && profile.gate == Gate::Detected;
    let is_looked_at = in_scope && profile.gate != Gate::Never;

    // Where the judge is to have the captions, step 3 goes first.
    let early = is_looked_at && profile.judges_by_caption();
    let mut captions = if early { Some(captions(work, chat, &query).await?) } else { None };
    let described = || captions.as_deref().unwrap_or_default();

    // Not in the paper: is harm asked for? What asks for it gets no draft.
    let look = match &profile.look {
        Some(look) if is_looked_at => {
            let asked = prompt::question(profile, look, &query, "", described());
            Some(work.ask(Step::Look, look, asked, None).await?)
        }
        _ => None,
    };

    // 1. Direct answer, with the image: y~ = F(v, x).
    let draft = match draft {
        Some(draft) => Some(profile.stripped(&draft)),
        None if look.is_some_and(Finding::is_harm) => None,
        None => {
            let sampling = sampling.cloned().unwrap_or_else(|| profile.direct.sampling());
            Some(work.reply(Step::Direct, chat.clone(), &sampling, None).await?)
        }
    };

    // 2. Harm detection, by the same model: s = F(v, P_det(x, y~)).
    let found = match &draft {
        _ if !is_judged => None,
        None => look,
        Some(draft) if profile.refusals == Refusals::Safe && declines(draft) => Some(Finding::harmless()),
        Some(_) if profile.detect.is_settled_by(look) => Some(Finding::of(Verdict::Safe, look)),
        Some(draft) => {
            let asked = prompt::question(profile, &profile.detect, &query, draft, described());
            Some(work.ask(Step::Detect, &profile.detect, asked, look).await?)
        }
    };
    if let Some(found) = found {
        (work.outcome.verdict, work.outcome.score) = (found.verdict, found.score);
    }
    let must_rewrite = in_scope && (profile.gate == Gate::Always || work.outcome.verdict == Verdict::Unsafe);
    work.decide(must_rewrite).await;
    match draft {
        Some(draft) if !must_rewrite => return work.answer(draft).await,
        _ if profile.rewrite == Rewrite::Refuse => return work.answer(profile.refusal.clone()).await,
        _ => {}
    }

    // 3. Each image as text that keeps what the query needs: c = F(v, P_trans(x)).
    let captions = match captions.take() {
        Some(captions) => captions,
        None => self::captions(work, chat, &query).await?,
    };
    let is_blank = captions.iter().all(|caption| caption.trim().is_empty());
    if is_blank && !captions.is_empty() && profile.empty_caption == EmptyCaption::Refuse {
        return work.answer(profile.refusal.clone()).await;
    }

    // 4. Safe answer, eyes closed: y = F(-, P_gen(c, x)).
    let sampling = sampling.cloned().unwrap_or_else(|| profile.safe.sampling());
    // Where the look says harm, or probabilities joined with it do, another answer to the same would be no better.
    let is_sure = look.is_some_and(|look| look.is_harm() || found.is_some_and(Finding::is_plain));
    for template in profile.safe.tries(&captions, &query, profile.empty_caption, is_sure) {
        let blind = prompt::safe(profile, chat, &query, &captions, template);
        let chat: Chat = match profile.safe.image {
            Eyes::Dropped => blind.into(),
            Eyes::Kept => query.shown_again(blind),
        };
        let Some(check) = &profile.check else {
            return work.write(Step::Safe, chat, sampling, template).await;
        };
        let answer = work.reply(Step::Safe, chat, &sampling, Some(template)).await?;

        // Not in the paper: the last word is judged too.
        if declines(&answer) {
            return work.answer(answer).await;
        }
        let asked = prompt::question(profile, check, &query, &answer, &captions);
        let before = look.filter(|_| !is_sure);
        if work.ask(Step::Check, check, asked, before).await?.verdict == Verdict::Safe {
            return work.answer(answer).await;
        }
    }
    work.answer(profile.refusal.clone()).await
}

async fn captions(work: &mut Work<'_>, chat: &Chat, query: &Query<'_>) -> Result<Vec<String>, GuardError> {
    let profile = work.profile;
    let mut captions = Vec::new();
    for image in chat.images() {
        let asked = prompt::caption(profile, image, query);
        let template = profile.caption.chosen();
        captions.push(work.reply(Step::Caption, asked, &profile.caption.sampling(), Some(template)).await?);
    }
    Ok(captions)
}
