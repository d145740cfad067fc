//! Ranks that are not in the same operation, or bring different sizes, find out and both are named;
//! what comes out is zeros.

mod support;

use mlx_rs::{Array, ops::ones};
use offbook_collectives::{
    CollectiveError, FastSynch, Group, QuicOptions, QuicTransport, Transport,
};

use support::{PATIENCE, on_threads, transports};

#[test]
fn another_kind() {
    let errors = on_threads(
        transports(2, QuicOptions::default()),
        |transport: QuicTransport| {
            run(transport, |group, x| match group.rank() {
                0 => group.all_sum(x).unwrap(),
                _ => group.all_max(x).unwrap(),
            })
        },
    );
    assert_named(
        &errors,
        ["all_sum #1 of 40 bytes", "all_max #1 of 40 bytes"],
    );
}

#[test]
fn another_size() {
    let errors = on_threads(
        transports(2, QuicOptions::default()),
        |transport: QuicTransport| {
            let elements = 10 * (1 + transport.rank() as i32);
            run(transport, |group, _| {
                group.all_sum(&ones::<f32>(&[elements]).unwrap()).unwrap()
            })
        },
    );
    assert_named(
        &errors,
        ["all_sum #1 of 40 bytes", "all_sum #1 of 80 bytes"],
    );
}

#[test]
fn another_type() {
    let errors = on_threads(
        transports(2, QuicOptions::default()),
        |transport: QuicTransport| {
            run(transport, |group, x| match group.rank() {
                0 => group.all_sum(x).unwrap(),
                _ => group.all_sum(&ones::<i32>(&[10]).unwrap()).unwrap(),
            })
        },
    );
    assert_named(&errors, ["type 10", "type 7"]);
}

fn run(transport: QuicTransport, operation: impl Fn(&Group, &Array) -> Array) -> CollectiveError {
    let group = Group::over(Box::new(transport), PATIENCE, FastSynch::Off).unwrap();
    let result = operation(&group, &ones::<f32>(&[10]).unwrap());
    result.eval().unwrap();
    // Zero is all bits zero in each of the types here.
    assert!(
        result
            .as_type::<f32>()
            .unwrap()
            .as_slice::<f32>()
            .iter()
            .all(|&element| element == 0.0)
    );
    group.handle().health().unwrap_err()
}

/// Each rank sees the other's operation, or is told by the other, who saw it first.
fn assert_named(errors: &[CollectiveError], names: [&str; 2]) {
    for (rank, error) in errors.iter().enumerate() {
        let text = error.to_string();
        assert!(
            names.iter().all(|name| text.contains(name)),
            "rank {rank}: {text}"
        );
    }
    assert!(
        errors
            .iter()
            .any(|error| matches!(error, CollectiveError::Mismatch { .. }))
    );
}
