//! The gate before a share is read onto a GPU: a process that held the device before may be dead and its
//! memory not yet given back, for a driver takes a while to tear a killed process down. Until its memory
//! is seen to be free nothing is loaded; but not for ever, for whatever has it may be none of ours.

use std::time::{Duration, Instant};

/// What to do, by what is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    Open,
    Wait,
    /// It was waited for long enough: the device itself will say what does not fit.
    Late,
}

/// Waits until the device has as many bytes free as a share needs, of which this process holds some
/// already. `free` asks the device; a device that does not say is not waited for.
pub(super) fn wait(needed: u64, own: u64, mut free: impl FnMut() -> Option<u64>) {
    let began = Instant::now();
    let mut said = false;
    while let Some(bytes) = free() {
        let waited = began.elapsed();
        match decide(needed, bytes.saturating_add(own), waited) {
            Gate::Open if said => {
                tracing::info!(?waited, free = bytes, "the device's memory is free");
                return;
            }
            Gate::Open => return,
            Gate::Late => {
                tracing::warn!(
                    needed,
                    free = bytes,
                    "the device's memory is still taken: the share is loaded nevertheless"
                );
                return;
            }
            Gate::Wait => {
                if !std::mem::replace(&mut said, true) {
                    tracing::info!(needed, free = bytes, "waiting for the device's memory");
                }
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }
}

fn decide(needed: u64, available: u64, waited: Duration) -> Gate {
    if available >= needed {
        Gate::Open
    } else if waited >= WAIT_MAX {
        Gate::Late
    } else {
        Gate::Wait
    }
}

const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A driver that takes longer to free a dead process's memory is stuck.
const WAIT_MAX: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_passes_at_once_and_what_does_not_is_waited_for_so_long() {
        let soon = Duration::from_millis(1);
        assert_eq!(decide(10, 10, Duration::ZERO), Gate::Open);
        assert_eq!(decide(10, 9, Duration::ZERO), Gate::Wait);
        assert_eq!(decide(10, 9, WAIT_MAX - soon), Gate::Wait);
        assert_eq!(decide(10, 9, WAIT_MAX), Gate::Late);
        assert_eq!(decide(10, 10, 2 * WAIT_MAX), Gate::Open);
    }

    #[test]
    fn it_looks_until_the_memory_is_free_and_no_longer() {
        let mut looks = [3, 5, 10, 99].into_iter();
        wait(10, 0, || looks.next());
        assert_eq!(looks.next(), Some(99), "open at 10");
        // What this process holds itself is not waited for.
        let mut looks = [4, 99].into_iter();
        wait(10, 6, || looks.next());
        assert_eq!(looks.next(), Some(99));
    }

    #[test]
    fn a_device_that_does_not_say_is_not_waited_for() {
        wait(u64::MAX, 0, || None);
    }
}
