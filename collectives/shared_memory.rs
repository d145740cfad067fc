//! Ranks of one host that exchange through memory which all of them map.
//!
//! Each ordered pair of ranks has a channel, each rank a place where it says that it is there, that
//! it has left or why it gave up. The thread that waits for a collective moves the bytes itself:
//! there is no other thread, and between collectives nothing runs. `segment` is the memory, `board`
//! the places, `channel` one direction between two ranks, `pass` an exchange, `patience` how long one
//! spins, `alive` who died.

mod segment;
mod board;
mod channel;
mod alive;
mod patience;
mod pass;

use std::{
    collections::VecDeque,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use self::{
    alive::Processes,
    board::{Board, Layout},
    channel::{Inbox, Outbox},
    pass::Pass,
    patience::Patience,
};
use crate::{
    error::CollectiveError,
    operation::Operation,
    transport::{Exchange, Transport, Wait},
};

pub use self::segment::Segment;

/// Who meets whom, and where. All ranks are processes of one host, of one user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedMemorySpec {
    /// Which life of the group this is; ranks of another one are refused.
    pub epoch: u64,
    /// Our place, from 0.
    pub rank: usize,
    /// How many ranks there are.
    pub size: usize,
    /// Names the group: the same on all its ranks, and in no other group on this host. Rank 0 makes
    /// a file of this name in [`Segment::folder`], and removes it when all are there.
    pub name: String,
}

/// Settings, the same on all ranks.
#[derive(Debug, Clone, Default)]
pub struct SharedMemoryOptions {
    /// How long a waiting thread looks again and again before it sleeps, letting others run in
    /// between. Unset: 50 µs. While others turn out to need its core it sleeps at once.
    pub spin: Option<Duration>,
    /// How many bytes one rank may be ahead of another, a power of two from 64. Unset: 256 KiB, or
    /// less where there are so many ranks that all channels would take more than 32 MiB.
    pub channel_bytes: Option<usize>,
}

/// All ranks of a group on one host, connected.
pub struct SharedMemory {
    rank: usize,
    size: usize,
    patience: Patience,
    board: Board,
    processes: Processes,
    /// By rank; none to ourselves.
    links: Vec<Option<Link>>,
}

/// Both directions between us and one peer.
struct Link {
    outbox: Outbox,
    inbox: Inbox,
    /// What came before it was asked for.
    early: VecDeque<u8>,
    /// How many operands went each way.
    sent: u64,
    received: u64,
}

impl SharedMemory {
    /// Meets all ranks. Blocks until everybody is there, at most for `deadline`.
    ///
    /// # Errors
    /// [`CollectiveError::Late`] naming a rank that did not come, [`CollectiveError::WrongEpoch`] or
    /// [`CollectiveError::Refused`] when one does not belong, [`CollectiveError::PeerPoisoned`] when
    /// one gave up, [`CollectiveError::Local`] when there is no memory to share or the name is taken.
    pub fn join(
        spec: &SharedMemorySpec,
        options: &SharedMemoryOptions,
        deadline: Duration,
    ) -> Result<Self, CollectiveError> {
        let start = Instant::now();
        let layout = options.layout(spec)?;
        let path = Segment::folder().join(&spec.name);
        let segment = match spec.rank {
            0 => Segment::create(&path, layout.bytes())?,
            _ => wait_for(&path, layout.bytes(), deadline)?,
        };
        let board = Board {
            segment: Arc::new(segment),
            layout,
            rank: spec.rank,
        };
        let entered = board.enter(spec.epoch, start, deadline);
        // Who is not here by now does not come any more.
        board.segment.unlink();
        entered?;
        Ok(Self {
            rank: spec.rank,
            size: spec.size,
            patience: Patience::new(options.spin.unwrap_or(SPIN)),
            processes: Processes::watch(&board),
            links: (0..spec.size)
                .map(|peer| (peer != spec.rank).then(|| Link::between(&board, peer)))
                .collect(),
            board,
        })
    }
}

impl SharedMemoryOptions {
    fn layout(&self, spec: &SharedMemorySpec) -> Result<Layout, CollectiveError> {
        let &SharedMemorySpec { rank, size, .. } = spec;
        let unsupported = |why| Err(CollectiveError::unsupported(Operation::Join, why));
        if rank >= size {
            return unsupported(format!("there is no rank {rank} of {size}"));
        }
        if size > RANKS_MAX {
            return unsupported(format!(
                "{size} ranks on one host are more than {RANKS_MAX}"
            ));
        }
        let fits = CHANNELS_BYTES_MAX / (size * (size - 1)).max(1);
        let fits = 1 << fits.ilog2();
        let channel_bytes = self.channel_bytes.unwrap_or(CHANNEL_BYTES.min(fits));
        if !channel_bytes.is_power_of_two() || channel_bytes < CHANNEL_BYTES_MIN {
            return unsupported(format!(
                "a channel of {channel_bytes} bytes is not a power of two from {CHANNEL_BYTES_MIN}"
            ));
        }
        Ok(Layout {
            size,
            channel_bytes,
        })
    }
}

impl Link {
    fn between(board: &Board, peer: usize) -> Self {
        Self {
            outbox: Outbox::to(board, peer),
            inbox: Inbox::from(board, peer),
            early: VecDeque::new(),
            sent: 0,
            received: 0,
        }
    }
}

impl Transport for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(
        &mut self,
        exchange: Exchange<'_, '_>,
        wait: Wait<'_>,
    ) -> Result<(), CollectiveError> {
        Pass::begin(self, exchange)?.complete(wait)
    }

    fn abandon(&mut self, why: &CollectiveError) {
        self.board.give_up(&why.to_string());
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        self.board.leave();
    }
}

/// Waits for rank 0 to make the segment.
fn wait_for(path: &Path, bytes: usize, deadline: Duration) -> Result<Segment, CollectiveError> {
    let start = Instant::now();
    loop {
        if let Some(segment) = Segment::try_open(path, bytes)? {
            return Ok(segment);
        }
        if start.elapsed() >= deadline {
            return Err(CollectiveError::Late {
                rank: 0,
                operation: Operation::Join,
                deadline,
            });
        }
        thread::sleep(LOOK_AGAIN_AFTER);
    }
}

/// About one wake-up: after that, sleeping costs no more than what was already lost.
const SPIN: Duration = Duration::from_micros(50);
/// Rank 0 makes the segment as soon as its process runs.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(1);
/// Far more ranks than devices that one host has.
const RANKS_MAX: usize = 64;
/// Small enough for a second-level cache, large enough that a decode step never fills it.
const CHANNEL_BYTES: usize = 256 << 10;
/// An envelope fits twice.
const CHANNEL_BYTES_MIN: usize = 64;
/// Half of what containers commonly give to shared memory.
const CHANNELS_BYTES_MAX: usize = 32 << 20;
