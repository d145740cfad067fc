//! What collectives cost on this machine, as a program that uses them sees it. `offbook bench` and
//! `offbook doctor` use it; all ranks of a group call the same functions with the same arguments.

use std::time::{Duration, Instant};

use mlx_rs::{
    Array, Device, DeviceType, Dtype,
    ops::{matmul, ones},
    random,
    transforms::async_eval,
};

use crate::{
    error::CollectiveError,
    group::Group,
    handle::GroupHandle,
    operation::Operation,
    transport::{Exchange, Transport, Wait},
};

/// The device that computes in this process unless told otherwise.
pub fn device() -> &'static str {
    match Device::try_default().and_then(|device| device.get_type()) {
        Ok(DeviceType::Cpu) => "cpu",
        Ok(_) if cfg!(target_os = "macos") => "gpu (metal)",
        Ok(_) => "gpu (cuda)",
        Err(_) => "unknown",
    }
}

/// Graphs that the device of this process has instantiated since this was asked first. `None` where
/// that cannot be known: without CUDA, without CUPTI's library, or while another profiler uses it.
pub fn graphs_instantiated() -> Option<u64> {
    #[cfg(target_os = "linux")]
    return crate::graphs::instantiated();
    #[cfg(not(target_os = "linux"))]
    None
}

/// Sums of one size, to be timed one by one. The operand is of f32.
pub struct Probe<'a> {
    group: &'a Group,
    handle: GroupHandle,
    x: Array,
    scale: Array,
}

impl<'a> Probe<'a> {
    /// For operands of `bytes` bytes, a multiple of four.
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] for a size that no array of f32 has.
    pub fn new(group: &'a Group, bytes: usize) -> Result<Self, CollectiveError> {
        let elements = i32::try_from(bytes / 4)
            .ok()
            .filter(|&elements| elements > 0 && bytes.is_multiple_of(4));
        let Some(elements) = elements else {
            let why = format!("{bytes} bytes are no array of f32");
            return Err(CollectiveError::unsupported(Operation::AllSum, why));
        };
        let x = ones::<f32>(&[elements]).map_err(refused)?;
        let scale = Array::from_f32(1.0 / group.size() as f32);
        for array in [&x, &scale] {
            array.eval().map_err(refused)?;
        }
        Ok(Self {
            group,
            handle: group.handle(),
            x,
            scale,
        })
    }

    /// Builds one sum and evaluates it: how long that took.
    ///
    /// # Errors
    /// What poisoned the group.
    pub fn alone(&self) -> Result<Duration, CollectiveError> {
        let start = Instant::now();
        let sum = self.group.all_sum(&self.x)?;
        sum.eval().map_err(refused)?;
        let took = start.elapsed();
        self.handle.health()?;
        Ok(took)
    }

    /// Evaluates `operations` sums of which each needs the one before, divided by the number of
    /// ranks in between: how long each took.
    ///
    /// # Errors
    /// What poisoned the group.
    pub fn chained(&self, operations: u32) -> Result<Duration, CollectiveError> {
        let start = Instant::now();
        let mut y = self.x.clone();
        for _ in 0..operations {
            y = self
                .group
                .all_sum(&y)?
                .multiply(&self.scale)
                .map_err(refused)?;
        }
        y.eval().map_err(refused)?;
        let took = start.elapsed();
        self.handle.health()?;
        Ok(took / operations.max(1))
    }
}

/// What is left of a decode step when everything but its shape is taken away: `depth` products of a
/// vector `[1, width]` with matrices `[width, width]`, each followed by a sum over all ranks, in one
/// evaluation. In bf16, or in f32 on the CPU, which is slow in bf16.
pub struct Products {
    x: Array,
    matrices: Vec<Array>,
    depth: usize,
}

/// Where the time of one step went on this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProductsTiming {
    /// From the first call to the result.
    pub total: Duration,
    /// Building the step and handing it to the device.
    pub model: Duration,
    /// Waiting for the device; all of `total` that is not `model`.
    pub eval: Duration,
    /// Of that, what the stream says it spent in collectives; zero where it does not say.
    pub collective: Duration,
}

impl Products {
    /// Makes the matrices, the same on all ranks. Eight of them are used in turn, more than caches
    /// hold. Results keep their magnitude when `ranks` are added.
    ///
    /// # Errors
    /// [`CollectiveError::Mlx`] when MLX has no memory for them.
    pub fn new(width: i32, depth: usize, ranks: usize) -> Result<Self, CollectiveError> {
        let dtype = match device() {
            "cpu" => Dtype::Float32,
            _ => Dtype::Bfloat16,
        };
        let scale = 1.0 / (f64::from(width).sqrt() * ranks as f64);
        let normal = |seed, shape: &[i32], scale: f64| -> Result<Array, CollectiveError> {
            // Seeds are the same everywhere, and so are the values.
            let key = random::key(seed).map_err(refused)?;
            let values = random::normal::<f32>(shape, None, Some(scale as f32), Some(&key));
            let values = values
                .and_then(|values| values.as_dtype(dtype))
                .map_err(refused)?;
            values.eval().map_err(refused)?;
            Ok(values)
        };
        // As layers of a model hold them, by output: MLX has a kernel for a vector and such a matrix.
        let by_output = |seed| -> Result<Array, CollectiveError> {
            let matrix = normal(seed, &[width, width], scale)?
                .transpose()
                .map_err(refused)?;
            matrix.eval().map_err(refused)?;
            Ok(matrix)
        };
        Ok(Self {
            x: normal(MATRICES, &[1, width], 1.0)?,
            matrices: (0..MATRICES).map(by_output).collect::<Result<_, _>>()?,
            depth,
        })
    }

    /// Runs one step. Without a group each product is added to itself as often as there are ranks,
    /// so that the same is computed and nothing is exchanged.
    ///
    /// # Errors
    /// What poisoned the group.
    pub fn step(&self, group: Summation<'_>) -> Result<ProductsTiming, CollectiveError> {
        let waited = || {
            group
                .handle()
                .map_or(Duration::ZERO, |handle| handle.waited())
        };
        let (start, waited_before) = (Instant::now(), waited());
        let mut x = self.x.clone();
        for matrix in self.matrices.iter().cycle().take(self.depth) {
            let product = matmul(&x, matrix).map_err(refused)?;
            x = group.of(&product)?;
        }
        async_eval([&x]).map_err(refused)?;
        let model = start.elapsed();
        x.eval().map_err(refused)?;
        let total = start.elapsed();
        if let Some(handle) = group.handle() {
            handle.health()?;
        }
        Ok(ProductsTiming {
            total,
            model,
            eval: total.saturating_sub(model),
            collective: waited().saturating_sub(waited_before),
        })
    }
}

/// A transport to a peer that answers with what it is sent, at once: what an operation costs over it
/// is the way between the device and the host, and nothing else.
pub struct Echo;

impl Echo {
    /// This rank, and the one that it hears.
    pub const SIZE: usize = 2;
}

impl Transport for Echo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        Self::SIZE
    }

    /// # Errors
    /// [`CollectiveError::Unsupported`] where as much does not come as goes: an echo changes nothing.
    fn exchange(&mut self, exchange: Exchange<'_, '_>, _: Wait<'_>) -> Result<(), CollectiveError> {
        let ways = exchange.outgoing.iter().zip(exchange.incoming.iter_mut());
        for (outgoing, incoming) in ways {
            match (outgoing, incoming) {
                (Some(out), Some(back)) if out.len() == back.len() => back.copy_from_slice(out),
                (None, None) => {}
                _ => {
                    let why = "an echo answers with as many bytes as it hears".to_owned();
                    return Err(CollectiveError::unsupported(exchange.operation, why));
                }
            }
        }
        Ok(())
    }

    fn abandon(&mut self, _: &CollectiveError) {}
}

/// How products are summed.
#[derive(Clone, Copy)]
pub enum Summation<'a> {
    /// By nobody else: multiplied by this number of ranks instead.
    None(usize),
    /// Over the ranks of a group.
    Over(&'a Group),
}

impl Summation<'_> {
    fn of(self, product: &Array) -> Result<Array, CollectiveError> {
        match self {
            Self::Over(group) => group.all_sum(product),
            Self::None(ranks) => {
                let ranks = Array::from_f32(ranks as f32);
                let ranks = ranks.as_dtype(product.dtype()).map_err(refused)?;
                product.multiply(ranks).map_err(refused)
            }
        }
    }

    fn handle(self) -> Option<GroupHandle> {
        match self {
            Self::Over(group) => Some(group.handle()),
            Self::None(_) => None,
        }
    }
}

fn refused(why: mlx_rs::error::Exception) -> CollectiveError {
    CollectiveError::Mlx {
        operation: Operation::AllSum,
        why: why.what().to_owned(),
    }
}

const MATRICES: u64 = 8;
