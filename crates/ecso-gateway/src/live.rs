//! What every request shares: upstream, profile, settings, figures.

use std::{io, sync::Arc, time::Instant};

use axum::http::HeaderMap;
use ecso::{Guard, GuardError, Image, Memory, Mllm, Outcome, Part, Profile, Sampling, Step, profile::Gate};
use ecso_openai::Fetcher;
use tracing::Instrument;

use crate::{
    access::Rates,
    audit::{Audit, Case},
    failure::Failure,
    metrics::Metrics,
    request::Request,
    settings::{Mode, Settings},
    telemetry,
    upstream::Upstream,
};

/// All that a request needs to know.
pub(crate) struct Live {
    pub(crate) upstream: Upstream,
    pub(crate) profile: Profile,
    pub(crate) settings: Settings,
    /// Bounds of an image.
    pub(crate) images: ecso::Limits,
    fetcher: Option<Fetcher>,
    audit: Option<Audit>,
    pub(crate) rates: Rates,
    pub(crate) metrics: Arc<Metrics>,
    /// What was found about requests, for whatever repeats from call to call.
    pub(crate) memory: Arc<Memory>,
}

impl Live {
    pub(crate) fn new(
        upstream: Upstream,
        profile: Profile,
        settings: Settings,
        images: ecso::Limits,
        metrics: Arc<Metrics>,
        memory: Arc<Memory>,
    ) -> io::Result<Self> {
        let fetcher = settings.fetch_images.then(Fetcher::new).transpose().map_err(io::Error::other)?;
        let audit = Audit::open(&settings.audit).map_err(|error| {
            io::Error::new(error.kind(), format!("the audit log {}: {error}", settings.audit.path.display()))
        })?;
        let rates = Rates::new(&settings);
        Ok(Self { upstream, profile, settings, images, fetcher, audit, rates, metrics, memory })
    }

    /// Gets what a request only points to, and looks at its images, as far as the operator wants that.
    pub(crate) async fn prepare(&self, request: &mut Request) -> Result<(), Failure> {
        if let Some(fetcher) = &self.fetcher {
            for part in request.chat.turns.iter_mut().flat_map(|turn| &mut turn.parts) {
                let Some(url) = (if let Part::Image(image) = part { image.url() } else { None }) else { continue };
                let fetched: Result<Image, _> = fetcher.image(url, self.images).await;
                *part = Part::Image(fetched.map_err(|error| Failure::bad_request("invalid_image", error.to_string()))?);
            }
        }
        if self.settings.decode_images {
            let chat = request.chat.clone();
            let looked = tokio::task::spawn_blocking(move || {
                chat.images().filter(|image| image.encoded().is_some()).try_for_each(|image| image.pixels().map(drop))
            });
            let looked = looked.await.map_err(|_| Failure::upstream("an image could not be decoded"))?;
            looked.map_err(|error| Failure::bad_request("invalid_image", error.to_string()))?;
        }
        Ok(())
    }

    /// The guard for one request: its model, its caller's key, its sampling.
    pub(crate) fn guard(
        &self,
        request: &Request,
        headers: &HeaderMap,
        mode: Mode,
    ) -> Result<Guard<Arc<dyn Mllm>>, Failure> {
        let sampling = match &self.upstream {
            Upstream::Server(_) => request.sampling(),
            Upstream::Engine(_) => request.own_sampling()?,
        };
        let mut profile = self.profile.clone();
        if mode == Mode::Off {
            profile.gate = Gate::Never;
        }
        Ok(self.guarding(request, headers, profile).with_sampling(sampling))
    }

    /// The guard for one request under another profile.
    pub(crate) fn guarding(&self, request: &Request, headers: &HeaderMap, profile: Profile) -> Guard<Arc<dyn Mllm>> {
        let model = self.upstream.model(&request.model, headers);
        Guard::new(model, profile).with_extra(request.extra()).with_memory(Arc::clone(&self.memory))
    }

    /// All steps, from the draft on, and what that was. It is the guarded model's, wherever the guard asks its
    /// questions.
    pub(crate) async fn answer(
        &self,
        guard: &Guard<Arc<dyn Mllm>>,
        request: &Request,
        headers: &HeaderMap,
        sampling: &Sampling,
    ) -> Result<(Outcome, String), Failure> {
        let Some(model) = self.upstream.guarded(&request.model, headers) else {
            let outcome = guard.answer(&request.chat).await?;
            let direct = outcome.steps.iter().find(|step| step.step == Step::Direct);
            let draft = direct.map(|step| step.reply.clone()).unwrap_or_default();
            return Ok((outcome, draft));
        };
        let asked = model.generate(&request.chat, sampling).instrument(telemetry::direct(&request.model));
        let draft = asked.await.map_err(|source| GuardError::Model { step: Step::Direct, source })?.text;
        Ok((guard.review(&request.chat, &draft).await?, draft))
    }

    /// What takes until the deadline of a request that has `begun`, and no longer.
    pub(crate) async fn in_time<T>(
        &self,
        begun: Instant,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let limits = &self.settings.limits;
        let left = limits.deadline().saturating_sub(begun.elapsed());
        tokio::time::timeout(left, work).await.unwrap_or_else(|_| Err(Failure::deadline(limits.deadline)))
    }

    /// Tells what became of a request; in the log no word of the conversation.
    pub(crate) fn record(&self, case: &Case<'_>) {
        tracing::info!(
            id = case.id,
            model = case.request.model,
            profile = self.profile.name,
            mode = ?case.mode,
            verdict = ?case.report.verdict(),
            score = case.report.score(),
            images = case.request.chat.image_count(),
            ms = u64::try_from(case.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "guarded"
        );
        self.metrics.judged(case);
        if let Some(audit) = &self.audit {
            audit.write(case, &self.profile.name);
        }
    }
}
