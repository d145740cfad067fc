//! Ranks connected over QUIC, one connection per pair, driven by the thread that waits.
//!
//! There is no runtime and no second thread on the path of a collective: the stream's thread writes
//! its operands, then polls socket and timers itself until the others' have come. Between
//! collectives a keeper thread looks in every few milliseconds, for keep-alives, acknowledgements
//! and closes. `rendezvous` meets, `driver` moves packets, `link` is one peer.

mod driver;
mod hello;
mod keeper;
mod link;
mod options;
mod rendezvous;
mod socket;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use self::{
    driver::{Driver, Pass},
    keeper::Keeper,
    link::Farewell,
};
use crate::{
    error::CollectiveError,
    operation::Operation,
    transport::{Exchange, Transport, Wait},
};

pub use self::options::{QuicOptions, TensorTls};

/// Who meets whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinSpec {
    /// Which life of the group this is; ranks of another one are refused.
    pub epoch: u64,
    /// Our place, from 0.
    pub rank: usize,
    /// Where each rank's endpoint is bound, by rank, ours included.
    pub peers: Vec<SocketAddr>,
}

/// A bound endpoint that is in no group yet: its address can be told to the others.
pub struct QuicEndpoint {
    driver: Driver,
    tls: TensorTls,
    options: QuicOptions,
    local: SocketAddr,
}

impl QuicEndpoint {
    /// Binds a UDP socket; port 0 takes any free one.
    ///
    /// # Errors
    /// [`CollectiveError::Local`] when the address cannot be bound.
    pub fn bind(
        addr: SocketAddr,
        tls: TensorTls,
        options: QuicOptions,
    ) -> Result<Self, CollectiveError> {
        let driver = Driver::bind(addr, &options)?;
        let local = driver.local_addr()?;
        Ok(Self {
            driver,
            tls,
            options,
            local,
        })
    }

    /// Where the endpoint is bound, with the real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Meets all peers: the lower rank of each pair calls the higher. Blocks until everybody is
    /// there, at most for `deadline`.
    ///
    /// # Errors
    /// [`CollectiveError::Late`] naming a rank that did not come, [`CollectiveError::WrongEpoch`] or
    /// [`CollectiveError::Refused`] when a peer does not belong, [`CollectiveError::Lost`] when one
    /// cannot be talked to (an unknown key, for one).
    pub fn join(
        mut self,
        spec: &JoinSpec,
        deadline: Duration,
    ) -> Result<QuicTransport, CollectiveError> {
        if spec.rank >= spec.peers.len() {
            let why = format!("there is no rank {} of {}", spec.rank, spec.peers.len());
            return Err(CollectiveError::unsupported(Operation::Join, why));
        }
        let spin = self.options.spin.unwrap_or_else(|| spin_that_pays(spec));
        if let Err(why) =
            rendezvous::meet(&mut self.driver, &self.tls, &self.options, spec, deadline)
        {
            self.driver.close_all(Farewell::Poisoned(why.to_string()));
            return Err(why);
        }
        let driver = Arc::new(Mutex::new(self.driver));
        let keeper = Keeper::start(&driver, self.options.keeper_interval)?;
        Ok(QuicTransport {
            driver,
            keeper,
            rank: spec.rank,
            size: spec.peers.len(),
            spin,
        })
    }
}

/// All pairs of one rank, connected.
pub struct QuicTransport {
    driver: Arc<Mutex<Driver>>,
    keeper: Keeper,
    rank: usize,
    size: usize,
    spin: Duration,
}

impl QuicTransport {
    fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transport for QuicTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(
        &mut self,
        exchange: Exchange<'_, '_>,
        wait: Wait<'_>,
    ) -> Result<(), CollectiveError> {
        let Exchange {
            operation,
            dtype,
            outgoing,
            incoming,
        } = exchange;
        let mut driver = self.driver();
        let mut pass = Pass::begin(&mut driver, operation, dtype, outgoing, incoming)?;
        pass.complete(self.spin, wait)
    }

    fn abandon(&mut self, why: &CollectiveError) {
        self.driver().close_all(Farewell::Poisoned(why.to_string()));
    }
}

impl Drop for QuicTransport {
    fn drop(&mut self) {
        self.keeper.stop();
        self.driver().close_all(Farewell::Left);
    }
}

/// Spinning saves a wake-up when every rank on this host can have its waiting thread and its engine
/// thread on a core each; otherwise it takes the core from whom we wait for.
fn spin_that_pays(spec: &JoinSpec) -> Duration {
    let ours = spec.peers[spec.rank].ip();
    let same_host = |peer: &&SocketAddr| peer.ip() == ours || is_loopback(peer.ip());
    let ranks_here = spec.peers.iter().filter(same_host).count();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    match cores / ranks_here {
        0..2 => Duration::ZERO,
        2..4 => SPIN,
        _ => SPIN_WHERE_CORES_ABOUND,
    }
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// About one wake-up: after that, sleeping costs no more than what was already lost.
const SPIN: Duration = Duration::from_micros(50);
/// A virtual machine may need hundreds of microseconds to wake a core; a rank is rarely later than
/// this within a step, and asleep between steps.
const SPIN_WHERE_CORES_ABOUND: Duration = Duration::from_millis(2);
