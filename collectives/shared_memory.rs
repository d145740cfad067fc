//! Memory that the shard processes of one host share.

mod segment;

pub use self::segment::Segment;
