//! The guard as a server: what `ecso serve` runs.
//!
//! It stands in front of an OpenAI-compatible server (or of a model in this process) and speaks the
//! same language. A chat with an image is answered by the model, judged, and answered anew with
//! eyes closed if need be; **no text of an answer reaches the client before a verdict on it**. What
//! is not guarded is passed on if it is known to be harmless.
//!
//! The way of a request: [`server`] routes it; `context` lets it in; `json` and `request` read it
//! against the tables of `fields`; `upstream` gets the draft; `completion` is what is known of
//! that; `chat` judges it and writes the answer; `windowed` has a draft judged while it is written;
//! `report` is what was found; `error` is everything that can go wrong, as the client sees it.
//! `passthrough` sends on what the table of `routes` lets through; `observe` judges beside; `guard`
//! and `moderation` judge on demand, and `hooks` for gateways that others run; `layer` guards a
//! service of the same program. `playground` is a page for people.

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

pub use connections::serve;
pub use layer::{GuardLayer, Guarded};
pub use playground::{Calibration, Playground};
pub use server::Gateway;
pub use settings::Settings;
pub use state::Profiles;
pub use upstream::{Checks, Upstream};
