//! The trace context of a request's header: whatever bytes come, no panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| offbook_runtime::fuzzing::traceparent(bytes));
