//! The actors that a process keeps, as an operator is to see them. A node tells the head of its own each
//! second, a shard of its own when it registers.
//!
//! What ended its whole process is known to the next one: that counts as a restart like any other.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use offbook_protocol::{ActorReport, DeadLetterReport};
use offbook_runtime::ProcessName;
use offbook_runtime::supervise::{ChildState, ChildStatus, Roster};

/// See the module's own words.
#[derive(Clone, Debug)]
pub struct Roll {
    process: String,
    rosters: Vec<Roster>,
    /// Those with which an earlier process of this name ended.
    earlier: Arc<[ActorReport]>,
}

impl Roll {
    /// Of nobody yet.
    pub fn new(process: &ProcessName, earlier: Vec<ActorReport>) -> Self {
        Self {
            process: process.to_string(),
            rosters: Vec::new(),
            earlier: earlier.into(),
        }
    }

    /// With the actors of this supervisor too, those that it is given later among them.
    #[must_use]
    pub fn with(mut self, supervised: Roster) -> Self {
        self.rosters.push(supervised);
        self
    }

    /// All of them, as they are now.
    pub fn report(&self) -> Vec<ActorReport> {
        let children = self.rosters.iter().flat_map(Roster::status);
        children.map(|status| self.report_of(&status)).collect()
    }

    /// One of them, of which this is known.
    pub fn report_of(&self, status: &ChildStatus) -> ActorReport {
        let now = report_of(&self.process, status);
        let earlier = self.earlier.iter().find(|actor| actor.name == now.name);
        match earlier {
            Some(earlier) => after(earlier, now),
            None => now,
        }
    }
}

fn report_of(process: &str, status: &ChildStatus) -> ActorReport {
    let last = status.last.as_ref();
    let since_1970 = last.and_then(|end| end.when.duration_since(UNIX_EPOCH).ok());
    let letter = status.dead_letters.back();
    ActorReport {
        process: process.to_owned(),
        name: status.name.clone(),
        restarts: u32::try_from(status.restarts).unwrap_or(u32::MAX),
        last_error: last.map_or_else(String::new, |end| cut(&end.exit.to_string())),
        ended_at: since_1970.map(|since| since.as_secs()),
        dead_letters: status.dead_letters_count,
        last_dead_letter: letter.map(|letter| DeadLetterReport {
            message: cut(letter.message),
            cause: cut(&letter.cause),
        }),
        given_up: status.state == ChildState::Escalated,
    }
}

/// What is known of an actor with which an earlier process ended.
fn after(earlier: &ActorReport, now: ActorReport) -> ActorReport {
    let ended = match now.last_error.is_empty() {
        true => earlier,
        false => &now,
    };
    ActorReport {
        restarts: (earlier.restarts.saturating_add(1)).saturating_add(now.restarts),
        last_error: ended.last_error.clone(),
        ended_at: ended.ended_at,
        given_up: ended.given_up,
        dead_letters: earlier.dead_letters.saturating_add(now.dead_letters),
        last_dead_letter: (now.last_dead_letter).or_else(|| earlier.last_dead_letter.clone()),
        process: now.process,
        name: now.name,
    }
}

/// As much as an operator reads: it travels each second.
fn cut(words: &str) -> String {
    words.chars().take(WORDS_CHARS_MAX).collect()
}

const WORDS_CHARS_MAX: usize = 300;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use actix::{Actor, Context, Handler, Message};
    use offbook_runtime::supervise::{ActorSpec, CallError, RestartPolicy, Supervisor};

    use super::*;

    struct Frail;

    impl Actor for Frail {
        type Context = Context<Self>;
    }

    #[derive(Message)]
    #[rtype(result = "()")]
    struct Poison(&'static str);

    impl Handler<Poison> for Frail {
        type Result = ();

        fn handle(&mut self, poison: Poison, _: &mut Context<Self>) {
            panic!("{} and no more", poison.0);
        }
    }

    fn roll(earlier: Vec<ActorReport>) -> Roll {
        Roll::new(&ProcessName::new("node-1").unwrap(), earlier)
    }

    fn supervisor(intensity: u32) -> Supervisor {
        let policy = RestartPolicy {
            intensity,
            backoff_min: Duration::ZERO,
            ..RestartPolicy::default()
        };
        Supervisor::new(policy).0
    }

    /// What is said of an actor that was poisoned so often, once that is `wanted`.
    async fn poisoned(
        times: u32,
        (by, roll): (&Supervisor, &Roll),
        wanted: impl Fn(&ActorReport) -> bool,
    ) -> ActorReport {
        let frail = by.start_actor(ActorSpec::new("frail"), |_| Frail).unwrap();
        for _ in 0..times {
            let failed = frail.ask(Poison("so far"), DEADLINE).await;
            assert!(matches!(failed, Err(CallError::Panicked(_))));
        }
        let counted = async {
            loop {
                let mut said = roll.report();
                assert_eq!(said.len(), 1);
                // Its keeper may not have noted its end yet.
                if wanted(&said[0]) {
                    return said.remove(0);
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, counted).await.unwrap()
    }

    #[actix::test]
    async fn whoever_was_made_anew_is_told_of_with_the_cause() {
        let by = supervisor(5);
        let roll = roll(Vec::new()).with(by.roster());
        let said = poisoned(2, (&by, &roll), |said| said.restarts == 2).await;
        assert!(said.ended_at.is_some());
        let expected = ActorReport {
            process: "node-1".into(),
            name: "frail".into(),
            restarts: 2,
            last_error: "panic: so far and no more".into(),
            ended_at: said.ended_at,
            dead_letters: 2,
            last_dead_letter: Some(DeadLetterReport {
                message: std::any::type_name::<Poison>().into(),
                cause: "so far and no more".into(),
            }),
            given_up: false,
        };
        assert_eq!(said, expected);
    }

    #[actix::test]
    async fn the_end_of_a_process_is_a_restart_of_whoever_it_ended_with() {
        let by = supervisor(0);
        let first = roll(Vec::new()).with(by.roster());
        let fatal = poisoned(1, (&by, &first), |said| said.given_up).await;
        assert_eq!((fatal.restarts, fatal.dead_letters), (0, 1));
        // The next process of that name.
        let by = supervisor(1);
        let next = roll(vec![fatal.clone()]).with(by.roster());
        let fresh = poisoned(0, (&by, &next), |_| true).await;
        let restarted = ActorReport {
            restarts: 1,
            ..fatal
        };
        assert_eq!(fresh, restarted);
        by.stop_child("frail", DEADLINE).await.unwrap();
        let late = poisoned(1, (&by, &next), |said| said.restarts == 2).await;
        assert_eq!(late.dead_letters, 2);
        assert!(!late.given_up, "its process goes on");
    }

    const DEADLINE: Duration = Duration::from_secs(20);
}
