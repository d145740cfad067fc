//! Who waits how long: the bounds of the queue, whose turn it is, and what a client that is refused is
//! told to wait. Pure, without IO or clock.
//!
//! What was begun goes on first. Among the others the lowest priority number is next; among equals, the
//! client that was served least (its *account*, in tokens); for one client, the first that came. So
//! nobody waits behind all requests of somebody else, however many these are. Who comes, or comes back,
//! begins with the least account of those that are there: nobody saves up turns.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use offbook_protocol::{ClientId, Rejection, Request, SequenceId};

use super::journal::{Entry, Journal};

/// The accounts and the pace of those in a [`Journal`].
#[derive(Debug)]
pub(super) struct Queue {
    requests_max: u32,
    tokens_max: u64,
    /// What was done for each client that is there.
    accounts: BTreeMap<ClientId, u64>,
    /// Seconds from step to step, lately.
    step: Option<f64>,
    /// Tokens of an answer, lately.
    answer: Option<f64>,
}

/// What waits, or a client's part of it.
#[derive(Clone, Copy, Debug, Default)]
struct Waiting {
    requests: u32,
    tokens: u64,
}

impl Queue {
    pub(super) fn new(requests_max: u32, tokens_max: u64) -> Self {
        Self {
            requests_max,
            tokens_max,
            accounts: BTreeMap::new(),
            step: None,
            answer: None,
        }
    }

    /// Whether the request may wait. `places` is how many sequences run at the same time at most.
    ///
    /// A client may hold [`SHARE`] times of what is left free: one alone can take three quarters of
    /// the queue, a second one three quarters of the rest, and there is room for whoever comes next.
    /// An answer that was begun is let in: it had its place before.
    ///
    /// # Errors
    /// That the queue is full, or the client's part of it.
    pub(super) fn check<C>(
        &self,
        request: &Request,
        journal: &Journal<C>,
        places: u32,
    ) -> Result<(), Rejection> {
        if !request.delivered.is_empty() {
            return Ok(());
        }
        let mut all = Waiting::default();
        let mut own = Waiting::default();
        for (_, entry) in journal.waiting().filter(|(_, entry)| entry.is_new()) {
            all.add(&entry.request);
            if entry.request.client == request.client {
                own.add(&entry.request);
            }
        }
        let free_requests = self.requests_max.saturating_sub(all.requests);
        let free_tokens = self.tokens_max.saturating_sub(all.tokens);
        let fits = all.requests == 0 || cost_max(request) <= free_tokens;
        if free_requests == 0 || !fits {
            return Err(Rejection::Overloaded {
                queued: all.requests,
                tokens: all.tokens,
                retry_after_seconds: self.retry_after_seconds(journal, 1),
            });
        }
        let has_room = u64::from(own.requests) < SHARE * u64::from(free_requests)
            && (own.requests == 0 || own.tokens < SHARE * free_tokens);
        if has_room {
            return Ok(());
        }
        // Its next turn comes when each other client has had one.
        let turns = self.accounts.len() as u32;
        Err(Rejection::ShareUsed {
            queued: own.requests,
            retry_after_seconds: self.retry_after_seconds(journal, turns.div_ceil(places)),
        })
    }

    /// How many requests of one client [`Queue::check`] lets in where nobody else waits.
    pub(super) fn client_requests_max(requests_max: u32) -> u32 {
        let share = u64::from(requests_max) * SHARE;
        // Not more than it was given.
        share.div_ceil(SHARE + 1) as u32
    }

    /// A request of this client is about to enter the journal.
    pub(super) fn arrive<C>(&mut self, client: ClientId, journal: &Journal<C>) {
        self.forget(journal);
        let least = self.accounts.values().min().copied().unwrap_or_default();
        self.accounts.entry(client).or_insert(least);
    }

    /// Drops the accounts of clients that have no request any more.
    pub(super) fn forget<C>(&mut self, journal: &Journal<C>) {
        self.accounts.retain(|client, _| {
            journal
                .entries()
                .any(|entry| entry.request.client == *client)
        });
    }

    /// Whose turn it is.
    pub(super) fn next<'a, C>(
        &self,
        journal: &'a Journal<C>,
    ) -> Option<(SequenceId, &'a Entry<C>)> {
        journal.waiting().min_by_key(|(sequence, entry)| {
            if !entry.is_new() {
                return (Reverse(true), 0, 0, *sequence);
            }
            let account = self.accounts.get(&entry.request.client);
            let account = account.copied().unwrap_or_default();
            (Reverse(false), entry.request.priority, account, *sequence)
        })
    }

    /// The shards are about to begin with this request. Whoever goes on has paid.
    pub(super) fn join<C>(&mut self, journal: &Journal<C>, sequence: SequenceId) {
        let Some(entry) = journal.get(sequence).filter(|entry| entry.is_new()) else {
            return;
        };
        let prompt = u64::from(entry.positions());
        self.charge(entry.request.client, prompt);
    }

    /// The shards have drawn a token of this request.
    pub(super) fn note<C>(&mut self, journal: &Journal<C>, sequence: SequenceId) {
        if let Some(entry) = journal.get(sequence) {
            self.charge(entry.request.client, ANSWER_TOKEN);
        }
    }

    fn charge(&mut self, client: ClientId, tokens: u64) {
        let account = self.accounts.entry(client).or_default();
        *account = account.saturating_add(tokens);
    }

    /// From one step to the next it took so long.
    pub(super) fn note_step(&mut self, took: Duration) {
        blend(&mut self.step, took.as_secs_f64());
    }

    /// An answer was complete with so many tokens.
    pub(super) fn note_answer(&mut self, tokens: u32) {
        blend(&mut self.answer, f64::from(tokens));
    }

    /// When so many more have come to their turn: what is left of the answer that ends first, and the
    /// time of whole answers for the turns after it. Answers are taken to have the length that answers
    /// had lately, or that was asked for where that is less.
    pub(super) fn retry_after_seconds<C>(&self, journal: &Journal<C>, turns: u32) -> u32 {
        let Some(step) = self.step else {
            return RETRY_SECONDS_MIN;
        };
        let usual = self.answer.unwrap_or(f64::INFINITY);
        let left = journal.running().map(|entry| {
            let had = f64::from(entry.delivered());
            let most = f64::from(entry.request.max_tokens) - had;
            // One that is longer than usual already may end with every token.
            most.min((usual - had).max(1.0))
        });
        let first = left.fold(f64::INFINITY, f64::min);
        if first.is_infinite() {
            return RETRY_SECONDS_MIN;
        }
        let whole = if usual.is_finite() { usual } else { first };
        let further = whole * f64::from(turns.saturating_sub(1));
        // Casts saturate.
        let seconds = (step * (first + further)).ceil() as u32;
        seconds.clamp(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
    }
}

impl Waiting {
    fn add(&mut self, request: &Request) {
        self.requests += 1;
        self.tokens = self.tokens.saturating_add(cost_max(request));
    }
}

/// Tokens that the request has and may get.
fn cost_max(request: &Request) -> u64 {
    request.prompt.len() as u64 + u64::from(request.max_tokens)
}

/// A mean in which the last few count most.
fn blend(mean: &mut Option<f64>, new: f64) {
    *mean = Some(mean.map_or(new, |mean| mean + (new - mean) * NEWS));
}

/// How many times the free part of the queue a client may hold.
const SHARE: u64 = 3;
/// A token that is generated takes a step, one that is read a part of it.
const ANSWER_TOKEN: u64 = 2;
/// Of a new value in a mean.
const NEWS: f64 = 0.1;
const RETRY_SECONDS_MIN: u32 = 1;
/// Whoever waits longer than this should ask again to see how things are.
const RETRY_SECONDS_MAX: u32 = 300;

#[cfg(test)]
mod tests;
