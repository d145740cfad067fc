//! A model directory's tensors: one `model.safetensors`, or several files and their index.
//!
//! Opening reads headers only. Reading takes the byte ranges of one slice with positional reads
//! rather than a memory map: a map needs `unsafe`, turns a file that shrinks into a signal, and
//! counts as resident memory what was only passed over. Files are untrusted: what is wrong with
//! them is an error that names the tensor and the file.

mod header;
mod slice;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use mlx_rs::Array;
use serde::Deserialize;
use thiserror::Error;

use crate::config::ModelConfig;
use crate::partition::{RankShare, ShareSlices};
use crate::precision::Precision;
use crate::regular_file;
use header::{Entry, StoredType};
use slice::{Slice, read_values};

/// The tensors of a model, by name.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<TensorFile>,
    /// Index into `files`, and what its header says.
    tensors: HashMap<String, (usize, Entry)>,
}

#[derive(Debug)]
struct TensorFile {
    path: PathBuf,
    file: File,
}

impl Checkpoint {
    /// Opens `model.safetensors.index.json` and the files it names, or `model.safetensors`.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let index = directory.join("model.safetensors.index.json");
        let single = directory.join("model.safetensors");
        let checkpoint = if index.exists() {
            Self::open_indexed(directory, &index)?
        } else if single.exists() {
            let (file, entries) = TensorFile::open(single)?;
            let tensors = entries.into_iter().map(|(name, entry)| (name, (0, entry)));
            Self {
                files: vec![file],
                tensors: tensors.collect(),
            }
        } else {
            return Err(CheckpointError::NoModel {
                directory: directory.to_owned(),
            });
        };
        checkpoint.converted()?;
        Ok(checkpoint)
    }

    fn open_indexed(directory: &Path, path: &Path) -> Result<Self, CheckpointError> {
        let malformed = |detail: String| CheckpointError::Malformed {
            file: path.to_owned(),
            detail,
        };
        let mut text = String::new();
        regular_file::open(path)
            .and_then(|file| file.take(INDEX_BYTES_MAX).read_to_string(&mut text))
            .map_err(|source| unreadable(path, source))?;
        let index: Index =
            serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        let mut by_file: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, file) in index.weight_map {
            // A name that leaves the directory would read what is not the model's.
            if Path::new(&file).file_name() != Some(file.as_ref()) {
                return Err(malformed(format!("'{file}' is not a plain file name")));
            }
            by_file.entry(file).or_default().push(tensor);
        }
        let mut files = Vec::with_capacity(by_file.len());
        let mut tensors = HashMap::new();
        for (name, listed) in by_file {
            let (file, mut entries) = TensorFile::open(directory.join(name))?;
            for tensor in listed {
                let entry = entries
                    .remove(&tensor)
                    .ok_or_else(|| CheckpointError::NotInFile {
                        tensor: tensor.clone(),
                        file: file.path.clone(),
                    })?;
                tensors.insert(tensor, (files.len(), entry));
            }
            files.push(file);
        }
        Ok(Self { files, tensors })
    }

    /// Original checkpoints hold each expert by itself, or weights in blocks of fp8.
    fn converted(&self) -> Result<(), CheckpointError> {
        let original =
            |name: &&String| name.ends_with(".weight_scale_inv") || name.contains(".experts.");
        match self.tensors.keys().find(original) {
            Some(tensor) => Err(CheckpointError::NotConverted {
                tensor: tensor.clone(),
            }),
            None => Ok(()),
        }
    }

    /// An error if there are tensors that the model has no place for: then it is not the model that
    /// `config.json` says, and computing on without them would give wrong answers.
    pub fn expect_nothing_else(&self, config: &ModelConfig) -> Result<(), CheckpointError> {
        let whole = ShareSlices::of(config, &RankShare::whole(config));
        let known: HashSet<String> = whole.tensors().collect();
        let idle = |name: &str| {
            name.ends_with(".rotary_emb.inv_freq")
                || config.tied_embeddings && name.starts_with("lm_head.")
        };
        let surplus = self.tensors.iter();
        let mut surplus: Vec<_> = surplus
            .filter(|(name, _)| !known.contains(*name) && !idle(name))
            .collect();
        surplus.sort_by_key(|(name, _)| *name);
        match surplus.first() {
            None => Ok(()),
            Some((tensor, (file, _))) => Err(CheckpointError::Surplus {
                tensor: (*tensor).clone(),
                file: self.files[*file].path.clone(),
                others: surplus.len() - 1,
            }),
        }
    }

    /// Whether a tensor holds packed words.
    pub(crate) fn is_of_words(&self, tensor: &str) -> bool {
        let entry = self.tensors.get(tensor);
        entry.is_some_and(|(_, entry)| entry.stored == StoredType::Word32)
    }

    /// Whether a module is packed: whether it has scales.
    pub fn is_packed(&self, module: &str) -> bool {
        self.tensors.contains_key(&format!("{module}.scales"))
    }

    /// What the checkpoint's own floats are: what to compute in where the device is fast in it.
    pub fn precision(&self) -> Precision {
        match self.tensors.get("model.norm.weight") {
            Some((_, entry)) => match entry.stored {
                StoredType::BFloat16 => Precision::BFloat16,
                StoredType::Float16 => Precision::Float16,
                _ => Precision::Float32,
            },
            None => Precision::Float32,
        }
    }

    /// Bytes that a share takes in memory when its floats are loaded in `precision`.
    pub fn share_bytes(
        &self,
        config: &ModelConfig,
        share: &RankShare,
        precision: Precision,
    ) -> u64 {
        let packing = |module: &str| {
            let packing = config.packing_of(module);
            packing.filter(|_| self.is_packed(module))
        };
        ShareSlices::of(config, share).bytes(packing, precision.bytes())
    }

    /// An error unless the tensor exists and has this shape.
    pub fn expect_shape(&self, tensor: &str, expected: &[usize]) -> Result<(), CheckpointError> {
        let (file, entry) = self.find(tensor)?;
        if entry.shape == expected {
            return Ok(());
        }
        Err(CheckpointError::Shape {
            tensor: tensor.to_owned(),
            file: file.path.clone(),
            found: entry.shape.clone(),
            expected: expected.to_vec(),
        })
    }

    /// Reads a slice of a tensor of packed words (u32): one range per axis.
    pub fn read_words(
        &self,
        tensor: &str,
        ranges: &[Range<usize>],
    ) -> Result<Array, CheckpointError> {
        let (file, entry) = self.find(tensor)?;
        match entry.stored {
            StoredType::Word32 => {
                let slice = self.slice(tensor, ranges)?;
                let words = read_values(&file.file, &slice, u32::from_le_bytes);
                Ok(Array::from_slice(
                    &self.named(tensor, words)?,
                    &slice.array_shape(),
                ))
            }
            _ => Err(self.wrong_type(tensor, "U32")),
        }
    }

    /// Reads a slice of a tensor of floats (F32, F16 or BF16) in the precision asked for.
    pub fn read_floats(
        &self,
        tensor: &str,
        ranges: &[Range<usize>],
        to: Precision,
    ) -> Result<Array, CheckpointError> {
        match to {
            Precision::Float32 => self.floats(tensor, ranges, (|value| value, Array::from_slice)),
            Precision::BFloat16 => self.floats(tensor, ranges, (bf16::from_f32, Array::from_slice)),
            Precision::Float16 => self.floats(tensor, ranges, (f16::from_f32, Array::from_slice)),
        }
    }

    /// Every stored value is exact in f32, so a value that keeps its type comes back as it was.
    fn floats<T>(
        &self,
        tensor: &str,
        ranges: &[Range<usize>],
        (to, array): FloatKind<T>,
    ) -> Result<Array, CheckpointError> {
        let (file, entry) = self.find(tensor)?;
        if entry.stored.bytes() == 0 || entry.stored == StoredType::Word32 {
            return Err(self.wrong_type(tensor, "F32, F16 or BF16"));
        }
        let (file, slice) = (&file.file, self.slice(tensor, ranges)?);
        let values = match entry.stored {
            StoredType::Float32 => read_values(file, &slice, |b| to(f32::from_le_bytes(b))),
            StoredType::BFloat16 => {
                read_values(file, &slice, |b| to(bf16::from_le_bytes(b).to_f32()))
            }
            StoredType::Float16 => {
                read_values(file, &slice, |b| to(f16::from_le_bytes(b).to_f32()))
            }
            _ => return Err(self.wrong_type(tensor, "F32, F16 or BF16")),
        };
        Ok(array(&self.named(tensor, values)?, &slice.array_shape()))
    }

    fn slice(&self, tensor: &str, ranges: &[Range<usize>]) -> Result<Slice, CheckpointError> {
        let (file, entry) = self.find(tensor)?;
        Slice::of(entry, ranges).ok_or_else(|| CheckpointError::OutOfBounds {
            tensor: tensor.to_owned(),
            file: file.path.clone(),
            shape: entry.shape.clone(),
            ranges: ranges.to_vec(),
        })
    }

    fn find(&self, tensor: &str) -> Result<(&TensorFile, &Entry), CheckpointError> {
        let (file, entry) = self
            .tensors
            .get(tensor)
            .ok_or_else(|| CheckpointError::Missing {
                tensor: tensor.to_owned(),
                file: self
                    .files
                    .first()
                    .map(|file| file.path.clone())
                    .unwrap_or_default(),
            })?;
        Ok((&self.files[*file], entry))
    }

    fn named<T>(&self, tensor: &str, read: std::io::Result<T>) -> Result<T, CheckpointError> {
        let file = self.find(tensor)?.0.path.clone();
        read.map_err(|source| CheckpointError::ReadTensor {
            tensor: tensor.to_owned(),
            file,
            source,
        })
    }

    /// As if the tensor had not been there.
    #[cfg(test)]
    pub(crate) fn forget(&mut self, tensor: &str) {
        self.tensors.remove(tensor);
    }

    fn wrong_type(&self, tensor: &str, expected: &'static str) -> CheckpointError {
        match self.find(tensor) {
            Ok((file, entry)) => CheckpointError::Type {
                tensor: tensor.to_owned(),
                file: file.path.clone(),
                found: entry.type_name.clone(),
                expected,
            },
            Err(missing) => missing,
        }
    }
}

/// How a value is made, and an array of them: mlx-rs names no trait that does the latter.
type FloatKind<T> = (fn(f32) -> T, fn(&[T], &[i32]) -> Array);

/// `model.safetensors.index.json`
#[derive(Debug, Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl TensorFile {
    fn open(path: PathBuf) -> Result<(Self, HashMap<String, Entry>), CheckpointError> {
        let file = regular_file::open(&path).map_err(|source| unreadable(&path, source))?;
        let entries = header::read(&file, &path)?;
        Ok((Self { path, file }, entries))
    }
}

fn unreadable(file: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Read {
        file: file.to_owned(),
        source,
    }
}

/// The model directory is not what the configuration promises, or cannot be read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    #[error("{} has neither model.safetensors nor model.safetensors.index.json", directory.display())]
    NoModel { directory: PathBuf },
    #[error("cannot read {}: {source}", file.display())]
    Read {
        file: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is malformed: {detail}", file.display())]
    Malformed { file: PathBuf, detail: String },
    #[error("{} is truncated: {tensor} ends at byte {end} of {file_bytes}", file.display())]
    Truncated {
        tensor: String,
        file: PathBuf,
        end: u64,
        file_bytes: u64,
    },
    #[error("the index places {tensor} in {}, which does not hold it", file.display())]
    NotInFile { tensor: String, file: PathBuf },
    #[error(
        "{tensor} is of an original checkpoint: only MLX's format is read, convert the model with \
         mlx_lm.convert"
    )]
    NotConverted { tensor: String },
    #[error("the checkpoint of {} lacks {tensor}", file.display())]
    Missing { tensor: String, file: PathBuf },
    #[error(
        "{tensor} in {}{} no place in the model that config.json describes: is config.json of this \
         checkpoint?", file.display(), and_others(*others)
    )]
    Surplus {
        tensor: String,
        file: PathBuf,
        others: usize,
    },
    #[error("{tensor} in {} has shape {found:?}, which should be {expected:?}", file.display())]
    Shape {
        tensor: String,
        file: PathBuf,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("{tensor} in {} has type {found}, which should be {expected}", file.display())]
    Type {
        tensor: String,
        file: PathBuf,
        found: String,
        expected: &'static str,
    },
    #[error("{tensor} in {} has shape {shape:?}, of which {ranges:?} cannot be read", file.display())]
    OutOfBounds {
        tensor: String,
        file: PathBuf,
        shape: Vec<usize>,
        ranges: Vec<Range<usize>>,
    },
    #[error("cannot read {tensor} from {}: {source}", file.display())]
    ReadTensor {
        tensor: String,
        file: PathBuf,
        source: std::io::Error,
    },
}

fn and_others(others: usize) -> String {
    match others {
        0 => " has".to_owned(),
        _ => format!(", and {others} more, have"),
    }
}

/// Indices have about 100 bytes per tensor; the largest models have some 100,000 tensors.
const INDEX_BYTES_MAX: u64 = 64 << 20;

#[cfg(test)]
mod tests;
