//! Decides from heartbeats alone whether a process is still there: pure, time comes in as an
//! argument. `link/heartbeat.rs` feeds one of these per link.
//!
//! It is a phi-accrual detector: φ = −log₁₀ of the probability that a heartbeat is still to come,
//! given how far apart they came so far (Hayashibara et al., 2004). Alone, φ is too quick for a
//! process that computes at full load, whose heartbeats come like clockwork until the scheduler
//! takes its core away for once. So there is a least silence too, and whoever was late before is
//! given twice that. And a silence is only somebody else's fault as far as we listened:
//! what our own timer was late is taken off everybody's silence.

use std::time::{Duration, Instant};

/// How long a process may be silent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patience {
    /// How often each side of a link says that it is there.
    pub heartbeat: Duration,
    /// The least silence that makes a process suspect.
    pub suspect_min: Duration,
    /// The least silence that makes a process count as lost. It is a process's reaction time at its
    /// worst: a stall of the scheduler, and some heartbeats lost after it.
    pub lose_min: Duration,
    /// The silence that makes a process count as lost however late it was before.
    pub lose_max: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(25),
            suspect_min: Duration::from_millis(125),
            // A stall of 200 ms, the heartbeat before it and two lost ones after it pass. With a
            // look every 10 ms this leaves a frozen process less than 300 ms.
            lose_min: Duration::from_millis(280),
            lose_max: Duration::from_secs(2),
        }
    }
}

/// What is to be thought of a process now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is heard of as usual.
    Alive,
    /// It is late: worth a line in the log, and nothing else.
    Suspected,
    /// It is not coming back on this link.
    Lost,
}

/// What one process knows of another one's heartbeats.
#[derive(Clone, Debug)]
pub struct Detector {
    patience: Patience,
    heard: Instant,
    /// How much of the time since then we were not listening ourselves.
    excused: Duration,
    gaps: Gaps,
}

impl Detector {
    /// A detector that has heard of its process just `now`.
    pub fn new(patience: Patience, now: Instant) -> Self {
        Self {
            gaps: Gaps::new(&patience, now),
            patience,
            heard: now,
            excused: Duration::ZERO,
        }
    }

    /// A heartbeat came.
    pub fn heard(&mut self, now: Instant) {
        self.gaps.note(self.silence(now), now);
        self.heard = now;
        self.excused = Duration::ZERO;
    }

    /// Our own timer was late by so much: in that time nobody could have been heard.
    pub fn excuse(&mut self, lateness: Duration) {
        self.excused += lateness;
    }

    /// How long the process was silent while we listened.
    pub fn silence(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.heard)
            .saturating_sub(self.excused)
    }

    /// Judges the silence up to `now`.
    pub fn standing(&self, now: Instant) -> Standing {
        let silence = self.silence(now);
        let improbable = silence >= self.lose_after() && self.gaps.phi(silence) >= PHI_LOST;
        if improbable || silence >= self.patience.lose_max {
            Standing::Lost
        } else if silence >= self.patience.suspect_min {
            Standing::Suspected
        } else {
            Standing::Alive
        }
    }

    /// The least silence that would count as lost now.
    fn lose_after(&self) -> Duration {
        let Patience {
            lose_min, lose_max, ..
        } = self.patience;
        if self.gaps.count < GAPS_KNOWN_MIN {
            return (lose_min * STARTING).min(lose_max);
        }
        (self.gaps.longest() * 2).clamp(lose_min, lose_max.max(lose_min))
    }
}

/// How far apart heartbeats came: mean and variance that forget, in seconds, and the longest gap.
#[derive(Clone, Debug)]
struct Gaps {
    count: u32,
    mean: f64,
    variance: f64,
    deviation_min: f64,
    /// The longest gap of this period and of the one before.
    longest: [Duration; 2],
    period_began: Instant,
}

impl Gaps {
    fn new(patience: &Patience, now: Instant) -> Self {
        let expected = patience.heartbeat.as_secs_f64();
        Self {
            count: 0,
            mean: expected,
            variance: 0.0,
            deviation_min: expected / 4.0,
            longest: [Duration::ZERO; 2],
            period_began: now,
        }
    }

    fn note(&mut self, gap: Duration, now: Instant) {
        self.count = self.count.saturating_add(1);
        let off = gap.as_secs_f64() - self.mean;
        self.mean += FORGET * off;
        self.variance = (1.0 - FORGET) * (self.variance + FORGET * off * off);
        if now.saturating_duration_since(self.period_began) >= PERIOD {
            self.period_began = now;
            self.longest = [Duration::ZERO, self.longest[0]];
        }
        self.longest[0] = self.longest[0].max(gap);
    }

    fn longest(&self) -> Duration {
        self.longest[0].max(self.longest[1])
    }

    /// −log₁₀ of the chance that a gap is longer than `silence`, if gaps are normally distributed.
    fn phi(&self, silence: Duration) -> f64 {
        let deviation = self.variance.sqrt().max(self.deviation_min);
        let y = (silence.as_secs_f64() - self.mean) / deviation;
        // The logistic approximation of the normal distribution, off by less than 0.00014 (Bowling
        // et al., 2009).
        let e = (-y * (1.5976 + 0.070_566 * y * y)).exp();
        -(e / (1.0 + e)).log10()
    }
}

/// Our own timer, as the measure of whether we listened.
#[derive(Clone, Copy, Debug)]
pub struct OwnTimer {
    due: Instant,
}

impl OwnTimer {
    /// The pause between two looks at everybody's standing.
    pub const TICK: Duration = Duration::from_millis(10);

    /// A timer whose next tick is due one pause after `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            due: now + Self::TICK,
        }
    }

    /// When the next tick is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// The tick came at `now`: how late it was. Less than a pause is what a timer is always late.
    pub fn ticked(&mut self, now: Instant) -> Duration {
        let lateness = now.saturating_duration_since(self.due);
        self.due = now + Self::TICK;
        if lateness < Self::TICK {
            Duration::ZERO
        } else {
            lateness
        }
    }
}

/// When to send our own heartbeats.
#[derive(Clone, Copy, Debug)]
pub struct Pulse {
    heartbeat: Duration,
    next: Instant,
    owed: u32,
}

impl Pulse {
    /// A pulse whose first heartbeat is due `now`.
    pub fn new(patience: &Patience, now: Instant) -> Self {
        Self {
            heartbeat: patience.heartbeat,
            next: now,
            owed: 0,
        }
    }

    /// Is one to be sent at this tick, which came so late? After a stall one goes out at every tick
    /// until all that were missed are made up for: others wait for a sign of life, and the first one
    /// may be lost on its way.
    pub fn is_due(&mut self, now: Instant, lateness: Duration) -> bool {
        let missed = lateness.as_nanos() / self.heartbeat.as_nanos().max(1);
        self.owed = self.owed.saturating_add(missed as u32).min(OWED_MAX);
        if now >= self.next {
            self.next = now + self.heartbeat;
            return true;
        }
        let owes = self.owed > 0;
        self.owed = self.owed.saturating_sub(1);
        owes
    }
}

/// One false alarm in 10¹² heartbeats, were gaps normally distributed: the longest gap has the last
/// word where they are not.
const PHI_LOST: f64 = 12.0;
/// Two seconds' worth of heartbeats: so few that stalls which have begun are soon part of the mean.
const FORGET: f64 = 1.0 / 80.0;
/// Of so many heartbeats in a row, one arrives.
const OWED_MAX: u32 = 8;
/// Before so many gaps are known, a process may still be starting, and is given so many times the least
/// silence.
const GAPS_KNOWN_MIN: u32 = 20;
const STARTING: u32 = 4;
/// A process that was late is given more time for one to two of these.
const PERIOD: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// One process that sends heartbeats and one that listens, in virtual time.
    struct Simulation {
        chance: StdRng,
        loss: f64,
        jitter: Duration,
        /// Stalls of the observer, of the peer: how long, and the mean time between two.
        observer_stalls: Option<(Duration, Duration)>,
        peer_stalls: Option<(Duration, Duration)>,
        frozen_at: Duration,
    }

    impl Simulation {
        fn calm(seed: u64) -> Self {
            Self {
                chance: StdRng::seed_from_u64(seed),
                loss: 0.0,
                jitter: ms(2),
                observer_stalls: None,
                peer_stalls: None,
                frozen_at: Duration::MAX,
            }
        }

        fn wait(&mut self, stalls: Option<(Duration, Duration)>) -> Duration {
            stalls.map_or(Duration::MAX, |(_, mean)| {
                let share: f64 = self.chance.random();
                // Whoever has got a core back keeps it for a moment.
                ms(100) + mean.mul_f64(-(1.0 - share).ln())
            })
        }

        /// When a timer that is due at `due` ticks, if its owner may stall then.
        fn tick(
            &mut self,
            due: Duration,
            stall_at: &mut Duration,
            stalls: Option<(Duration, Duration)>,
        ) -> Duration {
            if due < *stall_at {
                return due;
            }
            let woken = due + stalls.map_or(Duration::ZERO, |(stall, _)| stall);
            *stall_at = woken + self.wait(stalls);
            woken
        }

        /// When the peer was suspected first after its freeze, and when it was lost.
        fn run(&mut self, length: Duration) -> (Option<Duration>, Option<Duration>) {
            let began = Instant::now();
            let at = |instant: Instant| instant.duration_since(began);
            let patience = Patience::default();
            let mut detector = Detector::new(patience.clone(), began);
            let mut pulse = Pulse::new(&patience, began);
            let (mut timer, mut peer_timer) = (OwnTimer::new(began), OwnTimer::new(began));
            let mut observer_stall = self.wait(self.observer_stalls);
            let mut peer_stall = self.wait(self.peer_stalls);
            let mut peer_now = Duration::ZERO;
            let mut under_way = VecDeque::new();
            let mut suspected = None;
            let mut now = Duration::ZERO;
            while now < length {
                now = self.tick(at(timer.due()), &mut observer_stall, self.observer_stalls);
                // The timer's task may run before the socket is read: the worse order.
                detector.excuse(timer.ticked(began + now));
                match detector.standing(began + now) {
                    Standing::Lost => return (suspected, Some(now)),
                    Standing::Suspected if now >= self.frozen_at => {
                        suspected.get_or_insert(now);
                    }
                    _ => {}
                }
                while peer_now <= now && peer_now < self.frozen_at {
                    let lateness = peer_timer.ticked(began + peer_now);
                    if pulse.is_due(began + peer_now, lateness)
                        && !self.chance.random_bool(self.loss)
                    {
                        let delay: f64 = self.chance.random();
                        under_way.push_back(peer_now + self.jitter.mul_f64(delay));
                    }
                    peer_now = self.tick(at(peer_timer.due()), &mut peer_stall, self.peer_stalls);
                }
                while under_way.pop_front_if(|arrival| *arrival <= now).is_some() {
                    detector.heard(began + now);
                }
            }
            (suspected, None)
        }
    }

    #[test]
    fn a_frozen_process_is_suspected_within_150_ms_and_lost_within_300() {
        for seed in 0..200 {
            let mut simulation = Simulation::calm(seed);
            simulation.loss = if seed % 2 == 0 { 0.0 } else { 0.05 };
            simulation.jitter = ms(10);
            let frozen_at = Duration::from_secs(20) + ms(seed);
            simulation.frozen_at = frozen_at;
            let (suspected, lost) = simulation.run(Duration::from_secs(30));
            let (suspected, lost) = (suspected.unwrap() - frozen_at, lost.unwrap() - frozen_at);
            assert!(
                suspected <= ms(150),
                "seed {seed}: suspected in {suspected:?}"
            );
            assert!(lost <= ms(300), "seed {seed}: lost in {lost:?}");
        }
    }

    #[test]
    fn a_day_of_lost_packets_and_own_stalls_raises_no_alarm() {
        let mut simulation = Simulation::calm(1);
        simulation.loss = 0.05;
        simulation.jitter = ms(10);
        simulation.observer_stalls = Some((ms(200), Duration::from_secs(2)));
        let day = Duration::from_secs(24 * 60 * 60);
        assert_eq!(simulation.run(day).1, None);
    }

    #[test]
    fn a_peer_that_stalls_is_given_time_and_still_lost_when_frozen() {
        let mut took = Vec::new();
        for seed in 0..50 {
            let mut simulation = Simulation::calm(seed);
            simulation.loss = 0.05;
            simulation.peer_stalls = Some((ms(200), Duration::from_secs(5)));
            let frozen_at = Duration::from_secs(3600);
            simulation.frozen_at = frozen_at;
            let (_, lost) = simulation.run(frozen_at + Duration::from_secs(10));
            let lost = lost.expect("it is frozen");
            assert!(
                lost > frozen_at,
                "seed {seed}: a false alarm after {lost:?}"
            );
            assert!(lost - frozen_at <= ms(2010), "seed {seed}");
            took.push(lost - frozen_at);
        }
        // Twice the longest gap of late.
        took.sort();
        assert!(took[25] <= ms(600), "{took:?}");
    }

    #[test]
    fn our_own_lateness_is_nobodys_silence() {
        let began = Instant::now();
        let mut detector = Detector::new(Patience::default(), began);
        for beat in 1..=40 {
            detector.heard(began + ms(25) * beat);
        }
        let heard = began + ms(1000);
        let mut timer = OwnTimer::new(heard);
        let woken = heard + Duration::from_secs(60);
        assert_eq!(
            detector.standing(woken),
            Standing::Lost,
            "if we had listened"
        );
        detector.excuse(timer.ticked(woken));
        assert_eq!(detector.standing(woken), Standing::Alive);
        assert_eq!(detector.standing(woken + ms(290)), Standing::Lost);
    }

    #[test]
    fn nobody_is_lost_early_of_whom_little_is_known() {
        let began = Instant::now();
        let mut detector = Detector::new(Patience::default(), began);
        detector.heard(began + ms(25));
        assert_eq!(detector.standing(began + ms(1100)), Standing::Suspected);
        assert_eq!(detector.standing(began + ms(1145)), Standing::Lost);
    }

    #[test]
    fn phi_is_that_of_the_normal_distribution() {
        let mut gaps = Gaps::new(&Patience::default(), Instant::now());
        gaps.mean = 0.1;
        gaps.variance = 0.01 * 0.01;
        // One and three deviations: 15.9 % and 0.135 % of the gaps are longer.
        assert!((gaps.phi(ms(110)) - 0.799).abs() < 0.01);
        assert!((gaps.phi(ms(130)) - 2.87).abs() < 0.05);
    }
}
