//! What was said and heard in a run, and what must be true of it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::actors::{Note, Question};
use crate::simulation::seeds;

/// One start of one process. Later ones of the same process are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Life {
    pub(super) process: usize,
    pub(super) boot: u64,
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.process, self.boot)
    }
}

/// What a run came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) packets: u64,
    pub(super) notes: u64,
    pub(super) answers: u64,
    pub(super) refusals: u64,
    pub(super) items: u64,
    pub(super) kills: u64,
    pub(super) cuts: u64,
    pub(super) links: u64,
}

impl seeds::Tally for Tally {
    fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.notes += other.notes;
        self.answers += other.answers;
        self.refusals += other.refusals;
        self.items += other.items;
        self.kills += other.kills;
        self.cuts += other.cuts;
        self.links += other.links;
    }
}

pub(super) struct Ledger {
    began: Instant,
    tells: bool,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    tally: Tally,
    dead: BTreeSet<Life>,
    /// By sender, its link and receiver: how many notes were put on the link, and how many came.
    notes: BTreeMap<(Life, u64, usize), (u64, u64)>,
    /// By receiver and sending process: the newest life that it has heard.
    newest: BTreeMap<(Life, usize), u64>,
    /// Whose notes over a link were heard by whom: no other life of it may hear more of them.
    heard_by: BTreeMap<(Life, u64, usize), Life>,
    questions: BTreeMap<(Life, u64), Fate>,
    /// By number: who waits for whom, in which life that was known to be.
    waits: BTreeMap<u64, (Life, Life, &'static str)>,
    waits_next: u64,
}

#[derive(Clone, Copy, Default)]
struct Fate {
    begun: bool,
    /// Its asker was told that it was not handled.
    not_handled: bool,
}

impl Ledger {
    pub(super) fn new(tells: bool) -> Self {
        Self {
            began: Instant::now(),
            tells,
            state: RefCell::default(),
        }
    }

    /// A line for whoever watches one seed.
    pub(super) fn tell(&self, what: fmt::Arguments<'_>) {
        if self.tells {
            println!("{:>9.3?} {what}", self.began.elapsed());
        }
    }

    pub(super) fn is_alive(&self, life: Life) -> bool {
        !self.state.borrow().dead.contains(&life)
    }

    pub(super) fn died(&self, life: Life) {
        self.state.borrow_mut().dead.insert(life);
    }

    /// A note was put on a link: gives its number there.
    pub(super) fn put(&self, from: Life, link: u64, to: usize) -> u64 {
        let mut state = self.state.borrow_mut();
        let (put, _) = state.notes.entry((from, link, to)).or_default();
        *put += 1;
        *put - 1
    }

    /// It was not taken after all.
    pub(super) fn take_back(&self, from: Life, link: u64, to: usize) {
        let mut state = self.state.borrow_mut();
        let (put, _) = state.notes.get_mut(&(from, link, to)).expect("it was put");
        *put -= 1;
    }

    /// A note has come: all before it on its link have, none twice, and none of an older life of its
    /// sender after one of a newer.
    pub(super) fn heard(&self, by: Life, note: &Note) {
        if !self.is_alive(by) {
            return;
        }
        let mut state = self.state.borrow_mut();
        state.tally.notes += 1;
        let key = (note.from, note.link, by.process);
        let (put, came) = state.notes.entry(key).or_default();
        assert!(
            note.number == *came && *came < *put,
            "{by} hears note {} of {} over link {} after {came} of {put}",
            note.number,
            note.from,
            note.link
        );
        *came += 1;
        let first = *state.heard_by.entry(key).or_insert(by);
        assert_eq!(first, by, "a link of {} ends in two lives", note.from);
        state.hears_of(by, note.from);
    }

    /// A question reached its actor: once, and not if its asker was told that it never would.
    pub(super) fn began(&self, by: Life, question: &Question) {
        if !self.is_alive(by) {
            return;
        }
        let mut state = self.state.borrow_mut();
        state.hears_of(by, question.from);
        let fate = state.questions.entry((question.from, question.number));
        let fate = fate.or_default();
        assert!(!fate.begun, "question {} is begun twice", question.number);
        assert!(
            !fate.not_handled,
            "question {} is begun although its asker was told that it is not handled",
            question.number
        );
        fate.begun = true;
    }

    pub(super) fn answered(&self, from: Life, number: u64) {
        let mut state = self.state.borrow_mut();
        state.tally.answers += 1;
        let begun = state
            .questions
            .get(&(from, number))
            .is_some_and(|fate| fate.begun);
        assert!(begun, "question {number} is answered, but nobody began it");
    }

    /// The asker has an error; does it say that the question was not handled?
    pub(super) fn refused(&self, from: Life, number: u64, not_handled: bool) {
        let mut state = self.state.borrow_mut();
        state.tally.refusals += 1;
        if not_handled {
            let fate = state.questions.entry((from, number)).or_default();
            assert!(
                !fate.begun,
                "question {number} was begun, and its asker is told that it was not handled"
            );
            fate.not_handled = true;
        }
    }

    pub(super) fn count(&self, count: impl FnOnce(&mut Tally)) {
        count(&mut self.state.borrow_mut().tally);
    }

    pub(super) fn tally(&self) -> Tally {
        self.state.borrow().tally
    }

    /// `who` waits for something of `whom`, which it has a link to.
    pub(super) fn waits(&self, who: Life, whom: Life, what: &'static str) -> u64 {
        let mut state = self.state.borrow_mut();
        state.waits_next += 1;
        let number = state.waits_next;
        state.waits.insert(number, (who, whom, what));
        number
    }

    pub(super) fn waits_no_more(&self, number: u64) {
        self.state.borrow_mut().waits.remove(&number);
    }

    /// What others still wait for from a life that has been over for long.
    pub(super) fn nobody_waits_for(&self, whom: Life) {
        let state = self.state.borrow();
        for (who, waited_for, what) in state.waits.values() {
            let in_vain = *waited_for == whom && !state.dead.contains(who);
            assert!(
                !in_vain,
                "{who} still waits for {what} of {whom}, long dead"
            );
        }
    }

    /// All notes that were put on this link have come.
    pub(super) fn all_came(&self, from: Life, link: u64, to: usize) {
        let state = self.state.borrow();
        if let Some((put, came)) = state.notes.get(&(from, link, to)) {
            assert_eq!(put, came, "notes of {from} over link {link} to {to}");
        }
    }
}

impl State {
    fn hears_of(&mut self, by: Life, from: Life) {
        let newest = self.newest.entry((by, from.process)).or_insert(from.boot);
        assert!(
            *newest <= from.boot,
            "{by} hears {from} after having heard boot {newest} of it"
        );
        *newest = from.boot;
    }
}
