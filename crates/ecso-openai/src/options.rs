//! Options of a client.

use std::{path::PathBuf, time::Duration};

use secrecy::SecretString;

/// Options of a client: model, key, time limits, retries, connection.
///
/// ```
/// use std::time::Duration;
///
/// use ecso_openai::{Options, SecretString};
///
/// let options = Options {
///     model: Some("qwen2.5-vl-7b".into()),
///     api_key: Some(SecretString::from("sesame")),
///     reply_timeout: Duration::from_secs(60),
///     ..Options::default()
/// };
/// ```
#[derive(Debug, Clone)]
pub struct Options {
    /// The model's name on the server; `None` takes the server's only model.
    pub model: Option<String>,
    /// Sent as a bearer token; `None` sends the `user:password@` of the base URL, if it has one.
    pub api_key: Option<SecretString>,
    /// Longest wait for a connection, and so for the error if the server is unreachable. 8 s by
    /// default.
    pub connect_timeout: Duration,
    /// Longest wait for a complete reply, or for the next part of a streamed one. 10 minutes by
    /// default.
    pub reply_timeout: Duration,
    /// How often a request is retried after 429, 5xx or a lost connection. 3 by default.
    pub retries: usize,
    /// The wait before the first retry; it doubles each time, with jitter. A server's `Retry-After`
    /// replaces it. 300 ms by default.
    pub backoff: Duration,
    /// The longest `Retry-After` that is obeyed; a longer one ends the request with
    /// [`ecso::ModelError::Overloaded`]. A minute by default.
    pub longest_wait: Duration,
    /// The name of the limit on new tokens.
    pub max_tokens_field: MaxTokensField,
    /// Names of request fields that are never sent (`temperature`, `seed`, …).
    pub omit: Vec<String>,
    /// How long requests leave out log-probabilities or usage counts after the server refused them,
    /// before they are tried again. 10 minutes by default.
    pub forget_after: Duration,
    /// URL of a proxy for all requests, with `user:password@` if it needs that; `None` uses the
    /// environment (`HTTPS_PROXY` and similar variables), and no proxy for a server on this
    /// machine (`localhost`, a loopback address).
    pub proxy: Option<SecretString>,
    /// A PEM file of certificates that are trusted in addition to the system's; `None` trusts only
    /// those.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with this client's certificate chain and its private key; `None` sends none.
    pub client_cert: Option<PathBuf>,
    /// A Unix socket for all requests, whatever the host of the base URL; no proxy is used then.
    /// `None` uses TCP.
    pub unix_socket: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            model: None,
            api_key: None,
            connect_timeout: Duration::from_secs(8),
            reply_timeout: Duration::from_mins(10),
            retries: 3,
            backoff: Duration::from_millis(300),
            longest_wait: Duration::from_mins(1),
            max_tokens_field: MaxTokensField::default(),
            omit: Vec::new(),
            forget_after: Duration::from_mins(10),
            proxy: None,
            ca_file: None,
            client_cert: None,
            unix_socket: None,
        }
    }
}

/// The name of the limit on new tokens in a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MaxTokensField {
    /// `max_tokens`, and `max_completion_tokens` for a model that refuses it.
    #[default]
    Auto,
    /// `max_tokens`, always.
    MaxTokens,
    /// `max_completion_tokens`, always.
    MaxCompletionTokens,
}
