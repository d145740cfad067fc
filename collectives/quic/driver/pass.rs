//! One exchange with all peers at once: write, read and wait until every operand has come.

use std::time::{Duration, Instant};

use super::Driver;
use crate::{
    error::CollectiveError,
    operation::{Envelope, Operation},
    quic::link::{Farewell, Link},
    transport::{POISON_LATENCY_MAX, Wait},
};

/// An exchange under way.
pub(in crate::quic) struct Pass<'a> {
    driver: &'a mut Driver,
    operation: Operation,
    letters: Vec<Letter<'a>>,
}

/// What goes to and comes from one peer.
struct Letter<'a> {
    rank: usize,
    link: usize,
    outgoing: Option<Outgoing<'a>>,
    incoming: Option<Incoming<'a>>,
}

struct Outgoing<'a> {
    envelope: [u8; Envelope::BYTES],
    body: &'a [u8],
    written: usize,
}

struct Incoming<'a> {
    expected: Envelope,
    envelope: [u8; Envelope::BYTES],
    body: &'a mut [u8],
    read: usize,
}

impl<'a> Pass<'a> {
    /// Addresses the letters; nothing is sent yet.
    pub(in crate::quic) fn begin(
        driver: &'a mut Driver,
        operation: Operation,
        dtype: u8,
        outgoing: &[Option<&'a [u8]>],
        incoming: &'a mut [Option<&mut [u8]>],
    ) -> Result<Self, CollectiveError> {
        let mut letters = Vec::with_capacity(outgoing.len());
        for (rank, (body, place)) in outgoing.iter().zip(incoming).enumerate() {
            if body.is_none() && place.is_none() {
                continue;
            }
            let Some(link) = driver.by_rank.get(rank).copied().flatten() else {
                return Err(CollectiveError::unsupported(
                    operation,
                    format!("rank {rank} is no peer"),
                ));
            };
            let envelope = |sequence, bytes: usize| Envelope {
                operation,
                dtype,
                sequence,
                bytes: bytes as u64,
            };
            let state = &mut driver.links[link];
            let outgoing = body.map(|body| {
                state.sent += 1;
                let envelope = envelope(state.sent, body.len()).encode();
                Outgoing {
                    envelope,
                    body,
                    written: 0,
                }
            });
            let incoming = place.as_deref_mut().map(|body| {
                state.received += 1;
                let expected = envelope(state.received, body.len());
                Incoming {
                    expected,
                    envelope: [0; Envelope::BYTES],
                    body,
                    read: 0,
                }
            });
            letters.push(Letter {
                rank,
                link,
                outgoing,
                incoming,
            });
        }
        Ok(Self {
            driver,
            operation,
            letters,
        })
    }

    /// Returns when everything has come and the outgoing bytes are no longer needed.
    pub(in crate::quic) fn complete(
        &mut self,
        spin: Duration,
        wait: Wait<'_>,
    ) -> Result<(), CollectiveError> {
        let mut now = Instant::now();
        let mut quiet_since = now;
        loop {
            self.write();
            self.driver.flush(now);
            self.read()?;
            if self.letters.iter().all(Letter::is_done) {
                return Ok(());
            }
            self.make_room();
            self.check_peers()?;
            (wait.interrupted)().map_or(Ok(()), Err)?;
            let left = wait.left(now, self.missing().count());
            if left.is_zero() {
                let first = self.missing().next().unwrap_or(0);
                return Err(wait.late(first, self.operation));
            }
            if self.driver.turn(now) {
                quiet_since = now;
            } else if now.duration_since(quiet_since) < spin {
                std::hint::spin_loop();
            } else {
                self.sleep(now, left);
            }
            now = Instant::now();
        }
    }

    /// Until a packet comes, a timer is due, or it is time to look at the health again.
    fn sleep(&mut self, now: Instant, left: Duration) {
        let timer = self.driver.next_timer();
        let timer = timer.map_or(POISON_LATENCY_MAX, |timer| {
            timer.saturating_duration_since(now)
        });
        let limit = timer.min(left).min(POISON_LATENCY_MAX);
        if !self.driver.socket.readable(limit) && limit == POISON_LATENCY_MAX {
            self.knock();
        }
    }

    /// Whether those we wait for are still there.
    fn knock(&mut self) {
        for letter in self.letters.iter().filter(|letter| !letter.is_done()) {
            let link = &mut self.driver.links[letter.link];
            if link.is_deserted() {
                link.end(Farewell::Lost(
                    "nobody listens at its address any more".to_owned(),
                ));
            }
        }
    }

    fn write(&mut self) {
        for letter in &mut self.letters {
            if let Some(outgoing) = &mut letter.outgoing {
                outgoing.write(&mut self.driver.links[letter.link]);
            }
        }
    }

    fn read(&mut self) -> Result<(), CollectiveError> {
        for letter in &mut self.letters {
            if let Some(incoming) = &mut letter.incoming {
                incoming.read(&mut self.driver.links[letter.link], letter.rank)?;
            }
        }
        Ok(())
    }

    /// While we cannot go on sending, peers of whom we expect nothing now may be sending to us, in a
    /// circle even: whoever waits for room must make room.
    fn make_room(&mut self) {
        let sending = |letter: &Letter<'_>| {
            letter
                .outgoing
                .as_ref()
                .is_some_and(|outgoing| outgoing.written < outgoing.bytes())
        };
        if !self.letters.iter().any(sending) {
            return;
        }
        for (index, link) in self.driver.links.iter_mut().enumerate() {
            let reads = |letter: &Letter<'_>| letter.link == index && letter.incoming.is_some();
            if !self.letters.iter().any(reads) {
                link.absorb();
            }
        }
    }

    /// A needed peer that is gone ends the exchange, and so does any peer that did not leave in peace.
    fn check_peers(&self) -> Result<(), CollectiveError> {
        let error = |letter: &Letter<'_>| {
            let ending = self.driver.links[letter.link].ending.as_ref()?;
            Some(ending.error(letter.rank, self.operation, 0))
        };
        if let Some(why) = self
            .letters
            .iter()
            .filter(|letter| !letter.is_done())
            .find_map(error)
        {
            return Err(why);
        }
        let links = self.driver.links.iter();
        let mut unhappy = links.filter_map(|link| Some((link.rank?, link.ending.as_ref()?)));
        match unhappy.find(|(_, ending)| **ending != Farewell::Left) {
            Some((rank, ending)) => Err(ending.error(rank, self.operation, 0)),
            None => Ok(()),
        }
    }

    fn missing(&self) -> impl Iterator<Item = usize> {
        let waited_for = self.letters.iter().filter(|letter| !letter.is_done());
        waited_for.map(|letter| letter.rank)
    }
}

impl Letter<'_> {
    fn is_done(&self) -> bool {
        self.outgoing
            .as_ref()
            .is_none_or(|outgoing| outgoing.written == outgoing.bytes())
            && self
                .incoming
                .as_ref()
                .is_none_or(|incoming| incoming.read == incoming.bytes())
    }
}

impl Outgoing<'_> {
    fn bytes(&self) -> usize {
        Envelope::BYTES + self.body.len()
    }

    fn write(&mut self, link: &mut Link) {
        if self.written < Envelope::BYTES {
            self.written += link.write(&self.envelope[self.written..]);
        }
        while self.written >= Envelope::BYTES && self.written < self.bytes() {
            let rest = &self.body[self.written - Envelope::BYTES..];
            let piece = &rest[..rest.len().min(PIECE_BYTES)];
            let written = link.write(piece);
            self.written += written;
            if written < piece.len() {
                return;
            }
        }
    }
}

impl Incoming<'_> {
    fn bytes(&self) -> usize {
        Envelope::BYTES + self.body.len()
    }

    fn read(&mut self, link: &mut Link, rank: usize) -> Result<(), CollectiveError> {
        if self.read < Envelope::BYTES {
            self.read += link.read(&mut self.envelope[self.read..]);
            if self.read < Envelope::BYTES {
                return Ok(());
            }
            if let Some((ours, theirs)) = self.expected.difference(&self.envelope) {
                return Err(CollectiveError::Mismatch { rank, ours, theirs });
            }
        }
        if self.read < self.bytes() {
            self.read += link.read(&mut self.body[self.read - Envelope::BYTES..]);
        }
        Ok(())
    }
}

/// quinn copies what it is given; copies of this size the allocator hands out again and again, where
/// larger ones would come fresh from the system, page by page.
const PIECE_BYTES: usize = 64 << 10;
