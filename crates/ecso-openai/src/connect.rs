//! Connections: TLS, proxies, Unix sockets.

use std::path::Path;

use ecso::{Cause, ModelError};
use reqwest::{Certificate, Client, ClientBuilder, Identity, Proxy, redirect::Policy};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use secrecy::ExposeSecret;

use crate::options::Options;

/// What becomes of the bodies of replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bodies {
    /// The client asks for compressed ones (gzip, deflate, brotli, zstd) and unpacks them.
    Unpacked,
    /// They stay as they came, and so do their headers; nothing is asked for that the request's own
    /// headers don't ask for.
    AsSent,
}

/// Chooses how TLS is done in this process, for clients of this crate and of others that leave it
/// open. Set by whoever comes first; a program that has its own provider keeps it.
pub fn install_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// An HTTP client with the connection settings of `options`: time limits, proxy, certificates, Unix
/// socket. It follows no redirects and knows nothing of keys.
///
/// # Errors
/// [`ModelError::Transport`] if a file can't be used (its path is told, and what is wrong), or the
/// proxy's URL, or TLS.
pub fn http_client(options: &Options, bodies: Bodies) -> Result<Client, ModelError> {
    install_provider();
    let mut builder = Client::builder()
        .connect_timeout(options.connect_timeout)
        .read_timeout(options.reply_timeout)
        .redirect(Policy::none());
    builder = match bodies {
        Bodies::Unpacked => builder.user_agent(concat!("ecso/", env!("CARGO_PKG_VERSION"))),
        Bodies::AsSent => builder.no_gzip().no_deflate().no_brotli().no_zstd(),
    };
    if let Some(url) = &options.proxy {
        builder = builder.proxy(proxy(url.expose_secret())?);
    }
    if let Some(path) = &options.ca_file {
        builder = builder.tls_certs_merge(authorities(path)?);
    }
    if let Some(path) = &options.client_cert {
        builder = builder.identity(identity(path)?);
    }
    if let Some(path) = &options.unix_socket {
        builder = on_socket(builder, path)?;
    }
    builder.build().map_err(|error| {
        let what = ecso::error_chain(&error);
        let what = match &options.client_cert {
            // All else was looked at before; that key and certificate belong together is found out
            // only here.
            Some(path) => format!("{}: {what}", path.display()),
            None => what,
        };
        ModelError::Transport(Cause::new(what, error.without_url()))
    })
}

fn proxy(url: &str) -> Result<Proxy, ModelError> {
    // The URL itself may hold a password.
    let unusable = |error: reqwest::Error| {
        let error = error.without_url();
        ModelError::Transport(Cause::new(
            format!("the proxy's URL can't be used: {}", ecso::error_chain(&error)),
            error,
        ))
    };
    Proxy::all(url).map_err(unusable)
}

/// The certificates of a file, each good as a trust anchor.
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
#[expect(clippy::unnecessary_wraps, reason = "elsewhere it fails")]
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
