//! The guard as a server: what `ecso serve` runs.
//!
//! It sits in front of an OpenAI-compatible server (or a model in this process) and speaks the same
//! API. A chat with an image is answered by the model and judged; if the answer is harmful, a safe
//! one is written from text alone. **No text of an answer reaches the client before a verdict on
//! it.** Requests that are not guarded are passed on if they are known to be harmless.
//!
//! The path of a request: [`server`] routes it to `handlers`; `context` admits it; `json` and
//! `request` read it against the tables of `fields`; `upstream` gets the draft; `completion` is
//! what is known of that draft; `chat` judges it and writes the answer; `windowed` judges a draft
//! while it is written; `report` holds the findings; `error` is everything that can go wrong, as
//! the client sees it. `passthrough` forwards what the table of `routes` allows; `observe` judges
//! without holding answers back; `guard` and `moderation` judge on demand, and `hooks` judge for
//! other gateways; `layer` guards a service in the same program. `playground` is a web page.

mod access;
mod audit;
mod chat;
mod completion;
mod connections;
mod context;
mod cors;
mod error;
#[cfg(feature = "ext-proc")]
pub mod ext_proc;
mod fields;
mod forms;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod guard;
mod handlers;
mod hooks;
mod json;
mod layer;
mod metrics;
mod moderation;
mod observe;
mod openapi;
mod passthrough;
mod playground;
mod ready;
pub mod replay;
mod report;
mod request;
mod routes;
pub mod server;
pub mod settings;
mod state;
mod store;
mod telemetry;
mod upstream;
mod windowed;
mod wire;
mod written;

pub use connections::serve;
pub use layer::{GuardLayer, Guarded};
pub use playground::{Calibration, Playground};
pub use server::Gateway;
pub use settings::Settings;
pub use state::{Fitted, Profiles};
pub use upstream::{Checks, Upstream};
