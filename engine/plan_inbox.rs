//! Plans that came and have not taken effect: which one is next, and up to which one to apply. Pure,
//! so that what ranks agree on is decided without waiting for anything.

use std::collections::VecDeque;

use offbook_protocol::{Epoch, Plan, PlanNumber};

/// The plans of one epoch on one rank. They come without gaps.
#[derive(Debug)]
pub struct PlanInbox {
    /// Plans of other epochs are passed over.
    epoch: Epoch,
    waiting: VecDeque<Plan>,
    applied: PlanNumber,
    received: PlanNumber,
}

impl PlanInbox {
    /// An inbox that nothing has come to.
    pub fn new(epoch: Epoch) -> Self {
        Self {
            epoch,
            waiting: VecDeque::new(),
            applied: PlanNumber(0),
            received: PlanNumber(0),
        }
    }

    /// Takes a plan that came.
    ///
    /// # Errors
    /// When it is not the next one of its epoch: one was lost on its way.
    pub fn take(&mut self, plan: Plan) -> Result<(), PlanGap> {
        if plan.epoch != self.epoch {
            tracing::debug!(epoch = %plan.epoch, "a plan of another epoch was passed over");
            return Ok(());
        }
        let expected = self.received.next();
        if plan.number != expected {
            let came = plan.number;
            return Err(PlanGap { expected, came });
        }
        self.received = plan.number;
        self.waiting.push_back(plan);
        Ok(())
    }

    /// The next plan, which takes effect now.
    pub fn next_plan(&mut self) -> Option<Plan> {
        let plan = self.waiting.pop_front()?;
        self.applied = plan.number;
        Some(plan)
    }

    /// What the sampling rank says of itself in the message of a step: the low 32 bits of the highest
    /// number that came.
    pub fn control_word(&self) -> u32 {
        self.received.0 as u32
    }

    /// Up to which plan to apply after a step with this control word, or without one: never below what
    /// is applied.
    pub fn upto(&self, control_word: Option<u32>) -> PlanNumber {
        let Some(word) = control_word else {
            return self.received;
        };
        let ahead = word.wrapping_sub(self.applied.0 as u32);
        PlanNumber(self.applied.0 + u64::from(ahead))
    }

    /// The plan that took effect last.
    pub fn applied(&self) -> PlanNumber {
        self.applied
    }

    /// How many plans came and have not taken effect.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

/// A plan is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanGap {
    pub expected: PlanNumber,
    pub came: PlanNumber,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(epoch: u64, number: u64) -> Plan {
        Plan {
            epoch: Epoch(epoch),
            number: PlanNumber(number),
            joins: Vec::new(),
            leaves: Vec::new(),
        }
    }

    #[test]
    fn a_plan_takes_effect_when_the_sampling_rank_names_it() {
        let (mut sampling, mut late) = (PlanInbox::new(Epoch(3)), PlanInbox::new(Epoch(3)));
        sampling.take(plan(3, 1)).unwrap();
        sampling.take(plan(3, 2)).unwrap();
        late.take(plan(3, 1)).unwrap();
        let word = sampling.control_word();
        assert_eq!(late.upto(Some(word)), PlanNumber(2));
        assert_eq!(
            late.next_plan().map(|plan| plan.number),
            Some(PlanNumber(1))
        );
        assert_eq!(late.upto(Some(word)), PlanNumber(2));
        assert!(late.next_plan().is_none(), "it is still on its way");
        assert_eq!(late.upto(None), PlanNumber(1));
    }

    #[test]
    fn another_epochs_plan_is_passed_over_and_a_gap_is_an_error() {
        let mut inbox = PlanInbox::new(Epoch(3));
        inbox.take(plan(2, 1)).unwrap();
        assert_eq!((inbox.waiting(), inbox.applied()), (0, PlanNumber(0)));
        let gap = inbox.take(plan(3, 2)).unwrap_err();
        assert_eq!((gap.expected, gap.came), (PlanNumber(1), PlanNumber(2)));
    }
}
