//! How processes keep their actors, and what becomes of a process when one of them panics.
//!
//! What can be rebuilt is made anew: the node agent, whose shard process ends with it and is started
//! again, as after a kill. The scheduler and the membership hold what nobody would tell them again: the
//! clients of every answer, and which shards are there. With a fresh one the head would be alive and
//! serve nothing, so the process ends instead, before any client has seen its answer break off. Whoever
//! started the node starts it again; the shards come back, and the journal's answers go on. The shard
//! worker holds the engine's thread: its process ends, and its node starts another.
//!
//! What became of any of them is read by the [`Roll`], and an end that took the process with it is noted on
//! disk for the next one: [`EndedActors`].

mod ended_actors;

use std::path::Path;
use std::process;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use offbook_actors::Roll;
use offbook_protocol::ActorReport;
use offbook_runtime::ProcessName;
use offbook_runtime::supervise::{ChildStatus, RestartPolicy, Supervisor};

use self::ended_actors::EndedActors;

/// Who keeps the actors of a process. They end with this value.
pub(crate) struct KeptActors {
    /// Of actors that are made anew, until that happens too often.
    pub(crate) replaceable: Supervisor,
    /// Of actors that their process cannot go on without.
    pub(crate) irreplaceable: Supervisor,
    /// All of both.
    pub(crate) roll: Roll,
}

impl KeptActors {
    /// Of nobody yet, in a process of a node that keeps its state in this folder. `end` ends the process
    /// without waiting for anything: what clients are owed is on the disk already.
    pub(crate) fn new(process: &ProcessName, data: &Path, end: fn()) -> Self {
        let ended = EndedActors::of(data);
        let roll = Roll::new(process, ended.read());
        let supervisor = |policy| {
            let (supervisor, _news) = Supervisor::new(policy);
            let (ended, roll) = (ended.clone(), roll.clone());
            supervisor.on_escalation(move |status| {
                note(ended.clone(), roll.report_of(status));
                say(status);
                end();
            });
            supervisor
        };
        let replaceable = supervisor(RestartPolicy::default());
        let irreplaceable = supervisor(RestartPolicy {
            intensity: 0,
            ..RestartPolicy::default()
        });
        Self {
            roll: roll.with(irreplaceable.roster()).with(replaceable.roster()),
            replaceable,
            irreplaceable,
        }
    }
}

/// Leaves word for the next process. A disk that hangs does not keep this one alive.
fn note(ended: EndedActors, actor: ActorReport) {
    let (done, noted) = mpsc::channel();
    let noting = thread::Builder::new().spawn(move || {
        ended.note(&actor);
        // Nobody waits for it any more when it took too long.
        let _ = done.send(());
    });
    if noting.is_ok() {
        let _ = noted.recv_timeout(NOTE_MAX);
    }
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

/// A few hundred bytes take a moment.
const NOTE_MAX: Duration = Duration::from_millis(500);

/// An internal fault, by the list of `sysexits.h`: told apart from a node that refused to start.
const ENDED_BY_AN_ACTOR: i32 = 70;

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output};

    use actix::{Actor, Context, Handler, Message};
    use offbook_runtime::supervise::{ActorSpec, CallError, once};

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
            let process = ProcessName::new("node-1").unwrap();
            let end = match std::env::var_os("TEST_SHARD") {
                Some(_) => crate::shard::fail_at_once,
                None => exit,
            };
            let kept = KeptActors::new(&process, file.parent().unwrap(), end);
            if std::env::var_os("TEST_REPLACEABLE").is_some() {
                let node = kept.replaceable;
                let holder = ActorSpec::new("holder");
                let holder = node.start_actor(holder, move |_| Holder(Held(file.clone())));
                let holder = holder.unwrap();
                for _ in 0..20 {
                    let failed = holder.ask(Fail, DEADLINE).await;
                    assert!(matches!(failed, Err(CallError::Panicked(_))));
                }
            } else {
                let (node, holder) = (kept.irreplaceable, Holder(Held(file)));
                let holder = node.start_actor(ActorSpec::new("holder"), once(holder));
                let _ = holder.unwrap().ask(Fail, DEADLINE).await;
            }
            // Longer than the end takes.
            tokio::time::sleep(DEADLINE).await;
        });
    }

    fn run(file: &Path, how: Option<&str>) -> Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([
            "kept_actors::tests::child_process",
            "--exact",
            "--nocapture",
        ]);
        command.env("TEST_FILE", file);
        command.envs(how.map(|variable| (variable, "yes")));
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
    fn a_shard_that_ends_so_has_failed_and_was_not_killed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("held");
        let output = run(&file, Some("TEST_SHARD"));
        let said = String::from_utf8_lossy(&output.stderr);
        let alarm = rustix::process::Signal::ALARM.as_raw();
        assert_eq!(output.status.signal(), Some(alarm), "{said}");
        assert!(!file.exists(), "somebody has seen it end");
    }

    #[test]
    fn a_replaceable_one_is_made_anew_a_few_times() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("held");
        let output = run(&file, Some("TEST_REPLACEABLE"));
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
