//! `ecso serve` and `ecso key`.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use ecso::profile::Gate;
use ecso_gateway::{
    Checks, Gateway, Playground, Upstream,
    settings::{ImageUrls, Mode, OnFailure, Streams},
};
use futures::FutureExt;
use tokio::{net::TcpListener, sync::watch};

use crate::{
    backend,
    calibration::{BUILT_IN, FITTED, UNNAMED},
    cli::ServeArgs,
    error::UsageError,
    profiles,
    settings::{self, Settings},
};

/// Serves until the process is asked to stop.
pub(crate) fn run(
    args: &ServeArgs,
    file: Option<&Path>,
    opens_browser: bool,
) -> anyhow::Result<()> {
    let settings = settings::load_serve(file, args)?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let (gateway, tokens) = with_playground(gateway(&settings).await?, args, &settings)?;
        let gateway = Arc::new(gateway);
        let listener = listen(&settings).await?;
        let ext_proc_listener = listen_ext_proc(&settings).await?;
        say!("ecso: {}", greeting(&settings, listener.local_addr()?)?);
        if let Some(listener) = &ext_proc_listener {
            say!("ecso: external processing for gateways on {}", listener.local_addr()?);
        }
        for warning in warnings(&settings)? {
            say!("ecso: warning: {warning}");
        }
        if let Some(tokens) = tokens {
            tokio::spawn(print_links(listener.local_addr()?, tokens, opens_browser));
        }
        reload_on_signal(&gateway, &settings, args.clone(), file.map(Path::to_owned));
        let stop = stop_signal().shared();
        let http = ecso_gateway::serve(Arc::clone(&gateway), listener, stop.clone());
        tokio::try_join!(http, serve_ext_proc(gateway, ext_proc_listener, stop))?;
        say!("ecso: all requests are finished");
        Ok(())
    })
}

async fn gateway(settings: &Settings) -> anyhow::Result<Gateway> {
    let profiles = profiles::load_all(settings)?;
    let upstream = if settings.is_server() {
        if settings.reader {
            return Err(UsageError(
                "`ecso serve` supports --reader only for models in this process".into(),
            )
            .into());
        }
        let options = backend::server_options(settings);
        let checks = checks(settings, &options)?;
        let key = options.api_key.clone();
        Upstream::server(&settings.model, key, options, checks)
            .map_err(|error| backend::connection_error(&error))?
    } else {
        Upstream::Engine(backend::open(settings).await?)
    };
    Ok(Gateway::new(upstream, profiles, settings.gateway.clone(), settings.images)?)
}

/// Adds the playground, if it is to be served; returns the tokens that let a browser in.
fn with_playground(
    gateway: Gateway,
    args: &ServeArgs,
    settings: &Settings,
) -> anyhow::Result<(Gateway, Option<watch::Receiver<String>>)> {
    if !args.playground {
        return Ok((gateway, None));
    }
    let playground = Playground::new(profiles::calibration_curve(settings)?);
    let tokens = playground.tokens();
    Ok((gateway.with_playground(playground), Some(tokens)))
}

/// Prints a link that lets a browser into the playground, and the next one once it is used.
async fn print_links(
    mut address: SocketAddr,
    mut tokens: watch::Receiver<String>,
    mut opens_browser: bool,
) {
    if address.ip().is_unspecified() {
        address.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    loop {
        let link = format!("http://{address}/?token={}", *tokens.borrow_and_update());
        say!("ecso: playground (this link works once): {link}");
        if std::mem::take(&mut opens_browser) && open::that_detached(&link).is_err() {
            say!("ecso: no browser could be opened here; open the link yourself");
        }
        if tokens.changed().await.is_err() {
            return;
        }
    }
}

/// The server for the guard's own calls, if that is not the guarded one. It has the same proxy and
/// certificates, and its own key.
fn checks(settings: &Settings, options: &ecso_openai::Options) -> anyhow::Result<Option<Checks>> {
    let Settings { checks, .. } = settings;
    if checks.url.is_empty() {
        return Ok(None);
    }
    let key = match checks.api_key_env.as_str() {
        "" => None,
        name => Some(
            std::env::var(name)
                .map_err(|_| UsageError(format!("checks.api_key_env: {name} is not set")))?,
        ),
    };
    let options = ecso_openai::Options {
        model: None,
        api_key: key.map(Into::into),
        unix_socket: None, // It leads to the guarded server.
        ..options.clone()
    };
    let server = ecso_openai::OpenAi::new(&checks.url, options)
        .map_err(|error| backend::connection_error(&error))?;
    Ok(Some(Checks { server, model: checks.model_name.clone() }))
}

/// Reloads the settings on SIGHUP. If they are wrong, that is reported and the old ones stay.
#[cfg(unix)]
fn reload_on_signal(
    gateway: &Arc<Gateway>,
    settings: &Settings,
    args: ServeArgs,
    file: Option<PathBuf>,
) {
    use tokio::signal::unix::{SignalKind, signal};
    let (gateway, initial) = (Arc::clone(gateway), settings.clone());
    let Ok(mut hangups) = signal(SignalKind::hangup()) else { return };
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            match reload(&gateway, &initial, &args, file.as_deref()) {
                Ok(profile) => say!("ecso: settings reloaded; profile {profile}"),
                Err(error) => say!("ecso: settings not reloaded: {error:#}"),
            }
        }
    });
}

#[cfg(not(unix))]
fn reload_on_signal(_: &Arc<Gateway>, _: &Settings, _: ServeArgs, _: Option<PathBuf>) {}

/// Reloads the settings and returns the profile's name, with the reason for its threshold.
#[cfg(unix)]
fn reload(
    gateway: &Gateway,
    initial: &Settings,
    args: &ServeArgs,
    file: Option<&Path>,
) -> anyhow::Result<String> {
    let settings = settings::load_serve(file, args)?;
    let fixed = |settings: &Settings| {
        let Settings { model, model_name, listen, ext_proc, .. } = settings;
        [model, model_name, listen, ext_proc].map(Clone::clone)
    };
    if fixed(&settings) != fixed(initial) {
        return Err(UsageError("restart ecso to change the model or an address".into()).into());
    }
    if settings.gateway.keys.is_empty() != initial.gateway.keys.is_empty() {
        return Err(UsageError(
            "restart ecso to add the first client key or remove the last one".into(),
        )
        .into());
    }
    let named = named_profile(&settings)?;
    gateway.reload(profiles::load_all(&settings)?, settings.gateway, settings.images)?;
    Ok(named)
}

/// Listens for clients. Without client keys, only on a loopback address.
async fn listen(settings: &Settings) -> anyhow::Result<TcpListener> {
    let address: SocketAddr = settings.listen.parse().map_err(|_| {
        UsageError(format!(
            "listen: {:?} is not an address; write for instance 127.0.0.1:8080",
            settings.listen
        ))
    })?;
    if settings.gateway.keys.is_empty() && !address.ip().is_loopback() {
        return Err(UsageError(format!(
            "{address} is reachable from other machines, and without client keys anyone could call \
             it; create one with `ecso key NAME`, or listen on 127.0.0.1"
        ))
        .into());
    }
    TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))
}

/// Listens for gateways, if external processing is on. Access is up to the network.
async fn listen_ext_proc(settings: &Settings) -> anyhow::Result<Option<TcpListener>> {
    let address = &settings.ext_proc;
    if address.is_empty() {
        return Ok(None);
    }
    if cfg!(not(feature = "ext-proc")) {
        return Err(UsageError(
            "this build has no external processing; build with the feature `ext-proc`".into(),
        )
        .into());
    }
    let address: SocketAddr = address.parse().map_err(|_| {
        UsageError(format!(
            "ext_proc: {address:?} is not an address; write for instance 127.0.0.1:9090"
        ))
    })?;
    TcpListener::bind(address).await.map(Some).with_context(|| format!("listening on {address}"))
}

#[cfg(feature = "ext-proc")]
async fn serve_ext_proc(
    gateway: Arc<Gateway>,
    listener: Option<TcpListener>,
    stop: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    match listener {
        Some(listener) => ecso_gateway::ext_proc::serve(gateway, listener, stop).await,
        None => Ok(()),
    }
}

#[cfg(not(feature = "ext-proc"))]
#[expect(clippy::unused_async, reason = "has the signature of the real function")]
async fn serve_ext_proc(
    _: Arc<Gateway>,
    _: Option<TcpListener>,
    _: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    Ok(())
}

fn greeting(settings: &Settings, address: SocketAddr) -> anyhow::Result<String> {
    let callers = match settings.gateway.keys.len() {
        0 => "no client keys: local clients only".to_owned(),
        1 => "1 client key".to_owned(),
        count => format!("{count} client keys"),
    };
    let profile = named_profile(settings)?;
    let model = redact_url(&settings.model);
    let activity = match settings.gateway.mode {
        Mode::Enforce => "guarding",
        Mode::Observe => "observing, not guarding,",
        Mode::Off => "passing on, not guarding,",
    };
    Ok(format!("{activity} {model} on http://{address}/v1 ({callers}) under profile {profile}"))
}

/// The name of the profile, with the reason for its threshold.
fn named_profile(settings: &Settings) -> anyhow::Result<String> {
    let (profile, reason) = profiles::load_with_reason(settings)?;
    Ok(profile.name + &reason.map_or_else(String::new, |reason| format!(" ({reason})")))
}

/// Removes user, password, query and fragment from a URL. Other names of models stay as they are.
fn redact_url(model: &str) -> String {
    let Some((scheme, rest)) = model.split_once("://") else { return model.to_owned() };
    let host = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let start = rest[..host].rfind('@').map_or(0, |at| at + 1);
    let end = rest.find(['?', '#']).unwrap_or(rest.len());
    format!("{scheme}://{}", &rest[start..end])
}

/// Warnings about settings that weaken the guard.
fn warnings(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let Settings { gateway, ext_proc, .. } = settings;
    let mut warnings = Vec::new();
    let (profile, reason) = profiles::load_with_reason(settings)?;
    if profile.gate == Gate::Never {
        warnings.push(format!("gate = \"never\": profile {} judges nothing", profile.name));
    }
    let is_fitted = |reason: &&str| [FITTED, BUILT_IN].contains(reason);
    if reason == Some(UNNAMED) {
        warnings.push(format!("{UNNAMED}, for requests to that model"));
    } else if let Some(reason) =
        reason.filter(|reason| !is_fitted(reason) && gateway.mode == Mode::Enforce)
    {
        warnings.push(format!(
            "`hardened` runs with its defaults ({reason}), which were fitted to mini; run \
             `ecso tune` to fit it to your model and to see whether the guard pays off"
        ));
    }
    let except =
        if gateway.modes.is_empty() { "" } else { ", except for the models in gateway.modes" };
    match gateway.mode {
        Mode::Enforce => {}
        Mode::Observe => warnings.push(format!(
            "gateway.mode = \"observe\": answers go out before they are judged{except}"
        )),
        Mode::Off => warnings.push(format!("gateway.mode = \"off\": nothing is judged{except}")),
    }
    if gateway.on_failure == OnFailure::Open {
        warnings.push(
            "gateway.on_failure = \"fail-open\": answers go out if they can't be judged".into(),
        );
    }
    let is_remote = ext_proc.parse::<SocketAddr>().is_ok_and(|address| !address.ip().is_loopback());
    if is_remote && gateway.keys.is_empty() {
        warnings.push(format!(
            "ext_proc = \"{ext_proc}\": anyone who reaches this address can use the guard and its \
             model; let only the gateway reach it"
        ));
    }
    if gateway.image_urls == ImageUrls::Pass {
        warnings.push(
            "gateway.image_urls = \"pass\": an image's host can show the model another image than \
             the guard"
                .into(),
        );
    }
    if gateway.stream == Streams::Windowed {
        warnings.push(
            "gateway.stream = \"windowed\": the part of an answer before it turns harmful goes out \
             and can't be recalled"
                .into(),
        );
    }
    Ok(warnings)
}

/// Waits for Ctrl-C or SIGTERM.
async fn stop_signal() {
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    #[cfg(unix)]
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => signal.recv().await.unwrap_or(()),
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminated = std::future::pending::<()>();
    tokio::select! {
        () = interrupted => {}
        () = terminated => {}
    }
    say!("ecso: shutting down; running requests are finished first");
}

/// Prints a new client key, and its entry for the settings file.
pub(crate) fn print_key(name: &str) {
    let (key, entry) = ecso_gateway::settings::Key::generate();
    println!("{key}");
    say!("This key is shown only once; give it to the client. Add to config.toml:\n");
    say!("[gateway.keys.{name:?}]\nsha256 = \"{}\"", entry.sha256);
}
