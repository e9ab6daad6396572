//! Fetching remote images for clients, without letting them reach inside through us: only public addresses, checked
//! where names are resolved, on every hop; few bytes, little time.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ecso::Image;
use futures::StreamExt;
use reqwest::{
    Client, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    redirect::Policy,
};

/// Longest time for one image.
const PATIENCE: Duration = Duration::from_secs(20);
/// Most redirects.
const HOPS: usize = 3;

/// Why a remote image was not fetched. It is not told in detail: that would map what can be reached from here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an image URL can't be fetched: {0}")]
pub struct FetchError(String);

/// Fetches images.
#[derive(Debug, Clone)]
pub struct Fetcher(Client);

impl Fetcher {
    /// A fetcher. It uses no proxy: that would resolve names in our place.
    ///
    /// # Errors
    /// [`FetchError`] when no HTTP client can be made.
    pub fn new() -> Result<Self, FetchError> {
        crate::install_provider();
        let policy = Policy::custom(|attempt| {
            if attempt.previous().len() > HOPS {
                return attempt.error("too many redirects");
            }
            if is_allowed(attempt.url()) { attempt.follow() } else { attempt.error("a redirect to a private address") }
        });
        let client = Client::builder().dns_resolver(Arc::new(Public)).redirect(policy).timeout(PATIENCE).no_proxy();
        client.build().map(Self).map_err(|error| FetchError(error.to_string()))
    }

    /// What `url` points to.
    ///
    /// # Errors
    /// [`FetchError`]: the address is not public, the answer no image within `limits`, or there is none.
    pub async fn image(&self, url: &str, limits: ecso::Limits) -> Result<Image, FetchError> {
        let failed = |why: &str| FetchError(why.to_owned());
        let url = Url::parse(url).map_err(|_| failed("it is no URL"))?;
        if !is_allowed(&url) {
            return Err(failed("its address is not public"));
        }
        let response = self.0.get(url).send().await.map_err(|_| failed("no answer from a public address"))?;
        if !response.status().is_success() {
            return Err(failed(&format!("status {}", response.status().as_u16())));
        }
        let mut bytes = Vec::new();
        let mut body = response.bytes_stream();
        while let Some(piece) = body.next().await {
            bytes.extend_from_slice(&piece.map_err(|_| failed("it broke off"))?);
            if bytes.len() > limits.bytes {
                return Err(failed(&format!("it has more than {} bytes", limits.bytes)));
            }
        }
        Image::from_bytes(bytes, limits).map_err(|error| failed(&error.to_string()))
    }
}

/// Whether a URL may be asked; a name is looked at once more when it is resolved.
fn is_allowed(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https")
        && match url.host() {
            Some(url::Host::Domain(_)) => true,
            Some(url::Host::Ipv4(address)) => is_public(address.into()),
            Some(url::Host::Ipv6(address)) => is_public(address.into()),
            None => false,
        }
}

/// Resolves names to public addresses only.
struct Public;

impl Resolve for Public {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let public: Vec<SocketAddr> = found.filter(|address| is_public(address.ip())).collect();
            if public.is_empty() {
                return Err("no public address".into());
            }
            let addresses: Addrs = Box::new(public.into_iter());
            Ok(addresses)
        })
    }
}

/// Whether an address is of the open internet, by the registries of special-purpose addresses (RFC 6890 and its
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
            // Only global unicast, and of it not what stands for something else: documentation, benchmarks, Teredo,
            // 6to4.
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
        for outside in ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"] {
            assert!(is_public(outside.parse().unwrap()), "{outside}");
        }
    }

    #[tokio::test]
    async fn nothing_inside_is_reached() {
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
}
