//! The bytes of every message that crosses from process to process, as they are: a format that changed
//! without a new version would be read as something else by whoever has not changed yet. And the same
//! types, fed with what a hostile peer might send.
//!
//! `wire/golden.txt` has a line for each: name, version, the bytes in hexadecimal. A line that no longer
//! fits says so with the new one: if the change is meant, raise the message's version and put it there.

use std::num::NonZeroU32;
use std::time::Duration;

use offbook_protocol::{
    ActorReport, Candidate, ClientId, DeadLetterReport, Epoch, FastSynch, FinishReason,
    GroupMember, GroupSpec, Histogram, Join, KvBits, KvFigures, Layout, LoadProgress, LogitBias,
    MemoryFigures, NodeWeight, Plan, PlanNumber, Rank, Rejection, Request, RequestEvent,
    RequestFailure, SampledToken, Sampling, SequenceId, ShardSpec, ShardSteps, Step,
    StepHistograms, StepOutcome, ThrottleFigures, Transport,
};
use offbook_runtime::fuzzing::{decoded, decoded_older, encoded};
use offbook_runtime::{RemoteMessage, StreamMessage};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::membership::{
    Announce, AnnounceBefore, NoteProgress, RegisterShard, RegisterShardBefore, StepFailed,
};
use crate::node_agent::{Attach, Probe};
use crate::scheduler::Submit;
use crate::shard_worker::{
    ApplyPlan, JoinGroup, Joined, LeaveGroup, LoadRefusal, LoadShard, Loaded, ReadSteps,
    WatchOutcomes,
};
use crate::simulation::Chance;

/// One value on the wire.
struct Sample {
    name: &'static str,
    version: u16,
    bytes: Vec<u8>,
    /// Reads hostile bytes as the type; what was read is written again.
    read: fn(&[u8]) -> Option<Vec<u8>>,
}

fn sample<T: Serialize + DeserializeOwned>(name: &'static str, version: u16, value: &T) -> Sample {
    Sample {
        name,
        version,
        bytes: encoded(value),
        read: |bytes| decoded::<T>(bytes).map(|value| encoded(&value)),
    }
}

fn message<M: RemoteMessage>(message: &M) -> Sample {
    sample(M::NAME, M::VERSION, message)
}

fn reply<M: RemoteMessage>(name: &'static str, reply: &M::Reply) -> Sample {
    sample(name, M::VERSION, reply)
}

fn item<M: StreamMessage>(name: &'static str, item: &M::Item) -> Sample {
    sample(name, M::VERSION, item)
}

fn samples() -> Vec<Sample> {
    let mut samples = of_nodes();
    samples.extend(of_shards());
    samples.extend(of_requests());
    samples
}

fn of_nodes() -> Vec<Sample> {
    vec![
        message(&Announce {
            node: "node-1".into(),
            pid: 4711,
            restarts: 3,
            last_failure: "exit status 1".into(),
            last_lines: vec!["out of memory".into(), "ä".into()],
            ended_pid: Some(4710),
            given_up: true,
            failed: true,
            actors: vec![actor()],
        }),
        sample("announce before", 3, &announce_before()),
        message(&RegisterShard {
            node: "node-1".into(),
            process: "node-1/shard".into(),
            pid: 70_000,
            heard: Epoch(300),
            actors: vec![ActorReport {
                ended_at: None,
                last_dead_letter: None,
                ..actor()
            }],
        }),
        sample("register-shard before", 2, &register_shard_before()),
        message(&NoteProgress {
            node: "node-1".into(),
            load: LoadProgress {
                rank: Rank(2),
                bytes_loaded: 1 << 33,
                bytes_total: 1 << 34,
            },
        }),
        message(&StepFailed {
            epoch: Epoch(5),
            rank: Rank(1),
            why: "late".into(),
        }),
        message(&Attach {
            process: "node-1/shard".into(),
            pid: 9,
        }),
        reply::<Attach>("attach reply", &true),
        message(&Probe {
            node: "node-2".into(),
        }),
        reply::<Probe>("probe reply", &false),
    ]
}

fn announce_before() -> AnnounceBefore {
    AnnounceBefore {
        node: "node-1".into(),
        pid: 4711,
        restarts: 3,
        last_failure: "exit status 1".into(),
        last_lines: vec!["out of memory".into(), "ä".into()],
        ended_pid: Some(4710),
        given_up: true,
        failed: true,
    }
}

fn register_shard_before() -> RegisterShardBefore {
    RegisterShardBefore {
        node: "node-1".into(),
        process: "node-1/shard".into(),
        pid: 70_000,
        heard: Epoch(300),
    }
}

fn actor() -> ActorReport {
    ActorReport {
        process: "node-1".into(),
        name: "scheduler".into(),
        restarts: 2,
        last_error: "panic: a fault".into(),
        ended_at: Some(1 << 31),
        dead_letters: 300,
        last_dead_letter: Some(DeadLetterReport {
            message: "Submit".into(),
            cause: "a fault".into(),
        }),
        given_up: true,
    }
}

fn of_shards() -> Vec<Sample> {
    let spec = ShardSpec {
        epoch: Epoch(7),
        rank: Rank(1),
        model: "/models/demo".into(),
        layout: Layout::Expert,
        weights: vec![NodeWeight(1.0), NodeWeight(0.5)],
        transport: Transport::SharedMemory,
        fast_synch: FastSynch::Require,
        prefill_chunk_tokens: 256,
        context_tokens: 196_608,
        sequences_max: 16,
        kv_tokens: Some(65_536),
        kv_bits: KvBits::Eight,
        prefix_cache: true,
        micro_batches: NonZeroU32::new(2),
        collective_deadline: Duration::from_millis(2500),
    };
    let group = GroupSpec {
        epoch: Epoch(7),
        rank: Rank(1),
        members: vec![GroupMember {
            process: "node-1/shard".into(),
            address: ([10, 0, 0, 1], 7700).into(),
            rdma: vec![None, Some("rdma_en5".into())],
        }],
        kv_tokens: 4096,
    };
    let loaded = Loaded {
        address: "[fe80::1]:7701".parse().unwrap(),
        sampling_rank: Rank(2),
        context_tokens: 4096,
        vocabulary: 200_064,
        kv_tokens: 65_536,
    };
    let refused = LoadRefusal {
        detail: "too large".into(),
        lasting: true,
    };
    let joined = Joined {
        collectives: "host".into(),
    };
    vec![
        message(&LoadShard(spec)),
        reply::<LoadShard>("load-shard loaded", &Ok(loaded)),
        reply::<LoadShard>("load-shard refused", &Err(refused)),
        message(&JoinGroup(group)),
        reply::<JoinGroup>("join-group joined", &Ok(joined)),
        reply::<JoinGroup>("join-group refused", &Err("late".into())),
        sample(
            WatchOutcomes::NAME,
            WatchOutcomes::VERSION,
            &WatchOutcomes { epoch: Epoch(7) },
        ),
        item::<WatchOutcomes>(
            "watch-outcomes item",
            &StepOutcome {
                epoch: Epoch(7),
                step: Step(1 << 20),
                tokens: vec![
                    token(),
                    SampledToken {
                        finish: None,
                        ..token()
                    },
                ],
            },
        ),
        message(&ApplyPlan(Plan {
            epoch: Epoch(7),
            number: PlanNumber(12),
            joins: vec![Join {
                sequence: SequenceId(99),
                prompt: vec![1, 300, 70_000],
                delivered: 2,
                sampling: sampling(),
                max_tokens: 64,
                stop_tokens: vec![2],
            }],
            leaves: vec![SequenceId(98)],
        })),
        message(&LeaveGroup {
            epoch: Epoch(7),
            why: "over".into(),
        }),
        message(&ReadSteps),
        reply::<ReadSteps>("read-steps reply", &Some(steps())),
        reply::<ReadSteps>("read-steps nothing", &None),
    ]
}

fn of_requests() -> Vec<Sample> {
    let request = Request {
        prompt: vec![1, 2, 300],
        sampling: sampling(),
        max_tokens: 100,
        max_tokens_by_default: true,
        stop_tokens: vec![2, 70_000],
        priority: -5,
        client: ClientId(u64::MAX),
        delivered: vec![7],
    };
    let event = |name, event: RequestEvent| item::<Submit>(name, &event);
    let rejected = |name, why| event(name, RequestEvent::Rejected(why));
    let failed = |name, why| event(name, RequestEvent::Failed(why));
    let detail = || "why".to_owned();
    vec![
        sample(Submit::NAME, Submit::VERSION, &Submit(request)),
        event("submit accepted", RequestEvent::Accepted),
        event("submit token", RequestEvent::Token(token())),
        event("submit paused", RequestEvent::Paused),
        rejected(
            "submit overloaded",
            Rejection::Overloaded {
                queued: 3,
                tokens: 1 << 33,
                retry_after_seconds: 7,
            },
        ),
        rejected(
            "submit share-used",
            Rejection::ShareUsed {
                queued: 3,
                retry_after_seconds: 7,
            },
        ),
        rejected("submit not-ready", Rejection::NotReady { detail: detail() }),
        rejected(
            "submit too-long",
            Rejection::TooLong {
                prompt_tokens: 9000,
                completion_tokens: Some(100),
                context_tokens: 4096,
            },
        ),
        rejected("submit invalid", Rejection::Invalid { detail: detail() }),
        failed(
            "submit shard-lost",
            RequestFailure::ShardLost { detail: detail() },
        ),
        failed(
            "submit cluster-failed",
            RequestFailure::ClusterFailed { detail: detail() },
        ),
        failed(
            "submit deadline-exceeded",
            RequestFailure::DeadlineExceeded { seconds: 600 },
        ),
        failed(
            "submit lost-repeatedly",
            RequestFailure::LostRepeatedly { losses: 3 },
        ),
        failed(
            "submit not-begun",
            RequestFailure::NotBegun {
                seconds: 60,
                retry_after_seconds: 5,
            },
        ),
    ]
}

fn sampling() -> Sampling {
    Sampling {
        temperature: 0.7,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.05,
        repetition_penalty: 1.1,
        presence_penalty: -0.5,
        frequency_penalty: 0.25,
        logit_bias: vec![LogitBias {
            token: 300,
            bias: -100.0,
        }],
        min_tokens: 4,
        seed: u64::MAX - 1,
        logprobs: Some(5),
    }
}

fn token() -> SampledToken {
    SampledToken {
        sequence: SequenceId(99),
        token: 151_643,
        logprob: Some(-0.25),
        top: vec![Candidate {
            token: 1,
            logprob: -1.5,
        }],
        cached_tokens: 256,
        finish: Some(FinishReason::Length),
    }
}

fn steps() -> ShardSteps {
    let mut seen = Histogram::default();
    seen.observe(Duration::from_micros(125));
    let times = StepHistograms {
        total: seen.clone(),
        collective: seen,
        ..StepHistograms::default()
    };
    ShardSteps {
        rank: Rank(1),
        node: "node-1".into(),
        decode: times,
        prefill: StepHistograms::default(),
        kv: KvFigures {
            in_use_tokens: 1,
            retained_tokens: 2,
            capacity_tokens: 300,
            preemptions: 4,
        },
        memory: MemoryFigures {
            active_bytes: 1,
            cache_bytes: 2,
            peak_bytes: 3,
            limit_bytes: 1 << 40,
        },
        throttle: ThrottleFigures {
            prefill_window: 30,
            decode_window: 100,
            chunk_permille: 1500,
            shrinks: 1,
            cache_clears: 2,
        },
    }
}

fn line(sample: &Sample) -> String {
    let bytes: String = sample
        .bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{} {} {bytes}", sample.name, sample.version)
}

#[test]
fn the_bytes_of_no_message_change() {
    let golden = std::fs::read_to_string(GOLDEN).unwrap();
    let golden: Vec<_> = golden.lines().collect();
    let lines: Vec<_> = samples().iter().map(line).collect();
    for (at, line) in lines.iter().enumerate() {
        let known = golden.get(at).copied().unwrap_or_default();
        assert_eq!(
            line.trim_end(),
            known,
            "line {}; all of them:\n{}",
            at + 1,
            lines.join("\n")
        );
    }
    assert_eq!(
        lines.len(),
        golden.len(),
        "a message is not sampled any more"
    );
}

#[test]
fn what_nodes_said_in_the_version_before_is_understood() {
    let bytes = encoded(&announce_before());
    let announce: Announce = decoded_older(3, &bytes).unwrap();
    assert_eq!((&*announce.node, announce.pid), ("node-1", 4711));
    assert!(announce.failed && announce.given_up && announce.actors.is_empty());
    assert!(decoded_older::<Announce>(2, &bytes).is_none());
    let bytes = encoded(&register_shard_before());
    let register: RegisterShard = decoded_older(2, &bytes).unwrap();
    let expected = ("node-1/shard", 70_000, Epoch(300));
    assert_eq!((&*register.process, register.pid, register.heard), expected);
    assert!(register.actors.is_empty());
    assert!(decoded_older::<RegisterShard>(1, &bytes).is_none());
}

#[test]
fn every_message_survives_the_wire_and_no_piece_of_one_passes_for_it() {
    for sample in samples() {
        let again = (sample.read)(&sample.bytes);
        assert_eq!(again.as_ref(), Some(&sample.bytes), "{}", sample.name);
        for end in 0..sample.bytes.len() {
            assert_eq!(
                (sample.read)(&sample.bytes[..end]),
                None,
                "{} cut",
                sample.name
            );
        }
        let longer = [&sample.bytes[..], &[0]].concat();
        assert_eq!((sample.read)(&longer), None, "{} and more", sample.name);
    }
}

/// The decoder's limits end each of these; without them one such length ends the process.
#[test]
fn a_length_that_is_a_lie_allocates_nothing() {
    for sample in samples() {
        for at in 0..sample.bytes.len() {
            for length in [1 << 24, 1 << 32, u64::MAX] {
                let lie = [&[253][..], &length.to_le_bytes()].concat();
                let mut bytes = sample.bytes.clone();
                bytes.splice(at..=at, lie);
                let _ = (sample.read)(&bytes);
            }
        }
    }
}

#[test]
fn no_bytes_panic_and_what_is_read_is_what_would_be_written() {
    let samples = samples();
    let mut chance = Chance::new(3);
    for round in 0..60_000 {
        let origin = &samples[chance.below(samples.len())];
        let mut bytes = origin.bytes.clone();
        if round % 4 == 0 {
            bytes = (0..chance.below(300))
                .map(|_| any_byte(&mut chance))
                .collect();
        }
        for _ in 0..chance.below(4) {
            damage(&mut bytes, &mut chance);
        }
        for sample in &samples {
            if let Some(written) = (sample.read)(&bytes) {
                // A number may have been written at greater length than it needs.
                assert!(written.len() <= bytes.len(), "{}", sample.name);
                let again = (sample.read)(&written);
                assert_eq!(again.as_ref(), Some(&written), "{}", sample.name);
            }
        }
    }
}

fn any_byte(chance: &mut Chance) -> u8 {
    chance.below(256) as u8
}

/// Flips, sets, cuts, inserts or repeats.
fn damage(bytes: &mut Vec<u8>, chance: &mut Chance) {
    if bytes.is_empty() {
        bytes.push(any_byte(chance));
    }
    let at = chance.below(bytes.len());
    match chance.below(5) {
        0 => bytes[at] ^= 1 << chance.below(8),
        1 => bytes[at] = [0, 1, 127, 128, 250, 251, 252, 253, 254, 255][chance.below(10)],
        2 => bytes.truncate(at),
        3 => bytes.insert(at, any_byte(chance)),
        _ => {
            let piece = bytes[at..].to_vec();
            bytes.extend_from_slice(&piece);
        }
    }
}

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/wire/golden.txt");
