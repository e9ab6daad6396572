//! Request bodies: no panic, and what the guard would guard is in its scope.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| ecso_gateway::fuzzing::body(body));
