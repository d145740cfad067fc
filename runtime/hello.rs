//! The first frame of a link, in each direction: who speaks, and what must be equal at both ends.
//!
//! Laid out by hand: `magic u32, wire u16, config_hash u64, boot u64, link u64, welcomed u64,
//! cluster u16+text, from u16+text, to u16+text`. Magic and wire version never move, so that any
//! two versions can tell each other apart. What follows is skipped: there a later version may say
//! more to those that know it, without another wire version. A refusal is the connection's close code and its reason.

use std::net::SocketAddr;

use bytes::{BufMut, BytesMut};
use quinn::{ConnectionError, TransportErrorCode, VarInt};

use crate::frame::{self, FrameError, put_text, take_text, take_u16, take_u64};
use crate::name::ProcessName;
use crate::trust::Trust;

/// What a process says about itself when a link begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) cluster: String,
    pub(crate) config_hash: u64,
    pub(crate) from: ProcessName,
    pub(crate) to: ProcessName,
    pub(crate) boot: u64,
    /// Counts the dials of this process: a later dial replaces an earlier one.
    pub(crate) link: u64,
    /// The last link from the other side that this process welcomed. It tells two dials that
    /// crossed from a dial by someone who lost the link that the other side still believes in.
    pub(crate) welcomed: u64,
}

impl Hello {
    pub(crate) fn frame(&self) -> BytesMut {
        let written = frame::build(HELLO_BYTES_MAX, |out| {
            out.put_u32_le(MAGIC);
            out.put_u16_le(WIRE_VERSION);
            out.put_u64_le(self.config_hash);
            out.put_u64_le(self.boot);
            out.put_u64_le(self.link);
            out.put_u64_le(self.welcomed);
            put_text(out, &self.cluster);
            put_text(out, self.from.as_str());
            put_text(out, self.to.as_str());
            Ok(())
        });
        written.expect("System::start checked the cluster id, and names are short")
    }

    pub(crate) fn parse(mut bytes: &[u8]) -> Result<Self, HandshakeError> {
        let rest = &mut bytes;
        let malformed = |error: FrameError| HandshakeError::Malformed(error.to_string());
        let magic = u64::from(take_u16(rest).map_err(malformed)?)
            | u64::from(take_u16(rest).map_err(malformed)?) << 16;
        if magic != u64::from(MAGIC) {
            return Err(HandshakeError::Malformed(
                "it does not begin with a hello".into(),
            ));
        }
        let wire = take_u16(rest).map_err(malformed)?;
        if wire != WIRE_VERSION {
            return Err(HandshakeError::WireVersion(format!(
                "the two sides speak wire versions {WIRE_VERSION} and {wire}"
            )));
        }
        let hello = Self::parse_rest(rest).map_err(malformed)?;
        hello.map_err(|error| HandshakeError::Malformed(error.to_string()))
    }

    fn parse_rest(rest: &mut &[u8]) -> Result<Result<Self, crate::NameError>, FrameError> {
        let config_hash = take_u64(rest)?;
        let boot = take_u64(rest)?;
        let link = take_u64(rest)?;
        let welcomed = take_u64(rest)?;
        let cluster = take_text(rest)?.to_owned();
        let names = (take_text(rest)?, take_text(rest)?);
        Ok(ProcessName::new(names.0).and_then(|from| {
            let to = ProcessName::new(names.1)?;
            Ok(Self {
                cluster,
                config_hash,
                from,
                to,
                boot,
                link,
                welcomed,
            })
        }))
    }

    /// Does the other side belong to us, and did it mean us?
    pub(crate) fn check(&self, trust: &Trust, us: &ProcessName) -> Result<(), HandshakeError> {
        if self.cluster != trust.cluster {
            return Err(HandshakeError::Cluster(format!(
                "{us} is of cluster {:?}, {} of {:?}",
                trust.cluster, self.from, self.cluster
            )));
        }
        if self.config_hash != trust.config_hash {
            return Err(HandshakeError::ConfigHash(format!(
                "the shared configuration hashes to {:016x} at {us}, to {:016x} at {}",
                trust.config_hash, self.config_hash, self.from
            )));
        }
        if self.to != *us {
            return Err(HandshakeError::WrongProcess(format!(
                "{} looked for {} and found {us}",
                self.from, self.to
            )));
        }
        Ok(())
    }
}

/// Why two processes did not become linked. Where the other side refused, the text is its own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Nobody answers there, or a firewall drops the packets.
    #[error("no answer from {0}")]
    NoAnswer(SocketAddr),
    /// The other side's key is not among the pinned ones: fix the cluster file here.
    #[error("the other side shows a key that is not pinned here")]
    UnknownKey,
    /// Our key is not among the other side's pinned ones: fix the cluster file there.
    #[error("the other side does not know the key of this process")]
    KeyRefused,
    /// The other side is another version of this software.
    #[error("another wire version: {0}")]
    WireVersion(String),
    /// The other side belongs to another cluster.
    #[error("another cluster: {0}")]
    Cluster(String),
    /// The shared configuration differs.
    #[error("another configuration: {0}")]
    ConfigHash(String),
    /// A process calls itself by a name that its key is not pinned for.
    #[error("a name that its key may not use: {0}")]
    Name(String),
    /// The address is that of another process.
    #[error("another process: {0}")]
    WrongProcess(String),
    /// A process that has since been restarted: it must not speak any more.
    #[error("out of date: {0}")]
    StaleBoot(String),
    /// Both sides dialled; the other dial was kept.
    #[error("the other side keeps another link")]
    Duplicate,
    /// The other side's first bytes are no hello.
    #[error("no hello: {0}")]
    Malformed(String),
    /// The other side has as many connections of this node as it takes: try again after a while.
    #[error("the other side takes no more now: {0}")]
    Busy(String),
    /// The other side is shutting down.
    #[error("the other side is shutting down")]
    Closing,
    /// QUIC or TLS failed in another way.
    #[error("the connection failed: {0}")]
    Transport(String),
}

impl HandshakeError {
    /// What the refusing side closes the connection with.
    pub(crate) fn close_code(&self) -> VarInt {
        VarInt::from_u32(match self {
            Self::WireVersion(_) => 0x10,
            Self::Cluster(_) => 0x11,
            Self::ConfigHash(_) => 0x12,
            Self::Name(_) => 0x13,
            Self::WrongProcess(_) => 0x14,
            Self::StaleBoot(_) => 0x15,
            Self::Duplicate => 0x16,
            Self::Busy(_) => 0x18,
            Self::Closing => 0x01,
            _ => 0x17,
        })
    }

    /// What the other side's close means to the one that dialled.
    pub(crate) fn of_connection(error: &ConnectionError, addr: SocketAddr) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => {
                let text = String::from_utf8_lossy(&close.reason).into_owned();
                Self::of_close(close.error_code.into_inner(), text)
            }
            // We refuse a key with this alert ourselves, or the other side did.
            ConnectionError::TransportError(error) if error.code == ACCESS_DENIED.into() => {
                Self::UnknownKey
            }
            ConnectionError::ConnectionClosed(close)
                if close.error_code == ACCESS_DENIED.into() =>
            {
                Self::KeyRefused
            }
            ConnectionError::ConnectionClosed(close)
                if close.error_code == NO_APPLICATION_PROTOCOL.into() =>
            {
                Self::WireVersion("the two sides have no application protocol in common".into())
            }
            // An endpoint that is closed refuses, or breaks off the handshakes that are under way: QUIC
            // says no more of that than that the application did it (RFC 9000, section 10.2.3).
            ConnectionError::ConnectionClosed(close)
                if [
                    TransportErrorCode::CONNECTION_REFUSED,
                    TransportErrorCode::APPLICATION_ERROR,
                ]
                .contains(&close.error_code) =>
            {
                Self::Closing
            }
            ConnectionError::TimedOut | ConnectionError::Reset => Self::NoAnswer(addr),
            other => Self::Transport(other.to_string()),
        }
    }

    fn of_close(code: u64, text: String) -> Self {
        match code {
            0x01 => Self::Closing,
            0x10 => Self::WireVersion(text),
            0x11 => Self::Cluster(text),
            0x12 => Self::ConfigHash(text),
            0x13 => Self::Name(text),
            0x14 => Self::WrongProcess(text),
            0x15 => Self::StaleBoot(text),
            0x16 => Self::Duplicate,
            0x18 => Self::Busy(text),
            _ => Self::Malformed(text),
        }
    }

    /// The text that travels with the close code: the detail without the heading.
    pub(crate) fn detail(&self) -> &str {
        match self {
            Self::WireVersion(text)
            | Self::Cluster(text)
            | Self::ConfigHash(text)
            | Self::Name(text)
            | Self::WrongProcess(text)
            | Self::StaleBoot(text)
            | Self::Busy(text)
            | Self::Malformed(text)
            | Self::Transport(text) => text,
            _ => "",
        }
    }
}

/// QUIC carries a TLS alert as 0x100 plus its number: 49 is access_denied, 120 is
/// no_application_protocol (RFC 9001, section 4.8; RFC 8446, section 6).
const ACCESS_DENIED: TlsAlert = TlsAlert(49);
const NO_APPLICATION_PROTOCOL: TlsAlert = TlsAlert(120);

struct TlsAlert(u8);

impl From<TlsAlert> for quinn_proto::TransportErrorCode {
    fn from(alert: TlsAlert) -> Self {
        Self::crypto(alert.0)
    }
}

/// The coarse gate, inside TLS: it changes when even the hello does.
pub(crate) const ALPN: &[u8] = b"offbook-messages/1";

/// The fine one: it changes with any change of the frames or of the codec.
const WIRE_VERSION: u16 = 1;

/// `OFBK` as it lies on the wire.
const MAGIC: u32 = u32::from_le_bytes(*b"OFBK");

/// Three names and a few numbers; anything longer is no hello.
pub(crate) const HELLO_BYTES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            cluster: "c-1".into(),
            config_hash: 5,
            from: "node-1".parse().unwrap(),
            to: "node-2/worker-0".parse().unwrap(),
            boot: 3,
            link: 4,
            welcomed: 2,
        }
    }

    fn bytes() -> Vec<u8> {
        hello().frame()[4..].to_vec()
    }

    #[test]
    fn a_hello_survives_the_wire() {
        assert_eq!(Hello::parse(&bytes()), Ok(hello()));
    }

    #[test]
    fn the_layout_does_not_change() {
        // A change here is a change of the wire version.
        let numbers = [5u64, 3, 4, 2].map(u64::to_le_bytes).concat();
        let names = b"\x03\0c-1\x06\0node-1\x0f\0node-2/worker-0";
        let expected = [b"OFBK\x01\0", &numbers[..], names].concat();
        assert_eq!(bytes(), expected);
        assert_eq!(hello().frame()[..4], (expected.len() as u32).to_le_bytes());
    }

    #[test]
    fn what_a_later_version_appends_is_skipped() {
        let bytes = [&bytes()[..], &[1, 2, 3]].concat();
        assert_eq!(Hello::parse(&bytes), Ok(hello()));
    }

    #[test]
    fn every_truncation_is_malformed() {
        for end in 0..bytes().len() {
            let result = Hello::parse(&bytes()[..end]);
            assert!(
                matches!(result, Err(HandshakeError::Malformed(_))),
                "cut at {end}"
            );
        }
    }

    #[test]
    fn another_version_is_told_apart_whatever_follows() {
        let mut bytes = bytes();
        bytes[4] = 9;
        bytes.truncate(6);
        assert!(matches!(
            Hello::parse(&bytes),
            Err(HandshakeError::WireVersion(_))
        ));
    }

    #[test]
    fn each_mismatch_has_its_own_error() {
        let trust = Trust {
            cluster: "c-1".into(),
            config_hash: 5,
            nodes: Vec::new(),
        };
        let us: ProcessName = "node-2/worker-0".parse().unwrap();
        assert_eq!(hello().check(&trust, &us), Ok(()));
        let other = Trust {
            cluster: "c-2".into(),
            ..trust.clone()
        };
        assert!(matches!(
            hello().check(&other, &us),
            Err(HandshakeError::Cluster(_))
        ));
        let other = Trust {
            config_hash: 6,
            ..trust.clone()
        };
        assert!(matches!(
            hello().check(&other, &us),
            Err(HandshakeError::ConfigHash(_))
        ));
        let other = "node-3".parse().unwrap();
        assert!(matches!(
            hello().check(&trust, &other),
            Err(HandshakeError::WrongProcess(_))
        ));
    }

    #[test]
    fn a_refusal_arrives_as_what_it_was() {
        for error in [
            HandshakeError::WireVersion("a".into()),
            HandshakeError::Cluster("b".into()),
            HandshakeError::ConfigHash("c".into()),
            HandshakeError::Name("d".into()),
            HandshakeError::WrongProcess("e".into()),
            HandshakeError::StaleBoot("f".into()),
            HandshakeError::Duplicate,
            HandshakeError::Malformed("g".into()),
            HandshakeError::Busy("h".into()),
            HandshakeError::Closing,
        ] {
            let code = error.close_code().into_inner();
            assert_eq!(
                HandshakeError::of_close(code, error.detail().to_owned()),
                error
            );
        }
    }
}
