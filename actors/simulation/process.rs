//! One simulated process: a runtime of its own, whose clock stands still while the process does, and whose
//! end is the end of all that ran in it.

use std::sync::Arc;
use std::time::Duration;

use offbook_runtime::simulation::network::{Network, Socket};
use offbook_runtime::supervise::Exit;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, oneshot};
use tokio::task::LocalSet;
use tokio::time::{Instant, advance, sleep_until};

use super::{Event, WINDOW};

/// See the module's own words.
pub(super) struct Process {
    pub(super) machine: usize,
    pub(super) frozen: bool,
    /// What became due while it was frozen.
    pub(super) held: Vec<Event>,
    /// Told of its end, if it has a supervisor.
    pub(super) ended: Option<oneshot::Sender<Exit>>,
    /// SIGTERM.
    pub(super) terminate: Arc<Notify>,
    socket: Arc<Socket>,
    // In the order in which they are dropped.
    tasks: LocalSet,
    runtime: Runtime,
    clock: Clock,
}

/// The clock of a process beside that of the world.
#[derive(Clone, Copy)]
struct Clock {
    began: Instant,
    at: Duration,
}

impl Process {
    /// A process whose `main` is given its socket, `now` by the world's clock.
    pub(super) fn start<F: Future + 'static>(
        machine: usize,
        now: Duration,
        bind: impl FnOnce(Duration) -> Arc<Socket>,
        main: impl FnOnce(Arc<Socket>, Arc<Notify>) -> F,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime can be made");
        let tasks = LocalSet::new();
        let terminate = Arc::new(Notify::new());
        let (socket, began) = {
            let _within = runtime.enter();
            (bind(now), Instant::now())
        };
        drop(tasks.spawn_local(main(Arc::clone(&socket), Arc::clone(&terminate))));
        Self {
            machine,
            frozen: false,
            held: Vec::new(),
            ended: None,
            terminate,
            socket,
            tasks,
            runtime,
            clock: Clock { began, at: now },
        }
    }

    /// How long it has lived.
    pub(super) fn age(&self, now: Duration) -> Duration {
        now - self.clock.at
    }

    /// Does what is to be done before `until`. Whoever stood still finds that time has passed at once.
    pub(super) fn run(&mut self, until: Duration) {
        let Clock { began, at } = self.clock;
        let window = async move {
            let now = at + began.elapsed();
            let missed = until.saturating_sub(now + WINDOW);
            if !missed.is_zero() {
                advance(missed).await;
            }
            sleep_until(began + (until - at)).await;
        };
        self.runtime.block_on(self.tasks.run_until(window));
    }

    /// Nothing of it leaves the machine any more.
    pub(super) fn end(self, network: &Network) {
        network.unplug(&self.socket);
        let _within = self.runtime.enter();
        drop(self.tasks);
    }
}
