//! The lock this crate uses: a panic elsewhere must not turn into a second one here.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, and takes the data of a poisoned lock as it is: no holder leaves it half changed, since
/// none calls foreign code while holding it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
