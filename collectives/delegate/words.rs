//! The words in which a device and its proxy speak, in memory that both see.
//!
//! Every 8-byte word carries 4 bytes of an operand and the number of the operation that it belongs
//! to. Such a word is read and written whole, so that a reader knows of each word by itself whether
//! it is the one that it waits for: there is no flag beside the data that could overtake it, no
//! fence, and no stale value that could pass for a fresh one. It costs twice the bytes and saves two
//! crossings of the bus.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One word of shared memory. A trait, so that the protocol can be explored under a model checker.
pub(crate) trait Word {
    fn get(&self) -> u64;
    fn set(&self, value: u64);
}

impl Word for AtomicU64 {
    fn get(&self) -> u64 {
        self.load(Relaxed)
    }

    fn set(&self, value: u64) {
        self.store(value, Relaxed);
    }
}

/// The number of an operation, from 1, the same on the device and on the host. It wraps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sequence(pub(crate) u32);

impl Sequence {
    pub(crate) const FIRST: Self = Self(1);

    pub(crate) fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }

    /// Is `other` of a later operation? Operations are never half the numbers apart.
    fn is_before(self, other: Self) -> bool {
        other.0.wrapping_sub(self.0).cast_signed() > 0
    }
}

/// A word with the number of a later operation than the one that is waited for: the other side went
/// on without us. Nothing that it wrote can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overrun {
    pub(crate) expected: Sequence,
    pub(crate) found: Sequence,
}

/// How many words `bytes` take. Readers and writers move words in pairs, and no bytes at all still
/// take a pair: that the other side has arrived is news as well.
pub(crate) const fn words(bytes: usize) -> usize {
    match bytes {
        0 => 2,
        _ => bytes.div_ceil(PAIR_DATA_BYTES) * 2,
    }
}

/// How many bytes of an operand fit into `words`.
pub(crate) const fn bytes(words: usize) -> usize {
    words / 2 * PAIR_DATA_BYTES
}

/// Writes `bytes` as words of operation `sequence`; what is left of the last pair is zeros.
pub(crate) fn write<W: Word>(words: &[W], sequence: Sequence, bytes: &[u8]) {
    let stamp = u64::from(sequence.0) << 32;
    let (whole, rest) = bytes.as_chunks::<DATA_BYTES>();
    for (word, data) in words.iter().zip(whole) {
        word.set(stamp | u64::from(u32::from_le_bytes(*data)));
    }
    let mut last = [0; DATA_BYTES];
    last[..rest.len()].copy_from_slice(rest);
    let mut last = u32::from_le_bytes(last);
    for word in &words[whole.len()..self::words(bytes.len())] {
        word.set(stamp | u64::from(last));
        last = 0;
    }
}

/// Reads what [`write`] wrote for `sequence`. `wait` is called for as long as a word is not there,
/// and may end the waiting.
pub(crate) fn read<W: Word, E: From<Overrun>>(
    words: &[W],
    sequence: Sequence,
    bytes: &mut [u8],
    mut wait: impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    let lines = words[..self::words(bytes.len())].chunks(LINE_WORDS);
    // No bytes at all still take a line, whose data nobody wants.
    let mut places = bytes.chunks_mut(LINE_WORDS * DATA_BYTES);
    for line in lines {
        let mut data = [0; LINE_WORDS * DATA_BYTES];
        while !take(line, sequence, &mut data)? {
            wait()?;
        }
        if let Some(place) = places.next() {
            place.copy_from_slice(&data[..place.len()]);
        }
    }
    Ok(())
}

/// Reads up to a cache line of words. Whether all were of `sequence`; their data counts only then.
/// One look at each word and no branch between them: the next line is on its way meanwhile.
fn take<W: Word>(
    line: &[W],
    sequence: Sequence,
    data: &mut [u8; LINE_WORDS * DATA_BYTES],
) -> Result<bool, Overrun> {
    let mut found = [sequence.0; LINE_WORDS];
    let (places, _) = data.as_chunks_mut::<DATA_BYTES>();
    for ((word, place), found) in line.iter().zip(places).zip(&mut found) {
        let word = word.get();
        *place = (word as u32).to_le_bytes();
        *found = (word >> 32) as u32;
    }
    let differs = found
        .iter()
        .fold(0, |differs, found| differs | (found ^ sequence.0));
    if differs == 0 {
        return Ok(true);
    }
    match found
        .into_iter()
        .map(Sequence)
        .find(|&found| sequence.is_before(found))
    {
        Some(found) => Err(Overrun {
            expected: sequence,
            found,
        }),
        None => Ok(false),
    }
}

/// Bytes of the operand in a word; the other half is its number.
const DATA_BYTES: usize = 4;
/// A cache line of words.
const LINE_WORDS: usize = 8;
/// A device moves 16 bytes at a time: two words.
const PAIR_DATA_BYTES: usize = 2 * DATA_BYTES;

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(bytes: usize) -> Vec<AtomicU64> {
        (0..words(bytes)).map(|_| AtomicU64::new(0)).collect()
    }

    #[derive(Debug, PartialEq)]
    enum End {
        Empty,
        Overrun(Overrun),
    }

    impl From<Overrun> for End {
        fn from(overrun: Overrun) -> Self {
            Self::Overrun(overrun)
        }
    }

    fn try_read(words: &[AtomicU64], sequence: u32, bytes: usize) -> Result<Vec<u8>, End> {
        let mut data = vec![0; bytes];
        read(words, Sequence(sequence), &mut data, || Err(End::Empty))?;
        Ok(data)
    }

    impl Word for loom::sync::atomic::AtomicU64 {
        fn get(&self) -> u64 {
            self.load(Relaxed)
        }

        fn set(&self, value: u64) {
            self.store(value, Relaxed);
        }
    }

    #[test]
    fn any_length_comes_back() {
        for length in 0..40 {
            let bytes: Vec<u8> = (1..=length).collect();
            let memory = memory(bytes.len());
            write(&memory, Sequence(7), &bytes);
            assert_eq!(try_read(&memory, 7, bytes.len()), Ok(bytes));
        }
    }

    #[test]
    fn a_word_of_an_earlier_operation_is_waited_past() {
        let memory = memory(16);
        write(&memory, Sequence(7), &[9; 16]);
        write(&memory, Sequence(8), &[1; 8]);
        assert_eq!(try_read(&memory, 8, 8), Ok(vec![1; 8]));
        assert_eq!(try_read(&memory, 8, 16), Err(End::Empty));
    }

    #[test]
    fn a_word_of_a_later_operation_is_never_taken() {
        let memory = memory(8);
        write(&memory, Sequence(9), &[9; 8]);
        let overrun = Overrun {
            expected: Sequence(8),
            found: Sequence(9),
        };
        assert_eq!(try_read(&memory, 8, 8), Err(End::Overrun(overrun)));
    }

    #[test]
    fn numbers_wrap() {
        let memory = memory(8);
        write(&memory, Sequence(u32::MAX), &[9; 8]);
        let next = Sequence(u32::MAX).next();
        assert_eq!(try_read(&memory, next.0, 8), Err(End::Empty));
        write(&memory, next, &[3; 8]);
        assert_eq!(try_read(&memory, next.0, 8), Ok(vec![3; 8]));
    }

    /// The orders in which two threads can see each other's relaxed stores: two operations, there
    /// and back, and the answer to the second is never made of the first.
    #[test]
    fn no_interleaving_lets_a_stale_word_through() {
        use loom::sync::Arc;
        use loom::sync::atomic::AtomicU64 as Checked;

        fn taken(words: &[Checked], sequence: Sequence) -> [u8; 8] {
            let mut bytes = [0; 8];
            let waited = read(words, sequence, &mut bytes, || -> Result<(), Overrun> {
                loom::thread::yield_now();
                Ok(())
            });
            assert_eq!(waited, Ok(()));
            bytes
        }

        let mut model = loom::model::Builder::new();
        // All orders with up to three switches away from a thread that could go on.
        model.preemption_bound = Some(3);
        model.check(|| {
            let memory = || Arc::new([Checked::new(0), Checked::new(0)]);
            let (up, down) = (memory(), memory());
            let proxy = {
                let (up, down) = (up.clone(), down.clone());
                loom::thread::spawn(move || {
                    for number in 1..=2 {
                        let operand = taken(&*up, Sequence(number));
                        write(&*down, Sequence(number), &operand.map(|byte| byte + 100));
                    }
                })
            };
            for number in 1..=2_u8 {
                let sequence = Sequence(u32::from(number));
                write(&*up, sequence, &[number; 8]);
                assert_eq!(taken(&*down, sequence), [100 + number; 8]);
            }
            proxy.join().expect("the proxy ends");
        });
    }
}
