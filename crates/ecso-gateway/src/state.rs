//! What every request shares: upstream, profile, settings, figures.

use std::{collections::BTreeMap, io, sync::Arc};

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use base64::{Engine, prelude::BASE64_STANDARD};
use ecso::{
    Guard, GuardBuilder, GuardError, Image, Memory, Mllm, Profile, Sampling, Step, profile::Gate,
};
use ecso_openai::Fetcher;
use tracing::{Instrument, Span};

use crate::{
    access::{self, Caller, Rates},
    audit::{Audit, Case},
    context::RequestContext,
    error::ApiError,
    hooks::pending::Pending,
    json::shown,
    metrics::Metrics,
    request::{Body, Request, is_remote, made},
    settings::{ImageUrls, Mode, Settings, hash},
    store::Store,
    telemetry,
    upstream::Upstream,
};

/// The profiles that requests are judged under.
#[derive(Debug, Clone)]
pub struct Profiles {
    /// The usual one.
    pub usual: Profile,
    /// Those of single models and clients, by the names that the settings give them.
    pub named: BTreeMap<String, Profile>,
}

impl From<Profile> for Profiles {
    fn from(usual: Profile) -> Self {
        Self { usual, named: BTreeMap::new() }
    }
}

impl Profiles {
    /// An error for a name that the settings have and nobody knows.
    fn check(&self, settings: &Settings) -> io::Result<()> {
        match settings.profile_names().find(|name| !self.named.contains_key(*name)) {
            Some(name) => Err(io::Error::other(format!("there is no profile {name:?}"))),
            None => Ok(()),
        }
    }
}

/// What stays when the settings are exchanged.
pub(crate) struct Kept {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) store: Arc<Store>,
    pub(crate) pending: Arc<Pending>,
}

/// All that a request needs to know.
pub(crate) struct AppState {
    pub(crate) upstream: Upstream,
    profiles: Profiles,
    pub(crate) settings: Settings,
    /// Bounds of an image.
    pub(crate) images: ecso::Limits,
    fetcher: Option<Fetcher>,
    decoding: tokio::sync::Mutex<()>,
    pub(crate) audit: Option<Arc<Audit>>,
    pub(crate) rates: Rates,
    pub(crate) metrics: Arc<Metrics>,
    /// What was found about requests, for whatever repeats from call to call.
    pub(crate) memory: Arc<Memory>,
    /// Answers that requests may go on from.
    pub(crate) store: Arc<Store>,
    /// Requests whose answers are still to come.
    pub(crate) pending: Arc<Pending>,
}

impl AppState {
    pub(crate) fn new(
        upstream: Upstream,
        profiles: Profiles,
        settings: Settings,
        images: ecso::Limits,
        Kept { metrics, memory, store, pending }: Kept,
        audit: Option<Arc<Audit>>,
    ) -> io::Result<Self> {
        let is_wanted = settings.image_urls == ImageUrls::Fetch;
        let fetcher =
            is_wanted.then(|| Fetcher::with_hosts(upstream.proxy(), &settings.image_hosts));
        let fetcher = fetcher.transpose().map_err(io::Error::other)?;
        let rates = Rates::new(&settings);
        let decoding = tokio::sync::Mutex::new(());
        profiles.check(&settings)?;
        let is_digest = |key: &&crate::settings::Key| {
            key.sha256.len() == 64 && key.sha256.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        if let Some((name, _)) = settings.keys.iter().find(|(_, key)| !is_digest(key)) {
            return Err(io::Error::other(format!(
                "gateway.keys.{name}.sha256 is no SHA-256; make a key with `ecso key {name}`"
            )));
        }
        Ok(Self {
            upstream,
            profiles,
            settings,
            images,
            fetcher,
            decoding,
            audit,
            rates,
            metrics,
            memory,
            store,
            pending,
        })
    }

    /// Gets what a request only points to, reads its images, and decodes them as far as the
    /// operator wants that. `hold` takes room for so many bytes that were fetched or made.
    pub(crate) async fn prepare(
        &self,
        mut body: Body,
        mut hold: impl FnMut(usize) -> Result<(), ApiError>,
    ) -> Result<Request, ApiError> {
        let remote = body.remote_images().into_iter().filter(|url| is_remote(url)).count();
        if remote > self.settings.limits.images {
            let message = format!("at most {} images are allowed", self.settings.limits.images);
            return Err(ApiError::bad_request("too_many_images", message));
        }
        if remote > 0 && self.settings.image_urls == ImageUrls::Refuse {
            let message = "images by URL are not taken here: send them as data:image/png;base64,…";
            return Err(ApiError::bad_request("image_url_refused", message));
        }
        let mut fetched_bytes = 0;
        if let Some(fetcher) = &self.fetcher {
            for url in body.remote_images().into_iter().filter(|url| is_remote(url)) {
                let fetched = fetcher.bytes(url.trim(), self.images.bytes).await;
                let bytes = fetched
                    .map_err(|error| ApiError::bad_request("invalid_image", error.to_string()))?;
                fetched_bytes += bytes.len();
                if fetched_bytes > self.settings.limits.body {
                    let message = format!(
                        "images by URL have at most {} bytes together",
                        self.settings.limits.body
                    );
                    return Err(ApiError::new(
                        StatusCode::PAYLOAD_TOO_LARGE,
                        "body_too_large",
                        message,
                    ));
                }
                hold(fetched_bytes)?;
                *url = format!("data:;base64,{}", BASE64_STANDARD.encode(bytes));
            }
        }
        let (limits, images, span) = (self.settings.limits, self.images, Span::current());
        let is_passed = self.settings.image_urls == ImageUrls::Pass;
        // What models don't read takes its time.
        let read = tokio::task::spawn_blocking(move || {
            span.in_scope(|| body.request(&limits, images, is_passed))
        });
        let request =
            read.await.map_err(|_| ApiError::upstream("an image could not be read"))??;
        hold(fetched_bytes + request.chat.images().map(made).sum::<usize>())?;
        if self.settings.decode_images {
            // One at a time in the whole process: each may take 160 MB.
            let _alone = self.decoding.lock().await;
            let chat = request.chat.clone();
            let looked = tokio::task::spawn_blocking(move || {
                chat.images()
                    .filter(|image| image.url().is_none())
                    .try_for_each(Image::try_decoding)
            });
            let looked =
                looked.await.map_err(|_| ApiError::upstream("an image could not be decoded"))?;
            looked.map_err(|error| ApiError::bad_request("invalid_image", error.to_string()))?;
        }
        Ok(request)
    }

    /// The operator's profiles, the usual one first.
    pub(crate) fn all_profiles(&self) -> impl Iterator<Item = &Profile> {
        [&self.profiles.usual].into_iter().chain(self.profiles.named.values())
    }

    /// The profile that a request is judged under: its client's, its model's, or the usual one.
    pub(crate) fn profile(&self, caller: &Caller, model: Option<&str>) -> &Profile {
        let of_model = || self.settings.profiles.get(model?);
        let name = caller.profile.as_ref().or_else(of_model);
        name.and_then(|name| self.profiles.named.get(name)).unwrap_or(&self.profiles.usual)
    }

    /// The guard for one request: its model, its caller's key, its sampling.
    pub(crate) fn guard(
        &self,
        request: &Request,
        context: &RequestContext,
        mode: Mode,
    ) -> Guard<Arc<dyn Mllm>> {
        let mut profile = self.profile(&context.caller, Some(&request.model)).clone();
        profile.scope = context.scope(Some(&request.model));
        if mode == Mode::Off {
            profile.gate = Gate::Never;
        }
        let guard = self.guarding(request, &context.headers, profile);
        guard.sampling(self.sampling(request)).build()
    }

    /// A guard for one request under another profile, to be built.
    pub(crate) fn guarding(
        &self,
        request: &Request,
        headers: &HeaderMap,
        profile: Profile,
    ) -> GuardBuilder<Arc<dyn Mllm>> {
        let model = self.upstream.model(&request.model, headers);
        let memory = Arc::clone(&self.memory);
        // Where callers bring keys of their own, one name may stand for several models.
        Guard::builder(model)
            .profile(profile)
            .extra(request.extra())
            .memory(memory, self.account(headers))
    }

    /// By what the upstream tells whoever sends these headers from others, as a digest: keys of
    /// their own, and what else chooses models.
    pub(crate) fn account(&self, headers: &HeaderMap) -> String {
        let sent: Vec<&[u8]> =
            headers.get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes).collect();
        let account = match access::token(headers) {
            Some(token) if sent.len() < 2 => hash(token),
            _ if sent.is_empty() => String::new(),
            _ => hash(&format!("{sent:?}")),
        };
        let choosing = self.upstream.choosing(headers);
        choosing
            .iter()
            .fold(account, |account, (name, value)| hash(&format!("{account} {name} {value:?}")))
    }

    /// The guarded model's own answer, for whoever has none. It is that model's, wherever the guard
    /// asks its questions.
    pub(crate) async fn draft(
        &self,
        request: &Request,
        headers: &HeaderMap,
        sampling: &Sampling,
    ) -> Result<String, ApiError> {
        if matches!(self.upstream, Upstream::Engine(_)) {
            request.for_own_model()?;
        }
        let model = self.upstream.answering(&request.model, headers);
        let asked =
            model.generate(&request.chat, sampling).instrument(telemetry::direct(&request.model));
        let reply =
            asked.await.map_err(|source| GuardError::Model { step: Step::Direct, source })?;
        Ok(reply.text)
    }

    /// How the client wants answers to be drawn.
    pub(crate) fn sampling(&self, request: &Request) -> Sampling {
        match &self.upstream {
            Upstream::Server(_) => request.sampling(),
            Upstream::Engine(_) => request.own_sampling(),
        }
    }

    /// Tells what became of a request; in the log no word of the conversation.
    pub(crate) fn record(&self, case: &Case<'_>, caller: &Caller) {
        let usual = self.profile(caller, case.request.map(|request| request.model.as_str()));
        let profile = case.profile.unwrap_or(&usual.name);
        tracing::info!(
            id = case.id,
            model = case.request.map(|request| shown(&request.model)),
            profile,
            mode = ?case.mode,
            verdict = ?case.report.verdict(),
            score = case.report.score(),
            failure = case.report.failure,
            images = case.request.map(|request| request.chat.image_count()),
            ms = u64::try_from(case.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "guarded"
        );
        self.metrics.judged(case);
        if let Some(audit) = &self.audit {
            audit.write(case, profile);
        }
    }
}
