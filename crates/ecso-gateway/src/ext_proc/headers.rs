//! Headers as Envoy sends them, and the changes that it is asked to make.

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use bytes::Bytes;

use super::messages::{Header, HeaderMutation, HeaderValueOption, Headers};

/// Replaces existing values.
const OVERWRITE: i32 = 2;
/// Adds to existing values.
const APPEND: i32 = 0;

/// Received headers: HTTP/2 pseudo-headers, and all others.
pub(super) struct ReceivedHeaders {
    /// `:method`, `:path`, `:authority`, `:status`, …
    pseudo_header: Vec<(String, Bytes)>,
    pub(super) headers: HeaderMap,
}

impl ReceivedHeaders {
    /// Reads headers. `None` if one of them is invalid.
    pub(super) fn read(received: Option<Headers>) -> Option<Self> {
        let (mut pseudo_header, mut headers) = (Vec::new(), HeaderMap::new());
        for Header { key, value, raw_value } in received.unwrap_or_default().headers {
            let value = if raw_value.is_empty() { Bytes::from(value) } else { raw_value };
            if key.starts_with(':') {
                pseudo_header.push((key, value));
            } else {
                let name = HeaderName::try_from(key).ok()?;
                headers.append(name, HeaderValue::from_maybe_shared(value).ok()?);
            }
        }
        Some(Self { pseudo_header, headers })
    }

    /// A pseudo-header.
    pub(super) fn pseudo_header(&self, name: &str) -> Option<&[u8]> {
        let found = self.pseudo_header.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_ref())
    }
}

/// The changes that turn the request headers `from` into `to`.
pub(super) fn change(from: &HeaderMap, to: &HeaderMap) -> HeaderMutation {
    changed(from, to, |name, _| belongs_to_gateway(name))
}

/// The changes for response headers. Of the headers that the gateway sets itself, only numbers are
/// kept.
pub(super) fn change_answer(from: &HeaderMap, to: &HeaderMap) -> HeaderMutation {
    let is_figure = |value: &HeaderValue| value.as_bytes().iter().all(u8::is_ascii_digit);
    changed(from, to, |name, value| {
        *name == header::TRANSFER_ENCODING
            || (name.as_str().starts_with("x-envoy-") && is_figure(value))
    })
}

fn changed(
    from: &HeaderMap,
    to: &HeaderMap,
    stays: impl Fn(&HeaderName, &HeaderValue) -> bool,
) -> HeaderMutation {
    let differs = |name: &&HeaderName| !from.get_all(*name).iter().eq(to.get_all(*name).iter());
    let set = to.keys().filter(differs).flat_map(|name| {
        let values = to.get_all(name).iter().enumerate();
        values.map(move |(nth, value)| {
            option(name.as_str(), value, if nth == 0 { OVERWRITE } else { APPEND })
        })
    });
    let removed = from.keys().filter(|name| {
        !to.contains_key(*name) && !from.get_all(*name).iter().all(|value| stays(name, value))
    });
    HeaderMutation {
        set_headers: set.collect(),
        remove_headers: removed.map(ToString::to_string).collect(),
    }
}

/// Sets the path of a request.
pub(super) fn path(path: &str) -> Option<HeaderValueOption> {
    Some(option(":path", &HeaderValue::try_from(path).ok()?, OVERWRITE))
}

/// Sets the status of an answer.
pub(super) fn status(status: StatusCode) -> HeaderValueOption {
    option(":status", &HeaderValue::from(status.as_u16()), OVERWRITE)
}

fn option(name: &str, value: &HeaderValue, append_action: i32) -> HeaderValueOption {
    let raw_value = Bytes::copy_from_slice(value.as_bytes());
    let header = Header { key: name.to_owned(), value: String::new(), raw_value };
    HeaderValueOption { header: Some(header), append_action }
}

/// Whether the gateway manages this header itself. Some of these can't be changed by others.
fn belongs_to_gateway(name: &HeaderName) -> bool {
    const KNOWN: [HeaderName; 4] = [
        header::HOST,
        header::TRANSFER_ENCODING,
        HeaderName::from_static("x-forwarded-for"),
        HeaderName::from_static("x-forwarded-proto"),
    ];
    KNOWN.contains(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: &[(&'static str, &'static str)]) -> HeaderMap {
        let entry =
            |&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value));
        entries.iter().map(entry).collect()
    }

    #[test]
    fn only_what_differs_is_changed() {
        let from =
            map(&[("a", "1"), ("b", "1"), ("c", "1"), ("host", "x"), ("x-forwarded-for", "1")]);
        let mut to = map(&[("a", "1"), ("b", "2"), ("d", "3")]);
        to.append("d", HeaderValue::from_static("4"));
        let change = change(&from, &to);
        let set = change.set_headers.iter().map(|option| {
            let header = option.header.as_ref().unwrap();
            (header.key.as_str(), header.raw_value.as_ref(), option.append_action)
        });
        assert_eq!(
            set.collect::<Vec<_>>(),
            [("b", b"2".as_ref(), OVERWRITE), ("d", b"3", OVERWRITE), ("d", b"4", APPEND)]
        );
        assert_eq!(change.remove_headers, ["c"]);
        // In an answer, numbers stay and words don't.
        let from = map(&[
            ("x-envoy-attempt-count", "1"),
            ("x-envoy-said", "rye bread"),
            ("x-forwarded-for", "rye"),
        ]);
        let mut removed = change_answer(&from, &HeaderMap::new()).remove_headers;
        removed.sort_unstable();
        assert_eq!(removed, ["x-envoy-said", "x-forwarded-for"]);
    }
}
