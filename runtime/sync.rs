//! What this crate shares between threads and tasks: a lock that survives panics, and a value that can
//! be waited for.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Locks, and takes the data of a poisoned lock as it is: no holder leaves it half changed, since
/// none calls foreign code while holding it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A value that tasks wait for. Those that wait are woken in the order in which they came, so that a
/// simulated run is the same each time; tokio's `watch` wakes them in any.
pub(crate) struct Watched<T> {
    state: Mutex<State<T>>,
    waits: AtomicU64,
}

struct State<T> {
    value: T,
    waiting: Vec<(u64, Waker)>,
}

impl<T> Watched<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            state: Mutex::new(State {
                value,
                waiting: Vec::new(),
            }),
            waits: AtomicU64::new(0),
        }
    }

    /// Looks at the value.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&lock(&self.state).value)
    }

    /// Changes the value; when `change` says that it did, all that wait look again.
    pub(crate) fn change(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let woken = {
            let mut state = lock(&self.state);
            if !change(&mut state.value) {
                return false;
            }
            std::mem::take(&mut state.waiting)
        };
        woken.into_iter().for_each(|(_, waker)| waker.wake());
        true
    }

    /// Waits until `look` finds in the value what it looks for.
    pub(crate) async fn wait_for<R>(&self, mut look: impl FnMut(&T) -> Option<R>) -> R {
        let wait = Wait {
            watched: self,
            number: self.waits.fetch_add(1, Ordering::Relaxed),
        };
        poll_fn(|cx| {
            let mut state = lock(&wait.watched.state);
            if let Some(found) = look(&state.value) {
                return Poll::Ready(found);
            }
            let waiting = &mut state.waiting;
            match waiting
                .iter_mut()
                .find(|(number, _)| *number == wait.number)
            {
                Some((_, waker)) => waker.clone_from(cx.waker()),
                None => waiting.push((wait.number, cx.waker().clone())),
            }
            Poll::Pending
        })
        .await
    }
}

/// Leaves no waker behind when its future is dropped.
struct Wait<'a, T> {
    watched: &'a Watched<T>,
    number: u64,
}

impl<T> Drop for Wait<'_, T> {
    fn drop(&mut self) {
        lock(&self.watched.state)
            .waiting
            .retain(|(number, _)| *number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use futures::task::noop_waker_ref;
    use std::task::Context;

    #[test]
    fn whoever_waits_finds_the_change() {
        let watched = Watched::new(1);
        let mut waiting = watched
            .wait_for(|value| (*value > 1).then_some(*value))
            .boxed();
        let mut cx = Context::from_waker(noop_waker_ref());
        assert!(waiting.poll_unpin(&mut cx).is_pending());
        assert!(!watched.change(|_| false));
        assert!(waiting.poll_unpin(&mut cx).is_pending());
        watched.change(|value| {
            *value = 2;
            true
        });
        assert_eq!(waiting.now_or_never(), Some(2));
    }

    #[test]
    fn whoever_stops_waiting_leaves_nothing_behind() {
        let watched = Watched::new(());
        let mut waiting = watched.wait_for(|()| None::<()>).boxed();
        let mut cx = Context::from_waker(noop_waker_ref());
        for _ in 0..3 {
            assert!(waiting.poll_unpin(&mut cx).is_pending());
        }
        assert_eq!(lock(&watched.state).waiting.len(), 1);
        drop(waiting);
        assert!(lock(&watched.state).waiting.is_empty());
    }
}
