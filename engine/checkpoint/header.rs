//! The header of a safetensors file: eight bytes of length, then JSON.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;

use super::CheckpointError;

/// Where a tensor lies. Its bytes are inside the file, and as many as its shape says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) stored: StoredType,
    /// As the file writes it.
    pub(super) type_name: String,
    pub(super) shape: Vec<usize>,
    /// Of its first byte, from the start of the file.
    pub(super) offset: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoredType {
    Word32,
    Float32,
    BFloat16,
    Float16,
    /// Nothing that a model of ours is made of.
    Other,
}

impl StoredType {
    /// Bytes of one value; 0 for types that are never read.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Word32 | Self::Float32 => 4,
            Self::BFloat16 | Self::Float16 => 2,
            Self::Other => 0,
        }
    }
}

/// Reads and checks the header. Nothing larger than the header is allocated.
pub(super) fn read(file: &File, path: &Path) -> Result<HashMap<String, Entry>, CheckpointError> {
    let malformed = |detail: String| CheckpointError::Malformed {
        file: path.to_owned(),
        detail,
    };
    let unreadable = |source| CheckpointError::Read {
        file: path.to_owned(),
        source,
    };
    let file_bytes = file.metadata().map_err(unreadable)?.len();
    if file_bytes < LENGTH_BYTES {
        return Err(malformed(format!(
            "{file_bytes} bytes are no safetensors file"
        )));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0).map_err(unreadable)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX || length > file_bytes - LENGTH_BYTES {
        return Err(malformed(format!(
            "a header of {length} bytes in a file of {file_bytes}"
        )));
    }
    let mut text = vec![0; length as usize];
    file.read_exact_at(&mut text, LENGTH_BYTES)
        .map_err(unreadable)?;
    let fields: HashMap<String, serde_json::Value> =
        serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;

    let mut entries = HashMap::with_capacity(fields.len());
    for (tensor, field) in fields {
        if tensor == "__metadata__" {
            continue;
        }
        let field: Field = serde_json::from_value(field)
            .map_err(|error| malformed(format!("{tensor}: {error}")))?;
        let (entry, end) = field
            .entry(LENGTH_BYTES + length)
            .ok_or_else(|| malformed(format!("{tensor}: shape and bytes disagree")))?;
        if end > file_bytes {
            return Err(CheckpointError::Truncated {
                tensor,
                file: path.to_owned(),
                end,
                file_bytes,
            });
        }
        entries.insert(tensor, entry);
    }
    Ok(entries)
}

/// One tensor, as the header writes it.
#[derive(Debug, Deserialize)]
struct Field {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl Field {
    /// The entry and the end of its bytes; `None` when the numbers contradict each other.
    fn entry(self, data_start: u64) -> Option<(Entry, u64)> {
        let [start, end] = self.data_offsets;
        let stored = match self.dtype.as_str() {
            "U32" => StoredType::Word32,
            "F32" => StoredType::Float32,
            "BF16" => StoredType::BFloat16,
            "F16" => StoredType::Float16,
            _ => StoredType::Other,
        };
        let values = self.shape.iter().try_fold(1u64, |product, &size| {
            product.checked_mul(u64::try_from(size).ok()?)
        })?;
        let bytes = end.checked_sub(start)?;
        if stored != StoredType::Other && values.checked_mul(stored.bytes() as u64)? != bytes {
            return None;
        }
        let entry = Entry {
            stored,
            type_name: self.dtype,
            shape: self.shape,
            offset: data_start.checked_add(start)?,
        };
        Some((entry, data_start.checked_add(end)?))
    }
}

const LENGTH_BYTES: u64 = 8;
/// The format's own bound is 100 MB; a header has about 150 bytes per tensor.
const HEADER_BYTES_MAX: u64 = 100_000_000;
