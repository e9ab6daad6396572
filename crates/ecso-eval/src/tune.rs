//! Fits `hardened` to a model: the bias of each of its detectors, and the probability from which an
//! answer is unsafe. Both are fitted on one half of the items and evaluated on the other; a request
//! and its harmless twin are always in the same half.

mod fit;
mod item;
mod page;
#[cfg(test)]
mod tests;

pub use fit::{Fitted, fit, own};
pub use item::{TuningItem, TuningItems, UnknownRequests};
pub use page::{Advice, report};
