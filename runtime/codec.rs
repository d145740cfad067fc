//! The one file that knows bincode. Everything it reads came from a peer, so it decodes under a
//! limit and demands that every byte was used.
//!
//! The limit cannot see two things: recursive types, and sequences of values that take no bytes
//! (`Vec<()>`). Neither may be in a message.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::enc::write::Writer;
use bytes::BytesMut;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Appends `value` to `out`, or leaves `out` as it was when that took more than `bytes_max`.
pub(crate) fn encode<T: Serialize>(
    value: &T,
    out: &mut BytesMut,
    bytes_max: usize,
) -> Result<(), EncodeError> {
    let start = out.len();
    let mut writer = Capped {
        out,
        left: bytes_max,
    };
    let result = bincode::serde::encode_into_writer(value, &mut writer, CONFIG);
    result.map_err(|error| {
        out.truncate(start);
        match error {
            bincode::error::EncodeError::UnexpectedEnd => EncodeError::TooLong { bytes_max },
            other => EncodeError::Unencodable(other.to_string()),
        }
    })
}

/// Reads one value that fills `bytes` exactly.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, CONFIG)
        .map_err(|error| DecodeError::Malformed(error.to_string()))?;
    if used == bytes.len() {
        Ok(value)
    } else {
        Err(DecodeError::Trailing {
            bytes: bytes.len() - used,
        })
    }
}

/// Why a value of our own cannot be sent.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EncodeError {
    #[error("it takes more than {bytes_max} bytes")]
    TooLong { bytes_max: usize },
    #[error("its serde implementation failed: {0}")]
    Unencodable(String),
}

/// Why a peer's bytes are no value.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("{0}")]
    Malformed(String),
    #[error("{bytes} bytes are left over")]
    Trailing { bytes: usize },
}

/// Stops a value that is too long while it is being written, not after.
struct Capped<'a> {
    out: &'a mut BytesMut,
    left: usize,
}

impl Writer for Capped<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), bincode::error::EncodeError> {
        if bytes.len() > self.left {
            return Err(bincode::error::EncodeError::UnexpectedEnd);
        }
        self.left -= bytes.len();
        self.out.extend_from_slice(bytes);
        Ok(())
    }
}

/// The longest frame that any configuration may allow.
pub(crate) const FRAME_BYTES_LIMIT: usize = 8 << 20;

/// bincode counts claimed, decoded bytes, not those on the wire: a one-byte integer claims eight.
const DECODED_BYTES_LIMIT: usize = 8 * FRAME_BYTES_LIMIT;

const CONFIG: Configuration<LittleEndian, Varint, Limit<DECODED_BYTES_LIMIT>> =
    bincode::config::standard().with_limit::<DECODED_BYTES_LIMIT>();

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Sample {
        id: u64,
        name: String,
        items: Vec<(u32, Option<f32>)>,
        raw: Vec<u8>,
    }

    fn sample() -> Sample {
        Sample {
            id: 1 << 40,
            name: "näme".into(),
            items: vec![(1, Some(0.5)), (u32::MAX, None)],
            raw: vec![7; 300],
        }
    }

    fn bytes_of<T: Serialize>(value: &T) -> BytesMut {
        let mut out = BytesMut::new();
        encode(value, &mut out, usize::MAX).unwrap();
        out
    }

    #[test]
    fn the_bytes_do_not_change() {
        // A change here is a change of the wire version.
        assert_eq!(
            bytes_of(&(1u8, 300u32, "ab", Some(true)))[..],
            [1, 251, 44, 1, 2, 97, 98, 1, 1]
        );
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = bytes_of(&sample());
        assert_eq!(decode::<Sample>(&bytes), Ok(sample()));
        for end in 0..bytes.len() {
            assert!(decode::<Sample>(&bytes[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn bytes_left_over_are_an_error() {
        let mut bytes = bytes_of(&sample());
        bytes.extend_from_slice(&[0]);
        assert_eq!(
            decode::<Sample>(&bytes),
            Err(DecodeError::Trailing { bytes: 1 })
        );
    }

    #[test]
    fn a_length_bomb_is_an_error() {
        for length in [1u64 << 30, 1 << 40, u64::MAX] {
            let mut bomb = vec![253];
            bomb.extend_from_slice(&length.to_le_bytes());
            assert!(decode::<Vec<u64>>(&bomb).is_err());
            assert!(decode::<Vec<u8>>(&bomb).is_err());
            assert!(decode::<String>(&bomb).is_err());
            assert!(decode::<Vec<String>>(&bomb).is_err());
        }
    }

    #[test]
    fn a_value_that_is_too_long_leaves_nothing_behind() {
        let mut out = BytesMut::from(&b"before"[..]);
        let result = encode(&sample(), &mut out, 50);
        assert_eq!(result, Err(EncodeError::TooLong { bytes_max: 50 }));
        assert_eq!(out[..], b"before"[..]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode::<Sample>(&bytes);
            let _ = decode::<Vec<Sample>>(&bytes);
        }

        #[test]
        fn a_flipped_bit_never_panics(at in 0usize..330, bit in 0u8..8) {
            let mut bytes = bytes_of(&sample());
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = decode::<Sample>(&bytes);
        }
    }
}
