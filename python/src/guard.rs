//! The guard: opened in the process that asks it first, and again in one that was forked.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use ecso::{Event, Guard, Mllm};
use ecso_cli::library::{Patient, Setup};
use ecso_data::{
    answers::{Answering, AnswersError, Reading},
    input::Mapping,
};
use ecso_gateway::settings::ImageUrls;
use futures::{StreamExt, pin_mut};
use pyo3::prelude::*;
use serde_json::json;
use tokio::sync::{Mutex, OnceCell};

use crate::{
    call::{Call, Giver, Item},
    chat::{Sight, Told},
    failure::Failure,
    runtime::Own,
    table::{Table, Tables},
};

/// A model under a profile.
#[pyclass(frozen, module = "ecso._ecso")]
pub(crate) struct Core {
    setup: Setup,
    at_once: usize,
    cache: Option<PathBuf>,
    opened: Own<Arc<Opened>>,
}

/// What one process has open.
struct Opened {
    setup: Setup,
    at_once: usize,
    cache: Option<PathBuf>,
    sight: Sight,
    guard: OnceCell<Guard<Arc<dyn Mllm>>>,
    work: Mutex<Option<Arc<Work>>>,
}

/// What answers tables.
struct Work {
    patient: Patient,
    /// One for each journal, as each writes a file of its own there.
    answering: std::sync::Mutex<HashMap<Option<PathBuf>, Arc<Answering>>>,
}

impl Opened {
    async fn guard(&self) -> Result<&Guard<Arc<dyn Mllm>>, Failure> {
        let open = async || Ok(Guard::new(self.setup.model().await?, self.setup.profile().clone()));
        self.guard.get_or_try_init(open).await
    }

    async fn work(&self) -> Result<Arc<Work>, Failure> {
        let mut open = self.work.lock().await;
        if let Some(work) = &*open {
            return Ok(Arc::clone(work));
        }
        let model = Arc::clone(self.guard().await?.model());
        let patient = self.setup.patient(model, self.at_once, self.cache.clone()).await?;
        let work = Arc::new(Work { patient, answering: std::sync::Mutex::default() });
        *open = Some(Arc::clone(&work));
        Ok(work)
    }

    fn answering(&self, work: &Work, journal: Option<PathBuf>) -> Result<Arc<Answering>, Failure> {
        let mut open = work.answering.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answering) = open.get(&journal) {
            return Ok(Arc::clone(answering));
        }
        let fetcher =
            (self.setup.image_urls() == ImageUrls::Fetch).then(|| self.sight.fetcher.clone());
        let answering = Answering::new(
            work.patient.model(),
            work.patient.identity(),
            self.setup.profile().clone(),
            fetcher,
            self.setup.limits(),
            journal.as_deref(),
        );
        let answering = Arc::new(answering.map_err(AnswersError::from)?);
        open.insert(journal, Arc::clone(&answering));
        Ok(answering)
    }

    async fn table(
        &self,
        tables: Tables,
        journal: Option<PathBuf>,
        reading: Reading,
    ) -> Result<Table, Failure> {
        let work = self.work().await?;
        let answering = self.answering(&work, journal)?;
        let answered =
            work.patient.asked(answering.answer(&tables.schema, tables.batches, &reading)).await;
        if answered.is_err() {
            // The model stayed away. Whoever asks again looks for it anew.
            let mut open = self.work.lock().await;
            if open.as_ref().is_some_and(|open| Arc::ptr_eq(open, &work)) {
                *open = None;
            }
        }
        Ok(Table::of(&tables.schema, answered??, &reading.prefix))
    }
}

impl Core {
    fn opened(&self) -> Result<Arc<Opened>, Failure> {
        self.opened.get(|| {
            let sight = Sight {
                limits: self.setup.limits(),
                urls: self.setup.image_urls(),
                fetcher: self.setup.fetcher()?,
            };
            Ok(Arc::new(Opened {
                setup: self.setup.clone(),
                at_once: self.at_once,
                cache: self.cache.clone(),
                sight,
                guard: OnceCell::new(),
                work: Mutex::default(),
            }))
        })
    }
}

#[pymethods]
impl Core {
    /// `settings` is JSON, in the shape of a file of settings.
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
            .and_then(|given| Ok(Setup::new(given, api_key.map(Into::into))?));
        let setup = setup.map_err(|failure: Failure| failure.raised(py))?;
        let at_once = concurrency.unwrap_or_else(|| setup.at_once());
        Ok(Self { setup, at_once, cache, opened: Own::new() })
    }

    /// The profile's name.
    #[getter]
    fn profile(&self) -> &str {
        &self.setup.profile().name
    }

    /// Rows at once.
    #[getter]
    fn concurrency(&self) -> usize {
        self.at_once
    }

    /// Answers a conversation, or reviews `draft`. Gives the outcome as JSON; with `events` every
    /// event, each as JSON.
    #[pyo3(signature = (told, draft, events))]
    fn answer(
        &self,
        py: Python<'_>,
        told: Told,
        draft: Option<String>,
        events: bool,
    ) -> PyResult<Call> {
        let opened = self.opened().map_err(|failure| failure.raised(py))?;
        Call::start(|giver| answer(opened, told, draft, events, giver))
    }

    /// Answers all rows of a table; gives one [`Table`].
    #[expect(clippy::too_many_arguments, reason = "named ones, on the side of Python")]
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
        let raised = |failure: Failure| failure.raised(py);
        let mapping =
            Mapping::new(map).map_err(|cause| raised(Failure::settings(cause.to_string())))?;
        let rows = self.at_once;
        let reading =
            Reading { mapping, query, prefix, rows, bytes: image_bytes, may_fail: max_failures };
        let opened = self.opened().map_err(raised)?;
        Call::start(|giver| async move {
            let table = opened.table(tables, journal, reading).await?;
            let _ = giver.send(Ok(Item::Table(table))).await;
            Ok(())
        })
    }
}

async fn answer(
    opened: Arc<Opened>,
    told: Told,
    draft: Option<String>,
    wants_events: bool,
    giver: Giver,
) -> Result<(), Failure> {
    let guard = opened.guard().await?;
    let chat = opened.sight.chat(told).await?;
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
        if giver.send(Ok(Item::Json(json.to_string()))).await.is_err() {
            break;
        }
    }
    Ok(())
}
