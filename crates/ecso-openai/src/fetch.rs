//! Fetching remote images for clients, without giving them access to the internal network: only
//! public addresses and those that an operator names, checked after each name resolution and
//! redirect, with limits on bytes and time.

use std::{
    error::Error,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ecso::Image;
use futures::StreamExt;
use ipnet::IpNet;
use reqwest::{
    Client, Proxy, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    redirect::Policy,
};
use secrecy::{ExposeSecret, SecretString};

use crate::connect::trusting;

/// Longest time for one image.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Most redirects.
const MAX_REDIRECTS: usize = 3;

/// Why a remote image was not fetched. It has no details and no source, since they would reveal
/// what can be reached from here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an image URL can't be fetched: {0}")]
pub struct FetchError(String);

/// Fetches images from public addresses.
///
/// ```no_run
/// use ecso::Limits;
/// use ecso_openai::Fetcher;
///
/// # async fn example() -> Result<(), ecso_openai::FetchError> {
/// let fetcher = Fetcher::with_hosts(None, &["images.internal".into()])?;
/// let image = fetcher.image("https://example.org/bread.png", Limits::default()).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Fetcher {
    client: Client,
    trusted: Trusted,
    has_proxy: bool,
}

impl Fetcher {
    /// A fetcher for public addresses, without a proxy.
    ///
    /// # Errors
    /// [`FetchError`] if no HTTP client can be made.
    pub fn new() -> Result<Self, FetchError> {
        Self::with_hosts(None, &[])
    }

    /// A fetcher for public addresses and `hosts`: names, addresses, networks (`10.1.0.0/16`). A
    /// `proxy` resolves names itself; with one, a name must also resolve here, and redirects are
    /// not followed.
    ///
    /// # Errors
    /// [`FetchError`] if no HTTP client can be made.
    pub fn with_hosts(proxy: Option<&SecretString>, hosts: &[String]) -> Result<Self, FetchError> {
        crate::install_provider();
        let trusted = Trusted(
            hosts.iter().map(|host| host.trim_matches(['[', ']']).to_ascii_lowercase()).collect(),
        );
        let failed = |error: reqwest::Error| FetchError(error.without_url().to_string());
        let builder = || {
            let resolver = Arc::new(Resolver(trusted.clone()));
            let builder = Client::builder().timeout(TIMEOUT).dns_resolver(resolver);
            if let Some(url) = proxy {
                let proxy = Proxy::all(url.expose_secret())?;
                return Ok(builder.proxy(proxy).redirect(Policy::none()));
            }
            let trusted = trusted.clone();
            Ok(builder.no_proxy().redirect(Policy::custom(move |attempt| {
                if attempt.previous().len() > MAX_REDIRECTS {
                    attempt.error("too many redirects")
                } else if trusted.allows(attempt.url()) {
                    attempt.follow()
                } else {
                    attempt.error("a redirect to a private address")
                }
            })))
        };
        let twice = [builder().map_err(failed)?, builder().map_err(failed)?];
        let client = trusting(twice, Vec::new()).map_err(failed)?;
        Ok(Self { client, trusted, has_proxy: proxy.is_some() })
    }

    /// The image at `url`.
    ///
    /// # Errors
    /// [`FetchError`] if the address is not public, there is no answer, or the answer is not a
    /// single image within `limits`.
    pub async fn image(&self, url: &str, limits: ecso::Limits) -> Result<Image, FetchError> {
        let bytes = self.bytes(url, limits.bytes).await?;
        Image::from_bytes(bytes, limits).map_err(|error| FetchError(error.to_string()))
    }

    /// The bytes at `url`, `limit` at most.
    ///
    /// # Errors
    /// [`FetchError`] if the address is not public, there is no answer, or it is too long.
    pub async fn bytes(&self, url: &str, limit: usize) -> Result<Vec<u8>, FetchError> {
        let failed = |why: &str| FetchError(why.to_owned());
        let url = Url::parse(url).map_err(|_| failed("it is not a URL"))?;
        if !self.trusted.allows(&url) {
            return Err(failed("its address is not public"));
        }
        if let Some(url::Host::Domain(name)) = url.host().filter(|_| self.has_proxy) {
            self.trusted
                .resolve(name)
                .await
                .map_err(|_| failed("its name has no public address here"))?;
        }
        let response = self
            .client
            .get(url)
            .send()
            .await
            .map_err(|_| failed("no answer from a public address"))?;
        if !response.status().is_success() {
            return Err(failed(&format!("status {}", response.status().as_u16())));
        }
        let mut bytes = Vec::new();
        let mut body = response.bytes_stream();
        while let Some(piece) = body.next().await {
            bytes.extend_from_slice(&piece.map_err(|_| failed("the connection was lost"))?);
            if bytes.len() > limit {
                return Err(failed(&format!("it has more than {limit} bytes")));
            }
        }
        Ok(bytes)
    }
}

/// Hosts that may be contacted although they are not public: names, addresses and networks, in
/// lower case.
#[derive(Debug, Clone)]
struct Trusted(Arc<[String]>);

impl Trusted {
    /// Whether a URL may be contacted. A name is checked again when it is resolved.
    fn allows(&self, url: &Url) -> bool {
        matches!(url.scheme(), "http" | "https")
            && match url.host() {
                Some(url::Host::Domain(_)) => true,
                Some(url::Host::Ipv4(address)) => self.has(address.into()),
                Some(url::Host::Ipv6(address)) => self.has(address.into()),
                None => false,
            }
    }

    fn has(&self, address: IpAddr) -> bool {
        let is_in = |entry: &String| {
            entry.parse::<IpAddr>().is_ok_and(|known| known == address)
                || entry.parse::<IpNet>().is_ok_and(|network| network.contains(&address))
        };
        is_public(address) || self.0.iter().any(is_in)
    }

    /// The addresses of a name that may be contacted.
    async fn resolve(&self, name: &str) -> Result<Vec<SocketAddr>, Box<dyn Error + Send + Sync>> {
        let found = tokio::net::lookup_host((name, 0)).await?;
        let is_known =
            self.0.iter().any(|known| known.eq_ignore_ascii_case(name.trim_end_matches('.')));
        let allowed: Vec<SocketAddr> =
            found.filter(|address| is_known || self.has(address.ip())).collect();
        if allowed.is_empty() { Err("no public address".into()) } else { Ok(allowed) }
    }
}

/// Resolves names to addresses that may be contacted.
struct Resolver(Trusted);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let trusted = self.0.clone();
        Box::pin(async move {
            let addresses: Addrs = Box::new(trusted.resolve(name.as_str()).await?.into_iter());
            Ok(addresses)
        })
    }
}

/// Whether an address is public, by the registries of special-purpose addresses (RFC 6890 and its
/// updates).
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            let special = match a {
                0 | 10 | 127 | 224..=255 => true,
                100 => (64..=127).contains(&b),
                169 => b == 254,
                172 => (16..=31).contains(&b),
                192 => matches!((b, c), (0, 0 | 2) | (88, 99)) || b == 168,
                198 => matches!(b, 18 | 19) || (b, c) == (51, 100),
                203 => (b, c) == (0, 113),
                _ => false,
            };
            !special
        }
        IpAddr::V6(v6) => {
            if let Some(v4) = v6.to_ipv4_mapped() {
                return is_public(v4.into());
            }
            let [first, second, ..] = v6.segments();
            // Only global unicast, except documentation, benchmarks, Teredo and 6to4.
            let special = match first {
                0x2001 => matches!(second, 0..=0x01ff | 0x0db8),
                _ => matches!(first, 0x2002 | 0x3fff),
            };
            (0x2000..=0x3fff).contains(&first) && !special
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_public() {
        for inside in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.9.9",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "::1",
            "::",
            "fe80::1",
            "fd00::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001:db8::1",
            "2001::1",
            "ff02::1",
        ] {
            assert!(!is_public(inside.parse().unwrap()), "{inside}");
        }
        for outside in ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]
        {
            assert!(is_public(outside.parse().unwrap()), "{outside}");
        }
    }

    #[tokio::test]
    async fn private_addresses_are_not_reached() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let reached = tokio::spawn(async move { listener.accept().await });
        let fetcher = Fetcher::new().unwrap();
        for url in [
            format!("http://127.0.0.1:{port}/a.png"),
            format!("http://localhost:{port}/a.png"),
            format!("http://[::1]:{port}/a.png"),
            format!("http://[::ffff:127.0.0.1]:{port}/a.png"),
            format!("http://2130706433:{port}/a.png"),
            format!("http://0x7f.1:{port}/a.png"),
            "ftp://example.org/a.png".into(),
        ] {
            assert!(fetcher.image(&url, ecso::Limits::default()).await.is_err(), "{url}");
        }
        assert!(!reached.is_finished());
    }

    #[tokio::test]
    async fn named_hosts_are_reached() {
        let picture =
            std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/list.png")).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = [0; 1024];
                let _ = stream.read(&mut head).await;
                let told = format!(
                    "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                    picture.len()
                );
                let _ = stream.write_all(&[told.as_bytes(), &picture].concat()).await;
            }
        });
        for (named, host, is_reached) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.0/8", "127.0.0.1", true),
            ("LocalHost", "localhost", true),
            ("localhost", "127.0.0.1", false),
            ("10.0.0.0/8", "127.0.0.1", false),
        ] {
            let fetcher = Fetcher::with_hosts(None, &[named.to_owned()]).unwrap();
            let image = fetcher
                .image(&format!("http://{host}:{port}/a.png"), ecso::Limits::default())
                .await;
            assert_eq!(image.is_ok(), is_reached, "{named} {host}");
        }
    }
}
