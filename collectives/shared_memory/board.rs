//! What the ranks of a segment say about themselves: that they are there, that they have left, why
//! they gave up, whether they sleep. And how the segment is divided.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicU32,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
        },
    },
    thread,
    time::{Duration, Instant},
};

use super::{channel::CURSORS_BYTES, segment::Segment};
use crate::{error::CollectiveError, operation::Operation};

/// Where everything lies: a header, a place per rank, a channel per ordered pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) size: usize,
    pub(super) channel_bytes: usize,
}

impl Layout {
    /// Of the whole segment.
    pub(super) fn bytes(self) -> usize {
        self.channels() + self.size * (self.size - 1) * self.channel_stride()
    }

    /// Where the channel from one rank to another begins.
    pub(super) fn channel(self, from: usize, to: usize) -> usize {
        let column = if to > from { to - 1 } else { to };
        self.channels() + (from * (self.size - 1) + column) * self.channel_stride()
    }

    fn place(self, rank: usize) -> usize {
        HEADER_BYTES + rank * PLACE_BYTES
    }

    fn channels(self) -> usize {
        self.place(self.size)
    }

    fn channel_stride(self) -> usize {
        CURSORS_BYTES + self.channel_bytes
    }
}

/// The places of all ranks, as one of them sees them.
#[derive(Clone)]
pub(super) struct Board {
    pub(super) segment: Arc<Segment>,
    pub(super) layout: Layout,
    pub(super) rank: usize,
}

/// What a rank says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Presence {
    /// Nothing yet.
    Absent,
    Here,
    /// It has left in peace.
    Left,
    /// It gave up, and why.
    GaveUp(String),
}

impl Board {
    /// Takes our place and waits until everybody has taken theirs. Rank 0 opens the board: until
    /// then nobody knows whether it is the right one. Who does not belong here leaves no trace.
    pub(super) fn enter(
        &self,
        epoch: u64,
        start: Instant,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let late = |rank| CollectiveError::Late {
            rank,
            operation: Operation::Join,
            deadline,
        };
        let in_time = || {
            thread::sleep(LOOK_AGAIN_AFTER);
            start.elapsed() < deadline
        };
        let (mark, epochs) = (self.segment.counter(MARK), self.segment.counter(EPOCH));
        if self.rank == 0 {
            epochs.store(epoch, Relaxed);
            mark.store(VERSION, Release);
        }
        while mark.load(Acquire) == 0 {
            if !in_time() {
                return Err(late(0));
            }
        }
        self.check_version(mark.load(Acquire))?;
        match epochs.load(Relaxed) {
            theirs if theirs == epoch => {}
            theirs => {
                return Err(CollectiveError::WrongEpoch {
                    rank: 0,
                    ours: epoch,
                    theirs,
                });
            }
        }
        self.take_place()?;
        loop {
            let why = match self.first_not_here() {
                None => return Ok(()),
                Some((rank, Presence::GaveUp(why))) => CollectiveError::PeerPoisoned { rank, why },
                Some((rank, _)) if !in_time() => late(rank),
                Some(_) => continue,
            };
            self.give_up(&why.to_string());
            return Err(why);
        }
    }

    fn check_version(&self, version: u64) -> Result<(), CollectiveError> {
        match version {
            VERSION => Ok(()),
            _ => Err(CollectiveError::Refused {
                rank: 0,
                why: "it shares memory in another version: run the same program everywhere".into(),
            }),
        }
    }

    fn take_place(&self) -> Result<(), CollectiveError> {
        let ours = self.word(self.rank, PROCESS);
        let process = rustix::process::getpid().as_raw_nonzero().get();
        match ours.compare_exchange(0, process.cast_unsigned(), SeqCst, SeqCst) {
            Ok(_) => {
                self.word(self.rank, PRESENCE).store(HERE, Release);
                Ok(())
            }
            Err(taken) => Err(CollectiveError::Refused {
                rank: self.rank,
                why: format!("process {taken} has its place already"),
            }),
        }
    }

    fn first_not_here(&self) -> Option<(usize, Presence)> {
        let ranks = (0..self.layout.size).map(|rank| (rank, self.presence(rank)));
        // Who has left so soon has been here.
        ranks
            .into_iter()
            .find(|(_, presence)| !matches!(presence, Presence::Here | Presence::Left))
    }

    pub(super) fn presence(&self, rank: usize) -> Presence {
        match self.word(rank, PRESENCE).load(Acquire) {
            ABSENT => Presence::Absent,
            HERE => Presence::Here,
            LEFT => Presence::Left,
            _ => Presence::GaveUp(self.text(rank)),
        }
    }

    /// The process of a rank that is here.
    pub(super) fn process(&self, rank: usize) -> u32 {
        self.word(rank, PROCESS).load(Relaxed)
    }

    /// Says that we have left; who gave up has said more already.
    pub(super) fn leave(&self) {
        let ours = self.word(self.rank, PRESENCE);
        if ours.compare_exchange(HERE, LEFT, Release, Relaxed).is_ok() {
            self.ring_all();
        }
    }

    /// Says that we give up, once, and wakes everybody.
    pub(super) fn give_up(&self, why: &str) {
        let ours = self.word(self.rank, PRESENCE);
        if ours.load(Relaxed) == GAVE_UP {
            return;
        }
        let kept = why.floor_char_boundary(TEXT_BYTES_MAX);
        let text = self.layout.place(self.rank) + TEXT;
        for (at, &byte) in why.as_bytes()[..kept].iter().enumerate() {
            self.segment.letter(text + at).store(byte, Relaxed);
        }
        self.word(self.rank, TEXT_BYTES).store(kept as u32, Relaxed);
        ours.store(GAVE_UP, Release);
        self.ring_all();
    }

    fn text(&self, rank: usize) -> String {
        let bytes = self.word(rank, TEXT_BYTES).load(Relaxed) as usize;
        let text = self.layout.place(rank) + TEXT;
        let bytes: Vec<u8> = (text..text + bytes.min(TEXT_BYTES_MAX))
            .map(|at| self.segment.letter(at).load(Relaxed))
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn ring_all(&self) {
        let others = (0..self.layout.size).filter(|&rank| rank != self.rank);
        others.for_each(|rank| self.ring(rank));
    }

    /// Tells a rank that there is something new for it to see, and wakes it if it sleeps.
    pub(super) fn ring(&self, rank: usize) {
        let bell = self.word(rank, BELL);
        bell.fetch_add(1, SeqCst);
        if self.word(rank, ASLEEP).load(SeqCst) != 0 {
            wake(bell);
        }
    }

    /// How often our bell has rung. To be asked before one looks around, see [`sleep`](Self::sleep).
    pub(super) fn heard(&self) -> u32 {
        self.word(self.rank, BELL).load(SeqCst)
    }

    /// Sleeps until our bell rings, unless it has since `heard`; at most for `limit`. Either the one
    /// who rings sees that we sleep, or we see that it has rung: both do first the one and then the
    /// other in one order for all.
    pub(super) fn sleep(&self, heard: u32, limit: Duration, quiet: Duration) {
        let (bell, asleep) = (self.word(self.rank, BELL), self.word(self.rank, ASLEEP));
        asleep.store(1, SeqCst);
        if bell.load(SeqCst) == heard {
            wait(bell, heard, limit, quiet);
        }
        asleep.store(0, SeqCst);
    }

    fn word(&self, rank: usize, at: usize) -> &AtomicU32 {
        self.segment.word(self.layout.place(rank) + at)
    }
}

/// The kernel looks at the word again before it puts us to sleep.
#[cfg(target_os = "linux")]
fn wait(bell: &AtomicU32, heard: u32, limit: Duration, _quiet: Duration) {
    use rustix::thread::futex;
    let limit = futex::Timespec {
        tv_sec: limit.as_secs().cast_signed(),
        tv_nsec: limit.subsec_nanos().into(),
    };
    // Woken, timed out, rung meanwhile or interrupted: the caller looks around in any case.
    let _ = futex::wait(bell, futex::Flags::empty(), heard, Some(&limit));
}

#[cfg(target_os = "linux")]
fn wake(bell: &AtomicU32) {
    use rustix::thread::futex;
    let _ = futex::wake(bell, futex::Flags::empty(), u32::MAX);
}

/// Without a way to wait on a word of another process: short naps, longer when all has been quiet.
#[cfg(not(target_os = "linux"))]
fn wait(_: &AtomicU32, _: u32, limit: Duration, quiet: Duration) {
    thread::sleep(limit.min((quiet / 8).clamp(NAP_MIN, NAP_MAX)));
}

#[cfg(not(target_os = "linux"))]
fn wake(_: &AtomicU32) {}

#[cfg(not(target_os = "linux"))]
const NAP_MIN: Duration = Duration::from_micros(20);
#[cfg(not(target_os = "linux"))]
const NAP_MAX: Duration = Duration::from_millis(1);

/// "offbook", and the version of everything here and in channel.rs.
const VERSION: u64 = u64::from_le_bytes(*b"offbook\x01");

/// Meeting is rare, and who waits there waits for a process to start.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(1);

// In the header.
const MARK: usize = 0;
const EPOCH: usize = 8;
const HEADER_BYTES: usize = 128;

// In the place of a rank. What others write (the bell) is apart from what they only read, by more
// than a cache line of any processor.
const PROCESS: usize = 0;
const PRESENCE: usize = 4;
const TEXT_BYTES: usize = 8;
const BELL: usize = 128;
const ASLEEP: usize = 132;
const TEXT: usize = 256;
const TEXT_BYTES_MAX: usize = 256;
const PLACE_BYTES: usize = TEXT + TEXT_BYTES_MAX;

const ABSENT: u32 = 0;
const HERE: u32 = 1;
const LEFT: u32 = 2;
const GAVE_UP: u32 = 3;
