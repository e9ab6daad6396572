//! Running work that Python waits for and can cancel.

use std::{any::Any, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use pyo3::{IntoPyObjectExt, exceptions::PyRuntimeError, prelude::*};
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
    /// The process where the work runs. In a fork of it, nothing does.
    process: u32,
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.is_here() {
            self.task.abort();
        } else {
            // The locks inside may be those of a thread that does not exist here.
            std::mem::forget(Arc::clone(&self.items));
        }
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
            let result = AssertUnwindSafe(work).catch_unwind().await;
            let result = result.unwrap_or_else(|panic| Err(Failure::internal(panic_text(&*panic))));
            if let Err(failure) = result {
                let _ = sender.send(Err(failure)).await;
            }
        });
        let items = Arc::new(Mutex::new(items));
        Ok(Self { items, task: task.abort_handle(), process: std::process::id() })
    }

    fn is_here(&self) -> bool {
        self.process == std::process::id()
    }

    fn check_process(&self) -> PyResult<()> {
        if self.is_here() {
            return Ok(());
        }
        Err(PyRuntimeError::new_err("this call was started in another process, before a fork"))
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown")
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
        self.check_process()?;
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
        self.check_process()?;
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
        if self.is_here() {
            self.task.abort();
        }
    }
}
