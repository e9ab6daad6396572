//! `_ecso`, the Rust part of the Python package `ecso`. The public API is in `python/ecso`; this
//! module provides the guard, Arrow tables and the program.

mod call;
mod chat;
mod failure;
mod guard;
mod logging;
mod runtime;
mod table;

use std::{ffi::OsString, path::PathBuf};

use pyo3::prelude::*;

/// Runs the program `ecso` and returns its exit code. `arguments` start with its name. `program` is
/// the executable to call for work in a separate process.
#[pyfunction]
fn main(py: Python<'_>, program: Option<PathBuf>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| ecso_cli::main_as(program, arguments))
}

/// Whether this wheel includes the engine, so that models can run in this process.
#[pyfunction]
fn has_engine() -> bool {
    ecso_cli::library::HAS_ENGINE
}

#[pymodule(name = "_ecso")]
mod module {
    #[pymodule_export]
    use super::{call::Call, guard::Core, has_engine, main, table::Table};
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
