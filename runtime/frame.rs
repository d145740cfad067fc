//! What passes over a link, byte for byte: frames with a length, a kind and a header of ours.
//!
//! All integers are little-endian. A frame is `length u32` (of what follows) and `kind u8`, then:
//!
//! | kind | header | body |
//! | --- | --- | --- |
//! | ask, tell, subscribe | `extension u16+bytes, id u64, deadline_us u64, actor u16+text, message u16+text, version u16` | the message |
//! | reply | `id u64` | the reply |
//! | failed | `id u64, code u8, detail u16` | |
//! | cancel | `id u64` | |
//! | item | | one item |
//! | opened, end, abandoned | | |
//!
//! The extension holds fields, each `tag u8, length u8, bytes`, of which a reader skips those that it
//! does not know: a place for what a later version adds to every message. Tag 1 is the context of a
//! trace, `trace u128, span u64`. A frame whose kind is 128 or more may likewise be skipped by whoever
//! does not know it; any other unknown kind ends the link. Bodies belong to `codec.rs`.

use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use quinn::{ReadError, RecvStream};

use crate::codec::EncodeError;
use crate::failure::Failure;
use crate::trace::TraceContext;

/// One frame, borrowed from the bytes that arrived.
#[derive(Debug, PartialEq)]
pub(crate) enum Frame<'a> {
    Ask(Call<'a>),
    Tell(Call<'a>),
    Subscribe(Call<'a>),
    Reply {
        id: u64,
        body: &'a [u8],
    },
    Failed {
        id: u64,
        failure: Failure,
    },
    Cancel {
        id: u64,
    },
    Opened,
    Item {
        body: &'a [u8],
    },
    End,
    Abandoned,
    /// Of a later version, and of a kind that may be skipped.
    Skipped,
}

/// A message for an actor. A tell has the id 0 and no deadline.
#[derive(Debug, PartialEq)]
pub(crate) struct Call<'a> {
    pub(crate) id: u64,
    pub(crate) deadline: Duration,
    pub(crate) trace: Option<TraceContext>,
    pub(crate) actor: &'a str,
    pub(crate) message: &'a str,
    pub(crate) version: u16,
    pub(crate) body: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Reads the kind, the header and where the body lies.
    pub(crate) fn parse(mut bytes: &'a [u8]) -> Result<Self, FrameError> {
        let rest = &mut bytes;
        let frame = match take_u8(rest)? {
            ASK => return Ok(Frame::Ask(Call::parse(rest)?)),
            TELL => return Ok(Frame::Tell(Call::parse(rest)?)),
            SUBSCRIBE => return Ok(Frame::Subscribe(Call::parse(rest)?)),
            REPLY => {
                return Ok(Frame::Reply {
                    id: take_u64(rest)?,
                    body: rest,
                });
            }
            ITEM => return Ok(Frame::Item { body: rest }),
            FAILED => {
                let id = take_u64(rest)?;
                let failure = Failure::from_wire(take_u8(rest)?, take_u16(rest)?);
                Frame::Failed { id, failure }
            }
            CANCEL => Frame::Cancel {
                id: take_u64(rest)?,
            },
            OPENED => Frame::Opened,
            END => Frame::End,
            ABANDONED => Frame::Abandoned,
            SKIPPED_MIN.. => return Ok(Frame::Skipped),
            kind => return Err(FrameError::UnknownKind(kind)),
        };
        if rest.is_empty() {
            Ok(frame)
        } else {
            Err(FrameError::Trailing)
        }
    }
}

impl<'a> Call<'a> {
    fn parse(rest: &mut &'a [u8]) -> Result<Self, FrameError> {
        let trace = parse_extension(take_short(rest)?)?;
        Ok(Self {
            id: take_u64(rest)?,
            deadline: Duration::from_micros(take_u64(rest)?),
            trace,
            actor: take_text(rest)?,
            message: take_text(rest)?,
            version: take_u16(rest)?,
            body: rest,
        })
    }

    fn write(&self, kind: u8, out: &mut BytesMut) {
        out.put_u8(kind);
        match self.trace {
            None => out.put_u16_le(0),
            Some(TraceContext { trace, span }) => {
                out.put_u16_le(2 + u16::from(TRACE_BYTES));
                out.put_u8(TRACE);
                out.put_u8(TRACE_BYTES);
                out.put_u128_le(trace);
                out.put_u64_le(span);
            }
        }
        out.put_u64_le(self.id);
        out.put_u64_le(self.deadline.as_micros().try_into().unwrap_or(u64::MAX));
        put_text(out, self.actor);
        put_text(out, self.message);
        out.put_u16_le(self.version);
        out.put_slice(self.body);
    }
}

/// Takes what this version knows and skips what it does not.
fn parse_extension(mut fields: &[u8]) -> Result<Option<TraceContext>, FrameError> {
    let mut context = None;
    let rest = &mut fields;
    while !rest.is_empty() {
        let (tag, bytes) = (take_u8(rest)?, take_u8(rest)?);
        let (mut field, left) = rest
            .split_at_checked(usize::from(bytes))
            .ok_or(FrameError::Truncated)?;
        *rest = left;
        if tag == TRACE {
            let trace = field.try_get_u128_le().map_err(|_| FrameError::Truncated)?;
            let span = take_u64(&mut field)?;
            context = (trace != 0 && span != 0).then_some(TraceContext { trace, span });
        }
    }
    Ok(context)
}

/// Builds one frame: the length, whatever `write` appends, all of it within `bytes_max`.
pub(crate) fn build(
    bytes_max: usize,
    write: impl FnOnce(&mut BytesMut) -> Result<(), EncodeError>,
) -> Result<BytesMut, EncodeError> {
    let mut out = BytesMut::with_capacity(FRAME_BYTES_USUAL);
    append(&mut out, bytes_max, write)?;
    Ok(out)
}

/// Appends one frame to others, or leaves `out` as it was.
pub(crate) fn append(
    out: &mut BytesMut,
    bytes_max: usize,
    write: impl FnOnce(&mut BytesMut) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    let start = out.len();
    out.put_u32_le(0);
    let result = write(out).and_then(|()| match out.len() - start - LENGTH_BYTES {
        bytes if bytes <= bytes_max => Ok(bytes),
        _ => Err(EncodeError::TooLong { bytes_max }),
    });
    match result {
        Ok(bytes) => {
            let length = u32::try_from(bytes).expect("bytes_max is below 8 MiB");
            out[start..start + LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
            Ok(())
        }
        Err(error) => {
            out.truncate(start);
            Err(error)
        }
    }
}

/// The header of an ask, a tell or a subscription; `call.body` follows as it is.
pub(crate) fn put_call(out: &mut BytesMut, kind: CallKind, call: &Call<'_>) {
    let kind = match kind {
        CallKind::Ask => ASK,
        CallKind::Tell => TELL,
        CallKind::Subscribe => SUBSCRIBE,
    };
    call.write(kind, out);
}

/// Which of the three kinds of call a header opens.
#[derive(Clone, Copy)]
pub(crate) enum CallKind {
    Ask,
    Tell,
    Subscribe,
}

pub(crate) fn put_reply_header(out: &mut BytesMut, id: u64) {
    out.put_u8(REPLY);
    out.put_u64_le(id);
}

pub(crate) fn put_item_header(out: &mut BytesMut) {
    out.put_u8(ITEM);
}

/// A whole frame that has no body.
pub(crate) fn failed(id: u64, failure: Failure) -> BytesMut {
    let (code, detail) = failure.to_wire();
    small(|out| {
        out.put_u8(FAILED);
        out.put_u64_le(id);
        out.put_u8(code);
        out.put_u16_le(detail);
    })
}

pub(crate) fn cancel(id: u64) -> BytesMut {
    small(|out| {
        out.put_u8(CANCEL);
        out.put_u64_le(id);
    })
}

pub(crate) fn opened() -> BytesMut {
    small(|out| out.put_u8(OPENED))
}

pub(crate) fn end() -> BytesMut {
    small(|out| out.put_u8(END))
}

pub(crate) fn abandoned() -> BytesMut {
    small(|out| out.put_u8(ABANDONED))
}

fn small(write: impl FnOnce(&mut BytesMut)) -> BytesMut {
    let mut out = BytesMut::with_capacity(32);
    out.put_u32_le(0);
    write(&mut out);
    let bytes = (out.len() - LENGTH_BYTES) as u32;
    out[..LENGTH_BYTES].copy_from_slice(&bytes.to_le_bytes());
    out
}

/// Cuts a QUIC stream into frames. It buffers no more than one frame and one read.
pub(crate) struct FrameReader {
    stream: RecvStream,
    buffer: BytesMut,
    frame_bytes_max: usize,
}

impl FrameReader {
    pub(crate) fn new(stream: RecvStream, frame_bytes_max: usize) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            frame_bytes_max,
        }
    }

    /// Another limit for the frames to come.
    pub(crate) fn allow(&mut self, frame_bytes_max: usize) {
        self.frame_bytes_max = frame_bytes_max;
    }

    /// The next frame without its length; `None` when the stream ended between two frames.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, FrameError> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, FrameError>> {
        loop {
            if let Some(frame) = split_frame(&mut self.buffer, self.frame_bytes_max)? {
                return Poll::Ready(Ok(Some(frame)));
            }
            // The future keeps nothing between polls: all it knows is in the stream.
            let read = std::pin::pin!(self.stream.read_chunk(READ_BYTES_MAX, true));
            match ready!(read.poll(cx)).map_err(FrameError::Read)? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk.bytes),
                None if self.buffer.is_empty() => return Poll::Ready(Ok(None)),
                None => return Poll::Ready(Err(FrameError::Truncated)),
            }
        }
    }
}

/// Takes the first whole frame off the front of `buffer`.
pub(crate) fn split_frame(
    buffer: &mut BytesMut,
    frame_bytes_max: usize,
) -> Result<Option<Bytes>, FrameError> {
    let Some(length) = buffer.first_chunk::<LENGTH_BYTES>() else {
        return Ok(None);
    };
    let bytes = u32::from_le_bytes(*length) as usize;
    if bytes > frame_bytes_max {
        return Err(FrameError::TooLong {
            bytes,
            bytes_max: frame_bytes_max,
        });
    }
    if buffer.len() < LENGTH_BYTES + bytes {
        return Ok(None);
    }
    buffer.advance(LENGTH_BYTES);
    Ok(Some(buffer.split_to(bytes).freeze()))
}

/// Bytes of a peer that are no frame; the fault is the peer's, but for `Read`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("a frame of {bytes} bytes is longer than {bytes_max}")]
    TooLong { bytes: usize, bytes_max: usize },
    #[error("a frame ends too early")]
    Truncated,
    #[error("a frame has bytes left over")]
    Trailing,
    #[error("there is no frame of kind {0}")]
    UnknownKind(u8),
    #[error("a name is not UTF-8")]
    NotText,
    #[error("a frame is out of place")]
    OutOfPlace,
    #[error("the stream ended: {0}")]
    Read(ReadError),
}

pub(crate) fn take_u8(rest: &mut &[u8]) -> Result<u8, FrameError> {
    rest.try_get_u8().map_err(|_| FrameError::Truncated)
}

pub(crate) fn take_u16(rest: &mut &[u8]) -> Result<u16, FrameError> {
    rest.try_get_u16_le().map_err(|_| FrameError::Truncated)
}

pub(crate) fn take_u64(rest: &mut &[u8]) -> Result<u64, FrameError> {
    rest.try_get_u64_le().map_err(|_| FrameError::Truncated)
}

pub(crate) fn take_text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, FrameError> {
    std::str::from_utf8(take_short(rest)?).map_err(|_| FrameError::NotText)
}

fn take_short<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], FrameError> {
    let bytes = usize::from(take_u16(rest)?);
    let (taken, left) = rest.split_at_checked(bytes).ok_or(FrameError::Truncated)?;
    *rest = left;
    Ok(taken)
}

/// Names are short by construction; a longer text is cut, and then names nobody.
pub(crate) fn put_text(out: &mut BytesMut, text: &str) {
    let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
    out.put_u16_le(text.len() as u16);
    out.put_slice(text.as_bytes());
}

const ASK: u8 = 1;
const TELL: u8 = 2;
const REPLY: u8 = 3;
const FAILED: u8 = 4;
const CANCEL: u8 = 5;
const SUBSCRIBE: u8 = 6;
const OPENED: u8 = 7;
const ITEM: u8 = 8;
const END: u8 = 9;
const ABANDONED: u8 = 10;
/// From here on kinds that older versions may skip.
const SKIPPED_MIN: u8 = 128;

/// What a length of 16 bits allows.
const TEXT_BYTES_MAX: usize = u16::MAX as usize;

/// Fields of the extension.
const TRACE: u8 = 1;
const TRACE_BYTES: u8 = 24;

const LENGTH_BYTES: usize = 4;

/// A header of about 60 bytes and a small message: one allocation for most frames.
const FRAME_BYTES_USUAL: usize = 256;

/// What one read takes off the stream: enough for hundreds of small frames.
const READ_BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call() -> Call<'static> {
        Call {
            id: 7,
            deadline: Duration::from_micros(1500),
            trace: None,
            actor: "counter",
            message: "add",
            version: 3,
            body: b"body",
        }
    }

    fn body_of(mut frame: BytesMut) -> Bytes {
        split_frame(&mut frame, 1 << 20).unwrap().unwrap()
    }

    fn built(kind: CallKind) -> BytesMut {
        build(1 << 20, |out| {
            put_call(out, kind, &call());
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn calls_survive_the_wire() {
        assert_eq!(
            Frame::parse(&body_of(built(CallKind::Ask))),
            Ok(Frame::Ask(call()))
        );
        assert_eq!(
            Frame::parse(&body_of(built(CallKind::Tell))),
            Ok(Frame::Tell(call()))
        );
        assert_eq!(
            Frame::parse(&body_of(built(CallKind::Subscribe))),
            Ok(Frame::Subscribe(call()))
        );
    }

    #[test]
    fn small_frames_survive_the_wire() {
        let failure = Failure::Version { theirs: 9 };
        assert_eq!(
            Frame::parse(&body_of(failed(4, failure))),
            Ok(Frame::Failed { id: 4, failure })
        );
        assert_eq!(
            Frame::parse(&body_of(cancel(5))),
            Ok(Frame::Cancel { id: 5 })
        );
        assert_eq!(Frame::parse(&body_of(opened())), Ok(Frame::Opened));
        assert_eq!(Frame::parse(&body_of(end())), Ok(Frame::End));
        assert_eq!(Frame::parse(&body_of(abandoned())), Ok(Frame::Abandoned));
    }

    #[test]
    fn the_layout_does_not_change() {
        // A change here is a change of the wire version.
        let calls = [
            (CallKind::Ask, 1),
            (CallKind::Tell, 2),
            (CallKind::Subscribe, 6),
        ];
        for (kind, number) in calls {
            let rest =
                b"\0\0\x07\0\0\0\0\0\0\0\xdc\x05\0\0\0\0\0\0\x07\0counter\x03\0add\x03\0body";
            let expected = [&[39, 0, 0, 0, number][..], rest].concat();
            assert_eq!(built(kind)[..], expected);
        }
        let trace = Some(TraceContext {
            trace: 0x0102,
            span: 0x0304,
        });
        let traced = build(1 << 20, |out| {
            put_call(out, CallKind::Tell, &Call { trace, ..call() });
            Ok(())
        });
        let mut extension = vec![26, 0, 1, 24, 2, 1];
        extension.extend_from_slice(&[0; 14]);
        extension.extend_from_slice(&[4, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(traced.unwrap()[5..5 + extension.len()], extension);
        let reply = build(1 << 20, |out| {
            put_reply_header(out, 0x0102);
            out.put_slice(b"body");
            Ok(())
        });
        assert_eq!(
            reply.unwrap()[..],
            *b"\x0d\0\0\0\x03\x02\x01\0\0\0\0\0\0body"
        );
        let item = build(1 << 20, |out| {
            put_item_header(out);
            out.put_slice(b"item");
            Ok(())
        });
        assert_eq!(item.unwrap()[..], *b"\x05\0\0\0\x08item");
        let version = failed(5, Failure::Version { theirs: 0x0907 });
        assert_eq!(version[..4], [12, 0, 0, 0]);
        assert_eq!(version[4..13], [4, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(version[14..], [7, 9]);
        assert_eq!(cancel(5)[..], *b"\x09\0\0\0\x05\x05\0\0\0\0\0\0\0");
        assert_eq!(opened()[..], *b"\x01\0\0\0\x07");
        assert_eq!(end()[..], *b"\x01\0\0\0\x09");
        assert_eq!(abandoned()[..], *b"\x01\0\0\0\x0a");
    }

    #[test]
    fn every_truncation_of_a_header_is_an_error() {
        let frame = body_of(built(CallKind::Ask));
        for end in 0..frame.len() - call().body.len() {
            assert!(Frame::parse(&frame[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_kind_that_may_be_skipped_is_no_error_and_others_are() {
        assert_eq!(Frame::parse(&[128, 1, 2]), Ok(Frame::Skipped));
        assert_eq!(Frame::parse(&[255]), Ok(Frame::Skipped));
        assert_eq!(Frame::parse(&[127]), Err(FrameError::UnknownKind(127)));
    }

    #[test]
    fn a_field_that_a_later_version_adds_is_skipped() {
        let mut frame = body_of(built(CallKind::Tell)).to_vec();
        frame.splice(1..3, [5, 0, 200, 3, 1, 2, 3]);
        assert_eq!(Frame::parse(&frame), Ok(Frame::Tell(call())));
        frame[4] = 4;
        assert_eq!(Frame::parse(&frame), Err(FrameError::Truncated));
    }

    #[test]
    fn the_trace_survives_the_wire_beside_what_is_unknown() {
        let trace = Some(TraceContext::begin());
        let call = Call { trace, ..call() };
        let built = build(1 << 20, |out| {
            put_call(out, CallKind::Ask, &call);
            Ok(())
        });
        let mut frame = body_of(built.unwrap()).to_vec();
        assert_eq!(Frame::parse(&frame), Ok(Frame::Ask(call)));
        frame.splice(1..3, [29, 0, 200, 1, 9]);
        match Frame::parse(&frame) {
            Ok(Frame::Ask(call)) => assert_eq!(call.trace, trace),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_frame_beyond_the_limit_is_refused_by_its_length_alone() {
        let mut bytes = BytesMut::from(&u32::MAX.to_le_bytes()[..]);
        let refused = split_frame(&mut bytes, 1024);
        assert_eq!(
            refused,
            Err(FrameError::TooLong {
                bytes: u32::MAX as usize,
                bytes_max: 1024
            })
        );
    }

    #[test]
    fn a_frame_too_long_to_send_leaves_the_others() {
        let mut out = cancel(1);
        let before = out.clone();
        let result = append(&mut out, 16, |out| {
            out.put_slice(&[0; 17]);
            Ok(())
        });
        assert_eq!(result, Err(EncodeError::TooLong { bytes_max: 16 }));
        assert_eq!(out, before);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Frame::parse(&bytes);
            let _ = split_frame(&mut BytesMut::from(&bytes[..]), 100);
        }
    }
}
