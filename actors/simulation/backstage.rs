//! What simulated processes ask of their machines: to start, kill and stop other processes, and to have
//! shards meet. The world carries it out between two windows.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{self, BoxFuture};
use offbook_collectives::{CollectiveError, Operation};
use offbook_protocol::{Epoch, GroupSpec, Rank};
use offbook_runtime::supervise::{End, Exit, Kept, Life};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Pid;

/// Shared by the world and everybody in it.
#[derive(Clone, Default)]
pub(super) struct Backstage(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    last_pid: Pid,
    last_port: u16,
    orders: Vec<Order>,
    meetings: Vec<Meeting>,
}

/// What a machine is to do.
pub(super) enum Order {
    /// Start the shard's process of this machine's node.
    Start {
        machine: usize,
        pid: Pid,
        ended: oneshot::Sender<Exit>,
    },
    /// SIGKILL.
    Kill(Pid),
    /// SIGTERM.
    Terminate(Pid),
    /// It ends by itself.
    Exit(Pid, Exit),
}

/// A shard that waits for the others of its group.
pub(super) struct Meeting {
    pub(super) pid: Pid,
    pub(super) epoch: Epoch,
    pub(super) rank: Rank,
    pub(super) members: Vec<Pid>,
    pub(super) met: oneshot::Sender<()>,
}

impl Backstage {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number that no process had before. None has 0: the membership takes that for a node that never came.
    pub(super) fn next_pid(&self) -> Pid {
        let mut state = self.state();
        state.last_pid += 1;
        state.last_pid
    }

    pub(super) fn order(&self, order: Order) {
        self.state().orders.push(order);
    }

    pub(super) fn take_orders(&self) -> Vec<Order> {
        std::mem::take(&mut self.state().orders)
    }

    pub(super) fn take_meetings(&self) -> Vec<Meeting> {
        std::mem::take(&mut self.state().meetings)
    }
}

/// How a node starts its shard's process.
#[derive(Clone)]
pub(crate) struct Launcher {
    pub(super) machine: usize,
    pub(super) backstage: Backstage,
}

impl std::fmt::Debug for Launcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Launcher({})", self.machine)
    }
}

impl Kept for Launcher {
    fn start(&mut self) -> BoxFuture<'_, Result<Box<dyn Life>, Exit>> {
        let (ended, end) = oneshot::channel();
        let backstage = self.backstage.clone();
        let pid = backstage.next_pid();
        backstage.order(Order::Start {
            machine: self.machine,
            pid,
            ended,
        });
        let child = Child {
            pid,
            end,
            backstage,
        };
        Box::pin(future::ready(Ok(Box::new(child) as Box<dyn Life>)))
    }

    fn leave(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(future::ready(()))
    }
}

/// A shard's process, as its node sees it.
struct Child {
    pid: Pid,
    end: oneshot::Receiver<Exit>,
    backstage: Backstage,
}

impl Child {
    async fn exited(&mut self) -> Exit {
        let exit = (&mut self.end).await;
        exit.unwrap_or_else(|_| Exit::Unknown("its machine is gone".into()))
    }
}

impl Life for Child {
    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }

    fn ended(&mut self) -> BoxFuture<'_, End> {
        Box::pin(async { self.exited().await.into() })
    }

    fn kill(&mut self) {
        self.backstage.order(Order::Kill(self.pid));
    }

    fn stop(&mut self, deadline: Duration) -> BoxFuture<'_, Exit> {
        self.backstage.order(Order::Terminate(self.pid));
        Box::pin(async move {
            if let Ok(exit) = timeout(deadline, self.exited()).await {
                return exit;
            }
            self.kill();
            self.exited().await
        })
    }
}

impl Drop for Child {
    /// No process outlives the one that started it.
    fn drop(&mut self) {
        self.kill();
    }
}

/// Where the shard of one process meets others.
#[derive(Clone)]
pub(crate) struct Hall {
    pub(super) pid: Pid,
    pub(super) backstage: Backstage,
}

impl Hall {
    /// An address that says whose it is.
    pub(crate) fn bind(&self) -> SocketAddr {
        let mut state = self.backstage.state();
        state.last_port = state.last_port.wrapping_add(1).max(1);
        let [a, b, c, d] = self.pid.to_be_bytes();
        SocketAddr::from(([a, b, c, d], state.last_port))
    }

    fn owner(address: SocketAddr) -> Pid {
        match address {
            SocketAddr::V4(address) => address.ip().to_bits(),
            SocketAddr::V6(_) => unreachable!("a hall gives addresses of four bytes"),
        }
    }

    /// Resolves when all are there.
    pub(crate) async fn meet(
        &self,
        spec: &GroupSpec,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let (met, has_met) = oneshot::channel();
        let members = spec.members.iter();
        self.backstage.state().meetings.push(Meeting {
            pid: self.pid,
            epoch: spec.epoch,
            rank: spec.rank,
            members: members.map(|member| Self::owner(member.address)).collect(),
            met,
        });
        let met = timeout(deadline, has_met).await;
        met.ok().and_then(Result::ok).ok_or(CollectiveError::Late {
            rank: 0,
            operation: Operation::Join,
            deadline,
        })
    }
}
