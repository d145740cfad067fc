//! What reads bytes of a peer, as functions of bytes alone: for the fuzz targets in `fuzz/` and for
//! the test that runs the same functions on inputs of its own. Not part of the public interface.

use bytes::{BufMut, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::codec;
use crate::frame::{self, CallKind, Frame};
use crate::hello::{HELLO_BYTES_MAX, Hello};
use crate::message::{OlderBody, RemoteMessage};
use crate::trace::TraceContext;

/// It panics when a promise is broken, whatever the bytes.
pub type Target = fn(&[u8]);

/// Each target by name.
pub const TARGETS: [(&str, Target); 5] = [
    ("frame", frame),
    ("stream", stream),
    ("hello", hello),
    ("message", message),
    ("traceparent", traceparent),
];

/// One frame: what is read is what would be written.
pub fn frame(bytes: &[u8]) {
    let Ok(parsed) = Frame::parse(bytes) else {
        return;
    };
    let (kind, call) = match &parsed {
        Frame::Ask(call) => (CallKind::Ask, call),
        Frame::Tell(call) => (CallKind::Tell, call),
        Frame::Subscribe(call) => (CallKind::Subscribe, call),
        _ => return,
    };
    let written = frame::build(usize::MAX >> 1, |out| {
        frame::put_call(out, kind, call);
        Ok(())
    });
    let written = written.expect("it is no longer than what was read");
    assert_eq!(Frame::parse(&written[4..]), Ok(parsed));
}

/// Frames cut off a stream, whatever the chunks: none is longer than allowed, and each byte is in
/// one of them or still waits.
pub fn stream(bytes: &[u8]) {
    let (sizes, bytes) = bytes.split_at(bytes.len().min(8));
    let mut buffer = BytesMut::new();
    let (mut arrived, mut taken) = (0, 0);
    let mut chunks = sizes.iter().map(|&size| usize::from(size) + 1).cycle();
    let mut rest = bytes;
    while !rest.is_empty() {
        let size = chunks.next().unwrap_or(1).min(rest.len());
        let (chunk, left) = rest.split_at(size);
        buffer.put_slice(chunk);
        (arrived, rest) = (arrived + size, left);
        loop {
            match frame::split_frame(&mut buffer, STREAM_FRAME_BYTES_MAX) {
                Ok(Some(frame)) => {
                    assert!(frame.len() <= STREAM_FRAME_BYTES_MAX);
                    taken += 4 + frame.len();
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert_eq!(taken + buffer.len(), arrived);
        assert!(buffer.len() < 4 + STREAM_FRAME_BYTES_MAX);
    }
}

/// The first frame of a link.
pub fn hello(bytes: &[u8]) {
    if bytes.len() > HELLO_BYTES_MAX {
        return;
    }
    if let Ok(hello) = Hello::parse(bytes) {
        let written = hello.frame();
        assert_eq!(Hello::parse(&written[4..]), Ok(hello));
    }
}

/// The body of a message, of every shape that serde has.
pub fn message(bytes: &[u8]) {
    if let Ok(sample) = codec::decode::<Sample>(bytes) {
        let mut written = BytesMut::new();
        codec::encode(&sample, &mut written, usize::MAX).expect("it was decoded");
        // Two encodings of one value differ at most in what a shorter one would do as well.
        assert_eq!(codec::decode::<Sample>(&written), Ok(sample));
    }
}

/// The text of a trace context.
pub fn traceparent(bytes: &[u8]) {
    if let Ok(context) = String::from_utf8_lossy(bytes).parse::<TraceContext>() {
        assert_eq!(context.to_string().parse(), Ok(context));
    }
}

/// The bytes of a value in a message's body, for tests of other crates that hold their messages to what
/// they were.
///
/// # Panics
/// When the value's serde implementation fails.
pub fn encoded<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    codec::encode(value, &mut bytes, usize::MAX).expect("its serde implementation does not fail");
    bytes.to_vec()
}

/// What a peer's bytes are read as, if they can be.
pub fn decoded<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    codec::decode(bytes).ok()
}

/// What a caller of this older version meant by its bytes, if the message knows that version.
pub fn decoded_older<M: RemoteMessage>(version: u16, body: &[u8]) -> Option<M> {
    M::decode_older(&OlderBody { version, body })
}

/// An input that each target accepts, to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let call = frame::Call {
        id: 7,
        deadline: std::time::Duration::from_millis(5),
        trace: Some(TraceContext::begin()),
        actor: "counter",
        message: "add",
        version: 1,
        body: b"body",
    };
    let ask = frame::build(1 << 20, |out| {
        frame::put_call(out, CallKind::Ask, &call);
        Ok(())
    });
    let ask = ask.expect("it is short");
    let hello = Hello {
        cluster: "cluster".to_owned(),
        config_hash: 5,
        from: "node-1".parse().expect("a name"),
        to: "node-2/worker-0".parse().expect("a name"),
        boot: 3,
        link: 4,
        welcomed: 2,
    };
    let sample = Sample {
        id: 1 << 40,
        shape: Shape::Named {
            name: "näme".to_owned(),
            kept: Some(true),
        },
        items: vec![(1, Some(-5)), (u32::MAX, None)],
        raw: vec![7; 300],
        letter: 'ß',
    };
    let mut message = BytesMut::new();
    codec::encode(&sample, &mut message, usize::MAX).expect("it can be encoded");
    let several = [&[3, 50, 1, 9, 200, 0, 7, 7][..], &ask, &frame::end(), &ask].concat();
    vec![
        ask[4..].to_vec(),
        several,
        hello.frame()[4..].to_vec(),
        message.to_vec(),
        TraceContext::begin().to_string().into_bytes(),
    ]
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Sample {
    id: u64,
    shape: Shape,
    items: Vec<(u32, Option<i64>)>,
    raw: Vec<u8>,
    letter: char,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Shape {
    None,
    One(u8),
    Named { name: String, kept: Option<bool> },
}

const STREAM_FRAME_BYTES_MAX: usize = 300;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_call_survives_the_wire(
            (id, deadline, version) in (any::<u64>(), any::<u32>(), any::<u16>()),
            (trace, span) in (1u128.., 1u64..),
            traced in any::<bool>(),
            (actor, message) in (".{0,40}", ".{0,40}"),
            body in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let call = frame::Call {
                id,
                deadline: std::time::Duration::from_micros(deadline.into()),
                trace: traced.then_some(TraceContext { trace, span }),
                actor: &actor,
                message: &message,
                version,
                body: &body,
            };
            let written = frame::build(1 << 20, |out| {
                frame::put_call(out, CallKind::Tell, &call);
                Ok(())
            });
            let written = written.unwrap();
            prop_assert_eq!(Frame::parse(&written[4..]), Ok(Frame::Tell(call)));
        }

        #[test]
        fn any_hello_survives_the_wire(
            cluster in ".{0,100}",
            (from, to) in ("[a-z0-9.-]{1,60}/[a-z0-9-]{1,60}", "[a-z0-9.-]{1,100}"),
            (config_hash, boot, link, welcomed) in any::<(u64, u64, u64, u64)>(),
        ) {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let hello = Hello { cluster, config_hash, from, to, boot, link, welcomed };
            let written = hello.frame();
            prop_assert_eq!(Hello::parse(&written[4..]), Ok(hello));
        }

        #[test]
        fn frames_come_off_a_stream_as_they_went_on(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 0..20),
            chunk in 1usize..50,
        ) {
            let mut wire = BytesMut::new();
            for body in &bodies {
                let put = |out: &mut BytesMut| { out.put_slice(body); Ok(()) };
                frame::append(&mut wire, 100, put).unwrap();
            }
            let (mut buffer, mut read) = (BytesMut::new(), Vec::new());
            for chunk in wire.chunks(chunk) {
                buffer.put_slice(chunk);
                while let Some(frame) = frame::split_frame(&mut buffer, 100).unwrap() {
                    read.push(frame.to_vec());
                }
            }
            prop_assert_eq!(read, bodies);
        }
    }
}
