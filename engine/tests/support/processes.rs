//! Ranks as processes of their own, joined by QUIC: MLX counts its tasks per process and lets none
//! begin while ten wait, so ranks that wait for each other cannot share one.
//!
//! The parent writes one command per line to every rank's standard input; what the sampling rank
//! draws comes back the same way.

use std::io::{BufRead, Write};
use std::sync::mpsc::{SyncSender, sync_channel};

use offbook_engine::{Command, Report, StepError, StepTiming, step_loop};
use offbook_protocol::{Layout, Plan, StepOutcome};

use super::ranks::{Carrier, Place, RankProcess, processes, say};
use super::{Cluster, Cue, DEADLINE, Drawn, Script};

/// Plays `cues` on processes, one per rank. `test` is the name of the test that calls this; its
/// first statement must be [`be_a_rank`].
pub(crate) fn play_apart(cluster: &Cluster, cues: Vec<Cue>, test: &str) -> Drawn {
    play_and_count(cluster, cues, test).0
}

/// The same, and what the first rank counted.
pub(crate) fn play_and_count(cluster: &Cluster, cues: Vec<Cue>, test: &str) -> (Drawn, Counted) {
    let mut ranks = start(cluster, test);
    let sampling = match cluster.layout {
        Layout::Tensor | Layout::Expert => 0,
        Layout::Pipeline => ranks.len() - 1,
    };
    let mut script = Script::new(cues);
    loop {
        for command in script.due() {
            tell(&mut ranks, &command);
        }
        if script.has_ended() {
            break;
        }
        let outcome = ranks[sampling].says("outcome");
        script.hear(serde_json::from_str(&outcome).unwrap());
    }
    let mut number = |name| ranks[0].says(name).parse().unwrap();
    let counted = Counted {
        steps: number("steps"),
        operations: number("operations"),
    };
    for rank in &mut ranks {
        let end = rank.says("end");
        // The last ranks to stop may see the first ones gone.
        assert!(end == "Shutdown" || end.contains("Collective"), "{end}");
    }
    (script.drawn, counted)
}

/// What a rank did in all.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) steps: u64,
    /// Collectives that it took part in.
    pub(crate) operations: u64,
}

/// One process per rank of `cluster`.
pub(crate) fn start(cluster: &Cluster, test: &str) -> Vec<RankProcess> {
    let job = serde_json::to_string(cluster).unwrap();
    let arguments = ["--exact", test, "--nocapture"];
    processes(cluster.weights.len(), &arguments, &[(JOB, &job)])
}

pub(crate) fn tell(ranks: &mut [RankProcess], command: &Command) {
    let line = match command {
        Command::Plan(plan) => serde_json::to_string(plan).unwrap(),
        Command::Shutdown => SHUTDOWN.to_owned(),
    };
    for rank in ranks {
        writeln!(rank.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }
}

/// In a rank's process, runs the rank and returns true; in a test's, does nothing.
pub(crate) fn be_a_rank() -> bool {
    let Some(place) = Place::of_this_process() else {
        return false;
    };
    let cluster: Cluster = serde_json::from_str(&std::env::var(JOB).unwrap()).unwrap();
    let engine = cluster.load(place.rank);
    let group = place.group(Carrier::named(&cluster.carrier), DEADLINE);
    let handle = group.handle();
    let (tx, rx) = sync_channel(64);
    std::thread::spawn(move || listen(&tx));
    let mut teller = Teller { steps: 0 };
    let end = step_loop::run(engine, group, rx, &mut teller, cluster.options());
    say("steps", teller.steps);
    say("operations", handle.operations());
    say("end", format!("{:?}", end.reason));
    true
}

fn listen(tx: &SyncSender<Command>) {
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let command = match line.as_str() {
            SHUTDOWN => Command::Shutdown,
            plan => Command::Plan(serde_json::from_str::<Plan>(plan).unwrap()),
        };
        if tx.send(command).is_err() {
            break;
        }
    }
}

/// Passes on to the parent what the loop reports.
struct Teller {
    steps: u64,
}

impl Report for &mut Teller {
    fn outcome(&mut self, outcome: StepOutcome) {
        say("outcome", serde_json::to_string(&outcome).unwrap());
    }

    fn timing(&mut self, _: StepTiming) {
        self.steps += 1;
    }

    fn failed(&mut self, error: &StepError) {
        eprintln!("{error}");
    }
}

const JOB: &str = "OFFBOOK_TEST_JOB";
const SHUTDOWN: &str = "shutdown";
