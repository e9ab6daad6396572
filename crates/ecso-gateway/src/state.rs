//! What all requests share: upstream, profiles, settings, metrics.

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
    audit::{Audit, JudgedRequest},
    context::RequestContext,
    error::ApiError,
    hooks::pending::Pending,
    json::printable,
    metrics::Metrics,
    request::{Body, Request, converted_bytes, is_remote},
    settings::{ImageUrls, Mode, Settings, hash},
    store::Store,
    telemetry,
    upstream::Upstream,
};

/// The profiles that requests are judged under.
#[derive(Debug, Clone)]
pub struct Profiles {
    /// The profile for all other models and clients.
    pub default: Profile,
    /// The profiles of single models and clients, by the names in the settings.
    pub named: BTreeMap<String, Profile>,
    /// What is used instead for one model of the server, if `hardened` was fitted to it.
    pub fitted: Option<Fitted>,
}

/// `hardened` as it was fitted to one model of the server.
#[derive(Debug, Clone)]
pub struct Fitted {
    /// The model's name.
    pub model: String,
    /// In place of the default profile, if that is `hardened`.
    pub default: Option<Profile>,
    /// In place of a profile that the settings of a model or a client name `hardened` or `auto`.
    pub hardened: Profile,
}

impl From<Profile> for Profiles {
    fn from(default: Profile) -> Self {
        Self { default, named: BTreeMap::new(), fitted: None }
    }
}

impl Profiles {
    /// Returns an error if the settings name a profile that does not exist.
    fn check(&self, settings: &Settings) -> io::Result<()> {
        match settings.profile_names().find(|name| !self.named.contains_key(*name)) {
            Some(name) => Err(io::Error::other(format!(
                "the settings name the profile {name:?}, which does not exist"
            ))),
            None => Ok(()),
        }
    }
}

/// What is kept when the settings are replaced.
pub(crate) struct SharedState {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) store: Arc<Store>,
    pub(crate) pending: Arc<Pending>,
}

/// The state of the server under one version of its settings.
pub(crate) struct AppState {
    pub(crate) upstream: Upstream,
    profiles: Profiles,
    pub(crate) settings: Settings,
    /// Limits of a single image.
    pub(crate) images: ecso::Limits,
    fetcher: Option<Fetcher>,
    decoding: tokio::sync::Mutex<()>,
    pub(crate) audit: Option<Arc<Audit>>,
    pub(crate) rates: Rates,
    pub(crate) metrics: Arc<Metrics>,
    /// Findings about requests, for texts that repeat from call to call.
    pub(crate) memory: Arc<Memory>,
    /// Stored answers that requests may continue from.
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
        SharedState { metrics, memory, store, pending }: SharedState,
        audit: Option<Arc<Audit>>,
    ) -> io::Result<Self> {
        let is_fetching = settings.image_urls == ImageUrls::Fetch;
        let fetcher =
            is_fetching.then(|| Fetcher::with_hosts(upstream.proxy(), &settings.image_hosts));
        let fetcher = fetcher.transpose().map_err(io::Error::other)?;
        let rates = Rates::new(&settings);
        let decoding = tokio::sync::Mutex::new(());
        profiles.check(&settings)?;
        let is_digest = |key: &&crate::settings::Key| {
            key.sha256.len() == 64 && key.sha256.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        if let Some((name, _)) = settings.keys.iter().find(|(_, key)| !is_digest(key)) {
            return Err(io::Error::other(format!(
                "gateway.keys.{name}.sha256 is not a SHA-256; make a key with `ecso key {name}`"
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

    /// Fetches the images that a request names by URL, reads all images, and decodes them if the
    /// operator wants that. `reserve` is called with the number of bytes that were fetched or
    /// converted so far.
    pub(crate) async fn prepare(
        &self,
        mut body: Body,
        mut reserve: impl FnMut(usize) -> Result<(), ApiError>,
    ) -> Result<Request, ApiError> {
        let remote = body.remote_images().into_iter().filter(|url| is_remote(url)).count();
        if remote > self.settings.limits.images {
            let message = format!("at most {} images are allowed", self.settings.limits.images);
            return Err(ApiError::bad_request("too_many_images", message));
        }
        if remote > 0 && self.settings.image_urls == ImageUrls::Refuse {
            let message =
                "images by URL are not accepted here: send them as data:image/png;base64,…";
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
                        "images by URL may have at most {} bytes in total",
                        self.settings.limits.body
                    );
                    return Err(ApiError::new(
                        StatusCode::PAYLOAD_TOO_LARGE,
                        "body_too_large",
                        message,
                    ));
                }
                reserve(fetched_bytes)?;
                *url = format!("data:;base64,{}", BASE64_STANDARD.encode(bytes));
            }
        }
        let (limits, images, span) = (self.settings.limits, self.images, Span::current());
        let is_passed = self.settings.image_urls == ImageUrls::Pass;
        // Converting images that models can't read takes time.
        let read = tokio::task::spawn_blocking(move || {
            span.in_scope(|| body.request(&limits, images, is_passed))
        });
        let request =
            read.await.map_err(|_| ApiError::upstream("an image could not be read"))??;
        reserve(fetched_bytes + request.chat.images().map(converted_bytes).sum::<usize>())?;
        if self.settings.decode_images {
            // One at a time in the whole process: each may take 160 MB.
            let _permit = self.decoding.lock().await;
            let chat = request.chat.clone();
            let decoded = tokio::task::spawn_blocking(move || {
                chat.images()
                    .filter(|image| image.url().is_none())
                    .try_for_each(Image::try_decoding)
            });
            let decoded =
                decoded.await.map_err(|_| ApiError::upstream("an image could not be decoded"))?;
            decoded.map_err(|error| ApiError::bad_request("invalid_image", error.to_string()))?;
        }
        Ok(request)
    }

    /// The operator's profiles, the default one first.
    pub(crate) fn all_profiles(&self) -> impl Iterator<Item = &Profile> {
        [&self.profiles.default].into_iter().chain(self.profiles.named.values())
    }

    /// The profile for a request: its client's, else its model's, else the default.
    pub(crate) fn profile(&self, caller: &Caller, model: Option<&str>) -> &Profile {
        let of_model = || self.settings.profiles.get(model?);
        let name = caller.profile.as_ref().or_else(of_model);
        let fitted = self.profiles.fitted.as_ref().filter(|fitted| model == Some(&fitted.model));
        let fitted = fitted.and_then(|fitted| match name.map(String::as_str) {
            None => fitted.default.as_ref(),
            Some("hardened" | "auto") => Some(&fitted.hardened),
            Some(_) => None,
        });
        let usual = || name.and_then(|name| self.profiles.named.get(name));
        fitted.or_else(usual).unwrap_or(&self.profiles.default)
    }

    /// The guard for one request, with its model, its caller's key and its sampling.
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
        let guard = self.guard_under(request, &context.headers, profile);
        guard.sampling(self.sampling(request)).build()
    }

    /// The guard for one request under another profile, to be built.
    pub(crate) fn guard_under(
        &self,
        request: &Request,
        headers: &HeaderMap,
        profile: Profile,
    ) -> GuardBuilder<Arc<dyn Mllm>> {
        let model = self.upstream.model(&request.model, headers);
        let memory = Arc::clone(&self.memory);
        // If callers have keys of their own, one model name may stand for several models.
        Guard::builder(model)
            .profile(profile)
            .extra(request.extra())
            .memory(memory, self.account(headers))
    }

    /// A digest of what distinguishes the sender of these headers for the upstream: credentials,
    /// and other headers that choose a model.
    pub(crate) fn account(&self, headers: &HeaderMap) -> String {
        let sent: Vec<&[u8]> =
            headers.get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes).collect();
        let account = match access::token(headers) {
            Some(token) if sent.len() < 2 => hash(token),
            _ if sent.is_empty() => String::new(),
            _ => hash(&format!("{sent:?}")),
        };
        self.upstream
            .model_headers(headers)
            .iter()
            .fold(account, |account, (name, value)| hash(&format!("{account} {name} {value:?}")))
    }

    /// Asks the guarded model for an answer. The guard's own questions may go elsewhere; this call
    /// does not.
    pub(crate) async fn draft(
        &self,
        request: &Request,
        headers: &HeaderMap,
        sampling: &Sampling,
    ) -> Result<String, ApiError> {
        if matches!(self.upstream, Upstream::Engine(_)) {
            request.check_local_support()?;
        }
        let model = self.upstream.guarded_model(&request.model, headers);
        let asked = model
            .generate(&request.chat, sampling)
            .instrument(telemetry::draft_span(&request.model));
        let reply =
            asked.await.map_err(|source| GuardError::Model { step: Step::Direct, source })?;
        Ok(reply.text)
    }

    /// The sampling that the client asked for.
    pub(crate) fn sampling(&self, request: &Request) -> Sampling {
        match &self.upstream {
            Upstream::Server(_) => request.sampling(),
            Upstream::Engine(_) => request.local_sampling(),
        }
    }

    /// Logs the outcome of a request, and adds it to metrics and audit log. The log contains no
    /// text of the conversation.
    pub(crate) fn record(&self, judged: &JudgedRequest<'_>, caller: &Caller) {
        let default = self.profile(caller, judged.request.map(|request| request.model.as_str()));
        let profile = judged.profile.unwrap_or(&default.name);
        tracing::info!(
            id = judged.id,
            model = judged.request.map(|request| printable(&request.model)),
            profile,
            mode = ?judged.mode,
            verdict = ?judged.report.verdict(),
            score = judged.report.score(),
            failure = judged.report.failure,
            images = judged.request.map(|request| request.chat.image_count()),
            ms = u64::try_from(judged.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "guarded"
        );
        self.metrics.record_judged(judged);
        if let Some(audit) = &self.audit {
            audit.write(judged, profile);
        }
    }
}
