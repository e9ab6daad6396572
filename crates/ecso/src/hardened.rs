//! `hardened`: the same steps, with more around them. What is asked for is read off the images and judged before the draft; draft and
//! last answer are judged by the same rule. Nothing here is asked with eyes open but the draft itself.

#![expect(clippy::many_single_char_names, reason = "the letters of paper.rs")]

use crate::{
    pipeline::{Halt, Pipeline},
    profile::{Hardened, SafeStep},
    prompt::Query,
    template::Template,
    trace::Step,
    verdict::{Detection, Verdict},
};

pub(crate) async fn run(w: &mut Pipeline<'_>, p: &Hardened, q: &Query<'_>) -> Result<(), Halt> {
    // 3 goes first: the images as text.
    let c = w.describe(q).await?;

    // Is harm asked for? By the images' words, by the query, by all that the model is shown.
    let asked = q.question(&p.request_check, "", &c);
    let request = w.ask(Step::RequestCheck, &p.request_check, asked, p.sure_request()).await?;
    let request = if w.was_filtered() { request.or(Detection::HARM) } else { request };

    // 1 and 2. What surely asks for harm gets no draft, and no reply could make it safe.
    let mut found = request;
    if p.is_sure(request) {
        w.may_go_out(request).await?;
    } else {
        let y = w.draft(q).await?;
        let reply = judge(w, p, q, Step::Detect, Some(request), &q.whole(&y), &c).await?;
        found = p.decide(Some(request), reply);
        if w.may_go_out(found).await? {
            return w.release(y).await;
        }
    }

    // 4. An answer with eyes closed, which is judged as the draft was: alone, where the request is what was found harmful.
    let is_plain = p.is_sure(request) || (found.is_harm() && found.score.is_some());
    let open = Some(request).filter(|_| !is_plain);
    for template in tries(&w.profile.safe, q.has_hints(&c), is_plain) {
        let y = w.compose(q.safe(&c, template)).await?;
        let reply = judge(w, p, q, Step::ReplyCheck, open, &y, &c).await?;
        if !p.decide(open, reply).is_harm() {
            return w.release(y).await;
        }
    }
    Err(Halt::Refuse)
}

/// How harmful a reply is. What would be held back is asked about once more: does it help with anything?
async fn judge(
    w: &mut Pipeline<'_>,
    p: &Hardened,
    q: &Query<'_>,
    step: Step,
    request: Option<Detection>,
    y: &str,
    c: &[String],
) -> Result<Detection, Halt> {
    if y.trim().is_empty() {
        return Ok(Detection::SAFE);
    }
    let harms = w.ask(step, &p.reply_check, q.question(&p.reply_check, y, c), p.sure_reply()).await?;
    if !p.decide(request, harms).is_harm() {
        return Ok(harms);
    }
    let helps = w.ask(step, &p.help_check, q.question(&p.help_check, y, c), p.sure_reply()).await?;
    Ok(harms.and(helps))
}

impl Hardened {
    /// From where on a request is harmful whatever the reply.
    fn sure_request(&self) -> f64 {
        self.request_check.threshold.max(self.threshold)
    }

    /// From where on a reply is harmful whatever the request.
    fn sure_reply(&self) -> f64 {
        self.reply_check.threshold.max(self.threshold)
    }

    fn is_sure(&self, request: Detection) -> bool {
        request.weight >= self.sure_request()
    }

    /// The one place that decides. Harmful is what is surely asked for, what the reply surely does, and what both together come to: the
    /// mean of the two probabilities, or the reply's alone where the request is left out. The score is the one that decided.
    fn decide(&self, request: Option<Detection>, reply: Detection) -> Detection {
        if reply.verdict == Verdict::Unchecked {
            return Detection::UNCHECKED;
        }
        let asked = request.unwrap_or(reply);
        let mean = f64::midpoint(asked.weight, reply.weight);
        let (weight, is_harm) = match () {
            () if request.is_some_and(|request| self.is_sure(request)) => (asked.weight, true),
            () if reply.weight >= self.sure_reply() => (reply.weight, true),
            () => (mean, mean >= self.threshold),
        };
        let are_told = asked.score.is_some() && reply.score.is_some();
        let verdict = if is_harm { Verdict::Unsafe } else { Verdict::Safe };
        Detection { verdict, score: are_told.then_some(weight), weight }
    }
}

/// What is tried in step 4, one after the other. Where probabilities say harm, only the strict template is.
fn tries(safe: &SafeStep, has_hints: bool, is_plain: bool) -> Vec<&Template> {
    let strict = Some(&safe.strict).filter(|strict| !strict.text().is_empty());
    let first = Some(safe.chosen(has_hints)).filter(|_| !is_plain || strict.is_none());
    first.into_iter().chain(strict).collect()
}
