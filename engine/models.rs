//! The architectures. One file per family of models; what they share lies beside them.

pub(crate) mod minimax;
pub(crate) mod attention;
pub(crate) mod experts;
pub(crate) mod rotary;
pub(crate) mod linear;
