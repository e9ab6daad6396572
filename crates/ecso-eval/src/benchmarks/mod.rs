//! The benchmarks, one file each, behind one small trait. Each reads its official layout as users
//! download it.

mod benchmark;
pub(crate) mod figstep;
mod files;
pub(crate) mod jsonl;
mod location;
pub(crate) mod mm_safetybench;
mod mm_vet;
mod mmbench;
pub(crate) mod mme;
mod mossbench;
mod pairs;
mod tables;
pub(crate) mod twins;
mod validation;
mod vlsafe;
mod xstest;

pub use benchmark::{About, Benchmark, DataError, Items};
pub use files::is_image;
pub use tables::table_rows;
pub(crate) use tables::{csv_rows, json, read};

/// All benchmarks.
pub const ALL: [&dyn Benchmark; 11] = [
    &figstep::FigStep,
    &mm_safetybench::MmSafetyBench,
    &vlsafe::VlSafe,
    &twins::Twins,
    &pairs::Pairs,
    &xstest::XsTest,
    &mossbench::MossBench,
    &mme::Mme,
    &mmbench::MmBench,
    &mm_vet::MmVet,
    &jsonl::Jsonl,
];

/// The benchmark called `name`.
#[must_use]
pub fn named(name: &str) -> Option<&'static dyn Benchmark> {
    ALL.into_iter().find(|benchmark| benchmark.about().name == name)
}
