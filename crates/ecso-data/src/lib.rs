//! The data engine, the second half of the paper: running ECSO on unlabelled pairs of image and
//! query yields fine-tuning data for alignment, without a human in the loop.
//!
//! 1. [`input`] reads rows one by one, in many formats.
//! 2. [`generate::Generator::generate`] runs the guard on one row. If step 2 calls the draft unsafe
//!    and step 4's answer passes a second check, the row becomes a safety sample.
//! 3. [`run::run`] does this for all rows and keeps a journal. Duplicates are dropped before the
//!    model sees them ([`dedupe`]).
//! 4. [`pack::pack`] turns the journal into a dataset: files for `datasets`, TRL, LLaMA-Factory,
//!    ms-swift and LLaVA, a card and a manifest.
//!
//! [`answers`] runs the guard on the rows of in-memory tables, for data engines such as Ray.

pub mod answers;
mod card;
pub mod dedupe;
mod files;
pub mod generate;
pub mod input;
mod layout;
pub mod manifest;
pub mod pack;
pub mod record;
mod regular;
pub mod row;
pub mod run;
mod table;
