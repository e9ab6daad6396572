//! HTTP clients: TLS, proxies, Unix sockets.

use std::path::Path;

use ecso::{Cause, ModelError};
use reqwest::{Certificate, Client, ClientBuilder, Identity, Proxy, redirect::Policy};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use secrecy::ExposeSecret;

use crate::{base::Base, options::Options};

/// How the bodies of responses are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bodies {
    /// The client accepts compression (gzip, deflate, brotli, zstd) and decompresses them.
    Unpacked,
    /// They stay as they are, with their headers. The client adds nothing to the request's own
    /// `Accept-Encoding`.
    AsSent,
}

/// Makes `ring` the process's default provider of `rustls`, for clients of this crate and others.
/// If the program has installed a provider already, nothing happens.
pub fn install_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// An HTTP client for the server at `base`, with the connection settings of `options`: time limits,
/// proxy, certificates, Unix socket. It follows no redirects and sends no key.
///
/// ```
/// use ecso_openai::{Bodies, Options, http_client};
///
/// let client = http_client("http://localhost:8000/v1", &Options::default(), Bodies::Unpacked)?;
/// # Ok::<(), ecso::ModelError>(())
/// ```
///
/// # Errors
/// [`ModelError::Rejected`] if the base URL is invalid; [`ModelError::Transport`] if a file, the
/// proxy's URL or TLS can't be used.
pub fn http_client(base: &str, options: &Options, bodies: Bodies) -> Result<Client, ModelError> {
    client(&Base::parse(base)?, options, bodies)
}

/// As [`http_client`], for a base URL that was read before.
pub(crate) fn client(base: &Base, options: &Options, bodies: Bodies) -> Result<Client, ModelError> {
    install_provider();
    let own = options.ca_file.as_deref().map(authorities).transpose()?.unwrap_or_default();
    let twice = [builder(base, options, bodies)?, builder(base, options, bodies)?];
    trusting(twice, own).map_err(|error| {
        let what = ecso::error_chain(&error);
        let what = match &options.client_cert {
            // Everything else was checked before. Only here it turns out whether the key fits the
            // certificate.
            Some(path) => format!("{}: {what}", path.display()),
            None => what,
        };
        ModelError::Transport(Cause::new(what, error.without_url()))
    })
}

/// A client that trusts the system's certificate authorities and `own`. If the system has none,
/// that client can't be built, and one that trusts only `own` is returned; plain HTTP needs no
/// more.
pub(crate) fn trusting(
    [all, only]: [ClientBuilder; 2],
    own: Vec<Certificate>,
) -> reqwest::Result<Client> {
    all.tls_certs_merge(own.clone()).build().or_else(|_| only.tls_certs_only(own).build())
}

/// The client's settings, without the certificate authorities.
fn builder(base: &Base, options: &Options, bodies: Bodies) -> Result<ClientBuilder, ModelError> {
    let mut builder = Client::builder()
        .connect_timeout(options.connect_timeout)
        .read_timeout(options.reply_timeout)
        .redirect(Policy::none());
    builder = match bodies {
        Bodies::Unpacked => builder.user_agent(concat!("ecso/", env!("CARGO_PKG_VERSION"))),
        Bodies::AsSent => builder.no_gzip().no_deflate().no_brotli().no_zstd(),
    };
    builder = match &options.proxy {
        Some(url) => builder.proxy(proxy(url.expose_secret())?),
        // A proxy elsewhere can't reach this machine's servers, and needn't see their keys.
        None if base.is_loopback() => builder.no_proxy(),
        None => builder,
    };
    if let Some(path) = &options.client_cert {
        builder = builder.identity(identity(path)?);
    }
    match &options.unix_socket {
        Some(path) => on_socket(builder, path),
        None => Ok(builder),
    }
}

fn proxy(url: &str) -> Result<Proxy, ModelError> {
    // The URL may contain a password.
    let unusable = |error: reqwest::Error| {
        let error = error.without_url();
        ModelError::Transport(Cause::new(
            format!("the proxy's URL can't be used: {}", ecso::error_chain(&error)),
            error,
        ))
    };
    Proxy::all(url).map_err(unusable)
}

/// The certificates of a file, each checked to be usable as a trust anchor.
fn authorities(path: &Path) -> Result<Vec<Certificate>, ModelError> {
    let pem = read(path)?;
    let mut certificates = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| broken(path, error))?;
        RootCertStore::empty().add(certificate.clone()).map_err(|error| broken(path, error))?;
        certificates
            .push(Certificate::from_der(&certificate).map_err(|error| broken(path, error))?);
    }
    if certificates.is_empty() {
        return Err(wrong(
            path,
            "there is no certificate in it; it must be in PEM (-----BEGIN CERTIFICATE-----)",
        ));
    }
    Ok(certificates)
}

fn identity(path: &Path) -> Result<Identity, ModelError> {
    let pem = read(path)?;
    if CertificateDer::from_pem_slice(&pem).is_err() {
        return Err(wrong(
            path,
            "there is no certificate in it that can be read; it must be in PEM, before the key",
        ));
    }
    if PrivateKeyDer::from_pem_slice(&pem).is_err() {
        return Err(wrong(
            path,
            "there is no private key in it that can be read; it must be in PEM, without a password",
        ));
    }
    Identity::from_pem(&pem).map_err(|error| broken(path, error))
}

#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "it fails on other systems")]
fn on_socket(builder: ClientBuilder, path: &Path) -> Result<ClientBuilder, ModelError> {
    Ok(builder.unix_socket(path))
}

#[cfg(not(unix))]
fn on_socket(_: ClientBuilder, path: &Path) -> Result<ClientBuilder, ModelError> {
    Err(wrong(path, "there are no Unix sockets on this system"))
}

fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    std::fs::read(path).map_err(|error| broken(path, error))
}

fn broken(path: &Path, error: impl std::error::Error + Send + Sync + 'static) -> ModelError {
    ModelError::Transport(Cause::new(
        format!("{}: {}", path.display(), ecso::error_chain(&error)),
        error,
    ))
}

fn wrong(path: &Path, why: &str) -> ModelError {
    ModelError::Transport(format!("{}: {why}", path.display()).into())
}
