//! One peer: its connection, its stream, and how it ended.

use std::{
    collections::VecDeque,
    net::{SocketAddr, UdpSocket},
    time::Instant,
};

use bytes::Bytes;
use quinn_proto::{
    Connection, ConnectionError, ConnectionHandle, Dir, Event, ReadError, StreamEvent, StreamId,
    VarInt, WriteError,
};

use crate::{error::CollectiveError, operation::Operation};

/// The connection with one peer and the one stream on it, which both sides write and read.
pub(super) struct Link {
    pub handle: ConnectionHandle,
    pub connection: Connection,
    pub since: Instant,
    /// Whom we called; whoever calls us says it in its greeting.
    pub rank: Option<usize>,
    /// Greetings are exchanged.
    pub ready: bool,
    pub connected: bool,
    pub stream: Option<StreamId>,
    /// Why nothing more will come.
    pub ending: Option<Farewell>,
    /// Everything that we sent has arrived, after [`finish`](Self::finish).
    pub finished: bool,
    /// What has come of the peer's greeting.
    pub greeting: Vec<u8>,
    /// What came while we could not go on sending; read before anything else.
    early: VecDeque<Bytes>,
    early_bytes: usize,
    /// Operands so far, each way.
    pub sent: u64,
    pub received: u64,
    knock: Option<Knock>,
}

impl Link {
    pub(super) fn new(
        handle: ConnectionHandle,
        connection: Connection,
        rank: Option<usize>,
    ) -> Self {
        let knock = Knock::at(connection.remote_address());
        Self {
            handle,
            connection,
            since: Instant::now(),
            rank,
            ready: false,
            connected: false,
            stream: None,
            ending: None,
            finished: false,
            greeting: Vec::new(),
            early: VecDeque::new(),
            early_bytes: 0,
            sent: 0,
            received: 0,
            knock,
        }
    }

    /// Takes note of what happened on the connection.
    pub(super) fn note(&mut self, event: Event) {
        match event {
            Event::Connected => self.connected = true,
            Event::ConnectionLost { reason } => self.end(Farewell::from(reason)),
            Event::Stream(StreamEvent::Opened { dir: Dir::Bi }) if self.stream.is_none() => {
                self.stream = self.connection.streams().accept(Dir::Bi);
            }
            Event::Stream(StreamEvent::Finished { .. }) => self.finished = true,
            _ => {}
        }
    }

    pub(super) fn end(&mut self, farewell: Farewell) {
        self.ending.get_or_insert(farewell);
    }

    /// Opens the stream, on the side of the caller.
    pub(super) fn open(&mut self) {
        self.stream = self.connection.streams().open(Dir::Bi);
    }

    /// Hands over as much of `bytes` as may be sent ahead; how much that is.
    pub(super) fn write(&mut self, bytes: &[u8]) -> usize {
        let Some(stream) = self.stream else { return 0 };
        match self.connection.send_stream(stream).write(bytes) {
            Ok(written) => written,
            Err(WriteError::Blocked) => 0,
            Err(why @ (WriteError::Stopped(_) | WriteError::ClosedStream)) => {
                self.end(Farewell::Lost(why.to_string()));
                0
            }
        }
    }

    /// Moves what has come into `place`, as far as there is room; how much that is.
    pub(super) fn read(&mut self, place: &mut [u8]) -> usize {
        let mut filled = 0;
        while let Some(chunk) = self.early.front_mut().filter(|_| filled < place.len()) {
            let part = chunk.split_to(chunk.len().min(place.len() - filled));
            place[filled..filled + part.len()].copy_from_slice(&part);
            filled += part.len();
            self.early_bytes -= part.len();
            if chunk.is_empty() {
                self.early.pop_front();
            }
        }
        let room = place.len() - filled;
        self.take(room, |chunk| {
            place[filled..filled + chunk.len()].copy_from_slice(&chunk);
            filled += chunk.len();
        });
        filled
    }

    /// Takes in what the peer sends although we are not reading yet, so that two ranks that send to
    /// each other at the same time do not wait for each other's room.
    pub(super) fn absorb(&mut self) {
        let room = EARLY_BYTES_MAX.saturating_sub(self.early_bytes);
        let mut early = std::mem::take(&mut self.early);
        self.early_bytes += self.take(room, |chunk| early.push_back(chunk));
        self.early = early;
    }

    /// Gives at most `room` bytes of the stream to `place`, in order; how many.
    fn take(&mut self, room: usize, mut place: impl FnMut(Bytes)) -> usize {
        let Some(stream) = self.stream.filter(|_| room > 0) else {
            return 0;
        };
        let mut stream = self.connection.recv_stream(stream);
        let Ok(mut chunks) = stream.read(true) else {
            return 0;
        };
        let mut taken = 0;
        let ending = loop {
            if taken == room {
                break None;
            }
            match chunks.next(room - taken) {
                Ok(Some(chunk)) => {
                    taken += chunk.bytes.len();
                    place(chunk.bytes);
                }
                Err(ReadError::Blocked) => break None,
                Ok(None) => break Some(Farewell::Left),
                Err(ReadError::Reset(_)) => {
                    break Some(Farewell::Lost("it reset the stream".into()));
                }
            }
        };
        // Whatever credit this frees goes out with the next packets.
        let _ = chunks.finalize();
        if let Some(ending) = ending {
            self.end(ending);
        }
        taken
    }

    /// Says that nothing more will be written.
    pub(super) fn finish(&mut self) {
        let stream = self.stream.filter(|_| self.ending.is_none());
        let finishing = stream.is_some_and(|id| self.connection.send_stream(id).finish().is_ok());
        self.finished = !finishing;
    }

    /// Whether the peer's machine says that nobody has its port any more.
    pub(super) fn is_deserted(&self) -> bool {
        self.knock.as_ref().is_some_and(Knock::is_refused)
    }
}

/// Why a connection ended; what can be said to a peer travels as code and reason of the close.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Farewell {
    /// Its work was done.
    Left,
    /// It gave the group up.
    Poisoned(String),
    /// It is in that epoch.
    WrongEpoch(u64),
    /// We do not fit in.
    Refused(String),
    /// It did not say.
    Lost(String),
}

impl Farewell {
    pub(super) fn code(&self) -> VarInt {
        VarInt::from_u32(match self {
            Self::Left | Self::Lost(_) => CODE_LEFT,
            Self::Poisoned(_) => CODE_POISONED,
            Self::WrongEpoch(_) => CODE_WRONG_EPOCH,
            Self::Refused(_) => CODE_REFUSED,
        })
    }

    pub(super) fn reason(&self) -> Bytes {
        match self {
            Self::Left | Self::Lost(_) => Bytes::new(),
            Self::Poisoned(why) | Self::Refused(why) => {
                let end = why.floor_char_boundary(REASON_BYTES_MAX);
                Bytes::copy_from_slice(&why.as_bytes()[..end])
            }
            Self::WrongEpoch(ours) => Bytes::copy_from_slice(&ours.to_le_bytes()),
        }
    }

    pub(super) fn error(&self, rank: usize, operation: Operation, epoch: u64) -> CollectiveError {
        match self {
            Self::Left => CollectiveError::Lost {
                rank,
                operation,
                why: "it left".to_owned(),
            },
            Self::Poisoned(why) => CollectiveError::PeerPoisoned {
                rank,
                why: why.clone(),
            },
            Self::WrongEpoch(theirs) => CollectiveError::WrongEpoch {
                rank,
                ours: epoch,
                theirs: *theirs,
            },
            Self::Refused(why) => CollectiveError::Refused {
                rank,
                why: why.clone(),
            },
            Self::Lost(why) => CollectiveError::Lost {
                rank,
                operation,
                why: why.clone(),
            },
        }
    }
}

impl From<ConnectionError> for Farewell {
    fn from(reason: ConnectionError) -> Self {
        let ConnectionError::ApplicationClosed(close) = &reason else {
            return Self::Lost(reason.to_string());
        };
        let said = || String::from_utf8_lossy(&close.reason).into_owned();
        match u32::try_from(close.error_code.into_inner()) {
            Ok(CODE_LEFT) => Self::Left,
            Ok(CODE_POISONED) => Self::Poisoned(said()),
            Ok(CODE_REFUSED) => Self::Refused(said()),
            Ok(CODE_WRONG_EPOCH) => match close.reason[..].try_into() {
                Ok(epoch) => Self::WrongEpoch(u64::from_le_bytes(epoch)),
                Err(_) => Self::Refused("wrong epoch".to_owned()),
            },
            _ => Self::Lost(reason.to_string()),
        }
    }
}

/// A second socket that shows whether a peer's port is still taken: UDP tells only a connected
/// socket that its packets are refused. On a machine that was killed, or behind a firewall, nothing
/// comes back, and the idle time-out or the message plane must do.
struct Knock {
    socket: UdpSocket,
}

impl Knock {
    fn at(remote: SocketAddr) -> Option<Self> {
        let any: SocketAddr = if remote.is_ipv4() {
            ([0; 4], 0).into()
        } else {
            ([0; 16], 0).into()
        };
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(remote).ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(Self { socket })
    }

    /// Looks for the answer to the last knock, then knocks again.
    fn is_refused(&self) -> bool {
        let refused = |why: std::io::Error| why.kind() == std::io::ErrorKind::ConnectionRefused;
        // No QUIC packet is one zero byte: an endpoint that is there ignores it.
        self.socket.recv(&mut [0]).is_err_and(refused) || self.socket.send(&[0]).is_err_and(refused)
    }
}

const CODE_LEFT: u32 = 0;
const CODE_POISONED: u32 = 1;
const CODE_WRONG_EPOCH: u32 = 2;
const CODE_REFUSED: u32 = 3;

/// A prefill's activations and more; a peer that sends beyond that waits for us.
const EARLY_BYTES_MAX: usize = 256 << 20;

/// A close must fit one packet of the smallest size.
const REASON_BYTES_MAX: usize = 512;
