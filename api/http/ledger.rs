//! What became of the answers that this process was asked for last, by the names that their clients
//! know: whoever asks for one that cannot be read again is told why.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The last answers, the newest last.
#[derive(Default)]
pub(super) struct Ledger {
    entries: Mutex<VecDeque<Arc<Entry>>>,
}

struct Entry {
    names: Vec<String>,
    standing: AtomicU8,
}

/// What became of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Standing {
    UnderWay,
    Complete,
    Failed,
    /// Its client left before its end, and that cancelled the request.
    Cancelled,
}

impl Standing {
    /// Why the answer cannot be read.
    pub(super) fn why(self) -> &'static str {
        match self {
            Self::UnderWay => {
                "it is being written to the connection that asked for it, and can be read elsewhere \
                 only after this node has died"
            }
            Self::Complete => "it was written to its end to the connection that asked for it",
            Self::Failed => "it ended in an error, of which its client was told",
            Self::Cancelled => {
                "its client's connection ended before the answer did, and that cancels a request: \
                 ask again"
            }
        }
    }

    /// For programs.
    pub(super) fn code(self) -> &'static str {
        match self {
            Self::UnderWay => "answer_under_way",
            Self::Complete => "answer_complete",
            Self::Failed => "answer_failed",
            Self::Cancelled => "request_cancelled",
        }
    }

    fn of(number: u8) -> Self {
        let all = [Self::UnderWay, Self::Complete, Self::Failed];
        let known = all.into_iter().find(|one| *one as u8 == number);
        known.unwrap_or(Self::Cancelled)
    }
}

impl Ledger {
    /// Notes an answer that begins. The oldest one is forgotten when there are too many.
    pub(super) fn begin(&self, names: Vec<String>) -> Listing {
        let standing = AtomicU8::new(Standing::UnderWay as u8);
        let entry = Arc::new(Entry { names, standing });
        let mut entries = self.lock();
        if entries.len() == ENTRIES_MAX {
            entries.pop_front();
        }
        entries.push_back(Arc::clone(&entry));
        Listing(entry)
    }

    /// What became of the newest answer of this name.
    pub(super) fn standing(&self, name: &str) -> Option<Standing> {
        let entries = self.lock();
        let mut newest_first = entries.iter().rev();
        let entry = newest_first.find(|entry| entry.names.iter().any(|known| known == name))?;
        Some(Standing::of(entry.standing.load(Ordering::Relaxed)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An answer under way. Dropped before its end, it counts as cancelled.
pub(super) struct Listing(Arc<Entry>);

impl Listing {
    pub(super) fn end(&self, standing: Standing) {
        self.0.standing.store(standing as u8, Ordering::Relaxed);
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        let standing = &self.0.standing;
        let (from, to) = (Standing::UnderWay as u8, Standing::Cancelled as u8);
        let _ = standing.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// A client that lost its connection asks soon; a few hundred bytes each.
const ENTRIES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_found_by_each_of_its_names_with_what_became_of_it() {
        let ledger = Ledger::default();
        let names = |number| vec![format!("id-{number}"), "mine".to_owned()];
        let first = ledger.begin(names(1));
        assert_eq!(ledger.standing("id-1"), Some(Standing::UnderWay));
        first.end(Standing::Complete);
        drop(first);
        assert_eq!(ledger.standing("mine"), Some(Standing::Complete));
        drop(ledger.begin(names(2)));
        assert_eq!(ledger.standing("id-2"), Some(Standing::Cancelled));
        assert_eq!(ledger.standing("mine"), Some(Standing::Cancelled), "newest");
        assert_eq!(ledger.standing("id-1"), Some(Standing::Complete));
        ledger.begin(names(3)).end(Standing::Failed);
        assert_eq!(ledger.standing("id-3"), Some(Standing::Failed));
        assert_eq!(ledger.standing("nobody"), None);
    }

    #[test]
    fn the_oldest_is_forgotten() {
        let ledger = Ledger::default();
        for number in 0..=ENTRIES_MAX {
            drop(ledger.begin(vec![number.to_string()]));
        }
        assert_eq!(ledger.standing("0"), None);
        assert_eq!(ledger.standing("1"), Some(Standing::Cancelled));
        assert_eq!(ledger.lock().len(), ENTRIES_MAX);
    }
}
