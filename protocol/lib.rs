//! What Offbook's processes say to each other: plain data, no IO, no actors, no tensors.
//!
//! Read in the order of a request's life: who is meant (`ids`), how a token is drawn
//! (`sampling`), what the scheduler asks of every shard (`plan`), what a step answers
//! (`outcome`), how a shard comes to hold its share of a model (`shard`), what becomes of a request
//! (`request`), and what an operator sees of it all (`cluster`, `steps`).

mod ids;
mod sampling;
mod plan;
mod outcome;
mod kv_bits;
mod shard;
mod request;
mod cluster;
mod steps;

pub use cluster::{ActorReport, ClusterReport, DeadLetterReport, NodeReport, Phase, ShardReport};
pub use ids::{Epoch, PlanNumber, Rank, SequenceId, Step};
pub use kv_bits::{KvBits, UnknownKvBits};
pub use outcome::{Candidate, FinishReason, SampledToken, StepOutcome};
pub use plan::{Join, Plan};
pub use request::{ClientId, Rejection, Request, RequestEvent, RequestFailure};
pub use sampling::{LogitBias, Sampling, SamplingError};
pub use shard::{
    FastSynch, GroupMember, GroupSpec, Layout, LoadProgress, NodeWeight, ShardSpec, Transport,
    UnknownName,
};
pub use steps::{Histogram, KvFigures, MemoryFigures, ShardSteps, StepHistograms, ThrottleFigures};
