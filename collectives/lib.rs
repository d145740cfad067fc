//! Collective operations of one group of ranks: MLX's own lazy distributed operations, in order on
//! the stream, carried by a transport of ours or by MLX's ring.
//!
//! Invariants: every wait has a deadline; the first error poisons the group for good; an operation
//! of a poisoned group yields zeros at once, never stale memory; all ranks hold the same bits.
//! This crate knows nothing of models, actors or messages.

mod group;
mod handle;
mod transport;
pub mod quic;
pub mod shared_memory;
mod ring;

mod carrier;
mod error;
mod ffi;
mod health;
mod operation;
mod reduce;

pub mod conformance;

pub use self::error::CollectiveError;
pub use self::group::{Gathered, Group};
pub use self::handle::GroupHandle;
pub use self::operation::{Envelope, Operation};
pub use self::quic::{JoinSpec, QuicEndpoint, QuicOptions, QuicTransport, TensorTls};
pub use self::ring::RingSpec;
pub use self::shared_memory::{Segment, SharedMemory, SharedMemoryOptions, SharedMemorySpec};
pub use self::transport::{Exchange, POISON_LATENCY_MAX, Transport, Wait};
