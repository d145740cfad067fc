//! A sequence that is told to leave gives its blocks back on every rank as soon as the plan holds: with
//! the message of the first step that is built after the plan came. Its memory is free one step later.

mod support;

use std::sync::mpsc::{SyncSender, sync_channel};

use offbook_collectives::Group;
use offbook_engine::batch::KV_BLOCK_TOKENS;
use offbook_engine::memory::DeviceMemory;
use offbook_engine::{Command, EndReason, Report, StepError, StepTiming, step_loop};
use offbook_protocol::{Layout, Plan, PlanNumber, Sampling, SequenceId, StepOutcome};

use support::fixture::Fixture;
use support::ranks::{Carrier, Place, processes, say};
use support::{Cluster, DEADLINE, EPOCH, join};

/// Steps before the plan comes, and after it.
const BEFORE: u64 = 6;
const AFTER: u64 = 6;
/// Of who leaves: so long that two blocks hold it.
const PROMPT_TOKENS: u32 = 300;

#[test]
fn on_one_rank() {
    for prefix_cache in [true, false] {
        let fixture = Fixture::open("dense-f32");
        let cluster = Cluster {
            prefix_cache,
            ..Cluster::of(&fixture.model)
        };
        let (tx, rx) = sync_channel(8);
        let mut watch = Watch::of(tx, true);
        watch.send(1);
        let end = step_loop::run(
            cluster.load(0),
            Group::solo(),
            rx,
            &mut watch,
            cluster.options(),
        );
        assert_eq!(end.reason, EndReason::Shutdown);
        // The step that was on its way when the plan came, and none more.
        assert_eq!(watch.freed_after(), 1);
        let retained = watch.seen.last().unwrap().kv.retained_tokens;
        assert_eq!(retained > 0, prefix_cache, "{retained}");
        if !prefix_cache {
            // The step that was built before still reads the cache.
            let freed = watch.freed_at() as usize;
            let [held, free] = [freed - 1, freed + 1].map(|step| watch.seen[step].active_bytes);
            let cache = 2 * KV_BLOCK_TOKENS as u64 * POSITION_BYTES;
            assert!(free + cache * 9 / 10 < held, "{held} bytes, then {free}");
        }
    }
}

#[test]
fn on_every_rank_of_a_tensor_layout() {
    apart(Layout::Tensor, "on_every_rank_of_a_tensor_layout", 2);
}

#[test]
fn on_every_stage_of_a_pipeline() {
    // Each of two lanes has a step on its way, and one waits.
    apart(Layout::Pipeline, "on_every_stage_of_a_pipeline", 3);
}

/// Two ranks, both of which free the blocks after the same step: the first one that was built when the
/// plan had come, so many after the one that was read then.
fn apart(layout: Layout, test: &str, steps: u64) {
    let fixture = Fixture::open("dense-f32");
    let cluster = Cluster::of(&fixture.model).over(layout, &[1.0, 1.0]);
    if let Some(place) = Place::of_this_process() {
        return be_a_rank(&cluster, &place, layout);
    }
    let mut ranks = processes(2, &["--exact", test, "--nocapture"], &[]);
    let after: Vec<u64> = ranks
        .iter_mut()
        .map(|rank| rank.says("freed after").parse().unwrap())
        .collect();
    assert_eq!(after, [steps, steps], "{layout:?}");
}

fn be_a_rank(cluster: &Cluster, place: &Place, layout: Layout) {
    let samples = match layout {
        Layout::Tensor | Layout::Expert => place.rank == 0,
        Layout::Pipeline => place.rank == 1,
    };
    let group = place.group(Carrier::Quic, DEADLINE);
    let (tx, rx) = sync_channel(8);
    let mut watch = Watch::of(tx, samples);
    watch.send(1);
    if !samples {
        // It has the plan early, which changes nothing: the sampling rank decides.
        watch.send(2);
    }
    step_loop::run(
        cluster.load(place.rank),
        group,
        rx,
        &mut watch,
        cluster.options(),
    );
    say("freed after", watch.freed_after());
}

/// Sends the plan in which the first sequence leaves, and sees what the caches hold after each step.
struct Watch {
    tx: SyncSender<Command>,
    samples: bool,
    seen: Vec<Seen>,
}

struct Seen {
    kv: offbook_engine::batch::KvUse,
    active_bytes: u64,
}

impl Watch {
    fn of(tx: SyncSender<Command>, samples: bool) -> Self {
        let seen = Vec::new();
        Self { tx, samples, seen }
    }

    fn send(&self, number: u64) {
        let prompt: Vec<u32> = (0..PROMPT_TOKENS).map(|n| n % 90 + 5).collect();
        let (joins, leaves) = match number {
            1 => (
                vec![
                    join(1, &prompt, 200, Sampling::greedy()),
                    join(2, &[7, 8, 9], 200, Sampling::greedy()),
                ],
                Vec::new(),
            ),
            _ => (Vec::new(), vec![SequenceId(1)]),
        };
        let plan = Plan {
            epoch: EPOCH,
            number: PlanNumber(number),
            joins,
            leaves,
        };
        self.tx.try_send(Command::Plan(plan)).unwrap();
    }

    /// The first step after which only the other sequence holds anything.
    fn freed_at(&self) -> u64 {
        let alone = |seen: &Seen| seen.kv.held_tokens == KV_BLOCK_TOKENS as u64;
        self.seen.iter().position(alone).expect("it is freed") as u64
    }

    /// How many steps after the one at whose end the plan came.
    fn freed_after(&self) -> u64 {
        self.freed_at() - BEFORE
    }
}

impl Report for &mut Watch {
    fn outcome(&mut self, _: StepOutcome) {}

    fn timing(&mut self, timing: StepTiming) {
        assert_eq!(timing.step.0, self.seen.len() as u64);
        self.seen.push(Seen {
            kv: timing.kv,
            active_bytes: DeviceMemory::read().unwrap().active_bytes,
        });
        if timing.step.0 == BEFORE && self.samples {
            self.send(2);
        }
        if timing.step.0 == BEFORE + AFTER {
            self.tx.try_send(Command::Shutdown).unwrap();
        }
    }

    fn failed(&mut self, error: &StepError) {
        eprintln!("{error}");
    }
}

/// Two layers, keys and values, three heads of twelve numbers in 32 bits.
const POSITION_BYTES: u64 = 2 * 2 * 3 * 12 * 4;
