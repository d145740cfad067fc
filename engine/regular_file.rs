//! Opens what has to be a regular file. Whoever opens a pipe waits until somebody writes to it, which may be
//! for ever.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Links are followed.
///
/// # Errors
/// Also where there is something else of that name.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    File::open(path)
}
