//! Looks at memory, asks the controller, moves the window. The Throttle has one; a measurement may
//! have one without actors.

use std::sync::Arc;
use std::time::{Duration, Instant};

use offbook_engine::Window;
use offbook_engine::memory::{self, DeviceMemory};

use super::WindowSettings;
use super::controller::{CacheBound, Change, Controller, Decision, Sample};
use crate::system_memory::SystemMemory;

/// See the module's own words.
pub struct WindowKeeper {
    window: Arc<Window>,
    controller: Option<Controller>,
    since: Instant,
    system: SystemMemory,
    system_read_at: Option<Instant>,
    /// What MLX kept for later before that was bounded more tightly.
    cache_bytes_max: Option<u64>,
    shrinks: u64,
    cache_clears: u64,
}

impl WindowKeeper {
    /// A keeper, and the window that the engine's thread reads: at its set points, where it stays
    /// unless the settings are adaptive.
    #[must_use]
    pub fn new(settings: WindowSettings) -> (Self, Arc<Window>) {
        let window = Arc::new(Window::new(settings.prefill, settings.decode));
        let adaptive = settings.adaptive;
        let keeper = Self {
            window: Arc::clone(&window),
            controller: adaptive.then(|| Controller::new(settings.prefill, settings.decode)),
            since: Instant::now(),
            system: SystemMemory::default(),
            system_read_at: None,
            cache_bytes_max: None,
            shrinks: 0,
            cache_clears: 0,
        };
        (keeper, window)
    }

    /// To be called every [`LOOK_EVERY`]. Returns what was seen; nothing where MLX does not say.
    pub fn look(&mut self) -> Option<Sample> {
        let memory = DeviceMemory::read().ok()?;
        if self
            .system_read_at
            .is_none_or(|at| at.elapsed() >= SYSTEM_EVERY)
        {
            self.system = SystemMemory::read();
            self.system_read_at = Some(Instant::now());
        }
        let sample = Sample {
            at: self.since.elapsed(),
            work: self.window.work(),
            active_bytes: memory.active_bytes,
            cache_bytes: memory.cache_bytes,
            limit_bytes: memory.limit_bytes,
            available_bytes: self.system.available_bytes,
            stalled: self.system.stalled,
        };
        if let Some(controller) = &mut self.controller {
            let decision = controller.observe(&sample);
            self.carry_out(decision, &sample);
        }
        Some(sample)
    }

    fn carry_out(&mut self, decision: Decision, sample: &Sample) {
        let Decision {
            window,
            change,
            chunk_permille,
            clear_cache,
            cache_bound,
        } = decision;
        self.window.set(sample.work, window);
        self.window.set_chunk_permille(chunk_permille);
        let (work, active_bytes) = (sample.work, sample.active_bytes);
        let (cache_bytes, limit_bytes) = (sample.cache_bytes, sample.limit_bytes);
        match change {
            Some(Change::Shrink) => {
                self.shrinks += 1;
                tracing::info!(
                    ?work,
                    window,
                    chunk_permille,
                    active_bytes,
                    cache_bytes,
                    limit_bytes,
                    available_bytes = sample.available_bytes,
                    stalled = sample.stalled,
                    "memory is short: the window shrinks"
                );
            }
            Some(Change::Grow) => {
                tracing::debug!(?work, window, active_bytes, "the window grows");
            }
            None => {}
        }
        if let Some(bound) = cache_bound
            && let Err(error) = self.bound_cache(bound)
        {
            tracing::warn!(%error, "what MLX keeps for later cannot be bounded");
        }
        if clear_cache {
            match memory::clear_cache() {
                Ok(()) => {
                    self.cache_clears += 1;
                    tracing::info!(cache_bytes, "memory is short: MLX's cache is cleared");
                }
                Err(error) => tracing::warn!(%error, "MLX's cache cannot be cleared"),
            }
        }
    }

    fn bound_cache(&mut self, bound: CacheBound) -> Result<(), memory::Exception> {
        match bound {
            CacheBound::Narrow(bytes) => {
                let before = memory::limit_cache(bytes)?;
                let widest = *self.cache_bytes_max.get_or_insert(before);
                if widest < bytes {
                    memory::limit_cache(widest)?;
                }
            }
            CacheBound::Wide => {
                if let Some(widest) = self.cache_bytes_max.take() {
                    memory::limit_cache(widest)?;
                }
            }
        }
        Ok(())
    }

    /// How often the window was made smaller.
    #[must_use]
    pub fn shrinks(&self) -> u64 {
        self.shrinks
    }

    /// How often MLX's cache was cleared.
    #[must_use]
    pub fn cache_clears(&self) -> u64 {
        self.cache_clears
    }

    pub(super) fn window(&self) -> &Window {
        &self.window
    }
}

/// Shorter than a layer of a prompt takes on a large model; MLX's counters cost a microsecond.
pub const LOOK_EVERY: Duration = Duration::from_millis(10);
/// The system's figures cost more, and move more slowly.
const SYSTEM_EVERY: Duration = match cfg!(target_os = "macos") {
    true => Duration::from_secs(2),
    false => Duration::from_millis(100),
};
