//! Whether the processes of the other ranks still exist. A process that is killed says nothing; the
//! system knows.

use super::board::Board;

/// The processes of all ranks, as they were when the group met.
pub(super) struct Processes {
    #[cfg(target_os = "linux")]
    watched: Vec<Watched>,
    #[cfg(not(target_os = "linux"))]
    watched: Vec<Option<rustix::process::Pid>>,
}

/// A handle on a process stays on that process, whoever gets its number later.
#[cfg(target_os = "linux")]
enum Watched {
    Handle(std::os::fd::OwnedFd),
    /// It had ended before we could watch it.
    Ended,
    /// The system does not let us watch it: only the deadline tells.
    Unknown,
}

#[cfg(target_os = "linux")]
impl Processes {
    pub(super) fn watch(board: &Board) -> Self {
        use rustix::{
            io::Errno,
            process::{Pid, PidfdFlags, pidfd_open},
        };
        let watched = |rank| {
            let process = Pid::from_raw(board.process(rank).cast_signed());
            match process.map(|process| pidfd_open(process, PidfdFlags::empty())) {
                Some(Ok(handle)) => Watched::Handle(handle),
                Some(Err(Errno::SRCH)) => Watched::Ended,
                Some(Err(_)) | None => Watched::Unknown,
            }
        };
        Self {
            watched: (0..board.layout.size).map(watched).collect(),
        }
    }

    /// Whether the process of `rank` has ended.
    pub(super) fn has_ended(&self, rank: usize) -> bool {
        use rustix::{
            event::{PollFd, PollFlags, Timespec, poll},
            io::Errno,
        };
        match self.watched.get(rank) {
            Some(Watched::Handle(handle)) => {
                // A handle becomes readable when its process ends.
                let mut handles = [PollFd::new(handle, PollFlags::IN)];
                let at_once = Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                };
                match poll(&mut handles, Some(&at_once)) {
                    Ok(ready) => ready > 0,
                    Err(Errno::INTR | _) => false,
                }
            }
            Some(Watched::Ended) => true,
            Some(Watched::Unknown) | None => false,
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Processes {
    pub(super) fn watch(board: &Board) -> Self {
        use rustix::process::Pid;
        let watched = |rank| Pid::from_raw(board.process(rank).cast_signed());
        Self {
            watched: (0..board.layout.size).map(watched).collect(),
        }
    }

    /// Whether the process of `rank` has ended, and whoever started it has taken note.
    pub(super) fn has_ended(&self, rank: usize) -> bool {
        use rustix::{io::Errno, process::test_kill_process};
        match self.watched.get(rank) {
            Some(Some(process)) => test_kill_process(*process) == Err(Errno::SRCH),
            _ => false,
        }
    }
}
