//! What messages take: asks, tells and subscriptions, within this process and to another one.
//! `offbook bench message` and this crate's own bench print what it finds.
//!
//! The far process is a child of the one that measures: [`Far::start`] starts it, and it calls
//! [`serve`]. Everything counts: TLS on both sides, codec, mailbox, deadline, and the wake-ups of
//! every thread on the way. The callee has a thread of its own, as any actor may.

mod callee;
mod caller;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::failure::{AskError, TellError};
use crate::identity::{Identity, IdentityError, NodeKey};
use crate::limits::Limits;
use crate::name::ActorPath;
use crate::stream::StreamLost;
use crate::system::{StartError, System, SystemConfig};
use crate::trust::{Trust, TrustedNode};

pub use callee::serve;
pub use caller::measure;

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The lengths of the messages' contents.
    pub bytes: Vec<usize>,
    /// Asks of each kind, one after the other; long ones are measured less often.
    pub asks: usize,
    /// Tells of each kind, as fast as they are taken.
    pub tells: u64,
    /// How much each subscription carries.
    pub items_bytes: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            bytes: vec![64, 4096, 65_536],
            asks: 20_000,
            tells: 1_000_000,
            items_bytes: 1 << 30,
        }
    }
}

/// One row of the result. What does not apply is `None`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// Whether the actor is in this process or behind a link.
    pub place: Place,
    /// What was done.
    pub kind: Kind,
    /// The length of a message's content.
    pub bytes: usize,
    /// The median of a round trip, in microseconds.
    pub p50_us: Option<f64>,
    /// Of a hundred round trips 99 took no longer, in microseconds.
    pub p99_us: Option<f64>,
    /// Messages per second.
    pub per_second: f64,
    /// Content per second, in MiB; for [`Kind::AskUnderBulk`] that of the bulk.
    pub mib_per_second: f64,
}

/// Where the measured actor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// In this process, on another thread.
    Local,
    /// In another process, over QUIC.
    Quic,
}

impl Place {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Quic => "quic",
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// One ask after the other.
    Ask,
    /// Many asks at a time.
    Asks,
    /// Tells, until the last one was handled.
    Tell,
    /// The items of one subscription.
    Subscribe,
    /// One ask of 64 bytes after the other while a subscription runs at full speed.
    AskUnderBulk,
}

impl Kind {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ask => "ask",
            Self::Asks => "asks, 64 at a time",
            Self::Tell => "tell",
            Self::Subscribe => "subscribe",
            Self::AskUnderBulk => "ask under bulk",
        }
    }
}

/// The process that is measured against. It ends with this value, and with this process.
#[derive(Debug)]
pub struct Far {
    addr: SocketAddr,
    trust: Trust,
    identity: Arc<Identity>,
    _child: Child,
}

impl Far {
    /// Writes keys into `folder`, which must be private to this user, and starts `command`, which
    /// must call [`serve`] with the same folder and print nothing before. On Linux the child ends
    /// with the thread that calls this.
    ///
    /// # Errors
    /// [`MeasureError`] when the process cannot be started or ends before it listens.
    pub async fn start(folder: &Path, mut command: Command) -> Result<Self, MeasureError> {
        let identity = Arc::new(Identity::generate(CALLER)?);
        let far = Identity::generate(CALLEE)?;
        far.save(&folder.join(CALLEE_KEY))?;
        std::fs::write(folder.join(CALLER_KEY), identity.key().to_string())?;
        let trust = trust(identity.key(), far.key());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().ok_or(MeasureError::NoAddress)?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(START_MAX, lines.next_line()).await;
        let line = line.map_err(|_| MeasureError::NoAddress)??;
        let addr = line.and_then(|line| line.trim().parse().ok());
        Ok(Self {
            addr: addr.ok_or(MeasureError::NoAddress)?,
            trust,
            identity,
            _child: child,
        })
    }

    /// A system of this process that knows the far one, and the path of the actor there.
    async fn meet(&self, limits: Limits) -> Result<(System, ActorPath), MeasureError> {
        let config = config(CALLER, &self.identity, self.trust.clone(), limits);
        let system = System::start(config).await?;
        let path: ActorPath = CALLEE_PATH.parse().expect("a constant that is a path");
        system.learn(path.process.clone(), self.addr);
        Ok((system, path))
    }
}

/// The bounds under which messages are measured: the defaults, but for queues that hold all tells
/// of one turn, so that none is dropped while the machine is busy elsewhere.
pub fn limits(spin: Duration) -> Limits {
    Limits {
        mailbox_max: 1 << 20,
        spin,
        ..Limits::default()
    }
}

fn trust(caller: NodeKey, callee: NodeKey) -> Trust {
    let node = |name: &str, key| TrustedNode {
        name: name.to_owned(),
        keys: vec![key],
    };
    Trust {
        cluster: "measure".into(),
        config_hash: 0,
        nodes: vec![node(CALLER, caller), node(CALLEE, callee)],
    }
}

fn config(process: &str, identity: &Arc<Identity>, trust: Trust, limits: Limits) -> SystemConfig {
    SystemConfig {
        process: process.parse().expect("a constant that is a name"),
        identity: Arc::clone(identity),
        trust,
        listen: ([127, 0, 0, 1], 0).into(),
        boot: 1,
        limits,
    }
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The far process said nothing, or something else.
    #[error("the far process did not say where it listens: it must call `serve` and nothing else")]
    NoAddress,
    /// A file or a process could not be made.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A key could not be made or read.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The key of the other process is no key.
    #[error("the caller's key is unreadable: start this process by its parent only")]
    Key,
    /// A system did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// An ask or a subscription failed.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// A subscription broke off.
    #[error(transparent)]
    Stream(#[from] StreamLost),
    /// A subscription without end ended.
    #[error("the far actor stopped producing")]
    Ended,
    /// Tells were lost, so that their rate means nothing.
    #[error("{handled} of {sent} tells were handled: the far process dropped the others")]
    Dropped {
        /// How many arrived at the actor.
        handled: u64,
        /// How many were sent.
        sent: u64,
    },
}

impl<M> From<TellError<M>> for MeasureError {
    fn from(error: TellError<M>) -> Self {
        Self::Ask(error.reason)
    }
}

const CALLER: &str = "caller";
const CALLEE: &str = "callee";
const CALLEE_PATH: &str = "callee#measured";
const ACTOR: &str = "measured";
const CALLEE_KEY: &str = "callee.pem";
const CALLER_KEY: &str = "caller.key";
/// A process that starts on a busy machine.
const START_MAX: Duration = Duration::from_secs(20);
