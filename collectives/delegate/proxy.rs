//! The proxy: a thread that does nothing but carry one device's operands over the group's transport.
//!
//! It is told what comes next before the device gets there, takes the operand word by word as soon
//! as it is written, has the carrier exchange and fold it, and writes the answer. It knows nothing of
//! streams or kernels, and cannot tell a device from a thread that plays one.

use std::{
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mlx_rs::Dtype;

use super::{
    Control, Device,
    gave_up::GaveUp,
    job::{Job, Traffic},
    words::{self, Overrun, Sequence},
};
use crate::{
    carrier::{Carrier, InPlace, Work},
    error::CollectiveError,
};

/// The engine's hold on the proxy's thread, which ends with it.
pub(super) struct Proxy {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

/// An operation that the device will come to.
pub(super) struct Order {
    pub(super) sequence: Sequence,
    pub(super) job: Job,
    pub(super) dtype: Dtype,
    pub(super) traffic: Traffic,
}

impl Proxy {
    pub(super) fn start(
        device: Arc<dyn Device>,
        carrier: Arc<Carrier>,
    ) -> Result<Self, CollectiveError> {
        let (orders, inbox) = channel();
        let server = Server {
            device,
            carrier,
            spin: spare_cores(),
            operand: Vec::new(),
            gathered: Vec::new(),
        };
        let thread = thread::Builder::new()
            .name("offbook-proxy".into())
            .spawn(move || server.serve(&inbox))
            .map_err(|why| CollectiveError::local("starting the proxy's thread", why))?;
        Ok(Self {
            orders: Some(orders),
            thread: Some(thread),
        })
    }

    /// Says what the device will come to next. To be said before the device can get there.
    pub(super) fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // A proxy that is gone has poisoned the group: the device's wait is ended by that.
            let _ = orders.send(order);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // It ends with its inbox, and a wait under way with `Control::Stop`.
            let _ = thread.join();
        }
    }
}

struct Server {
    device: Arc<dyn Device>,
    carrier: Arc<Carrier>,
    /// Whether a wait may keep a core to itself.
    spin: bool,
    operand: Vec<u8>,
    gathered: Vec<u8>,
}

impl Server {
    fn serve(mut self, inbox: &Receiver<Order>) {
        tracing::debug!(spin = self.spin, "the proxy is there");
        while let Some(order) = self.next(inbox) {
            if let Err(why) = self.carry_out(&order) {
                // After this the device waits for nothing, and later orders find a poisoned group.
                self.carrier.health().poison(why);
                self.device.control(Control::Stop).store(1, Relaxed);
                self.carrier.tell_peers();
            }
        }
    }

    /// The next order. Between the layers of one step it is there already; between two steps a
    /// sleeping thread would cost a wake-up.
    fn next(&self, inbox: &Receiver<Order>) -> Option<Order> {
        let idle_since = Instant::now();
        while self.spin && idle_since.elapsed() < IDLE_SPIN {
            match inbox.try_recv() {
                Ok(order) => return Some(order),
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => std::hint::spin_loop(),
            }
        }
        loop {
            match inbox.recv_timeout(IDLE_CHECK) {
                Ok(order) => return Some(order),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn carry_out(&mut self, order: &Order) -> Result<(), CollectiveError> {
        self.carrier.health().check()?;
        let mut operand = std::mem::take(&mut self.operand);
        let mut gathered = std::mem::take(&mut self.gathered);
        operand.resize(order.traffic.up_bytes, 0);
        let taken = words::read(
            self.device.up(),
            order.sequence,
            &mut operand,
            self.patience(),
        );
        let done = taken
            .map_err(|end| end.into_error(order))
            .and_then(|()| self.exchange(order, &mut operand, &mut gathered));
        (self.operand, self.gathered) = (operand, gathered);
        done
    }

    /// Has the carrier do the job, and writes the answer.
    fn exchange(
        &self,
        order: &Order,
        operand: &mut Vec<u8>,
        gathered: &mut Vec<u8>,
    ) -> Result<(), CollectiveError> {
        let dtype = order.dtype;
        let down = order.traffic.down_bytes;
        let in_place = |task, data| self.carrier.run(Work::InPlace { task, dtype, data });
        let answer: &[u8] = match &order.job {
            Job::Reduce(reduction) => {
                in_place(InPlace::Reduce(*reduction), operand)?;
                operand
            }
            Job::Broadcast { root } => {
                in_place(InPlace::Broadcast { root: *root }, operand)?;
                operand
            }
            Job::Receive { from } => {
                operand.resize(down, 0);
                in_place(InPlace::Receive { from: *from }, operand)?;
                operand
            }
            Job::Send { to } => {
                let (input, to) = (&operand[..], *to);
                self.carrier.run(Work::Send { dtype, input, to })?;
                operand
            }
            Job::AllGather => {
                gathered.resize(down, 0);
                let (input, output) = (&operand[..], &mut gathered[..]);
                self.carrier.run(Work::AllGather {
                    dtype,
                    input,
                    output,
                })?;
                gathered
            }
            Job::GatherTo { root, parts } => {
                let task = InPlace::GatherTo { root: *root, parts };
                if *root == self.carrier.rank() {
                    gathered.resize(down, 0);
                    let start: usize = parts[..*root].iter().sum();
                    gathered[start..start + operand.len()].copy_from_slice(operand);
                    in_place(task, gathered)?;
                } else {
                    in_place(task, operand)?;
                    gathered.clear();
                }
                gathered
            }
        };
        words::write(self.device.down(), order.sequence, answer);
        Ok(())
    }

    /// What is done between two looks at a word that is not there yet. The device may be at work on
    /// a layer for as long as it takes: only a failure ends this wait.
    fn patience(&self) -> impl FnMut() -> Result<(), End> {
        let mut looks: u32 = 0;
        let (device, carrier, spin) = (self.device.clone(), self.carrier.clone(), self.spin);
        move || {
            looks = looks.saturating_add(1);
            if looks.is_multiple_of(LOOKS_PER_CHECK) || !spin {
                if let Some(gave_up) = GaveUp::of(device.as_ref()) {
                    let (rank, deadline) = (carrier.rank(), carrier.deadline());
                    return Err(End::Failed(gave_up.into_error(rank, deadline)));
                }
                if let Some(why) = carrier.health().first_error() {
                    return Err(End::Failed(why));
                }
                if device.control(Control::Stop).load(Relaxed) != 0 {
                    return Err(End::Failed(CollectiveError::Poisoned {
                        why: "the group is gone".to_owned(),
                    }));
                }
            }
            match (spin, looks) {
                (true, ..SPINS_MAX) => std::hint::spin_loop(),
                (false, ..YIELDS_MAX) => thread::yield_now(),
                _ => thread::sleep(NAP),
            }
            Ok(())
        }
    }
}

/// Why the proxy stopped waiting for its device.
enum End {
    Failed(CollectiveError),
    Overrun(Overrun),
}

impl From<Overrun> for End {
    fn from(overrun: Overrun) -> Self {
        Self::Overrun(overrun)
    }
}

impl End {
    fn into_error(self, order: &Order) -> CollectiveError {
        match self {
            Self::Failed(why) => why,
            Self::Overrun(Overrun { expected, found }) => CollectiveError::local(
                "taking an operand from the device",
                format!(
                    "{} #{} was expected, #{} is there: two operations were not in order",
                    order.job.operation(),
                    expected.0,
                    found.0
                ),
            ),
        }
    }
}

/// Whether there is a core for every thread that this process keeps busy, and some to spare for
/// other shards of the host. The thread is not tied to a core: the proxies of two groups that met on
/// one would both crawl, and the system moves a thread that never sleeps only when it must.
fn spare_cores() -> bool {
    thread::available_parallelism().is_ok_and(|cores| cores.get() >= SPIN_CORES_MIN)
}

/// Below this a spinning proxy takes the core that the engine or the transport needs.
const SPIN_CORES_MIN: usize = 4;
/// Longer than a host needs to build its next step, short enough to cost an idle shard nothing.
const IDLE_SPIN: Duration = Duration::from_millis(2);
const IDLE_CHECK: Duration = Duration::from_secs(1);
/// A look takes some nanoseconds; failures are noticed within microseconds.
const LOOKS_PER_CHECK: u32 = 256;
/// About a second: longer than a layer takes, and what was ordered may never be evaluated.
const SPINS_MAX: u32 = 50_000_000;
/// Without a core to spare: yield for about the length of a layer, then sleep.
const YIELDS_MAX: u32 = 2000;
const NAP: Duration = Duration::from_micros(50);
