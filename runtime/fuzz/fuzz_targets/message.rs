#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| offbook_runtime::fuzzing::message(bytes));
