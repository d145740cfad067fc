//! What a soak has seen, and the table at its end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::strikes::Kind;

/// What a soak has seen.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) requests: u32,
    pub(super) tokens: usize,
    /// Requests that ended in an error, and what the first of them said.
    pub(super) failed: u32,
    pub(super) error: String,
    pub(super) difference: Difference,
    pub(super) strikes: Vec<Strike>,
    /// When tokens came, of all clients together.
    pub(super) arrivals: Vec<Instant>,
    /// When the last one of each client came.
    pub(super) latest: Vec<Option<Instant>>,
}

impl Outcome {
    pub(super) fn is_clean(&self) -> bool {
        self.failed == 0 && self.difference == Difference::default()
    }
}

/// A process was struck.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strike {
    pub(super) kind: Kind,
    pub(super) at: Instant,
    /// When every client had a token again.
    pub(super) over: Option<Instant>,
}

impl Strike {
    /// How long no client got a token: up to the end of the longest silence before all went on. A strike
    /// after which nothing came has none.
    fn recovery(&self, arrivals: &[Instant]) -> Option<Duration> {
        let first = arrivals.partition_point(|arrival| *arrival <= self.at);
        let after = arrivals[first..].iter();
        let mut before = self.at;
        let silences = after
            .take_while(|arrival| self.over.is_some_and(|over| **arrival <= over))
            .map(|arrival| {
                let silence = *arrival - before;
                before = *arrival;
                (silence, *arrival - self.at)
            });
        silences.max().map(|(_, recovery)| recovery)
    }
}

/// In how many tokens an answer is not the one that was to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    lost: usize,
    duplicated: usize,
    wrong: usize,
}

impl Difference {
    pub(super) fn between(wanted: &[u64], came: &[u64]) -> Self {
        if wanted == came {
            return Self::default();
        }
        let same = wanted.iter().zip(came).take_while(|(a, b)| a == b).count();
        for shift in 1..=wanted.len() {
            if wanted.get(same + shift..) == Some(&came[same..]) {
                return Self {
                    lost: shift,
                    ..Self::default()
                };
            }
            if same >= shift && wanted[same - shift..] == came[same..] {
                return Self {
                    duplicated: shift,
                    ..Self::default()
                };
            }
        }
        Self {
            lost: wanted.len().saturating_sub(came.len()),
            duplicated: came.len().saturating_sub(wanted.len()),
            wrong: wanted.iter().zip(came).filter(|(a, b)| a != b).count(),
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.wrong += other.wrong;
    }
}

/// The recoveries from strikes of one kind.
#[derive(Debug, Default)]
struct Recoveries {
    strikes: usize,
    /// Sorted.
    took: Vec<Duration>,
}

impl Recoveries {
    fn of<'a>(strikes: impl Iterator<Item = &'a Strike>, arrivals: &[Instant]) -> Self {
        let mut recoveries = Self::default();
        for strike in strikes {
            recoveries.strikes += 1;
            recoveries.took.extend(strike.recovery(arrivals));
        }
        recoveries.took.sort();
        recoveries
    }

    /// The value that this share of all is not above, in milliseconds.
    fn percentile(&self, share: f64) -> Option<f64> {
        let rank = (self.took.len() as f64 * share).ceil() as usize;
        let index = rank.clamp(1, self.took.len().max(1)) - 1;
        self.took.get(index).map(|took| took.as_secs_f64() * 1e3)
    }
}

/// The figures of a soak, all together and by the kind of strike.
pub(super) fn report(outcome: &Outcome, took: Duration) -> Value {
    let arrivals = &outcome.arrivals;
    let all = Recoveries::of(outcome.strikes.iter(), arrivals);
    let mut kinds = BTreeMap::new();
    for strike in &outcome.strikes {
        kinds.entry(strike.kind).or_insert_with(|| {
            let same = outcome.strikes.iter().filter(|s| s.kind == strike.kind);
            Recoveries::of(same, arrivals)
        });
    }
    let kinds = kinds.iter().map(|(kind, recoveries)| {
        let mut row = times(recoveries);
        row["target"] = json!(kind.target.name());
        row["signal"] = json!(kind.blow.name());
        row["kills"] = json!(recoveries.strikes);
        row
    });
    let kinds: Vec<Value> = kinds.collect();
    let Difference {
        lost,
        duplicated,
        wrong,
    } = outcome.difference;
    let mut report = times(&all);
    report["kinds"] = json!(kinds);
    let counts = [
        ("requests", outcome.requests as usize),
        ("tokens", outcome.tokens),
        ("kills", all.strikes),
        ("failed", outcome.failed as usize),
        ("lost", lost),
        ("duplicated", duplicated),
        ("wrong", wrong),
    ];
    for (name, count) in counts {
        report[name] = json!(count);
    }
    report["seconds"] = json!(took.as_secs_f64());
    report["error"] = json!(outcome.error);
    report
}

fn times(recoveries: &Recoveries) -> Value {
    json!({
        "recovered": recoveries.took.len(),
        "recovery_p50_ms": recoveries.percentile(0.5),
        "recovery_p99_ms": recoveries.percentile(0.99),
        "recovery_max_ms": recoveries.percentile(1.0),
    })
}

/// The same as a table.
pub(super) fn table(report: &Value) -> String {
    let time = |row: &Value, key: &str| match row[key].as_f64() {
        Some(ms) => format!("{ms:.0} ms"),
        None => "–".into(),
    };
    let mut lines = Vec::new();
    for (what, key) in [
        ("seconds", "seconds"),
        ("requests", "requests"),
        ("tokens", "tokens"),
        ("failed requests", "failed"),
        ("tokens lost", "lost"),
        ("tokens duplicated", "duplicated"),
        ("tokens wrong", "wrong"),
    ] {
        let value = report[key].as_f64().unwrap_or_default();
        lines.push(format!("{what:<18} {value:>9.0}"));
    }
    lines.push(format!(
        "\n{:<18} {:>9} {:>9} {:>10} {:>10} {:>10}",
        "struck", "times", "recovered", "p50", "p99", "longest"
    ));
    let kinds = report["kinds"].as_array().into_iter().flatten();
    for row in kinds.chain([report]) {
        let name = match (row["signal"].as_str(), row["target"].as_str()) {
            (Some(signal), Some(target)) => format!("{target}, {signal}"),
            _ => "all".into(),
        };
        lines.push(format!(
            "{name:<18} {:>9} {:>9} {:>10} {:>10} {:>10}",
            row["kills"].to_string(),
            row["recovered"].to_string(),
            time(row, "recovery_p50_ms"),
            time(row, "recovery_p99_ms"),
            time(row, "recovery_max_ms")
        ));
    }
    if let Some(error) = report["error"].as_str().filter(|error| !error.is_empty()) {
        lines.push(format!("first error: {error}"));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::strikes::{Blow, Target};
    use super::*;

    #[test]
    fn what_is_missing_what_came_twice_and_what_is_other_are_told_apart() {
        let wanted = [1, 2, 3, 4, 5];
        let difference = |came: &[u64]| {
            let Difference {
                lost,
                duplicated,
                wrong,
            } = Difference::between(&wanted, came);
            (lost, duplicated, wrong)
        };
        assert_eq!(difference(&wanted), (0, 0, 0));
        assert_eq!(difference(&[1, 2, 3]), (2, 0, 0));
        assert_eq!(difference(&[]), (5, 0, 0));
        assert_eq!(difference(&[1, 4, 5]), (2, 0, 0));
        assert_eq!(difference(&[1, 2, 3, 2, 3, 4, 5]), (0, 2, 0));
        assert_eq!(difference(&[1, 2, 9, 4, 5]), (0, 0, 1));
        assert_eq!(difference(&[1, 9, 9]), (2, 0, 2));
    }

    #[test]
    fn a_soak_is_clean_only_without_any_difference() {
        assert!(Outcome::default().is_clean());
        let differences = [(1, 0, 0), (0, 1, 0), (0, 0, 1)];
        for (lost, duplicated, wrong) in differences {
            let mut outcome = Outcome::default();
            outcome.difference.add(Difference {
                lost,
                duplicated,
                wrong,
            });
            assert!(!outcome.is_clean());
        }
        let outcome = Outcome {
            failed: 1,
            ..Outcome::default()
        };
        assert!(!outcome.is_clean());
    }

    /// Two shards and the head are struck; nothing comes after the last one.
    fn outcome() -> Outcome {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let strike = |target, ms, over: Option<u64>| Strike {
            kind: Kind {
                target,
                blow: Blow::Kill,
            },
            at: at(ms),
            over: over.map(at),
        };
        Outcome {
            strikes: vec![
                strike(Target::Shard, 100, Some(800)),
                strike(Target::Shard, 1000, Some(1720)),
                strike(Target::Head, 3000, None),
            ],
            // Two tokens were on their way; what comes when all went on again belongs to no strike.
            arrivals: [90, 102, 104, 500, 700, 990, 1700, 1710, 1720, 2990]
                .map(at)
                .to_vec(),
            ..Outcome::default()
        }
    }

    #[test]
    fn a_recovery_ends_with_the_longest_silence_before_all_went_on() {
        let outcome = outcome();
        let recoveries = Recoveries::of(outcome.strikes.iter(), &outcome.arrivals);
        assert_eq!(recoveries.took, [400, 700].map(Duration::from_millis));
        assert_eq!(recoveries.percentile(1.0), Some(700.0));
        assert_eq!(recoveries.percentile(0.5), Some(400.0));
        assert_eq!(Recoveries::default().percentile(0.5), None);
    }

    #[test]
    fn every_kind_has_its_row() {
        let report = report(&outcome(), Duration::from_secs(4));
        assert_eq!(
            (&report["kills"], &report["recovered"]),
            (&json!(3), &json!(2))
        );
        let kinds = report["kinds"].as_array().unwrap();
        assert_eq!(kinds.len(), 2);
        assert_eq!(kinds[0]["target"], "shard");
        assert_eq!(
            (&kinds[0]["kills"], &kinds[0]["recovery_p99_ms"]),
            (&json!(2), &json!(700.0))
        );
        assert_eq!(
            (&kinds[1]["target"], &kinds[1]["recovered"]),
            (&json!("head"), &json!(0))
        );
        assert_eq!(kinds[1]["recovery_p50_ms"], Value::Null);
        let table = table(&report);
        let row = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(row("shard, SIGKILL").ends_with("700 ms"));
        assert!(row("head, SIGKILL").ends_with('–'));
        assert!(row("all").contains("400 ms"));
    }
}
