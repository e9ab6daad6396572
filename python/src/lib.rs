//! `_ecso`, the part of the Python package `ecso` that is in Rust. What people call is in
//! `python/ecso`; this gives it a guard, tables of Arrow, and the program.

mod call;
mod chat;
mod failure;
mod guard;
mod runtime;
mod table;

use std::{ffi::OsString, path::PathBuf};

use pyo3::prelude::*;

/// Runs the program `ecso`; `arguments` begin with its name. Gives the exit code. `program` is the
/// file that is called for it.
#[pyfunction]
fn main(py: Python<'_>, program: Option<PathBuf>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| ecso_cli::main_as(program, arguments))
}

/// Whether models run in this process: whether the wheel has the engine.
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
