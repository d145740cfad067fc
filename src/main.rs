//! offbook
fn main() {}
