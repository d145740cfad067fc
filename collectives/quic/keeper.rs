//! The thread that keeps connections alive while no collective is in progress.

use std::{
    sync::{
        Arc, Mutex, TryLockError, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::driver::Driver;
use crate::error::CollectiveError;

/// Looks in at a fixed rhythm, and leaves at once when a collective has the driver.
pub(super) struct Keeper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(super) fn start(
        driver: &Arc<Mutex<Driver>>,
        interval: Duration,
    ) -> Result<Self, CollectiveError> {
        let stop = Arc::new(AtomicBool::new(false));
        let (driver, stopped) = (Arc::downgrade(driver), stop.clone());
        let thread = thread::Builder::new()
            .name("tensor-keeper".to_owned())
            .spawn(move || keep(&driver, &stopped, interval))
            .map_err(|why| CollectiveError::local("starting the keeper thread", why))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    pub(super) fn stop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A keeper that panicked has nothing left to keep.
            let _ = thread.join();
        }
    }
}

fn keep(driver: &Weak<Mutex<Driver>>, stopped: &AtomicBool, interval: Duration) {
    loop {
        thread::park_timeout(interval);
        let Some(driver) = driver.upgrade() else {
            return;
        };
        if stopped.load(Relaxed) {
            return;
        }
        let mut driver = match driver.try_lock() {
            Ok(driver) => driver,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // A collective is in progress and does all this itself.
            Err(TryLockError::WouldBlock) => continue,
        };
        driver.turn(Instant::now());
    }
}
