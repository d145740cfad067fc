//! How much of a prompt a step reads, as a share of the configured chunk: less while memory is short, more
//! while there is plenty and prompts are read. Pure; the controller feeds it.

use std::time::Duration;

use offbook_engine::batch::CHUNK_GROWTH_MAX;
use offbook_engine::{CHUNK_AS_CONFIGURED, WorkKind};

use super::{CALM, GROW_PAUSE, Level, SHRINK_PAUSE, Sample, is_past};

/// See the module's own words. What a step needs grows with its chunk, whatever the window: a window of one
/// layer still holds that layer's results for the whole chunk.
#[derive(Debug)]
pub(super) struct Chunk {
    permille: u32,
    shrunk_at: Option<Duration>,
    grown_at: Option<Duration>,
}

impl Default for Chunk {
    fn default() -> Self {
        Self {
            permille: CHUNK_AS_CONFIGURED,
            shrunk_at: None,
            grown_at: None,
        }
    }
}

impl Chunk {
    /// Shrinks with the window, whatever is under way; grows with it up to the configured chunk. Beyond that
    /// it grows only while prompts are read, for nothing else shows what a longer one takes, and what it had
    /// beyond is given back as soon as memory is not plenty.
    pub(super) fn follow(&mut self, level: Level, sample: &Sample) -> u32 {
        let at = sample.at;
        match level {
            Level::Exhausted => self.shrink(LEAST, at),
            Level::High if is_past(self.shrunk_at, SHRINK_PAUSE, at) => {
                self.shrink((self.permille / 2).max(LEAST), at);
            }
            Level::High => {}
            Level::Between => self.permille = self.permille.min(CHUNK_AS_CONFIGURED),
            Level::Low => {
                let most = match sample.work {
                    WorkKind::Prefill => MOST,
                    WorkKind::Decode => CHUNK_AS_CONFIGURED,
                };
                let calm = is_past(self.shrunk_at, CALM, at);
                if calm && is_past(self.grown_at, GROW_PAUSE, at) && self.permille < most {
                    self.permille = self.permille.saturating_add(STEP).min(most);
                    self.grown_at = Some(at);
                }
            }
        }
        self.permille
    }

    fn shrink(&mut self, to: u32, at: Duration) {
        self.permille = self.permille.min(to);
        self.shrunk_at = Some(at);
    }
}

/// A sixteenth: matrices are then unpacked for a few rows, which takes longer and still gets on.
const LEAST: u32 = CHUNK_AS_CONFIGURED / 16;
/// As the window grows: memory shows what each tenth takes before the next one.
const STEP: u32 = CHUNK_AS_CONFIGURED / 10;
const MOST: u32 = CHUNK_AS_CONFIGURED * CHUNK_GROWTH_MAX as u32;
