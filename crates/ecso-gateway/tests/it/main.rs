//! The gateway as a router in this process, in front of an upstream on a socket.
#![expect(clippy::unwrap_used, reason = "a test that can't be set up fails")]

mod answers;
mod bypass;
mod clients;
mod conversations;
#[cfg(feature = "ext-proc")]
mod ext_proc;
mod formats;
mod golden;
mod hooks;
mod layer;
mod playground;
mod records;
mod support;
mod tenants;
mod windowed;
