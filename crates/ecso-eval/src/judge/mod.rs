//! Judges rule on answers. Judging is separate from running: a run can be judged again, by another
//! judge, without the model that answered.

mod answers;
mod exact;
mod judgement;
mod llm;
mod rules;

pub use answers::{ArmAnswer, answers_to_judge, judge_answers};
pub use exact::Exact;
pub(crate) use judgement::digest;
pub use judgement::{Case, Judge, Judgement, Ruling};
pub use llm::{Llm, published_judge};
pub use rules::{AdvBench, XsTest};
