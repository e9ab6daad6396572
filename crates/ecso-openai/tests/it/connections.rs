//! The ways to a server: TLS, client certificates, proxies, Unix sockets.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use ecso::{Chat, Mllm, ModelError, Sampling};
use ecso_openai::{OpenAi, Options};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};

use super::options;

const REPLY: &str = r#"{"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}"#;

/// The head of a request.
async fn head<S: AsyncRead + Unpin>(stream: &mut BufReader<S>) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
            break;
        }
    }
    head
}

/// Answers one request, and tells its head.
async fn serve<S: AsyncRead + AsyncWrite + Unpin>(stream: S) -> String {
    let mut stream = BufReader::new(stream);
    let head = head(&mut stream).await;
    let length = head
        .lines()
        .find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    stream.read_exact(&mut vec![0; length.unwrap_or(0)]).await.unwrap();
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{REPLY}",
        REPLY.len()
    );
    stream.write_all(answer.as_bytes()).await.unwrap();
    let _ = stream.shutdown().await;
    head
}

async fn ask(base: &str, options: Options) -> Result<String, ModelError> {
    let client = OpenAi::new(base, options)?;
    Ok(client.generate(&Chat::ask([], "q"), &Sampling::default()).await?.text)
}

/// An authority, and certificates of it.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { issuer, dir: tempfile::tempdir().unwrap() }
    }

    /// A certificate and its key, in PEM.
    fn certificate(&self) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Options with a file of this authority's certificate behind another's.
    fn trusting(&self) -> Options {
        let pem = format!("# ours\n{}\n{}", Authority::new().issuer.pem(), self.issuer.pem());
        Options { ca_file: Some(self.file("ca.pem", pem)), ..once() }
    }

    /// A TLS server's address; with `checks`, it asks clients for certificates of this authority.
    async fn server(&self, checks: bool) -> String {
        ecso_openai::install_provider();
        let (certificate, key) = self.certificate();
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let config = ServerConfig::builder();
        let config = if checks {
            config.with_client_cert_verifier(
                WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap(),
            )
        } else {
            config.with_no_client_auth()
        };
        let acceptor = TlsAcceptor::from(Arc::new(config.with_single_cert(chain, key).unwrap()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream).await;
                }
            }
        });
        format!("https://{address}")
    }
}

fn once() -> Options {
    Options { retries: 0, ..options() }
}

#[tokio::test]
async fn an_authority_in_a_file_is_trusted_and_others_are_not() {
    let authority = Authority::new();
    let server = authority.server(false).await;
    let error = ask(&server, once()).await.unwrap_err().to_string();
    assert!(error.contains("connection failed") && error.contains("UnknownIssuer"), "{error}");
    let trusting = authority.trusting();
    assert_eq!(ask(&server, trusting).await.unwrap(), "hi");
}

#[tokio::test]
async fn a_client_certificate_is_shown_where_it_is_asked_for() {
    let authority = Authority::new();
    let server = authority.server(true).await;
    let trusting = authority.trusting();
    assert!(matches!(ask(&server, trusting.clone()).await, Err(ModelError::Transport(_))));
    let (certificate, key) = authority.certificate();
    for pem in [format!("{certificate}{key}"), format!("{key}{certificate}")] {
        let known =
            Options { client_cert: Some(authority.file("client.pem", pem)), ..trusting.clone() };
        assert_eq!(ask(&server, known).await.unwrap(), "hi");
    }
}

#[tokio::test]
async fn files_that_can_not_be_used_are_told() {
    let authority = Authority::new();
    let (certificate, key) = authority.certificate();
    let (_, other_key) = authority.certificate();
    let missing = authority.dir.path().join("missing.pem");
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (ca_file, says) in [
        (missing.clone(), "No such file"),
        (authority.file("empty.pem", ""), "no certificate"),
        (authority.file("key.pem", &key), "no certificate"),
        (authority.file("broken.pem", broken), "BadEncoding"),
        (authority.file("open.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n"), "END"),
    ] {
        told(Options { ca_file: Some(ca_file.clone()), ..once() }, &ca_file, says);
    }
    for (client_cert, says) in [
        (missing, "No such file"),
        (authority.file("empty.pem", ""), "no certificate"),
        (authority.file("only.pem", &certificate), "no private key"),
        (authority.file("key.pem", &key), "no certificate"),
        (authority.file("other.pem", format!("{certificate}{other_key}")), "keys"),
    ] {
        told(Options { client_cert: Some(client_cert.clone()), ..once() }, &client_cert, says);
    }
}

/// Checks that a client is not made, and that the error names the file and says what is wrong.
fn told(options: Options, file: &Path, says: &str) {
    let name = file.display().to_string();
    let error = OpenAi::new("https://localhost:1", options).unwrap_err();
    let ModelError::Transport(cause) = &error else { panic!("{error}") };
    assert!(cause.message().contains(&name), "{error}");
    assert!(cause.message().to_lowercase().contains(&says.to_lowercase()), "{says}: {error}");
}

#[tokio::test]
async fn a_reply_that_breaks_off_is_told_as_that() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut stream = BufReader::new(listener.accept().await.unwrap().0);
        head(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"choices\": [")
            .await
            .unwrap();
    });
    let error = ask(&base, once()).await.unwrap_err();
    assert!(
        matches!(&error, ModelError::Transport(cause) if cause.message().contains("broke off")),
        "{error}"
    );
}

#[tokio::test]
async fn certificates_do_no_harm_without_tls() {
    let authority = Authority::new();
    let (certificate, key) = authority.certificate();
    let client_cert = Some(authority.file("client.pem", format!("{certificate}{key}")));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { serve(listener.accept().await.unwrap().0).await });
    let options = Options { client_cert, ..authority.trusting() };
    assert_eq!(ask(&base, options).await.unwrap(), "hi");
}

#[tokio::test]
async fn a_proxy_is_asked_in_the_server_s_place() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = tokio::spawn(async move { serve(listener.accept().await.unwrap().0).await });
    let options = Options { proxy: Some(format!("http://me:sesame@{address}").into()), ..once() };
    assert_eq!(ask("http://model.invalid/v1", options).await.unwrap(), "hi");
    let head = asked.await.unwrap();
    assert!(
        head.starts_with("POST http://model.invalid/v1/chat/completions HTTP/1.1\r\n"),
        "{head}"
    );
    assert!(head.to_lowercase().contains("proxy-authorization: basic "), "{head}");
}

#[tokio::test]
async fn a_server_with_tls_is_reached_through_a_proxy() {
    let authority = Authority::new();
    let server = authority.server(false).await;
    let target = server.strip_prefix("https://").unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Some(format!("http://{}", listener.local_addr().unwrap()).into());
    let asked = tokio::spawn(async move {
        let mut client = BufReader::new(listener.accept().await.unwrap().0);
        let head = head(&mut client).await;
        let mut server = TcpStream::connect(target).await.unwrap();
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        head
    });
    let options = Options { proxy, ..authority.trusting() };
    assert_eq!(ask(&server, options).await.unwrap(), "hi");
    assert!(asked.await.unwrap().starts_with("CONNECT 127.0.0.1:"));
}

#[tokio::test]
async fn a_proxy_s_password_is_never_shown() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for proxy in [
        format!("http://me:sesame@{free}"),
        "gopher://me:sesame@host".into(),
        "http://me:sesame@host:port".into(),
    ] {
        let options = Options { proxy: Some(proxy.into()), ..once() };
        assert!(!format!("{options:?}").contains("sesame"));
        let error = ask("http://model.invalid/v1", options).await.unwrap_err();
        assert!(matches!(error, ModelError::Transport(_)));
        assert!(!format!("{error} {error:?}").contains("sesame"), "{error:?}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_server_behind_a_unix_socket_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.sock");
    let options = Options { unix_socket: Some(path.clone()), ..once() };
    let error = ask("http://model.invalid/v1", options.clone()).await.unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()) && error.contains("No such file"), "{error}");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let asked = tokio::spawn(async move { serve(listener.accept().await.unwrap().0).await });
    assert_eq!(ask("http://model.invalid/v1", options).await.unwrap(), "hi");
    let head = asked.await.unwrap().to_lowercase();
    assert!(
        head.starts_with("post /v1/chat/completions") && head.contains("host: model.invalid"),
        "{head}"
    );
}
