//! Collective operations of one group of ranks: MLX's own lazy distributed operations, in order on
//! the stream of the device or of the CPU, carried by a transport of ours or of MLX's.
//!
//! Invariants: every wait has a deadline; the first error poisons the group for good; an operation
//! of a poisoned group yields zeros at once, never stale memory; all ranks hold the same bits.
//! This crate knows nothing of models, actors or messages.

mod group;
mod one_host;
mod handle;
mod fast_synch;
mod delegate;
mod transport;
pub mod quic;
pub mod shared_memory;
mod ring;
mod jaccl;
mod nccl;

mod carrier;
mod error;
mod ffi;
mod health;
mod operation;
mod reduce;

pub mod conformance;
#[cfg(target_os = "linux")]
mod graphs;
pub mod measure;

pub use self::delegate::{can_delegate, device_free_bytes};
pub use self::error::CollectiveError;
pub use self::fast_synch::{FastSynch, Path};
pub use self::group::{Gathered, Group};
pub use self::handle::GroupHandle;
pub use self::jaccl::JacclSpec;
pub use self::nccl::NcclSpec;
pub use self::one_host::OneHost;
pub use self::operation::{Envelope, Operation};
pub use self::quic::{JoinSpec, QuicEndpoint, QuicOptions, QuicTransport, TensorTls};
pub use self::ring::RingSpec;
pub use self::shared_memory::{Segment, SharedMemory, SharedMemoryOptions, SharedMemorySpec};
pub use self::transport::{Exchange, POISON_LATENCY_MAX, Transport, Wait};
