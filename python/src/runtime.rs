//! The runtime of this process. A process that was forked has none of its parent's threads, so it
//! gets one of its own.

use std::sync::{Mutex, PoisonError};

use pyo3::{PyResult, exceptions::PyOSError};
use tokio::runtime::Runtime;

/// Something that belongs to the process with this id.
pub(crate) struct Own<T>(Mutex<Option<(u32, T)>>);

impl<T: Clone> Own<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// What this process has; made by `make`, if it has none yet. What a parent had is left as it
    /// is: its threads are not here.
    pub(crate) fn get<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let process = std::process::id();
        if let Some((owner, own)) = &*held
            && *owner == process
        {
            return Ok(own.clone());
        }
        let own = make()?;
        std::mem::forget(held.replace((process, own.clone())));
        Ok(own)
    }
}

static RUNTIME: Own<&'static Runtime> = Own::new();

/// The runtime.
pub(crate) fn runtime() -> PyResult<&'static Runtime> {
    RUNTIME.get(|| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("ecso").build();
        let runtime =
            runtime.map_err(|error| PyOSError::new_err(format!("no runtime: {error}")))?;
        Ok(Box::leak(Box::new(runtime)) as &'static Runtime)
    })
}
