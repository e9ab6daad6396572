//! ECSO as published: the four steps, in the order of the paper's figure (arXiv 2403.09572, section
//! 3).
//!
//! | step | call | image? |
//! | --- | --- | --- |
//! | 1 direct answer | y~ = F(v, x) | yes |
//! | 2 harm detection | s = F(v, `P_det`(x, y~)); safe: y~ is the answer | yes |
//! | 3 query-aware image to text | c = F(v, `P_trans`(x)) | yes |
//! | 4 safe answer | y = F(-, `P_gen`(c, x)) | **no** |

#![expect(clippy::many_single_char_names, reason = "the paper's letters")]

use crate::{
    pipeline::{ANY_HARM, Halt, Pipeline},
    profile::Paper,
    prompt::Query,
    trace::Step,
    verdict::Detection,
};

pub(crate) async fn run(w: &mut Pipeline<'_>, p: &Paper, q: &Query<'_>) -> Result<(), Halt> {
    // 1. Direct answer, with the image: y~ = F(v, x).
    let y = w.draft(q).await?;

    // 2. Harm detection, by the same model: s = F(v, P_det(x, y~)).
    let s = detect(w, p, q, &y).await?;
    if w.decide(s).await? {
        return w.release(y).await;
    }

    // 3. Each image as text that keeps what the query needs: c = F(v, P_trans(x)).
    let c = w.describe(q).await?;

    // 4. Safe answer, eyes closed: y = F(-, P_gen(c, x)).
    w.write(q, &c).await
}

/// Step 2, for a draft or its beginning.
pub(crate) async fn detect(
    w: &mut Pipeline<'_>,
    p: &Paper,
    q: &Query<'_>,
    y: &str,
) -> Result<Detection, Halt> {
    w.ask(Step::Detect, &p.detect, q.question(&p.detect, q.draft(y), &[]), ANY_HARM).await
}
