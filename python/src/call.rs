//! Running work that Python waits for and can cancel.

use std::{sync::Arc, time::Duration};

use pyo3::{IntoPyObjectExt, prelude::*};
use tokio::{
    sync::{Mutex, mpsc},
    task::AbortHandle,
    time::timeout,
};

use crate::{failure::Failure, runtime::runtime, table::Table};

/// Interval between checks for Ctrl-C.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// A result of work.
pub(crate) enum Item {
    /// JSON of an outcome, or of an event.
    Json(String),
    /// A table with its answers.
    Table(Table),
}

type ItemResult = Result<Item, Failure>;

/// Where work sends its items.
pub(crate) type ItemSender = mpsc::Sender<ItemResult>;

/// Running work, which sends items until it ends. Dropping it cancels the work.
#[pyclass(frozen, module = "ecso._ecso")]
pub(crate) struct Call {
    items: Arc<Mutex<mpsc::Receiver<ItemResult>>>,
    task: AbortHandle,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Call {
    /// Starts work that sends its items to an [`ItemSender`]. A failure is the last item.
    pub(crate) fn start<F>(work: impl FnOnce(ItemSender) -> F) -> PyResult<Self>
    where
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let (sender, items) = mpsc::channel(8);
        let work = work(sender.clone());
        let task = runtime()?.spawn(async move {
            if let Err(failure) = work.await {
                let _ = sender.send(Err(failure)).await;
            }
        });
        Ok(Self { items: Arc::new(Mutex::new(items)), task: task.abort_handle() })
    }
}

async fn next(items: &Mutex<mpsc::Receiver<ItemResult>>) -> Result<Option<Item>, Failure> {
    items.lock().await.recv().await.transpose()
}

fn to_python(py: Python<'_>, item: Result<Option<Item>, Failure>) -> PyResult<Py<PyAny>> {
    match item.map_err(|failure| failure.into_exception(py))? {
        Some(Item::Json(json)) => json.into_py_any(py),
        Some(Item::Table(table)) => table.into_py_any(py),
        None => Ok(py.None()),
    }
}

#[pymethods]
impl Call {
    /// Waits for the next item; None means the end. Ctrl-C cancels the work.
    fn next(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let runtime = runtime()?;
        loop {
            let item = async { timeout(SIGNAL_INTERVAL, next(&self.items)).await };
            let wait = || runtime.block_on(item);
            match py.detach(wait) {
                Ok(item) => return to_python(py, item),
                Err(_) => py.check_signals().inspect_err(|_| self.task.abort())?,
            }
        }
    }

    /// Calls `done(item, None)` or `done(None, exception)` with the next item, from another thread.
    fn on_next(&self, done: Py<PyAny>) -> PyResult<()> {
        let items = Arc::clone(&self.items);
        runtime()?.spawn(async move {
            let item = next(&items).await;
            // If Python is shutting down, nothing waits for the item.
            let _ = tokio::task::spawn_blocking(move || {
                Python::try_attach(|py| {
                    let result = match to_python(py, item) {
                        Ok(item) => done.call1(py, (item, py.None())),
                        Err(error) => done.call1(py, (py.None(), error)),
                    };
                    // This fails if the event loop that waited is closed.
                    drop(result);
                })
            })
            .await;
        });
        Ok(())
    }

    /// Cancels the work.
    fn cancel(&self) {
        self.task.abort();
    }
}
