//! Properties of the controller on random traces, and its behaviour on recorded ones.

use proptest::prelude::*;

use super::*;

const LIMIT: u64 = 1000;
const CALM_SAMPLE: Sample = Sample {
    at: Duration::ZERO,
    work: WorkKind::Prefill,
    active_bytes: 100,
    cache_bytes: 0,
    limit_bytes: LIMIT,
    available_bytes: Some(10 * LIMIT),
    stalled: 0.0,
};

fn at(milliseconds: u64, active_bytes: u64) -> Sample {
    Sample {
        at: Duration::from_millis(milliseconds),
        active_bytes,
        ..CALM_SAMPLE
    }
}

#[test]
fn it_halves_at_the_high_water_mark_and_not_more_often_than_takes_effect() {
    let mut controller = Controller::new(30, 100);
    assert_eq!(controller.observe(&at(0, 899)).window, 30);
    let shrunk = controller.observe(&at(10, 900));
    assert_eq!((shrunk.window, shrunk.change), (15, Some(Change::Shrink)));
    assert_eq!(controller.observe(&at(20, 950)).window, 15);
    let windows: Vec<u32> = (1..6)
        .map(|n| controller.observe(&at(20 + 100 * n, 950)).window)
        .collect();
    assert_eq!(windows, [7, 3, 1, 1, 1]);
}

#[test]
fn at_the_limit_it_lets_one_layer_wait_at_once() {
    let mut controller = Controller::new(30, 100);
    assert_eq!(controller.observe(&at(0, LIMIT)).window, 1);
    let mut other = Controller::new(30, 100);
    let nothing_left = Sample {
        available_bytes: Some(0),
        ..CALM_SAMPLE
    };
    assert_eq!(other.observe(&nothing_left).window, 1);
}

#[test]
fn between_the_marks_it_stays_and_below_it_grows_after_a_rest() {
    let mut controller = Controller::new(30, 100);
    controller.observe(&at(0, LIMIT));
    for milliseconds in (0..5000).step_by(10) {
        assert_eq!(controller.observe(&at(milliseconds, 800)).window, 1);
    }
    assert_eq!(controller.observe(&at(5000, 750)).window, 4);
    assert_eq!(controller.observe(&at(5050, 750)).window, 4);
    assert_eq!(controller.observe(&at(5100, 750)).window, 7);
    controller.observe(&at(5200, 900));
    assert_eq!(controller.observe(&at(6100, 700)).window, 3, "it rests");
    assert_eq!(controller.observe(&at(6200, 700)).window, 6);
}

#[test]
fn each_kind_of_work_has_a_window_of_its_own() {
    let mut controller = Controller::new(30, 100);
    controller.observe(&at(0, LIMIT));
    let decode = Sample {
        work: WorkKind::Decode,
        ..at(10, 100)
    };
    assert_eq!(controller.observe(&decode).window, 100);
}

#[test]
fn a_machine_that_waits_for_memory_counts_as_full() {
    let mut controller = Controller::new(30, 100);
    let stalled = |stalled| Sample {
        stalled,
        ..CALM_SAMPLE
    };
    assert_eq!(controller.observe(&stalled(0.09)).window, 30);
    assert_eq!(controller.observe(&stalled(0.10)).window, 15);
}

#[test]
fn a_large_cache_is_cleared_at_the_mark_and_not_over_and_over() {
    let mut controller = Controller::new(30, 100);
    let cached = |milliseconds, cache_bytes| Sample {
        cache_bytes,
        ..at(milliseconds, 700)
    };
    assert!(!controller.observe(&cached(0, 100)).clear_cache, "below it");
    let first = controller.observe(&cached(10, 200));
    assert!(first.clear_cache);
    assert_eq!(first.window, 30, "what MLX keeps is no reason to shrink");
    assert!(!controller.observe(&cached(500, 200)).clear_cache);
    assert!(controller.observe(&cached(1010, 200)).clear_cache);
    let small = Sample {
        cache_bytes: 49,
        ..at(9000, 890)
    };
    assert!(!controller.observe(&small).clear_cache, "not worth it");
}

#[test]
fn what_mlx_keeps_counts_and_goes_first_and_the_window_follows_when_that_does_not_help() {
    let mut controller = Controller::new(30, 100);
    let cached = |milliseconds, active_bytes, cache_bytes| Sample {
        cache_bytes,
        ..at(milliseconds, active_bytes)
    };
    // 950 of 1000 are held, and without what is kept it would be 700.
    let first = controller.observe(&cached(0, 700, 250));
    assert_eq!((first.clear_cache, first.change), (true, None));
    assert_eq!(first.cache_bound, Some(CacheBound::Narrow(100)));
    // It helped.
    let after = controller.observe(&cached(10, 700, 0));
    assert_eq!((after.clear_cache, after.change), (false, None));
    // It is held again at once: this time the window pays.
    let again = controller.observe(&cached(200, 700, 250));
    assert_eq!((again.clear_cache, again.window), (false, 15));
    // Beyond the limit by what is kept is not beyond help: it halves, and does not fall to one.
    let beyond = controller.observe(&cached(400, 700, 350));
    assert_eq!(beyond.window, 7);
    // Where clearing cannot help, both at once.
    let full = controller.observe(&cached(2000, 900, 60));
    assert_eq!((full.clear_cache, full.window), (true, 3));
    assert_eq!(full.cache_bound, Some(CacheBound::Narrow(0)));
    // MLX may keep as much as ever once there is room for a while.
    let calm = |milliseconds| cached(milliseconds, 300, 0);
    assert_eq!(controller.observe(&calm(2500)).cache_bound, None);
    let wide = controller.observe(&calm(3000)).cache_bound;
    assert_eq!(wide, Some(CacheBound::Wide));
    assert_eq!(controller.observe(&calm(3010)).cache_bound, None, "once");
}

#[test]
fn the_chunk_shrinks_with_the_window_and_grows_beyond_what_is_configured_only_in_prefill() {
    let mut controller = Controller::new(30, 100);
    let chunk =
        |controller: &mut Controller, sample: Sample| controller.observe(&sample).chunk_permille;
    let decodes = |milliseconds, active_bytes| Sample {
        work: WorkKind::Decode,
        ..at(milliseconds, active_bytes)
    };
    assert_eq!(chunk(&mut controller, decodes(0, 100)), 1000);
    // Decode that fills memory makes the next prompt's chunks smaller too.
    assert_eq!(chunk(&mut controller, decodes(100, 900)), 500);
    assert_eq!(
        chunk(&mut controller, at(150, 950)),
        500,
        "it takes effect first"
    );
    assert_eq!(chunk(&mut controller, at(200, 950)), 250);
    assert_eq!(chunk(&mut controller, at(300, LIMIT)), 62);
    assert_eq!(chunk(&mut controller, at(900, 100)), 62, "it rests");
    assert_eq!(chunk(&mut controller, at(1300, 100)), 162);
    for n in 1..100 {
        chunk(&mut controller, decodes(1300 + 100 * n, 100));
    }
    assert_eq!(chunk(&mut controller, decodes(12_000, 100)), 1000);
    for n in 1..100 {
        chunk(&mut controller, at(12_000 + 100 * n, 100));
    }
    assert_eq!(chunk(&mut controller, at(24_000, 100)), 4000, "plenty");
    assert_eq!(chunk(&mut controller, at(24_100, 800)), 1000, "not plenty");
}

/// A prompt of 512 tokens through six wide layers on a CPU, then a few steps of decode, without a bound
/// on the window: `offbook bench prefill-memory --windows none --layers 6 --prompt 512 --chunk 512
/// --steps 4 --samples FILE`, of which every second or fourth line is here. Once with
/// `--headroom 100MiB`, once with all the memory of a machine.
fn recorded(text: &str) -> Vec<Sample> {
    let read = |line: &str| {
        let fields: Vec<&str> = line.split(',').collect();
        let number = |at: usize| fields[at].parse::<u64>().unwrap();
        Sample {
            at: Duration::from_millis(number(0)),
            work: match fields[1] {
                "prefill" => WorkKind::Prefill,
                _ => WorkKind::Decode,
            },
            active_bytes: number(2),
            cache_bytes: number(3),
            limit_bytes: number(4),
            available_bytes: Some(number(5)),
            stalled: fields[6].parse().unwrap(),
        }
    };
    text.lines().skip(1).map(read).collect()
}

#[test]
fn on_a_recorded_prefill_that_is_short_of_memory_it_has_shrunk_before_the_limit() {
    let trace = recorded(include_str!("traces/short_of_memory.csv"));
    let mut controller = Controller::new(30, 100);
    let mut windows = Vec::new();
    for sample in trace.iter().filter(|one| one.work == WorkKind::Prefill) {
        windows.push((sample.used(), controller.observe(sample).window));
    }
    let first_high = windows.iter().position(|(used, _)| *used >= HIGH_WATER);
    let first_high = first_high.expect("the trace reaches the mark");
    assert!(
        windows[..first_high]
            .iter()
            .all(|(_, window)| *window == 30)
    );
    assert_eq!(windows[first_high].1, 15);
    let first_full = windows.iter().position(|(used, _)| *used >= 1.0);
    let first_full = first_full.expect("without a bound it reaches the limit");
    assert_eq!(windows[first_full - 1].1, 1, "it was as small as it gets");
}

#[test]
fn on_a_recorded_prefill_with_room_to_spare_it_does_nothing() {
    let trace = recorded(include_str!("traces/room_to_spare.csv"));
    assert!(trace.len() > 100);
    let mut controller = Controller::new(30, 100);
    for sample in &trace {
        let decision = controller.observe(sample);
        assert_eq!((decision.change, decision.clear_cache), (None, false));
    }
}

prop_compose! {
    fn samples()(
        steps in prop::collection::vec(
            (0_u64..300, any::<bool>(), 0_u64..2000, 0_u64..2000, prop::option::of(0_u64..4000), 0.0..1.0),
            0..200,
        ),
    ) -> Vec<Sample> {
        let mut now = 0;
        steps.into_iter().map(|(pause, prefills, active_bytes, cache_bytes, available_bytes, stalled)| {
            now += pause;
            Sample {
                at: Duration::from_millis(now),
                work: if prefills { WorkKind::Prefill } else { WorkKind::Decode },
                active_bytes,
                cache_bytes,
                limit_bytes: LIMIT,
                available_bytes,
                stalled: if stalled > 0.9 { stalled } else { 0.0 },
            }
        }).collect()
    }
}

proptest! {
    #[test]
    fn whatever_comes_it_stays_between_one_and_the_set_point(
        trace in samples(), prefill in 0_u32..200, decode in 0_u32..200,
    ) {
        let mut controller = Controller::new(prefill, decode);
        let mut before = [prefill.max(1), decode.max(1)];
        for sample in &trace {
            let decision = controller.observe(sample);
            let (lane, set_point) = match sample.work {
                WorkKind::Prefill => (0, prefill.max(1)),
                WorkKind::Decode => (1, decode.max(1)),
            };
            prop_assert!((1..=set_point).contains(&decision.window));
            prop_assert!((62..=4000).contains(&decision.chunk_permille));
            match decision.change {
                None => prop_assert_eq!(decision.window, before[lane]),
                Some(Change::Shrink) => {
                    prop_assert!(decision.window < before[lane]);
                    prop_assert!(sample.used() >= HIGH_WATER || sample.stalled >= STALLED_HIGH);
                }
                Some(Change::Grow) => {
                    prop_assert!(decision.window > before[lane]);
                    prop_assert!(decision.window - before[lane] <= (set_point / 10).max(1));
                    prop_assert!(sample.used() <= LOW_WATER);
                }
            }
            before[lane] = decision.window;
        }
    }

    #[test]
    fn after_whatever_came_it_recovers_when_memory_does(trace in samples(), set_point in 1_u32..200) {
        let mut controller = Controller::new(set_point, set_point);
        for sample in &trace {
            controller.observe(sample);
        }
        let end = trace.last().map_or(Duration::ZERO, |sample| sample.at);
        // A rest, then at most as many growths as there are tenths, or ones.
        let growths = set_point.div_ceil((set_point / 10).max(1));
        let until = CALM + GROW_PAUSE * (growths + 1);
        let mut window = 0;
        let mut passed = Duration::ZERO;
        while passed <= until {
            let sample = Sample { at: end + passed, ..CALM_SAMPLE };
            window = controller.observe(&sample).window;
            passed += Duration::from_millis(10);
        }
        prop_assert_eq!(window, set_point);
    }

    #[test]
    fn under_lasting_pressure_it_comes_to_one(trace in samples(), set_point in 1_u32..2000) {
        let mut controller = Controller::new(set_point, set_point);
        for sample in &trace {
            controller.observe(sample);
        }
        let end = trace.last().map_or(Duration::ZERO, |sample| sample.at);
        let mut window = 0;
        for n in 0..=12 {
            let pressed = Sample {
                at: end + SHRINK_PAUSE * n,
                active_bytes: 950,
                ..CALM_SAMPLE
            };
            window = controller.observe(&pressed).window;
        }
        prop_assert_eq!(window, 1);
    }
}

#[test]
fn on_a_recorded_prefill_whose_leftovers_fill_memory_they_are_cleared_before_the_window_shrinks() {
    // The same trace on a machine where MLX keeps what a layer frees: what was freed since the peak.
    let mut most = 0;
    let trace = recorded(include_str!("traces/short_of_memory.csv"));
    let trace = trace.into_iter().map(|sample| {
        most = most.max(sample.active_bytes);
        Sample {
            // Room enough for all that is active, and not for what is kept beside it.
            limit_bytes: sample.limit_bytes * 12 / 10,
            cache_bytes: most / 8,
            ..sample
        }
    });
    let mut controller = Controller::new(30, 100);
    let decisions: Vec<(Sample, Decision)> = trace
        .filter(|sample| sample.work == WorkKind::Prefill)
        .map(|sample| (sample, controller.observe(&sample)))
        .collect();
    let first_clear = decisions.iter().position(|(_, one)| one.clear_cache);
    let first_shrink = decisions
        .iter()
        .position(|(_, one)| one.change == Some(Change::Shrink));
    let first_clear = first_clear.expect("what is kept reaches the mark");
    assert!(first_shrink.is_none_or(|shrink| shrink > first_clear));
    for (sample, decision) in &decisions[..first_clear] {
        assert!(sample.used() < HIGH_WATER && decision.change.is_none());
    }
}
