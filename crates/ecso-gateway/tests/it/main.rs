//! The gateway as a router in this process, in front of an upstream on a socket.
#![expect(clippy::unwrap_used, reason = "a test that can't be set up fails")]

mod answers;
mod bypass;
mod clients;
#[cfg(feature = "ext-proc")]
mod ext_proc;
mod goes_on;
mod golden;
mod hooks;
mod layer;
mod playground;
mod records;
mod tenants;
mod windowed;
mod wires;
mod world;
