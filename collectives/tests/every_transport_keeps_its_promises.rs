//! What every transport promises, asked of each of them, one process per rank: the right bits, the
//! same on all ranks; an error in time that names the rank when one is late or dies; and that one
//! who gives up is heard by all. Of MLX's ring only the values are asked: it promises no more.

mod support;

use std::time::{Duration, Instant};

use mlx_rs::ops::ones;
use offbook_collectives::{
    CollectiveError, Exchange, FastSynch, Group, SharedMemory, SharedMemoryOptions, Transport,
    Wait,
    conformance::{ConformanceError, Exactness, verify},
};
use rustix::process::Signal;

use support::{
    Carrier, PATIENCE, Place, RankProcess, listen, on_threads, processes, say, shared_memory,
};

/// Elements of up to four bytes: none, one, odd, 6 KiB of f32, 1 MiB and more than any channel.
const SIZES: [usize; 6] = [0, 1, 1237, 1536, 1 << 18, 1 << 20];
const DEADLINE: Duration = Duration::from_secs(1);
/// What a deadline may be exceeded by, by promise.
const GRACE: Duration = Duration::from_millis(100);

macro_rules! promises {
    ($($module:ident: $carrier:expr, [$($promise:ident),+];)+) => {
        $(mod $module {
            use super::*;

            $(#[test]
            fn $promise() {
                let name = concat!(stringify!($module), "::", stringify!($promise));
                super::$promise(name, $carrier);
            })+
        })+
    };
}

promises! {
    quic: Carrier::Quic, [
        all_get_the_same_right_bits, a_stopped_rank_is_named_in_time,
        a_killed_rank_is_lost_at_once, who_gives_up_is_heard_by_all];
    shared_memory: Carrier::SharedMemory, [
        all_get_the_same_right_bits, a_stopped_rank_is_named_in_time,
        a_killed_rank_is_lost_at_once, who_gives_up_is_heard_by_all];
    narrow_memory: Carrier::NarrowMemory, [
        all_get_the_same_right_bits, a_stopped_rank_is_named_in_time,
        a_killed_rank_is_lost_at_once, who_gives_up_is_heard_by_all];
    ring: Carrier::Ring, [all_get_the_right_values];
}

fn all_get_the_same_right_bits(name: &str, carrier: Carrier) {
    if let Some(place) = Place::of_this_process() {
        return verify_as_rank(&place, Exactness::Bits, &SIZES);
    }
    for size in [2, 3, 5] {
        assert_alike(&mut start(name, carrier, size));
    }
}

fn all_get_the_right_values(name: &str, carrier: Carrier) {
    if let Some(place) = Place::of_this_process() {
        return verify_as_rank(&place, Exactness::Rounding, &SIZES[1..4]);
    }
    assert_alike(&mut start(name, carrier, 3));
}

fn verify_as_rank(place: &Place, exactness: Exactness, sizes: &[usize]) {
    let group = place.group(carrier(), PATIENCE);
    let outcome = verify(&group, sizes, exactness);
    // Of MLX's own transports nothing is counted.
    let counted = group.handle().operations() > 0 && group.handle().waited() > Duration::ZERO;
    assert_eq!(counted, exactness == Exactness::Bits);
    match outcome {
        Ok(verified) => say("verified", format!("{verified:?}")),
        Err(why) => say("verified", format!("not: {why}")),
    }
    // Not to leave while another still needs us.
    listen();
}

fn assert_alike(ranks: &mut [RankProcess]) {
    let said: Vec<_> = ranks.iter_mut().map(|rank| rank.says("verified")).collect();
    assert!(said[0].starts_with("Verified"), "{}", said[0]);
    assert!(
        digests(&said).windows(2).all(|two| two[0] == two[1]),
        "{said:?}"
    );
}

/// What a rank carries out depends on its place; the digest does not.
fn digests(said: &[String]) -> Vec<&str> {
    let digest = |said: &&str| said.contains("digest");
    let digests = said
        .iter()
        .map(|said| said.split(',').find(digest).unwrap_or(said));
    digests.collect()
}

fn a_stopped_rank_is_named_in_time(name: &str, carrier: Carrier) {
    if let Some(place) = Place::of_this_process() {
        return fail_as_rank(&place, DEADLINE);
    }
    let mut ranks = start(name, carrier, 3);
    ranks.iter_mut().for_each(|rank| drop(rank.says("ready")));
    ranks[2].signal(Signal::STOP);
    ranks[..2].iter_mut().for_each(|rank| rank.tell("go"));
    for rank in &mut ranks[..2] {
        let (took, health) = rank.failed();
        assert!(health.contains("rank 2 was late: all_sum"), "{health}");
        assert!(took < DEADLINE + GRACE, "{took:?}: {health}");
    }
}

fn a_killed_rank_is_lost_at_once(name: &str, carrier: Carrier) {
    if let Some(place) = Place::of_this_process() {
        return fail_as_rank(&place, PATIENCE);
    }
    let mut ranks = start(name, carrier, 3);
    ranks.iter_mut().for_each(|rank| drop(rank.says("ready")));
    ranks[..2].iter_mut().for_each(|rank| rank.tell("go"));
    ranks[..2].iter_mut().for_each(|rank| drop(rank.says("in")));
    ranks[2].signal(Signal::KILL);
    for rank in &mut ranks[..2] {
        let (took, health) = rank.failed();
        assert!(health.contains("rank 2 was lost in all_sum"), "{health}");
        assert!(took < Duration::from_secs(2), "{took:?}: {health}");
    }
}

fn who_gives_up_is_heard_by_all(name: &str, carrier: Carrier) {
    if let Some(place) = Place::of_this_process() {
        return fail_as_rank(&place, PATIENCE);
    }
    let mut ranks = start(name, carrier, 3);
    ranks.iter_mut().for_each(|rank| drop(rank.says("ready")));
    ranks[..2].iter_mut().for_each(|rank| rank.tell("go"));
    ranks[..2].iter_mut().for_each(|rank| drop(rank.says("in")));
    ranks[2].tell("give up");
    for rank in &mut ranks[..2] {
        let (took, health) = rank.failed();
        assert!(health.contains("tired of it"), "{health}");
        assert!(took < Duration::from_secs(2), "{took:?}: {health}");
    }
}

/// The promise that the others rest on: that `verify` sees a single wrong bit.
#[test]
fn a_wrong_bit_does_not_pass() {
    let options = SharedMemoryOptions::default();
    let errors = on_threads(shared_memory(2, &options), |transport| {
        let transport = Box::new(FlipsABit(transport));
        let group = Group::over(transport, PATIENCE, FastSynch::Off).unwrap();
        verify(&group, &[1237], Exactness::Bits)
    });
    let wrong = |error: &_| matches!(error, Err(ConformanceError::Wrong { at: 1236, .. }));
    assert!(errors.iter().any(wrong), "{errors:?}");
}

struct FlipsABit(SharedMemory);

impl Transport for FlipsABit {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn exchange(
        &mut self,
        exchange: Exchange<'_, '_>,
        wait: Wait<'_>,
    ) -> Result<(), CollectiveError> {
        let Exchange {
            operation,
            dtype,
            outgoing,
            incoming,
        } = exchange;
        self.0.exchange(
            Exchange {
                operation,
                dtype,
                outgoing,
                incoming: &mut *incoming,
            },
            wait,
        )?;
        for last in incoming
            .iter_mut()
            .flatten()
            .filter_map(|body| body.last_mut())
        {
            *last ^= 1;
        }
        Ok(())
    }

    fn abandon(&mut self, why: &CollectiveError) {
        self.0.abandon(why);
    }
}

/// Works once with all; after that does as it is told, and says how long that took.
fn fail_as_rank(place: &Place, deadline: Duration) {
    let group = place.group(carrier(), deadline);
    let x = ones::<f32>(&[1000]).unwrap();
    // The first time may wait for a rank that is still starting, on a machine that is busy.
    let warm = group.all_sum(&x).unwrap();
    warm.eval().unwrap();
    group.handle().health().unwrap();
    say("ready", "");
    match listen().as_str() {
        "go" => {
            let sum = group.all_sum(&x).unwrap();
            say("in", "");
            let start = Instant::now();
            sum.eval().unwrap();
            let took = start.elapsed();
            assert!(sum.as_slice::<f32>().iter().all(|&element| element == 0.0));
            let health = group.handle().health().unwrap_err();
            say("failed", format!("{} {health}", took.as_micros()));
        }
        "give up" => group.handle().poison(CollectiveError::Poisoned {
            why: "tired of it".to_owned(),
        }),
        // The parent is gone.
        _ => return,
    }
    listen();
}

impl RankProcess {
    fn failed(&mut self) -> (Duration, String) {
        let said = self.says("failed");
        let (micros, health) = said.split_once(' ').unwrap();
        (
            Duration::from_micros(micros.parse().unwrap()),
            health.to_owned(),
        )
    }
}

fn start(name: &str, carrier: Carrier, size: usize) -> Vec<RankProcess> {
    let environment = [(CARRIER, carrier.name())];
    let environment = environment
        .each_ref()
        .map(|(name, value)| (*name, &**value));
    processes(size, &["--exact", name, "--nocapture"], &environment)
}

fn carrier() -> Carrier {
    Carrier::named(&std::env::var(CARRIER).unwrap())
}

const CARRIER: &str = "OFFBOOK_TEST_CARRIER";
