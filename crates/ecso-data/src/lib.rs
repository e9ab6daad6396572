//! The data engine, the second half of the paper: ECSO run over unlabelled pairs of image and query
//! yields fine-tuning data for alignment, with no human in the loop.
//!
//! 1. [`input`] reads rows, one by one, from what people have.
//! 2. [`make::Maker::make`] takes one row through the guard: what step 2 calls unsafe is kept with
//!    step 4's answer, if that passes a second check.
//! 3. [`run::run`] does it for all rows and keeps a journal; duplicates are dropped before the
//!    model sees them ([`dedupe`]).
//! 4. [`pack::pack`] makes a dataset of the journal: files for `datasets`, TRL, LLaMA-Factory,
//!    ms-swift and LLaVA, a card, a manifest.
//!
//! [`answers`] takes the rows of tables in memory through the guard, for engines that others run.

pub mod answers;
mod card;
pub mod dedupe;
mod files;
pub mod input;
mod layout;
pub mod make;
pub mod manifest;
pub mod pack;
pub mod record;
mod regular;
pub mod row;
pub mod run;
mod table;
