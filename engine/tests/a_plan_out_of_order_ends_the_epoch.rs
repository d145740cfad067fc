//! Ranks that miss a plan would build different steps: better none. Plans of another epoch are
//! nobody's, and do no harm.

mod support;

use std::sync::mpsc::sync_channel;

use offbook_collectives::Group;
use offbook_engine::{Command, EndReason, Report, StepError, StepTiming, step_loop};
use offbook_protocol::{Epoch, Plan, PlanNumber, StepOutcome};

use support::fixture::Fixture;
use support::{Cluster, EPOCH};

fn end_after(plans: &[(Epoch, u64)]) -> EndReason {
    let fixture = Fixture::open("dense-f32");
    let cluster = Cluster::of(&fixture.model);
    let (tx, rx) = sync_channel(8);
    for &(epoch, number) in plans {
        tx.send(Command::Plan(Plan {
            epoch,
            number: PlanNumber(number),
            joins: Vec::new(),
            leaves: Vec::new(),
        }))
        .unwrap();
    }
    drop(tx);
    let engine = cluster.load(0);
    step_loop::run(engine, Group::solo(), rx, Nobody, cluster.options()).reason
}

#[test]
fn a_gap_is_an_error() {
    let expected = StepError::PlanOrder {
        expected: PlanNumber(2),
        came: PlanNumber(3),
    };
    assert_eq!(
        end_after(&[(EPOCH, 1), (EPOCH, 3)]),
        EndReason::Failed(expected)
    );
}

#[test]
fn another_epoch_is_passed_over() {
    let plans = [(EPOCH, 1), (Epoch(EPOCH.0 - 1), 7), (EPOCH, 2)];
    assert_eq!(end_after(&plans), EndReason::Shutdown);
}

struct Nobody;

impl Report for Nobody {
    fn outcome(&mut self, _: StepOutcome) {}
    fn timing(&mut self, _: StepTiming) {}
    fn failed(&mut self, _: &StepError) {}
}
