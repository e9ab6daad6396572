//! A server's base URL, in the forms that people write.

use std::fmt;

use base64::{Engine, prelude::BASE64_STANDARD};
use ecso::{Cause, ModelError};
use percent_encoding::percent_decode_str;
use secrecy::SecretString;
use url::{Host, Url};

/// Ends of the URLs of endpoints.
const ENDPOINTS: [&str; 3] = ["/chat/completions", "/completions", "/models"];

/// A base URL. Its secrets are kept apart and never shown.
#[derive(Clone)]
pub(crate) struct Base {
    url: Url,
    /// The value of an `Authorization` header, from `user:password@`.
    pub(crate) login: Option<SecretString>,
}

impl Base {
    /// Reads `http://host:8000`, with `/v1` or without, or the URL of one of its endpoints.
    pub(crate) fn parse(text: &str) -> Result<Self, ModelError> {
        let text = text.trim();
        let message = |why: &str| format!("{:?} is not an http(s) URL: {why}", shown(text));
        let wrong = |why: &str| ModelError::Rejected(message(why).into());
        if !text.contains("://") {
            let scheme = if is_local(shown(text)) { "http" } else { "https" };
            return Err(wrong(&format!("write {scheme}://{}", shown(text))));
        }
        let mut url = Url::parse(text).map_err(|error| {
            ModelError::Rejected(Cause::new(message(&error.to_string()), error))
        })?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(wrong("it must begin with http:// or https://"));
        }
        let login = login(&url);
        // Can't fail for http(s).
        let _ = (url.set_username(""), url.set_password(None));
        url.set_fragment(None);
        let path = url.path().trim_end_matches('/').to_owned();
        let base = ENDPOINTS.iter().find_map(|endpoint| path.strip_suffix(endpoint));
        url.set_path(match base {
            Some(base) => base,
            None if path.is_empty() => "/v1",
            None => &path,
        });
        Ok(Self { url, login })
    }

    /// The base itself, without `user:password@`.
    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    /// Whether the host is this machine: `localhost`, a name below it, or a loopback address.
    pub(crate) fn is_loopback(&self) -> bool {
        match self.url.host() {
            Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
            Some(Host::Ipv4(address)) => address.is_loopback(),
            Some(Host::Ipv6(address)) => address.to_canonical().is_loopback(),
            None => false,
        }
    }

    /// The URL of a path below the base.
    pub(crate) fn join(&self, path: &str) -> Url {
        let mut url = self.url.clone();
        url.set_path(&format!("{}/{path}", self.url.path().trim_end_matches('/')));
        url
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_query(&self.url))
    }
}

impl fmt::Debug for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A URL without its query, which may hold a key.
pub(crate) fn without_query(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.into()
}

fn login(url: &Url) -> Option<SecretString> {
    let (user, password) = (url.username(), url.password().unwrap_or_default());
    if user.is_empty() && password.is_empty() {
        return None;
    }
    let mut pair = percent_decode_str(user).collect::<Vec<u8>>();
    pair.push(b':');
    pair.extend(percent_decode_str(password));
    Some(format!("Basic {}", BASE64_STANDARD.encode(pair)).into())
}

/// The part of a text, which may not be a URL, that holds no secret: after the last `@`, before a
/// query.
fn shown(text: &str) -> &str {
    let text = text.rsplit_once('@').map_or(text, |(_, rest)| rest);
    text.split(['?', '#']).next().unwrap_or_default()
}

/// Whether an address without a scheme usually has no TLS: one with a port, a numeric address, or
/// this machine.
fn is_local(address: &str) -> bool {
    let authority = address.split('/').next().unwrap_or_default();
    let Ok(url) = Url::parse(&format!("http://{authority}")) else { return true };
    url.port().is_some() || !matches!(url.host(), Some(Host::Domain(name)) if name.contains('.'))
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    fn base(text: &str) -> String {
        Base::parse(text).map_or_else(|error| error.to_string(), |base| base.url.to_string())
    }

    #[test]
    fn base_urls_are_read_in_all_common_forms() {
        for (written, read) in [
            ("http://host:1", "http://host:1/v1"),
            ("http://host:1/", "http://host:1/v1"),
            ("https://host/v1/", "https://host/v1"),
            (" https://host/v1//\n", "https://host/v1"),
            ("https://host/api/x", "https://host/api/x"),
            ("http://host/v1/chat/completions", "http://host/v1"),
            ("http://host/v1/chat/completions/", "http://host/v1"),
            ("http://host/v1/completions", "http://host/v1"),
            ("http://host/v1/models/", "http://host/v1"),
            ("http://host/chat/completions", "http://host/"),
            (
                "https://host/deployments/m?api-version=1",
                "https://host/deployments/m?api-version=1",
            ),
        ] {
            assert_eq!(base(written), read, "{written}");
        }
        assert_eq!(
            Base::parse("http://host/").unwrap().join("models").as_str(),
            "http://host/v1/models"
        );
        let azure = Base::parse("https://host/openai?api-version=1").unwrap().join("models");
        assert_eq!(azure.as_str(), "https://host/openai/models?api-version=1");
    }

    #[test]
    fn loopback_hosts_are_known() {
        for (written, loopback) in [
            ("http://LOCALHOST:8000", true),
            ("http://models.localhost", true),
            ("http://127.8.0.1:1/v1", true),
            ("http://[::1]:8000", true),
            ("http://[::ffff:127.0.0.1]", true),
            ("http://localhost.example.org", false),
            ("http://127.example.org", false),
            ("http://192.168.0.1", false),
            ("http://0.0.0.0", false),
        ] {
            assert_eq!(Base::parse(written).unwrap().is_loopback(), loopback, "{written}");
        }
    }

    #[test]
    fn the_error_for_a_url_without_a_scheme_shows_the_right_url() {
        for (written, right) in [
            ("host:8000/v1", "write http://host:8000/v1"),
            ("127.0.0.1:8000/v1", "write http://127.0.0.1:8000/v1"),
            ("127.0.0.1/v1", "write http://127.0.0.1/v1"),
            ("[::1]:8000", "write http://[::1]:8000"),
            ("localhost", "write http://localhost"),
            ("api.example.org/v1", "write https://api.example.org/v1"),
        ] {
            let error = base(written);
            assert!(error.ends_with(right), "{written}: {error}");
        }
        assert!(base("ftp://host").contains("must begin with http:// or https://"));
        assert!(base("http://").contains("is not an http(s) URL"));
    }

    #[test]
    fn secrets_in_a_base_url_are_never_shown() {
        let login = Base::parse("http://me:se%40same@host/v1?key=hidden").unwrap();
        assert_eq!(login.login.as_ref().unwrap().expose_secret(), "Basic bWU6c2VAc2FtZQ==");
        assert_eq!(format!("{login} {login:?}"), "http://host/v1 http://host/v1");
        assert_eq!(login.url.as_str(), "http://host/v1?key=hidden");
        for wrong in [
            "me:sesame@host:8000/v1?key=hidden",
            "ftp://me:sesame@host?key=hidden",
            "http://me:sesame@host:port/?key=hidden",
            "http://me:ses/ame@?key=hidden",
        ] {
            let error = base(wrong);
            assert!(!error.contains("ame") && !error.contains("hidden"), "{error}");
        }
    }
}
