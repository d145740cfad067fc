//! A data directory belongs to one process at a time: two would overwrite each other's epochs and answers.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// While this value lives, the directory is its process's.
pub(crate) struct Owned {
    _lock: File,
}

/// Takes a directory, once a process that is just ending has let go of it.
///
/// # Errors
/// When another process has it.
pub(crate) async fn own(folder: &Path) -> Result<Owned> {
    let path = folder.join(LOCK);
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let asked = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if asked.elapsed() < ENDING_MAX => {
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Err(TryLockError::WouldBlock) => bail!(
                "{} is in use by another offbook: stop that one, or choose another --data-dir",
                folder.display()
            ),
            Err(TryLockError::Error(error)) => {
                // Some file systems of a network have no locks.
                tracing::debug!(%error, "cannot see whether the data directory is in use");
                break;
            }
        }
    }
    Ok(Owned { _lock: lock })
}

const LOCK: &str = "lock";
/// A process that is killed is gone long before.
const ENDING_MAX: Duration = Duration::from_secs(2);
const ASK_AGAIN: Duration = Duration::from_millis(20);
