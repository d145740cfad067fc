//! What a supervisor can keep: something that is started again and again, and each time lives until
//! it ends or is stopped. A program is one ([`child`](super::child)), an actor another; a simulation
//! has processes of its own.

use std::time::Duration;

use futures::future::BoxFuture;

use super::status::Exit;

/// Something that can be started again and again.
pub trait Kept: Send {
    /// Begins a life; there is no other when this is called. It resolves when the life has begun, so
    /// that what is started later finds it there.
    fn start(&mut self) -> BoxFuture<'_, Result<Box<dyn Life>, Exit>>;

    /// It will not be started again: resolves when nobody can reach it any more.
    fn leave(self: Box<Self>) -> BoxFuture<'static, ()>;
}

/// One life. Dropping it ends it; what a life that has ended leaves behind goes with it too.
pub trait Life: Send {
    /// The process that it is; `None` if it is a part of this one.
    fn pid(&self) -> Option<u32>;

    /// Waits for its end. The future may be dropped and made again until it resolves.
    fn ended(&mut self) -> BoxFuture<'_, End>;

    /// Ends it at once, if it is a process.
    fn kill(&mut self);

    /// Ends it in order, or at once when that takes longer than `deadline`.
    fn stop(&mut self, deadline: Duration) -> BoxFuture<'_, Exit>;
}

/// How a life ended that nobody had asked to.
pub struct End {
    /// How.
    pub exit: Exit,
    /// The last that it wrote to standard error.
    pub last_lines: Vec<String>,
}

impl From<Exit> for End {
    fn from(exit: Exit) -> Self {
        Self {
            exit,
            last_lines: Vec::new(),
        }
    }
}
