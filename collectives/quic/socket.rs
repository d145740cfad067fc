//! One UDP socket: batches in, segments out, and the wait for either.

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use bytes::BytesMut;
use quinn_proto::EcnCodepoint;
use quinn_udp::{RecvMeta, UdpSockRef, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::CollectiveError;

/// A non-blocking UDP socket with the segmentation offloads that the system has.
pub(super) struct Socket {
    udp: UdpSocket,
    state: UdpSocketState,
}

/// What came in one piece.
pub(super) struct Datagram {
    pub remote: SocketAddr,
    pub local: Option<IpAddr>,
    pub ecn: Option<EcnCodepoint>,
    pub data: BytesMut,
}

impl Socket {
    pub(super) fn bind(addr: SocketAddr, buffer_bytes: usize) -> Result<Self, CollectiveError> {
        let failed = |why: io::Error| CollectiveError::local("binding the tensor socket", why);
        let udp = UdpSocket::bind(addr).map_err(failed)?;
        let state = UdpSocketState::new(UdpSockRef::from(&udp)).map_err(failed)?;
        // The system may grant less; what it granted is asked for below.
        let _ = state.set_recv_buffer_size((&udp).into(), buffer_bytes);
        let _ = state.set_send_buffer_size((&udp).into(), buffer_bytes);
        Ok(Self { udp, state })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// What the system sets aside for incoming packets, its own bookkeeping included.
    pub(super) fn receive_buffer_bytes(&self) -> usize {
        self.state.recv_buffer_size((&self.udp).into()).unwrap_or(0)
    }

    /// Whether packets larger than the path carries may be cut up on the way.
    pub(super) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// How many datagrams go into one [`send`](Self::send).
    pub(super) fn segments_max(&self) -> usize {
        self.state.max_gso_segments().min(SEGMENTS_MAX)
    }

    /// Sends what is in `contents`. A packet that the system will not take is lost, which QUIC mends.
    pub(super) fn send(&self, transmit: &quinn_proto::Transmit, contents: &[u8]) {
        let transmit = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit
                .ecn
                .and_then(|ecn| quinn_udp::EcnCodepoint::from_bits(ecn as u8)),
            contents: &contents[..transmit.size],
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        while let Err(why) = self.state.try_send((&self.udp).into(), &transmit) {
            let full = why.kind() == io::ErrorKind::WouldBlock;
            if !full || !self.wait(PollFlags::OUT, SEND_WAIT_MAX) {
                return;
            }
        }
    }

    /// Waits until something can be read, at most for `limit`; whether it can.
    pub(super) fn readable(&self, limit: Duration) -> bool {
        self.wait(PollFlags::IN, limit)
    }

    fn wait(&self, flags: PollFlags, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).ok();
        let mut sockets = [PollFd::new(&self.udp, flags)];
        // Interrupted or failed: the caller looks at the socket and at the clock in any case.
        poll(&mut sockets, limit.as_ref()).is_ok_and(|ready| ready > 0)
    }
}

/// Where packets are received into, many in one system call.
pub(super) struct Inbox {
    buffers: Vec<u8>,
    metas: [RecvMeta; BATCH],
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self {
            buffers: vec![0; BATCH * BUFFER_BYTES],
            metas: [RecvMeta::default(); BATCH],
        }
    }

    /// Takes what is there; how many buffers were filled, and whether there may be more.
    pub(super) fn fill(&mut self, socket: &Socket) -> (usize, bool) {
        let mut buffers = self
            .buffers
            .chunks_exact_mut(BUFFER_BYTES)
            .map(IoSliceMut::new);
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| buffers.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
        match socket
            .state
            .recv((&socket.udp).into(), &mut slices, &mut self.metas)
        {
            Ok(filled) => (filled, filled == BATCH),
            // Somebody refused an earlier packet of ours: not a word about this socket.
            Err(why) => (0, why.kind() == io::ErrorKind::ConnectionRefused),
        }
    }

    /// The datagrams of the buffer at `index`.
    pub(super) fn datagrams(&self, index: usize) -> impl Iterator<Item = Datagram> + use<> {
        let meta = self.metas[index];
        let start = index * BUFFER_BYTES;
        let mut data = BytesMut::from(&self.buffers[start..start + meta.len]);
        std::iter::from_fn(move || {
            (!data.is_empty()).then(|| Datagram {
                remote: meta.addr,
                local: meta.dst_ip,
                ecn: meta.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8)),
                data: data.split_to(meta.stride.clamp(1, data.len())),
            })
        })
    }
}

/// The kernel puts at most 64 KiB of segments together.
const BUFFER_BYTES: usize = 1 << 16;

/// Two or three peers with one packet each is the usual catch; a bulk comes as segments of one.
const BATCH: usize = 4;

/// What quinn uses: beyond it the gain is small, and 64 KiB are reached with large packets.
const SEGMENTS_MAX: usize = 10;

/// How long a full send buffer may hold a rank up before the packet is given up.
const SEND_WAIT_MAX: Duration = Duration::from_millis(2);
