//! The async runtime of this process. A forked process has none of its parent's threads, so it gets
//! its own runtime.

use std::sync::{Mutex, PoisonError};

use pyo3::{PyResult, exceptions::PyOSError};
use tokio::runtime::Runtime;

/// A value for each process, kept with the id of the process that created it.
pub(crate) struct PerProcess<T>(Mutex<Option<(u32, T)>>);

impl<T: Clone> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Returns the value of this process; `create` makes it on the first call. The value of a
    /// parent process is leaked, as its threads do not exist here.
    pub(crate) fn get<E>(&self, create: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let process = std::process::id();
        if let Some((owner, value)) = &*current
            && *owner == process
        {
            return Ok(value.clone());
        }
        let value = create()?;
        std::mem::forget(current.replace((process, value.clone())));
        Ok(value)
    }
}

static RUNTIME: PerProcess<&'static Runtime> = PerProcess::new();

/// The runtime of this process.
pub(crate) fn runtime() -> PyResult<&'static Runtime> {
    RUNTIME.get(|| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("ecso").build();
        let runtime =
            runtime.map_err(|error| PyOSError::new_err(format!("can't start threads: {error}")))?;
        Ok(Box::leak(Box::new(runtime)) as &'static Runtime)
    })
}
