//! Which caches outlive their sequences, and who begins with what they hold. Pure, and a part of the
//! [`Batch`](crate::batch::Batch): every rank keeps the same entries and moves its own arrays alike.
//!
//! An *entry* is the cache of a sequence that ended, left or was preempted: the tokens whose keys and
//! values are in it. Entries live in blocks that no sequence needs. They make nobody wait: the least
//! recently used one gives its last blocks back, and goes when nothing useful is left.
//!
//! A prefix ends at any token. Whoever begins with one takes the cache over where that loses little of the
//! entry, else it has a copy: where caches lie in blocks these are shared, and no more than one is ever
//! copied; a buffer is copied in some milliseconds, where reading the prompt again takes seconds.
//!
//! The longest common prefix is found block by block: each entry keeps the digest of its tokens at the end of
//! every block, and only in the first block that differs are tokens compared, and once all those that are
//! used. Each entry counts its blocks as if nobody shared them, for on some ranks nobody does.

use offbook_protocol::SequenceId;

use crate::batch::{KV_BLOCK_TOKENS, blocks};

/// See the module's own words.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    /// Positions that entries reserve together; 0 for a cache that keeps nothing.
    retained_max: usize,
    /// The least recently used first.
    entries: Vec<Entry>,
    next: EntryId,
    /// What was decided and not carried out yet.
    moves: Vec<CacheMove>,
}

/// A cache without a sequence. Numbers are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryId(pub u64);

#[derive(Debug)]
struct Entry {
    id: EntryId,
    /// Those whose keys and values it holds, from position 0 on.
    tokens: Vec<u32>,
    /// Of the tokens up to the end of each whole block.
    digests: Vec<u64>,
    /// Positions that it may occupy, whole blocks.
    reserved: usize,
}

/// What whoever holds the arrays has to do, in this order, before the next step is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMove {
    /// The sequence has no cache any more.
    Drop(SequenceId),
    /// What was the sequence's cache is an entry from now on.
    Retain {
        sequence: SequenceId,
        entry: EntryId,
    },
    /// The entry gives up what lies behind these positions, whole blocks.
    Trim { entry: EntryId, reserve: usize },
    /// The entry is gone.
    Evict(EntryId),
    /// What was an entry is this sequence's cache from now on, and may occupy so many positions.
    TakeOver {
        entry: EntryId,
        sequence: SequenceId,
        reserve: usize,
    },
    /// The sequence's cache is a copy of the first `positions` of another, with room for `reserve`.
    Copy {
        from: Source,
        sequence: SequenceId,
        positions: usize,
        reserve: usize,
    },
}

/// Whose cache is copied from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Entry(EntryId),
    /// It runs, and goes on.
    Sequence(SequenceId),
}

/// A sequence that is about to begin.
#[derive(Clone, Copy)]
pub(crate) struct Beginner<'a> {
    pub(crate) sequence: SequenceId,
    pub(crate) prompt: &'a [u32],
    /// Positions that its cache may occupy, whole blocks.
    pub(crate) reserve: usize,
}

/// A cache whose sequence is gone.
pub(crate) struct Left {
    pub(crate) sequence: SequenceId,
    /// Those whose keys and values it holds, from position 0 on.
    pub(crate) tokens: Vec<u32>,
    /// Positions that it may occupy, whole blocks.
    pub(crate) reserved: usize,
}

impl PrefixCache {
    pub(crate) fn new(retained_max: usize) -> Self {
        Self {
            retained_max,
            entries: Vec::new(),
            next: EntryId(0),
            moves: Vec::new(),
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.retained_max > 0
    }

    /// Positions that entries reserve together, whole blocks.
    pub(crate) fn retained(&self) -> usize {
        self.entries.iter().map(|entry| entry.reserved).sum()
    }

    /// What has been decided since this was asked last.
    pub(crate) fn take_moves(&mut self) -> Vec<CacheMove> {
        std::mem::take(&mut self.moves)
    }

    /// Keeps what a sequence leaves behind, if it is of use.
    pub(crate) fn retain(&mut self, left: Left) {
        let Left {
            sequence,
            tokens,
            reserved,
        } = left;
        if !self.is_on() || tokens.len() < HIT_TOKENS_MIN {
            return self.moves.push(CacheMove::Drop(sequence));
        }
        let known = |entry: &Entry| entry.tokens.starts_with(&tokens);
        if let Some(place) = self.entries.iter().position(known) {
            let entry = self.entries.remove(place);
            self.entries.push(entry);
            return self.moves.push(CacheMove::Drop(sequence));
        }
        // What holds less of the same is of no more use.
        let moves = &mut self.moves;
        self.entries.retain(|entry| {
            let of_use = !tokens.starts_with(&entry.tokens);
            if !of_use {
                moves.push(CacheMove::Evict(entry.id));
            }
            of_use
        });
        let entry = self.next;
        self.next = EntryId(entry.0 + 1);
        self.moves.push(CacheMove::Retain { sequence, entry });
        self.entries.push(Entry {
            id: entry,
            digests: digests(&tokens),
            tokens,
            reserved,
        });
        if self.entries.len() > ENTRIES_MAX {
            self.evict(0);
        }
        self.make_room(self.retained_max);
    }

    /// Lets a sequence begin with the entry that has most of its prompt, and says with how many of its
    /// tokens: 0 for none. Leaves entries no more than `room` positions, without this sequence's.
    pub(crate) fn begin(&mut self, beginner: Beginner<'_>, room: usize) -> usize {
        let Some((place, positions)) = self.longest(beginner.prompt) else {
            self.make_room(room);
            return 0;
        };
        let Beginner {
            sequence, reserve, ..
        } = beginner;
        let entry = self.entries.remove(place);
        let lost = entry.tokens.len() - positions;
        if lost <= positions / LOSS_DIVISOR || entry.reserved > room {
            self.make_room(room);
            self.moves.push(CacheMove::TakeOver {
                entry: entry.id,
                sequence,
                reserve,
            });
        } else {
            self.make_room(room - entry.reserved);
            self.moves.push(CacheMove::Copy {
                from: Source::Entry(entry.id),
                sequence,
                positions,
                reserve,
            });
            self.entries.push(entry);
        }
        positions
    }

    /// The same for a sequence that was let in before, with `has` of its tokens: it begins with more
    /// where an entry holds more by now, or `running`, a sequence and how much of the prompt is in its
    /// cache. Nobody else has to give room for it.
    pub(crate) fn begin_again(
        &mut self,
        beginner: Beginner<'_>,
        has: usize,
        running: Option<(SequenceId, usize)>,
    ) -> usize {
        let entry = self.longest(beginner.prompt);
        let of_entry = entry.map_or(0, |(_, positions)| positions);
        let of_running = running.map_or(0, |(_, positions)| positions);
        let positions = of_entry.max(of_running);
        if positions < has + HIT_TOKENS_MIN {
            return has;
        }
        let from = match (entry, running) {
            (Some((place, _)), _) if of_entry >= of_running => {
                let entry = self.entries.remove(place);
                let id = entry.id;
                self.entries.push(entry);
                Source::Entry(id)
            }
            (_, Some((sequence, _))) => Source::Sequence(sequence),
            _ => return has,
        };
        self.moves.push(CacheMove::Copy {
            from,
            sequence: beginner.sequence,
            positions,
            reserve: beginner.reserve,
        });
        positions
    }

    /// The entry with the longest prefix of `prompt`, the latest used among equals, and how many
    /// tokens that is: never all of them, for the last one's logits are not kept.
    fn longest(&self, prompt: &[u32]) -> Option<(usize, usize)> {
        let digests = digests(prompt);
        let found = self.longest_by(|entry| {
            let digests = entry.digests.iter().zip(&digests);
            let same = digests.take_while(|(a, b)| a == b).count() * KV_BLOCK_TOKENS;
            let tokens = entry.tokens[same..].iter().copied();
            let more = usable_prefix(&prompt[same..], tokens);
            (same + more).min(prompt.len().saturating_sub(1))
        });
        match found {
            // Other tokens with the same digest: nobody is to get their keys.
            Some((place, positions))
                if self.entries[place].tokens[..positions] != prompt[..positions] =>
            {
                self.longest_by(|entry| usable_prefix(prompt, entry.tokens.iter().copied()))
            }
            found => found,
        }
    }

    /// The place of the entry of which most can be used, the latest among equals, and how much that is.
    fn longest_by(&self, usable: impl Fn(&Entry) -> usize) -> Option<(usize, usize)> {
        let places = self.entries.iter().enumerate();
        places
            .map(|(place, entry)| (place, usable(entry)))
            .filter(|(_, positions)| *positions >= HIT_TOKENS_MIN)
            .max_by_key(|(_, positions)| *positions)
    }

    /// Leaves entries no more than so many positions, whole blocks.
    pub(crate) fn make_room(&mut self, room: usize) {
        loop {
            let excess = blocks(self.retained().saturating_sub(room));
            let Some(oldest) = self.entries.first_mut().filter(|_| excess > 0) else {
                return;
            };
            let reserve = oldest.reserved.saturating_sub(excess);
            if reserve < KV_BLOCK_TOKENS {
                self.evict(0);
                continue;
            }
            oldest.reserved = reserve;
            oldest.tokens.truncate(reserve);
            oldest.digests.truncate(reserve / KV_BLOCK_TOKENS);
            let entry = oldest.id;
            self.moves.push(CacheMove::Trim { entry, reserve });
        }
    }

    fn evict(&mut self, place: usize) {
        let entry = self.entries.remove(place);
        self.moves.push(CacheMove::Evict(entry.id));
    }
}

/// Of the tokens up to the end of each whole block.
fn digests(tokens: &[u32]) -> Vec<u64> {
    let mut digest = 0_u64;
    let of_block = |block: &[u32; KV_BLOCK_TOKENS]| {
        for token in block {
            // Fibonacci hashing: the odd number next to 2⁶⁴ divided by the golden ratio.
            digest =
                (digest.rotate_left(23) ^ u64::from(*token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        digest
    };
    let (whole, _) = tokens.as_chunks();
    whole.iter().map(of_block).collect()
}

/// How many tokens at the beginning of `prompt` a cache of `tokens` stands for: never all of them, for
/// the last one has to be read to draw the next.
pub(crate) fn usable_prefix(prompt: &[u32], tokens: impl Iterator<Item = u32>) -> usize {
    let read = &prompt[..prompt.len().saturating_sub(1)];
    let same = read.iter().zip(tokens).take_while(|(a, b)| **a == *b);
    same.count()
}

/// Shorter prefixes are read as quickly as they are found and copied.
pub(crate) const HIT_TOKENS_MIN: usize = 16;
/// An entry is taken over, not copied, when no more than this part of what is used is lost with it:
/// a conversation that goes on leaves nothing behind, but a prompt that many begin with stays.
const LOSS_DIVISOR: usize = 4;
/// Each is compared with every prompt that begins: of 1000 entries of 4096 tokens that have half of them in
/// common, the longest is found in a tenth of a millisecond, on a loaded machine. More entries than this are a
/// million positions.
const ENTRIES_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn keep(cache: &mut PrefixCache, sequence: u64, tokens: Vec<u32>) {
        let reserved = blocks(tokens.len());
        cache.retain(Left {
            sequence: SequenceId(sequence),
            tokens,
            reserved,
        });
    }

    /// Tokens that differ from those of other seeds behind so many.
    fn text(seed: u32, length: usize, common: usize) -> Vec<u32> {
        let token = |place: usize| match place < common {
            true => place as u32 % 991,
            false => (place as u32).wrapping_mul(seed.wrapping_mul(2_654_435_761) | 1) % 997,
        };
        (0..length).map(token).collect()
    }

    #[test]
    fn the_longest_prefix_is_the_one_that_comparing_tokens_finds() {
        let mut cache = PrefixCache::new(usize::MAX);
        for seed in 0..60_u32 {
            let (length, common) = (40 + 37 * seed as usize, 29 * (seed as usize % 23));
            keep(&mut cache, u64::from(seed), text(seed, length, common));
        }
        let mut found = 0;
        for seed in 0..60_u32 {
            for length in [1, 15, 255, 256, 257, 512, 513, 900, 2048] {
                let prompt = text(seed, length, 29 * (seed as usize % 23));
                let by_digests = cache.longest(&prompt);
                let by_tokens =
                    cache.longest_by(|e| usable_prefix(&prompt, e.tokens.iter().copied()));
                assert_eq!(by_digests, by_tokens, "{seed}, {length}");
                found += usize::from(by_digests.is_some());
            }
        }
        assert!(found > 100, "{found}");
    }

    #[test]
    fn other_tokens_of_the_same_digest_are_no_hit() {
        let mut cache = PrefixCache::new(usize::MAX);
        keep(&mut cache, 1, text(1, 600, 0));
        keep(&mut cache, 2, text(2, 300, 0));
        let prompt = text(2, 600, 0);
        // As somebody would who can make digests meet.
        cache.entries[0].digests = digests(&prompt);
        assert_eq!(cache.longest(&prompt), Some((1, 300)));
    }

    #[test]
    fn many_entries_are_kept_and_the_longest_of_them_is_found() {
        let mut cache = PrefixCache::new(usize::MAX);
        for seed in 0..1000_u32 {
            keep(&mut cache, u64::from(seed), text(seed, 4096, 2048));
        }
        let prompt = text(700, 4096, 2048);
        let since = Instant::now();
        let found = cache.longest(&prompt);
        let by_digests = since.elapsed();
        let since = Instant::now();
        cache.longest_by(|e| usable_prefix(&prompt, e.tokens.iter().copied()));
        println!("by digests {by_digests:?}, by tokens {:?}", since.elapsed());
        assert_eq!(found, Some((700, 4095)));
    }
}
