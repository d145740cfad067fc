//! One direction between two ranks: a circle of bytes, with a count of those written and a count of
//! those read. Only the writer writes the first, only the reader the second.
#![allow(unsafe_code)]

use std::{
    ptr,
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use super::{board::Board, segment::Segment};

/// The writer's end. There is one of each channel.
pub(super) struct Outbox {
    circle: Circle,
    written: u64,
    /// How far the reader was when we last looked.
    read: u64,
}

/// The reader's end. There is one of each channel.
pub(super) struct Inbox {
    circle: Circle,
    read: u64,
    /// How far the writer was when we last looked.
    written: u64,
}

struct Circle {
    segment: Arc<Segment>,
    at: usize,
    /// A power of two.
    bytes: usize,
}

impl Outbox {
    /// Our end of the channel to `peer`.
    pub(super) fn to(board: &Board, peer: usize) -> Self {
        Self {
            circle: Circle::of(board, board.rank, peer),
            written: 0,
            read: 0,
        }
    }

    /// Writes as much of `bytes` as there is room for; how much. The reader sees it piece by piece,
    /// so that it can take the first while we write the next.
    pub(super) fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let room = self.room();
            let piece = room.min(bytes.len() - done).min(PIECE_BYTES);
            if piece == 0 {
                break;
            }
            let (head, tail) = self.circle.split(self.written, piece);
            // SAFETY: both ranges are inside the circle and hold nothing that is still to be read;
            // the reader does not touch them before it has seen the count that we store below.
            unsafe {
                ptr::copy_nonoverlapping(bytes[done..].as_ptr(), self.circle.place(head), head.1);
                let rest = bytes[done + head.1..].as_ptr();
                ptr::copy_nonoverlapping(rest, self.circle.place(tail), tail.1);
            }
            self.written += piece as u64;
            self.circle.counter(WRITTEN).store(self.written, Release);
            done += piece;
        }
        done
    }

    fn room(&mut self) -> usize {
        let mut ahead = self.written.wrapping_sub(self.read);
        if ahead >= self.circle.bytes as u64 {
            self.read = self.circle.counter(READ).load(Acquire);
            ahead = self.written.wrapping_sub(self.read);
        }
        // A reader that claims more than we wrote is broken; then there is no room.
        (self.circle.bytes as u64).saturating_sub(ahead) as usize
    }
}

impl Inbox {
    /// Our end of the channel from `peer`.
    pub(super) fn from(board: &Board, peer: usize) -> Self {
        Self {
            circle: Circle::of(board, peer, board.rank),
            read: 0,
            written: 0,
        }
    }

    /// Fills as much of `bytes` as has come; how much.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let piece = self.ready().min(bytes.len() - done).min(PIECE_BYTES);
            if piece == 0 {
                break;
            }
            let (head, tail) = self.circle.split(self.read, piece);
            // SAFETY: both ranges are inside the circle; the writer wrote them before it stored the
            // count that we have seen, and leaves them alone until it sees the count that we store
            // below. A writer that does otherwise spoils its own bytes, which may be anything.
            unsafe {
                let place = bytes[done..].as_mut_ptr();
                ptr::copy_nonoverlapping(self.circle.place(head), place, head.1);
                let rest = bytes[done + head.1..].as_mut_ptr();
                ptr::copy_nonoverlapping(self.circle.place(tail), rest, tail.1);
            }
            self.read += piece as u64;
            self.circle.counter(READ).store(self.read, Release);
            done += piece;
        }
        done
    }

    /// Takes what has come, up to `limit` bytes, to the end of `bytes`; how much.
    pub(super) fn read_ahead(&mut self, bytes: &mut impl Extend<u8>, limit: usize) -> usize {
        let mut piece = vec![0; self.ready().min(limit)];
        let came = self.read(&mut piece);
        bytes.extend(piece);
        came
    }

    fn ready(&mut self) -> usize {
        if self.written == self.read {
            self.written = self.circle.counter(WRITTEN).load(Acquire);
        }
        // A writer that claims more than there is room for is broken; nothing is read beyond.
        let ready = self.written.wrapping_sub(self.read);
        ready.min(self.circle.bytes as u64) as usize
    }
}

impl Circle {
    fn of(board: &Board, from: usize, to: usize) -> Self {
        let circle = Self {
            segment: board.segment.clone(),
            at: board.layout.channel(from, to),
            bytes: board.layout.channel_bytes,
        };
        let end = circle.at + CURSORS_BYTES + circle.bytes;
        assert!(end <= circle.segment.len() && circle.bytes.is_power_of_two());
        debug_assert_eq!(circle.counter(READ).load(Relaxed), 0);
        circle
    }

    /// The `bytes` bytes from a count on, as (offset, length) before the seam and after it.
    fn split(&self, count: u64, bytes: usize) -> ((usize, usize), (usize, usize)) {
        let start = (count as usize) & (self.bytes - 1);
        let head = bytes.min(self.bytes - start);
        ((start, head), (0, bytes - head))
    }

    fn place(&self, (offset, bytes): (usize, usize)) -> *mut u8 {
        debug_assert!(offset + bytes <= self.bytes);
        // SAFETY: inside the segment, as `of` has checked for the whole circle.
        unsafe { self.segment.pointer().add(self.at + CURSORS_BYTES + offset) }
    }

    fn counter(&self, at: usize) -> &AtomicU64 {
        self.segment.counter(self.at + at)
    }
}

// The counts lie apart, so that each end writes to a cache line of its own.
const WRITTEN: usize = 0;
const READ: usize = 128;
/// The counts, before the bytes.
pub(super) const CURSORS_BYTES: usize = 256;

/// Half of a first-level cache: the reader begins while the writer still writes.
const PIECE_BYTES: usize = 16 << 10;
