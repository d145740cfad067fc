//! What a delegated operation is to do: said once, when the engine asks for it.

use mlx_rs::Array;

use crate::{operation::Operation, reduce::Reduction};

/// One operation. Ranks are counted from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Job {
    Reduce(Reduction),
    AllGather,
    Broadcast {
        root: usize,
    },
    /// The result is the operand.
    Send {
        to: usize,
    },
    /// The operand has the shape and type of what comes; its value is not looked at.
    Receive {
        from: usize,
    },
    /// `parts` are bytes per rank. The result is all of them on the root, a word elsewhere.
    GatherTo {
        root: usize,
        parts: Box<[usize]>,
    },
}

impl Job {
    pub(crate) fn operation(&self) -> Operation {
        match self {
            Self::Reduce(Reduction::Sum) => Operation::AllSum,
            Self::Reduce(Reduction::Max) => Operation::AllMax,
            Self::Reduce(Reduction::Min) => Operation::AllMin,
            Self::AllGather => Operation::AllGather,
            Self::Broadcast { .. } => Operation::Broadcast,
            Self::Send { .. } => Operation::Send,
            Self::Receive { .. } => Operation::Receive,
            Self::GatherTo { .. } => Operation::GatherTo,
        }
    }

    /// Whether every rank of the group takes part: devices that exchange by themselves count such
    /// operations, and must all count the same.
    pub(super) fn is_of_all(&self) -> bool {
        !matches!(self, Self::Send { .. } | Self::Receive { .. })
    }

    /// Whether a big operand may be cut anywhere, each piece being an operation of its own.
    pub(super) fn goes_in_pieces(&self) -> bool {
        !matches!(self, Self::AllGather | Self::GatherTo { .. })
    }

    /// The most bytes that any rank shows to all: the same number on every rank.
    pub(super) fn shown_bytes(&self, operand: &Array) -> usize {
        match self {
            Self::GatherTo { parts, .. } => parts.iter().copied().max().unwrap_or(0),
            _ => operand.nbytes(),
        }
    }

    /// What crosses for this job on `rank` of `size`.
    pub(super) fn traffic(&self, operand: &Array, rank: usize, size: usize) -> Traffic {
        let bytes = operand.nbytes();
        let same = |up_bytes| Traffic {
            up_bytes,
            down_bytes: bytes,
            result: Shape::LikeOperand,
        };
        match self {
            Self::Reduce(_) | Self::Broadcast { .. } | Self::Send { .. } => same(bytes),
            Self::Receive { .. } => same(0),
            Self::AllGather => Traffic {
                up_bytes: bytes,
                down_bytes: bytes * size,
                result: Shape::Rows(rows(operand) * size as i32),
            },
            Self::GatherTo { root, .. } if *root != rank => Traffic {
                up_bytes: bytes,
                down_bytes: 0,
                result: Shape::Word,
            },
            Self::GatherTo { parts, .. } => {
                let all: usize = parts.iter().sum();
                // An operand without rows says nothing about bytes per row; then all are alike.
                let row_bytes = row_bytes(operand);
                Traffic {
                    up_bytes: bytes,
                    down_bytes: all,
                    result: Shape::Rows((all / row_bytes.max(1)) as i32),
                }
            }
        }
    }
}

/// Bytes there and back, and the shape of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub(crate) up_bytes: usize,
    pub(crate) down_bytes: usize,
    pub(crate) result: Shape,
}

/// The shape of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    LikeOperand,
    /// That of the operand with so many rows.
    Rows(i32),
    /// One `u32` that stands for the operation.
    Word,
}

fn rows(operand: &Array) -> i32 {
    operand.shape().first().copied().unwrap_or(1)
}

fn row_bytes(operand: &Array) -> usize {
    let shape = operand.shape();
    let width: usize = shape.iter().skip(1).map(|&n| n as usize).product();
    width * operand.item_size()
}
