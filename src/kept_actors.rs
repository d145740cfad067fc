//! How processes keep their actors, and what becomes of a process when one of them panics.
//!
//! What can be rebuilt is made anew: the node agent, whose shard process ends with it and is started
//! again, as after a kill. The scheduler and the membership hold what nobody would tell them again: the
//! clients of every answer, and which shards are there. With a fresh one the head would be alive and
//! serve nothing, so the process ends instead, before any client has seen its answer break off. Whoever
//! started the node starts it again; the shards come back, and the journal's answers go on. The shard
//! worker holds the engine's thread: its process ends, and its node starts another.

use std::process;

use actix::Actor;
use offbook_runtime::supervise::{ActorRef, ChildStatus, RestartPolicy, Supervisor};

/// A supervisor of actors that are made anew, until that happens too often.
pub(crate) fn replaceable(end: fn()) -> Supervisor {
    supervisor(RestartPolicy::default(), end)
}

/// A supervisor of actors that their process cannot go on without.
pub(crate) fn irreplaceable(end: fn()) -> Supervisor {
    let policy = RestartPolicy {
        intensity: 0,
        ..RestartPolicy::default()
    };
    supervisor(policy, end)
}

/// `end` ends this process without waiting for anything: what clients are owed is on the disk already.
fn supervisor(policy: RestartPolicy, end: fn()) -> Supervisor {
    let (supervisor, _news) = Supervisor::new(policy);
    supervisor.on_escalation(move |status| {
        say(status);
        end();
    });
    supervisor
}

/// The last line of the process, which whoever supervises it shows.
fn say(status: &ChildStatus) {
    let name = &status.name;
    let why = status.last.as_ref().map(|last| last.exit.to_string());
    let why = why.unwrap_or_default();
    eprintln!("offbook: the {name} has ended ({why}), and this process cannot go on without it");
}

/// Ends a process that holds nothing which must not be torn down.
pub(crate) fn exit() {
    process::exit(ENDED_BY_AN_ACTOR);
}

/// What makes an actor that is never restarted: it was made before.
pub(crate) fn once<A: Actor>(actor: A) -> impl FnMut(&ActorRef<A>) -> A {
    let mut actor = Some(actor);
    move |_| {
        let made = actor.take();
        made.expect("an actor that is not restarted is started once")
    }
}

/// An internal fault, by the list of `sysexits.h`: told apart from a node that refused to start.
const ENDED_BY_AN_ACTOR: i32 = 70;

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output};
    use std::time::Duration;

    use actix::{Context, Handler, Message};
    use offbook_runtime::supervise::{ActorSpec, CallError};

    use super::*;

    /// Holds something that a client would see dropped.
    struct Holder(#[expect(dead_code, reason = "it is held")] Held);

    struct Held(PathBuf);

    impl Drop for Held {
        fn drop(&mut self) {
            std::fs::write(&self.0, "dropped").unwrap();
        }
    }

    impl Actor for Holder {
        type Context = Context<Self>;
    }

    #[derive(Message)]
    #[rtype(result = "()")]
    struct Fail;

    impl Handler<Fail> for Holder {
        type Result = ();

        fn handle(&mut self, _: Fail, _: &mut Context<Self>) {
            panic!("a fault of ours");
        }
    }

    /// The process of the tests below, when they start this binary anew.
    #[test]
    fn child_process() {
        let Some(file) = std::env::var_os("TEST_FILE") else {
            return;
        };
        let file = PathBuf::from(file);
        actix::System::new().block_on(async move {
            if std::env::var_os("TEST_REPLACEABLE").is_some() {
                let node = replaceable(exit);
                let holder = ActorSpec::new("holder");
                let holder = node.start_actor(holder, move |_| Holder(Held(file.clone())));
                let holder = holder.unwrap();
                for _ in 0..20 {
                    let failed = holder.ask(Fail, DEADLINE).await;
                    assert!(matches!(failed, Err(CallError::Panicked(_))));
                }
            } else {
                let (node, holder) = (irreplaceable(exit), Holder(Held(file)));
                let holder = node.start_actor(ActorSpec::new("holder"), once(holder));
                let _ = holder.unwrap().ask(Fail, DEADLINE).await;
            }
            // Longer than the end takes.
            tokio::time::sleep(DEADLINE).await;
        });
    }

    fn run(file: &Path, replaceable: Option<&str>) -> Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([
            "kept_actors::tests::child_process",
            "--exact",
            "--nocapture",
        ]);
        command.env("TEST_FILE", file);
        command.envs(replaceable.map(|value| ("TEST_REPLACEABLE", value)));
        command.output().unwrap()
    }

    #[test]
    fn a_process_ends_at_once_when_an_irreplaceable_actor_panics() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("held");
        let output = run(&file, None);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(ENDED_BY_AN_ACTOR), "{said}");
        let words = "the holder has ended (panic: a fault of ours)";
        assert!(said.contains(words), "{said}");
        assert!(!file.exists(), "somebody has seen it end");
    }

    #[test]
    fn a_replaceable_one_is_made_anew_a_few_times() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("held");
        let output = run(&file, Some("yes"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(ENDED_BY_AN_ACTOR), "{said}");
        let failures = said.matches("a fault of ours").count();
        // Each panic says so once, and the last word repeats it.
        assert_eq!(
            failures as u32,
            RestartPolicy::default().intensity + 2,
            "{said}"
        );
        assert!(file.exists(), "its state was never made anew");
    }

    /// More than the pauses before a few restarts take together.
    const DEADLINE: Duration = Duration::from_secs(20);
}
