//! Judges: what somebody says of an answer. Apart from running: a run can be judged again, by
//! another, without its model.

mod exact;
mod judgement;
mod llm;
mod rules;

pub use exact::Exact;
pub(crate) use judgement::digest;
pub use judgement::{Case, Judge, Judgement, Ruling};
pub use llm::{Llm, published};
pub use rules::{AdvBench, XsTest};
