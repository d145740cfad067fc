//! Where a peer may be dialled. Pure.

use std::net::SocketAddr;

/// Where a process may be: where this one was told, and where it last came from by itself.
#[derive(Default)]
pub(super) struct Places {
    told: Option<SocketAddr>,
    came: Option<SocketAddr>,
}

impl Places {
    /// Was that news? Then it also counts for more than where it came from before.
    pub(super) fn learn(&mut self, addr: SocketAddr) -> bool {
        if self.told == Some(addr) {
            return false;
        }
        (self.told, self.came) = (Some(addr), None);
        true
    }

    /// It has come from here by itself.
    pub(super) fn came_from(&mut self, addr: SocketAddr) {
        self.came = Some(addr);
    }

    /// Was this process told where it is?
    pub(super) fn is_told(&self) -> bool {
        self.told.is_some()
    }

    /// Where to dial after so many failures in a row. What it came from goes first; but its way here need
    /// not be a way there (a relay, an interface that is down again), so each second dial is for the
    /// other address.
    pub(super) fn next(&self, failures: u32) -> Option<SocketAddr> {
        match failures % 2 {
            0 => self.came.or(self.told),
            _ => self.told.or(self.came),
        }
    }
}
