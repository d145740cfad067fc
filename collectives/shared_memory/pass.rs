//! One exchange with all peers at once: write, read and wait until every operand has come.

use std::{collections::VecDeque, time::Instant};

use super::{Link, SharedMemory, board::Presence};
use crate::{
    error::CollectiveError,
    operation::{Envelope, Operation},
    transport::{Exchange, POISON_LATENCY_MAX, Wait},
};

/// An exchange under way.
pub(super) struct Pass<'a, 'm> {
    memory: &'a mut SharedMemory,
    operation: Operation,
    letters: Vec<Letter<'a, 'm>>,
}

/// What goes to and comes from one peer.
struct Letter<'a, 'm> {
    rank: usize,
    outgoing: Option<Outgoing<'a>>,
    incoming: Option<Incoming<'a, 'm>>,
}

struct Outgoing<'a> {
    envelope: [u8; Envelope::BYTES],
    body: &'a [u8],
    written: usize,
}

struct Incoming<'a, 'm> {
    expected: Envelope,
    envelope: [u8; Envelope::BYTES],
    body: &'a mut &'m mut [u8],
    read: usize,
}

impl<'a, 'm> Pass<'a, 'm> {
    /// Addresses the letters; nothing is written yet.
    pub(super) fn begin(
        memory: &'a mut SharedMemory,
        exchange: Exchange<'a, 'm>,
    ) -> Result<Self, CollectiveError>
    where
        'm: 'a,
    {
        let Exchange {
            operation,
            dtype,
            outgoing,
            incoming,
        } = exchange;
        let mut letters = Vec::with_capacity(outgoing.len());
        for (rank, (body, place)) in outgoing.iter().zip(incoming).enumerate() {
            if body.is_none() && place.is_none() {
                continue;
            }
            let Some(Some(link)) = memory.links.get_mut(rank) else {
                let why = format!("rank {rank} is no peer");
                return Err(CollectiveError::unsupported(operation, why));
            };
            let envelope = |sequence: &mut u64, bytes: usize| {
                *sequence += 1;
                Envelope {
                    operation,
                    dtype,
                    sequence: *sequence,
                    bytes: bytes as u64,
                }
            };
            letters.push(Letter {
                rank,
                outgoing: body.map(|body| Outgoing {
                    envelope: envelope(&mut link.sent, body.len()).encode(),
                    body,
                    written: 0,
                }),
                incoming: place.as_mut().map(|body| Incoming {
                    expected: envelope(&mut link.received, body.len()),
                    envelope: [0; Envelope::BYTES],
                    body,
                    read: 0,
                }),
            });
        }
        Ok(Self {
            memory,
            operation,
            letters,
        })
    }

    /// Returns when everything has come and the outgoing bytes are no longer needed.
    pub(super) fn complete(&mut self, wait: Wait<'_>) -> Result<(), CollectiveError> {
        let start = Instant::now();
        let (mut quiet_since, mut counted_at) = (start, start);
        loop {
            let heard = self.memory.board.heard();
            let moved = self.advance()?;
            if self.letters.iter().all(Letter::is_done) {
                return Ok(());
            }
            let now = Instant::now();
            let count = now.duration_since(counted_at) >= POISON_LATENCY_MAX;
            if count {
                counted_at = now;
            }
            if let Some(why) = self.absence(count) {
                // What it wrote before it went is still there.
                if self.advance()? {
                    continue;
                }
                return match self.letters.iter().all(Letter::is_done) {
                    true => Ok(()),
                    false => Err(why),
                };
            }
            (wait.interrupted)().map_or(Ok(()), Err)?;
            let left = wait.left(now, self.missing().count());
            if left.is_zero() {
                let first = self.missing().next().unwrap_or(0);
                return Err(wait.late(first, self.operation));
            }
            if moved {
                quiet_since = now;
                continue;
            }
            let quiet = now.duration_since(quiet_since);
            if self.memory.patience.is_up(now, quiet) {
                let limit = left.min(POISON_LATENCY_MAX);
                self.memory.board.sleep(heard, limit, quiet);
            }
        }
    }

    /// Writes and reads what can be; whether anything was.
    fn advance(&mut self) -> Result<bool, CollectiveError> {
        let mut moved = false;
        let SharedMemory { links, board, .. } = &mut *self.memory;
        for letter in &mut self.letters {
            let Some(link) = links[letter.rank].as_mut() else {
                continue;
            };
            let written = letter.outgoing.as_mut().map_or(0, |out| out.write(link));
            let read = match &mut letter.incoming {
                Some(incoming) => incoming.read(link, letter.rank)?,
                None => 0,
            };
            if written + read > 0 {
                moved = true;
                // There is something to read now, or room again.
                board.ring(letter.rank);
            }
        }
        Ok(self.make_room() || moved)
    }

    /// While we cannot go on writing, peers of whom we expect nothing now may be writing to us, in
    /// a circle even: whoever waits for room must make room.
    fn make_room(&mut self) -> bool {
        if !self.letters.iter().any(Letter::is_writing) {
            return false;
        }
        let mut moved = false;
        let SharedMemory { links, board, .. } = &mut *self.memory;
        for (rank, link) in links.iter_mut().enumerate() {
            let reads = |letter: &Letter<'_, '_>| letter.rank == rank && letter.incoming.is_some();
            if let Some(link) = link
                && !self.letters.iter().any(reads)
                && link.absorb() > 0
            {
                board.ring(rank);
                moved = true;
            }
        }
        moved
    }

    /// A needed peer that is gone ends the exchange, and so does any peer that did not leave in
    /// peace. Whether processes still exist is asked of the system only when `count`.
    fn absence(&self, count: bool) -> Option<CollectiveError> {
        let lost = |rank, why: &str| CollectiveError::Lost {
            rank,
            operation: self.operation,
            why: why.to_owned(),
        };
        let unfinished = |rank| {
            let mut letters = self.letters.iter();
            letters.any(|letter| letter.rank == rank && !letter.is_done())
        };
        let (board, processes) = (&self.memory.board, &self.memory.processes);
        let peers = (0..self.memory.size).filter(|&rank| rank != self.memory.rank);
        let absent = |rank| match board.presence(rank) {
            Presence::GaveUp(why) => Some(CollectiveError::PeerPoisoned { rank, why }),
            Presence::Left if unfinished(rank) => Some(lost(rank, "it left")),
            Presence::Left => None,
            _ if count && processes.has_ended(rank) => Some(lost(rank, "its process has ended")),
            _ => None,
        };
        peers.into_iter().find_map(absent)
    }

    fn missing(&self) -> impl Iterator<Item = usize> {
        let waited_for = self.letters.iter().filter(|letter| !letter.is_done());
        waited_for.map(|letter| letter.rank)
    }
}

impl Letter<'_, '_> {
    fn is_writing(&self) -> bool {
        self.outgoing
            .as_ref()
            .is_some_and(|outgoing| outgoing.written < Envelope::BYTES + outgoing.body.len())
    }

    fn is_reading(&self) -> bool {
        self.incoming
            .as_ref()
            .is_some_and(|incoming| incoming.read < Envelope::BYTES + incoming.body.len())
    }

    fn is_done(&self) -> bool {
        !self.is_writing() && !self.is_reading()
    }
}

impl Outgoing<'_> {
    fn write(&mut self, link: &mut Link) -> usize {
        let before = self.written;
        if self.written < Envelope::BYTES {
            self.written += link.outbox.write(&self.envelope[self.written..]);
        }
        if self.written >= Envelope::BYTES {
            let rest = &self.body[self.written - Envelope::BYTES..];
            self.written += link.outbox.write(rest);
        }
        self.written - before
    }
}

impl Incoming<'_, '_> {
    fn read(&mut self, link: &mut Link, rank: usize) -> Result<usize, CollectiveError> {
        let before = self.read;
        if self.read < Envelope::BYTES {
            self.read += link.read(&mut self.envelope[self.read..]);
            if self.read < Envelope::BYTES {
                return Ok(self.read - before);
            }
            if let Some((ours, theirs)) = self.expected.difference(&self.envelope) {
                return Err(CollectiveError::Mismatch { rank, ours, theirs });
            }
        }
        self.read += link.read(&mut self.body[self.read - Envelope::BYTES..]);
        Ok(self.read - before)
    }
}

impl Link {
    /// What came early comes first.
    fn read(&mut self, bytes: &mut [u8]) -> usize {
        let early = self.early.len().min(bytes.len());
        for (place, byte) in bytes.iter_mut().zip(self.early.drain(..early)) {
            *place = byte;
        }
        if self.early.is_empty() {
            // A burst is over: its memory goes back.
            self.early = VecDeque::new();
        }
        early + self.inbox.read(&mut bytes[early..])
    }

    /// Takes in what nobody asked for yet; how much.
    fn absorb(&mut self) -> usize {
        let room = EARLY_BYTES_MAX.saturating_sub(self.early.len());
        self.inbox.read_ahead(&mut self.early, room)
    }
}

/// What a peer may send before we want it, beyond its channel: more than a prefill's activations.
const EARLY_BYTES_MAX: usize = 256 << 20;
