//! Work under way: what Python waits for, and cancels.

use std::{sync::Arc, time::Duration};

use pyo3::{IntoPyObjectExt, prelude::*};
use tokio::{
    sync::{Mutex, mpsc},
    task::AbortHandle,
    time::timeout,
};

use crate::{failure::Failure, runtime::runtime, table::Table};

/// Between two looks whether somebody pressed Ctrl-C.
const LOOK: Duration = Duration::from_millis(50);

/// What work gives.
pub(crate) enum Item {
    /// JSON of an outcome, or of an event.
    Json(String),
    /// A table with its answers.
    Table(Table),
}

type Given = Result<Item, Failure>;

/// Where work puts what it gives.
pub(crate) type Giver = mpsc::Sender<Given>;

/// Work under way. It gives items, then it is over. Dropping it cancels it.
#[pyclass(frozen, module = "ecso._ecso")]
pub(crate) struct Call {
    given: Arc<Mutex<mpsc::Receiver<Given>>>,
    task: AbortHandle,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Call {
    /// Starts work that gives items to its [`Giver`]; a failure is the last.
    pub(crate) fn start<F>(work: impl FnOnce(Giver) -> F) -> PyResult<Self>
    where
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let (giver, items) = mpsc::channel(8);
        let work = work(giver.clone());
        let task = runtime()?.spawn(async move {
            if let Err(failure) = work.await {
                let _ = giver.send(Err(failure)).await;
            }
        });
        Ok(Self { given: Arc::new(Mutex::new(items)), task: task.abort_handle() })
    }
}

async fn next(given: &Mutex<mpsc::Receiver<Given>>) -> Result<Option<Item>, Failure> {
    given.lock().await.recv().await.transpose()
}

fn shown(py: Python<'_>, item: Result<Option<Item>, Failure>) -> PyResult<Py<PyAny>> {
    match item.map_err(|failure| failure.raised(py))? {
        Some(Item::Json(json)) => json.into_py_any(py),
        Some(Item::Table(table)) => table.into_py_any(py),
        None => Ok(py.None()),
    }
}

#[pymethods]
impl Call {
    /// Waits for the next item; None is the end. Ctrl-C cancels the work.
    fn next(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let runtime = runtime()?;
        loop {
            let waited = || runtime.block_on(async { timeout(LOOK, next(&self.given)).await });
            match py.detach(waited) {
                Ok(item) => return shown(py, item),
                Err(_) => py.check_signals().inspect_err(|_| self.task.abort())?,
            }
        }
    }

    /// Calls `done(item, None)` or `done(None, exception)` with the next item, from another thread.
    fn ask(&self, done: Py<PyAny>) -> PyResult<()> {
        let given = Arc::clone(&self.given);
        runtime()?.spawn(async move {
            let item = next(&given).await;
            // Where Python is going down nobody waits any more.
            let _ = tokio::task::spawn_blocking(move || {
                Python::try_attach(|py| {
                    let called = match shown(py, item) {
                        Ok(item) => done.call1(py, (item, py.None())),
                        Err(error) => done.call1(py, (py.None(), error)),
                    };
                    // The loop that waited is closed.
                    drop(called);
                })
            })
            .await;
        });
        Ok(())
    }

    /// Ends the work.
    fn cancel(&self) {
        self.task.abort();
    }
}
