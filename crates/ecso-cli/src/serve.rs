//! `ecso serve` and `ecso key`.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use ecso_gateway::{
    Checks, Gateway, Playground, Upstream,
    settings::{ImageUrls, Mode, OnFailure, Streams},
};
use futures::FutureExt;
use tokio::{net::TcpListener, sync::watch};

use crate::{
    UsageError, calibration,
    cli::ServeArgs,
    config::{self, Settings},
    open,
};

/// Serves; `opens` the playground in a browser.
pub(crate) fn run(args: &ServeArgs, file: Option<&Path>, opens: bool) -> anyhow::Result<()> {
    let settings = config::load_serve(file, args)?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let (gateway, tokens) = with_playground(gateway(&settings).await?, args, &settings)?;
        let gateway = Arc::new(gateway);
        let listener = listen(&settings).await?;
        let door = listen_for_gateways(&settings).await?;
        say!("ecso: {}", greeting(&settings, listener.local_addr()?)?);
        if let Some(door) = &door {
            say!("ecso: external processing for gateways on {}", door.local_addr()?);
        }
        for warning in warnings(&settings)? {
            say!("ecso: warning: {warning}");
        }
        if let Some(tokens) = tokens {
            tokio::spawn(tell_links(listener.local_addr()?, tokens, opens));
        }
        reload_on_signal(&gateway, &settings, args.clone(), file.map(Path::to_owned));
        let stop = stopped().shared();
        let http = ecso_gateway::serve(Arc::clone(&gateway), listener, stop.clone());
        tokio::try_join!(http, carried(gateway, door, stop))?;
        say!("ecso: all requests are finished");
        Ok(())
    })
}

async fn gateway(settings: &Settings) -> anyhow::Result<Gateway> {
    let profiles = config::profiles(settings)?;
    let upstream = if open::is_server(settings) {
        if settings.reader {
            return Err(UsageError(
                "the text reader stands in front of models in this process only".into(),
            )
            .into());
        }
        let options = open::server_options(settings);
        let checks = checks(settings, &options)?;
        let key = options.api_key.clone();
        Upstream::server(&settings.model, key, options, checks)
            .map_err(|error| open::misuse(&error))?
    } else {
        Upstream::Engine(open::model(settings).await?)
    };
    Ok(Gateway::new(upstream, profiles, settings.gateway.clone(), settings.images)?)
}

/// The same with a page for people, if there is to be one, and what lets them in.
fn with_playground(
    gateway: Gateway,
    args: &ServeArgs,
    settings: &Settings,
) -> anyhow::Result<(Gateway, Option<watch::Receiver<String>>)> {
    if !args.playground {
        return Ok((gateway, None));
    }
    let playground = Playground::new(calibration::curve(settings)?);
    let tokens = playground.tokens();
    Ok((gateway.with_playground(playground), Some(tokens)))
}

/// Tells the link that lets a browser into the playground, and the next one when it was used.
async fn tell_links(mut address: SocketAddr, mut tokens: watch::Receiver<String>, mut opens: bool) {
    if address.ip().is_unspecified() {
        address.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    loop {
        let link = format!("http://{address}/?token={}", *tokens.borrow_and_update());
        say!("ecso: the playground, by a link that works once: {link}");
        if std::mem::take(&mut opens)
            && let Err(error) = ::open::that_detached(&link)
        {
            say!("ecso: no browser could be opened ({error}); open the link yourself");
        }
        if tokens.changed().await.is_err() {
            return;
        }
    }
}

/// Where the guard's own calls go, if not to the guarded server: reached with the same proxy and
/// certificates, with a key of its own.
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
    // The socket is the guarded server's.
    let key = key.map(Into::into);
    let options =
        ecso_openai::Options { model: None, api_key: key, unix_socket: None, ..options.clone() };
    let server =
        ecso_openai::OpenAi::new(&checks.url, options).map_err(|error| open::misuse(&error))?;
    Ok(Some(Checks { server, model: checks.model_name.clone() }))
}

/// On SIGHUP the settings are read again; what is wrong with them is told, and the old ones stay.
#[cfg(unix)]
fn reload_on_signal(
    gateway: &Arc<Gateway>,
    settings: &Settings,
    args: ServeArgs,
    file: Option<PathBuf>,
) {
    use tokio::signal::unix::{SignalKind, signal};
    let (gateway, begun) = (Arc::clone(gateway), settings.clone());
    let Ok(mut hangups) = signal(SignalKind::hangup()) else { return };
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            match reload(&gateway, &begun, &args, file.as_deref()) {
                Ok(profile) => say!("ecso: the settings were read again; profile {profile}"),
                Err(error) => say!("ecso: the settings stay as they were: {error:#}"),
            }
        }
    });
}

#[cfg(not(unix))]
fn reload_on_signal(_: &Arc<Gateway>, _: &Settings, _: ServeArgs, _: Option<PathBuf>) {}

#[cfg(unix)]
fn reload(
    gateway: &Gateway,
    begun: &Settings,
    args: &ServeArgs,
    file: Option<&Path>,
) -> anyhow::Result<String> {
    let settings = config::load_serve(file, args)?;
    let fixed = |settings: &Settings| {
        let Settings { model, model_name, listen, ext_proc, .. } = settings;
        [model, model_name, listen, ext_proc].map(Clone::clone)
    };
    if fixed(&settings) != fixed(begun) {
        return Err(UsageError("another model or address takes a restart".into()).into());
    }
    if settings.gateway.keys.is_empty() != begun.gateway.keys.is_empty() {
        return Err(UsageError("the first or last client key takes a restart".into()).into());
    }
    let profiles = config::profiles(&settings)?;
    let name = profiles.default.name.clone();
    gateway.reload(profiles, settings.gateway, settings.images)?;
    Ok(name)
}

/// Without client keys only this machine may call.
async fn listen(settings: &Settings) -> anyhow::Result<TcpListener> {
    let address: SocketAddr = settings.listen.parse().map_err(|_| {
        UsageError(format!(
            "{:?} is no address to listen on; write for instance 127.0.0.1:8080",
            settings.listen
        ))
    })?;
    if settings.gateway.keys.is_empty() && !address.ip().is_loopback() {
        return Err(UsageError(format!(
            "{address} can be reached from elsewhere, and no client key is configured, so anybody could call; make one \
             with `ecso key NAME`, or listen on 127.0.0.1"
        ))
        .into());
    }
    TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))
}

/// The door for gateways, if there is to be one. That only they reach it is their network's
/// business.
async fn listen_for_gateways(settings: &Settings) -> anyhow::Result<Option<TcpListener>> {
    let named = &settings.ext_proc;
    if named.is_empty() {
        return Ok(None);
    }
    if cfg!(not(feature = "ext-proc")) {
        return Err(UsageError(
            "this program was built without external processing (the feature ext-proc)".into(),
        )
        .into());
    }
    let address: SocketAddr = named.parse().map_err(|_| {
        UsageError(format!(
            "ext_proc: {named:?} is no address to listen on; write for instance 127.0.0.1:9090"
        ))
    })?;
    TcpListener::bind(address).await.map(Some).with_context(|| format!("listening on {address}"))
}

/// Serves gateways, where there is a door for them.
#[cfg(feature = "ext-proc")]
async fn carried(
    gateway: Arc<Gateway>,
    door: Option<TcpListener>,
    stop: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    match door {
        Some(door) => ecso_gateway::ext_proc::serve(gateway, door, stop).await,
        None => Ok(()),
    }
}

#[cfg(not(feature = "ext-proc"))]
#[expect(clippy::unused_async, reason = "stands in for the real one")]
async fn carried(
    _: Arc<Gateway>,
    _: Option<TcpListener>,
    _: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    Ok(())
}

fn greeting(settings: &Settings, address: SocketAddr) -> anyhow::Result<String> {
    let callers = match settings.gateway.keys.len() {
        0 => "no client keys: this machine only".to_owned(),
        1 => "1 client key".to_owned(),
        count => format!("{count} client keys"),
    };
    let (profile, why) = config::chosen_profile(settings)?;
    let why = why.map_or_else(String::new, |why| format!(" ({why})"));
    let model = without_password(&settings.model);
    let does = match settings.gateway.mode {
        Mode::Enforce => "guarding",
        Mode::Observe => "observing, not guarding,",
        Mode::Off => "passing on, not guarding,",
    };
    Ok(format!(
        "{does} {model} on http://{address}/v1 ({callers}) under profile {}{why}",
        profile.name
    ))
}

/// A URL as it may be shown: who is named in it, and with which password, is nobody's business.
fn without_password(model: &str) -> String {
    let Some((scheme, rest)) = model.split_once("://") else { return model.to_owned() };
    let host = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let named = rest[..host].rfind('@').map_or(0, |at| at + 1);
    let shown = rest.find(['?', '#']).unwrap_or(rest.len());
    format!("{scheme}://{}", &rest[named..shown])
}

/// What somebody who relies on the guard should know before it runs.
fn warnings(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let mut warnings = Vec::new();
    let (_, why) = config::chosen_profile(settings)?;
    if let Some(why) =
        why.filter(|why| *why != calibration::FITTED && settings.gateway.mode == Mode::Enforce)
    {
        warnings.push(format!(
            "`hardened` runs with its defaults ({why}). They were fitted to mini: `ecso tune` fits it to your model, and says whether it pays"
        ));
    }
    let named = if settings.gateway.modes.is_empty() {
        ""
    } else {
        ", but for the models in gateway.modes"
    };
    match settings.gateway.mode {
        Mode::Enforce => {}
        Mode::Observe => {
            warnings.push(format!(
                "gateway.mode = \"observe\": answers go out before they are judged{named}"
            ));
        }
        Mode::Off => warnings.push(format!("gateway.mode = \"off\": nothing is judged{named}")),
    }
    if settings.gateway.on_failure == OnFailure::Open {
        warnings.push(
            "gateway.on_failure = \"fail-open\": answers go out that could not be judged".into(),
        );
    }
    let beyond =
        settings.ext_proc.parse::<SocketAddr>().is_ok_and(|address| !address.ip().is_loopback());
    if beyond && settings.gateway.keys.is_empty() {
        warnings.push(format!(
            "ext_proc = \"{}\": whoever reaches this address may use the guard and its model; let only the gateway do so",
            settings.ext_proc
        ));
    }
    if settings.gateway.image_urls == ImageUrls::Pass {
        warnings.push(
            "gateway.image_urls = \"pass\": whoever owns an image's host can show the model another picture than the judge".into(),
        );
    }
    if settings.gateway.stream == Streams::Windowed {
        warnings.push(
            "gateway.stream = \"windowed\": what an answer says before it turns to harm goes out, and stays out".into(),
        );
    }
    Ok(warnings)
}

/// Ends when the process is asked to: Ctrl-C or SIGTERM.
async fn stopped() {
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
    say!("ecso: no new requests; the running ones are finished first");
}

/// A fresh client key, and what to write into the settings for it.
pub(crate) fn key(name: &str) {
    let key = ecso_gateway::settings::Key::generate();
    println!("{}", key.0);
    say!("This is shown once; give it to the client. In config.toml:\n");
    say!("[gateway.keys.{name:?}]\nsha256 = \"{}\"", key.1.sha256);
}
