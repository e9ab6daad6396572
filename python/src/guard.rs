//! The guard. It is opened on the first question, once for each process.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use ecso::{Event, Guard, Mllm, error_chain, profile::Scope};
use ecso_cli::library::{BatchModel, Setup};
use ecso_data::{
    answers::{AnswersError, TableAnswerer, TableOptions},
    input::Mapping,
};
use ecso_gateway::settings::ImageUrls;
use futures::{StreamExt, pin_mut};
use pyo3::prelude::*;
use serde_json::json;
use tokio::sync::Mutex;

use crate::{
    call::{Call, Item, ItemSender},
    chat::{ImageReader, Messages},
    failure::Failure,
    logging,
    runtime::PerProcess,
    table::{Table, Tables},
};

/// A model under a profile.
#[pyclass(frozen, module = "ecso._ecso")]
pub(crate) struct Core {
    setup: Setup,
    concurrency: usize,
    cache: Option<PathBuf>,
    opened: PerProcess<Arc<OpenGuard>>,
}

/// The guard as one process has it open.
struct OpenGuard {
    setup: Setup,
    concurrency: usize,
    cache: Option<PathBuf>,
    images: ImageReader,
    guard: Mutex<Option<Arc<OpenModel>>>,
    tables: Mutex<Option<Arc<TableWorker>>>,
}

type OpenModel = Guard<Arc<dyn Mllm>>;

/// Answers tables.
struct TableWorker {
    model: BatchModel,
    /// One answerer for each journal, as each writes its own file there.
    answerers: std::sync::Mutex<HashMap<Option<PathBuf>, Arc<TableAnswerer>>>,
}

impl OpenGuard {
    async fn guard(&self) -> Result<Arc<OpenModel>, Failure> {
        let mut current = self.guard.lock().await;
        if let Some(guard) = &*current {
            return Ok(Arc::clone(guard));
        }
        let model = self.setup.open_model().await?;
        Ok(Arc::clone(current.insert(Arc::new(Guard::new(model, self.setup.profile().clone())))))
    }

    async fn table_worker(&self) -> Result<Arc<TableWorker>, Failure> {
        let mut current = self.tables.lock().await;
        if let Some(worker) = &*current {
            return Ok(Arc::clone(worker));
        }
        let model = Arc::clone(self.guard().await?.model());
        let model = self.setup.batch_model(model, self.concurrency, self.cache.clone()).await?;
        let worker = Arc::new(TableWorker { model, answerers: std::sync::Mutex::default() });
        *current = Some(Arc::clone(&worker));
        Ok(worker)
    }

    fn answerer(
        &self,
        worker: &TableWorker,
        journal: Option<PathBuf>,
    ) -> Result<Arc<TableAnswerer>, Failure> {
        let mut answerers = worker.answerers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answerer) = answerers.get(&journal) {
            return Ok(Arc::clone(answerer));
        }
        let fetcher =
            (self.setup.image_urls() == ImageUrls::Fetch).then(|| self.images.fetcher.clone());
        let answerer = TableAnswerer::new(
            worker.model.model(),
            worker.model.identity(),
            self.setup.profile().clone(),
            fetcher,
            self.setup.limits(),
            journal.as_deref(),
        );
        let answerer =
            answerer.map_err(|error| Failure::settings(error_chain(&AnswersError::from(error))))?;
        let answerer = Arc::new(answerer);
        answerers.insert(journal, Arc::clone(&answerer));
        Ok(answerer)
    }

    async fn answer_table(
        &self,
        tables: Tables,
        journal: Option<PathBuf>,
        options: TableOptions,
    ) -> Result<Table, Failure> {
        let worker = self.table_worker().await?;
        let answerer = self.answerer(&worker, journal)?;
        let answers =
            worker.model.run(answerer.answer(&tables.schema, tables.batches, &options)).await;
        if answers.is_err() {
            // The model stayed unreachable, or is another one. The next call opens it again.
            let mut current = self.tables.lock().await;
            if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &worker)) {
                *current = None;
                *self.guard.lock().await = None;
            }
        }
        let table = Table::new(&tables.schema, answers??, &options.prefix);
        let unchecked = table.count(&format!("{}verdict", options.prefix), "unchecked");
        if unchecked > 0 && self.setup.profile().scope == Scope::Images {
            tracing::warn!(
                "{unchecked} of {} rows have no image, so their answers were not judged; \
                 set={{\"scope\": \"all\"}} judges all",
                table.__len__()
            );
        }
        Ok(table)
    }
}

impl Core {
    fn open(&self) -> Result<Arc<OpenGuard>, Failure> {
        self.opened.get(|| {
            let images = ImageReader {
                limits: self.setup.limits(),
                urls: self.setup.image_urls(),
                fetcher: self.setup.fetcher()?,
            };
            Ok(Arc::new(OpenGuard {
                setup: self.setup.clone(),
                concurrency: self.concurrency,
                cache: self.cache.clone(),
                images,
                guard: Mutex::default(),
                tables: Mutex::default(),
            }))
        })
    }
}

#[pymethods]
impl Core {
    /// `settings` is JSON with the structure of a settings file.
    #[new]
    #[pyo3(signature = (settings, api_key, concurrency, cache))]
    fn new(
        py: Python<'_>,
        settings: &str,
        api_key: Option<String>,
        concurrency: Option<usize>,
        cache: Option<PathBuf>,
    ) -> PyResult<Self> {
        let setup = serde_json::from_str(settings)
            .map_err(|error| Failure::settings(format!("settings: {error}")))
            .and_then(|settings| Ok(Setup::new(settings, api_key.map(Into::into))?));
        let setup = setup.map_err(|failure: Failure| failure.into_exception(py))?;
        logging::start();
        let concurrency = concurrency.unwrap_or_else(|| setup.default_concurrency());
        Ok(Self { setup, concurrency, cache, opened: PerProcess::new() })
    }

    /// The name of the profile.
    #[getter]
    fn profile(&self) -> &str {
        &self.setup.profile().name
    }

    /// Maximum number of rows in flight.
    #[getter]
    fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Answers a conversation, or reviews `draft`. The item is the outcome as JSON; with `events`
    /// there is an item for every event.
    #[pyo3(signature = (messages, draft, events))]
    fn answer(
        &self,
        py: Python<'_>,
        messages: Messages,
        draft: Option<String>,
        events: bool,
    ) -> PyResult<Call> {
        let guard = self.open().map_err(|failure| failure.into_exception(py))?;
        Call::start(|sender| answer(guard, messages, draft, events, sender))
    }

    /// Reads the images of a conversation, and so checks that it could be judged. There is no item.
    fn check(&self, py: Python<'_>, messages: Messages) -> PyResult<Call> {
        let guard = self.open().map_err(|failure| failure.into_exception(py))?;
        Call::start(|_| async move { guard.images.chat(messages).await.map(drop) })
    }

    /// Answers all rows of a table. The item is a [`Table`].
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    #[pyo3(signature = (tables, *, map, query, prefix, journal, image_bytes, max_failures))]
    fn table(
        &self,
        py: Python<'_>,
        tables: Tables,
        map: Vec<(String, String)>,
        query: Option<String>,
        prefix: String,
        journal: Option<PathBuf>,
        image_bytes: usize,
        max_failures: f64,
    ) -> PyResult<Call> {
        let into_exception = |failure: Failure| failure.into_exception(py);
        let mapping = Mapping::new(map).map_err(|cause| Failure::settings(cause.to_string()));
        let mapping = mapping.map_err(into_exception)?;
        let options = TableOptions {
            mapping,
            query,
            prefix,
            concurrency: self.concurrency,
            image_bytes,
            max_failed: max_failures,
        };
        let guard = self.open().map_err(into_exception)?;
        Call::start(|sender| async move {
            let table = guard.answer_table(tables, journal, options).await?;
            let _ = sender.send(Ok(Item::Table(table))).await;
            Ok(())
        })
    }
}

async fn answer(
    open: Arc<OpenGuard>,
    messages: Messages,
    draft: Option<String>,
    wants_events: bool,
    sender: ItemSender,
) -> Result<(), Failure> {
    let guard = open.guard().await?;
    let chat = open.images.chat(messages).await?;
    let events = match &draft {
        Some(draft) => guard.review_events(&chat, draft).boxed(),
        None => guard.answer_events(&chat).boxed(),
    };
    pin_mut!(events);
    while let Some(event) = events.next().await {
        let json = match event? {
            Event::Done(outcome) if wants_events => json!({"done": outcome}),
            Event::Done(outcome) => json!(outcome),
            _ if !wants_events => continue,
            Event::Started { step, images } => json!({"started": {"step": step, "images": images}}),
            Event::Finished(trace) => json!({"finished": trace}),
            Event::Decided { verdict, rewritten } => {
                json!({"decided": {"verdict": verdict, "rewritten": rewritten}})
            }
            Event::Answer(text) => json!({"answer": text}),
            _ => continue,
        };
        if sender.send(Ok(Item::Json(json.to_string()))).await.is_err() {
            break;
        }
    }
    Ok(())
}
