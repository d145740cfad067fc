//! `MAX_ACTIVE_TASKS` reaches the steps of a shard; without it prefill and decode have set points of
//! their own, from the first step on.

mod support;

use std::collections::BTreeSet;

use support::{fixture, offbook};

/// The windows in the step log of one answer, by `prefill` and `decode` alike.
fn windows(environment: &[(&str, &str)]) -> BTreeSet<u32> {
    let output = offbook()
        .args(["generate", "--nodes", "1", "--tokens", "1,2,3"])
        .args(["--max-tokens", "4", "--ignore-eos", "--model"])
        .arg(fixture("dense-f32"))
        .env("OFFBOOK_LOG", "offbook::step=debug")
        .env_remove("MAX_ACTIVE_TASKS")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let steps = said.lines().filter(|line| line.contains("[STEP "));
    steps
        .filter_map(|line| line.split("window=").nth(1))
        .map(|rest| {
            let digits = rest.split(|letter: char| !letter.is_ascii_digit()).next();
            digits.unwrap().parse().unwrap()
        })
        .collect()
}

#[test]
fn and_that_of_its_kind_of_work_otherwise() {
    assert_eq!(windows(&[]), [30, 100].into());
    assert_eq!(windows(&[("MAX_ACTIVE_TASKS", "7")]), [7].into());
}
