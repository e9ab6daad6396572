//! How a server is talked to.

use std::{path::PathBuf, time::Duration};

use secrecy::SecretString;

/// How the server is talked to.
#[derive(Debug, Clone)]
pub struct Options {
    /// The model's name on the server; `None` takes the one that the server lists, if it lists just
    /// one.
    pub model: Option<String>,
    /// Sent as a bearer token; `None` sends the `user:password@` of the base URL, if it has one.
    pub api_key: Option<SecretString>,
    /// Longest wait for a connection. Keep it below ten seconds: it is how long an unreachable
    /// server goes unnoticed.
    pub connect_timeout: Duration,
    /// Longest wait for a whole reply, or for the next piece of a streamed one.
    pub reply_timeout: Duration,
    /// How often a request is tried again after 429, 5xx or a lost connection.
    pub retries: usize,
    /// First wait before trying again; it doubles each time, with jitter. A server's `Retry-After`
    /// takes its place.
    pub backoff: Duration,
    /// Longest `Retry-After` that is waited for; a server that asks for more is overloaded.
    pub longest_wait: Duration,
    /// What the limit on new tokens is called.
    pub max_tokens_field: MaxTokensField,
    /// Request fields that are never sent, by their names (`temperature`, `seed`, …).
    pub omit: Vec<String>,
    /// How long a model that refused log-probabilities or usage counts is asked without them,
    /// before they are tried again.
    pub forget_after: Duration,
    /// URL of a proxy for all requests, with `user:password@` if it asks for that; `None` leaves it
    /// to the environment (`HTTPS_PROXY` and its like).
    pub proxy: Option<SecretString>,
    /// A PEM file of certificates that are trusted besides the system's own; `None` trusts those
    /// alone.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with this client's certificate chain and its private key; `None` shows none.
    pub client_cert: Option<PathBuf>,
    /// A Unix socket that all requests go to, whatever the base URL's host; no proxy is used then.
    /// `None` goes by TCP.
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

/// What the limit on new tokens is called in a request.
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
