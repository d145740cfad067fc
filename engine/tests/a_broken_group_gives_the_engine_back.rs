//! A group that breaks ends the loop on every rank, at once, with an error that names the rank, and
//! without a token of the broken step. The engines then serve again in a fresh group.

mod support;

use std::io::Write;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use offbook_collectives::{CollectiveError, FastSynch, Group, GroupHandle, QuicOptions};
use offbook_engine::{
    Command, EndReason, Engine, LoopEnd, Report, StepError, StepTiming, step_loop,
};
use offbook_protocol::{Layout, Plan, PlanNumber, StepOutcome};

use support::fixture::Fixture;
use support::ranks::{Place, RankProcess, processes, say};
use support::{Cluster, DEADLINE, EPOCH};

const NAME: &str = "a_broken_group_gives_the_engine_back";
const STEPS_BEFORE_THE_END: usize = 6;

#[test]
fn a_broken_group_gives_the_engine_back() {
    if let Some(place) = Place::of_this_process() {
        return be_a_rank(&place);
    }
    let mut ranks = processes(2, &["--exact", NAME, "--nocapture"], &[]);
    assert!(ranks[1].says("error").contains("enough of this"));
    let broken = Instant::now();
    let error = ranks[0].says("error");
    assert!(error.contains("rank 0, step"), "{error}");
    assert!(error.contains("rank 1 gave the group up"), "{error}");
    assert!(broken.elapsed() < Duration::from_secs(5));

    let addresses: Vec<String> = ranks.iter_mut().map(|r| r.says("address")).collect();
    let introduce = |rank: &mut RankProcess| {
        let stdin = rank.child.stdin.as_mut().unwrap();
        writeln!(stdin, "{}", addresses.join(" ")).unwrap();
    };
    ranks.iter_mut().for_each(introduce);
    let tokens: Vec<u32> = serde_json::from_str(&ranks[0].says("tokens")).unwrap();
    assert_eq!(tokens, Fixture::open("dense-f32").tokens(0));
}

fn be_a_rank(place: &Place) {
    let fixture = Fixture::open("dense-f32");
    let cluster = Cluster::of(&fixture.model).over(Layout::Tensor, &[1.0, 1.0]);
    let run = |engine: Engine, tokens: u32, breaks_at: Option<usize>| {
        let transport = place.join_quic(QuicOptions::default());
        let group = Group::over(Box::new(transport), DEADLINE, FastSynch::Off).unwrap();
        let (tx, rx) = sync_channel(2);
        tx.send(plan(&fixture, tokens)).unwrap();
        let mut listener = Listener {
            group: group.handle(),
            tx,
            breaks_at: breaks_at.filter(|_| place.rank == 1),
            steps: 0,
            steps_max: tokens as usize,
            tokens: Vec::new(),
            failed: None,
        };
        let end = step_loop::run(engine, group, rx, &mut listener, cluster.options());
        (end, listener)
    };

    let engine = cluster.load(place.rank);
    let (end, listener) = run(engine, 900, Some(STEPS_BEFORE_THE_END));
    let LoopEnd { engine, reason } = end;
    let EndReason::Failed(error) = reason else {
        panic!("{reason:?}");
    };
    say("error", &error);
    assert_eq!(listener.failed, Some(error));
    let expected = fixture.tokens(0);
    let known = expected.len().min(listener.tokens.len());
    assert_eq!(listener.tokens[..known], expected[..known]);

    let (end, listener) = run(engine, expected.len() as u32, None);
    assert_eq!(end.reason, EndReason::Shutdown);
    say("tokens", serde_json::to_string(&listener.tokens).unwrap());
}

fn plan(fixture: &Fixture, tokens: u32) -> Command {
    let mut joins = fixture.joins();
    joins.truncate(1);
    joins[0].max_tokens = tokens;
    Command::Plan(Plan {
        epoch: EPOCH,
        number: PlanNumber(1),
        joins,
        leaves: Vec::new(),
    })
}

/// Hears of every step, and breaks the group when told to.
struct Listener {
    group: GroupHandle,
    tx: SyncSender<Command>,
    breaks_at: Option<usize>,
    steps: usize,
    steps_max: usize,
    tokens: Vec<u32>,
    failed: Option<StepError>,
}

impl Report for &mut Listener {
    fn outcome(&mut self, outcome: StepOutcome) {
        self.tokens.extend(outcome.tokens.iter().map(|t| t.token));
    }

    fn timing(&mut self, _: StepTiming) {
        self.steps += 1;
        if self.breaks_at == Some(self.steps) {
            self.group.poison(CollectiveError::Poisoned {
                why: "enough of this".into(),
            });
        }
        if self.steps == self.steps_max {
            self.tx.try_send(Command::Shutdown).unwrap();
        }
    }

    fn failed(&mut self, error: &StepError) {
        self.failed = Some(error.clone());
    }
}
