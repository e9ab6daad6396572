//! Streams of an upstream: no panic, and what is said doesn't depend on where the stream is cut.
#![no_main]

libfuzzer_sys::fuzz_target!(|stream: &[u8]| ecso_gateway::fuzzing::stream(stream));
