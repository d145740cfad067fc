//! Whether a group does what it promises: every operation, type and size, against plain arithmetic
//! that shares no code with the transports. The tests and `offbook doctor` use it; all ranks of a
//! group call [`verify`] with the same arguments.

use half::{bf16, f16};
use mlx_rs::{Array, ArrayElement, Dtype, transforms::eval};
use thiserror::Error;

use crate::{error::CollectiveError, group::Group};

/// How close a group's results are to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exactness {
    /// The very bits: operands are added in rank order, halves in f32 and rounded once. So do all
    /// transports of ours.
    Bits,
    /// Up to rounding: sums may be made in another order and rounded at each step, as MLX's own
    /// transports do. Sends go to the next rank only, and nothing is empty.
    Rounding,
}

/// What came out when all was well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// How many operations were carried out and compared.
    pub operations: usize,
    /// Of all results that every rank must get alike: equal on all ranks, or they differ.
    pub digest: u64,
}

/// Why a group does not keep its promises.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ConformanceError {
    /// A result is not the right one.
    #[error("{what}: element {at} is {got}, plain arithmetic says {expected}")]
    Wrong {
        /// The operation, its type and shape.
        what: String,
        /// The first wrong element.
        at: usize,
        /// What the group made of it.
        got: String,
        /// What is right.
        expected: String,
    },
    /// A result has the wrong number of elements.
    #[error("{what}: {got} elements came out instead of {expected}")]
    Size {
        /// The operation, its type and shape.
        what: String,
        /// How many came.
        got: usize,
        /// How many are right.
        expected: usize,
    },
    /// A type that cannot be added was accepted.
    #[error("{0} was accepted")]
    NotRefused(String),
    /// The group failed, or refused to do what it should.
    #[error("{what}: {why}")]
    Failed {
        /// The operation, its type and shape.
        what: String,
        /// The group's error.
        why: CollectiveError,
    },
    /// MLX could not evaluate.
    #[error("{what}: {why}")]
    Evaluation {
        /// The operation, its type and shape.
        what: String,
        /// In MLX's words.
        why: String,
    },
}

/// Carries out every operation in every type for operands of as many elements as in `sizes`, one
/// after the other. Collective: returns when this rank's part is done.
///
/// # Errors
/// The first [`ConformanceError`]. The other ranks may then wait for this one until their deadline.
pub fn verify(
    group: &Group,
    sizes: &[usize],
    exactness: Exactness,
) -> Result<Verified, ConformanceError> {
    let mut trial = Trial {
        group,
        exactness,
        what: String::new(),
        verified: Verified {
            operations: 0,
            digest: 0,
        },
    };
    for &elements in sizes {
        trial.numbers::<f32>(elements)?;
        trial.numbers::<f16>(elements)?;
        trial.numbers::<bf16>(elements)?;
        trial.numbers::<i32>(elements)?;
        trial.numbers::<u32>(elements)?;
        trial.moves::<u8>(elements)?;
    }
    trial.refuses_what_is_not_added()?;
    Ok(trial.verified)
}

struct Trial<'a> {
    group: &'a Group,
    exactness: Exactness,
    /// What is under way, for errors.
    what: String,
    verified: Verified,
}

type Outcome = Result<(), ConformanceError>;

impl Trial<'_> {
    /// What folds elements, and what moves them.
    fn numbers<E: Element>(&mut self, elements: usize) -> Outcome {
        let operands = operands::<E>(self.group.size(), elements);
        let x = array(&operands[self.group.rank()], &[elements]);
        let fold = |combine: fn(f64, f64) -> f64| -> Vec<E> {
            (0..elements)
                .map(|at| E::fold(operands.iter().map(|rank| rank[at]), combine))
                .collect()
        };
        let sums = fold(|a, b| a + b);
        self.begin::<E>("all_sum", elements);
        self.alike(self.group.all_sum(&x), &sums)?;
        self.begin::<E>("all_max", elements);
        self.alike(self.group.all_max(&x), &fold(f64::max))?;
        self.begin::<E>("all_min", elements);
        self.alike(self.group.all_min(&x), &fold(f64::min))?;
        self.begin::<E>("sum_scatter", elements);
        // As many copies of the operand as there are ranks; each keeps the sum of one of them.
        let size = self.group.size();
        let copies = array(&operands[self.group.rank()].repeat(size), &[size, elements]);
        self.own(self.group.sum_scatter(&copies), &sums)?;
        self.moves::<E>(elements)
    }

    /// What takes elements as they are.
    fn moves<E: Element>(&mut self, elements: usize) -> Outcome {
        let operands = operands::<E>(self.group.size(), elements);
        let x = array(&operands[self.group.rank()], &[elements]);
        self.begin::<E>("all_gather", elements);
        self.alike(self.group.all_gather(&x), &operands.concat())?;
        for (root, operand) in operands.iter().enumerate() {
            // MLX's own transports broadcast by adding.
            if self.exactness == Exactness::Rounding && E::DTYPE == Dtype::Uint8 {
                break;
            }
            self.begin::<E>("broadcast", elements);
            self.alike(self.group.broadcast(&x, root), operand)?;
        }
        match self.exactness {
            Exactness::Bits => self.all_around_the_circle(&x, &operands)?,
            Exactness::Rounding => self.one_to_the_next(&x, &operands)?,
        }
        self.uneven_rows(&operands)
    }

    /// All send to the next rank before they receive from the one before.
    fn all_around_the_circle<E: Element>(&mut self, x: &Array, operands: &[Vec<E>]) -> Outcome {
        let (rank, size) = (self.group.rank(), self.group.size());
        if size == 1 {
            return Ok(());
        }
        let (next, before) = ((rank + 1) % size, (rank + size - 1) % size);
        self.begin::<E>("send and recv", x.size());
        let sent = self.done(self.group.send(x, next))?;
        let received = self.done(self.group.recv(x.shape(), x.dtype(), before))?;
        self.evaluate(&[&sent, &received])?;
        self.own(Ok(sent), &operands[rank])?;
        self.own(Ok(received), &operands[before])
    }

    fn one_to_the_next<E: Element>(&mut self, x: &Array, operands: &[Vec<E>]) -> Outcome {
        self.begin::<E>("send and recv", x.size());
        match self.group.rank() {
            0 if self.group.size() > 1 => self.own(self.group.send(x, 1), &operands[0]),
            1 => self.own(self.group.recv(x.shape(), x.dtype(), 0), &operands[0]),
            _ => Ok(()),
        }
    }

    /// Rank 1 brings no rows, the others one more than their number.
    fn uneven_rows<E: Element>(&mut self, operands: &[Vec<E>]) -> Outcome {
        let (rank, size) = (self.group.rank(), self.group.size());
        let columns = operands[rank].len().min(COLUMNS_MAX);
        let rows_of = |rank: usize| if rank == 1 { 0 } else { rank + 1 };
        let part = |rank: usize| operands[rank][..columns].repeat(rows_of(rank));
        let rows: Vec<i32> = (0..size).map(|rank| rows_of(rank) as i32).collect();
        let mine = array(&part(rank), &[rows_of(rank), columns]);
        for root in [0, size - 1] {
            self.begin::<E>("gather_to", columns);
            let gathered = self
                .group
                .gather_to(&mine, &rows, root)
                .map_err(|why| self.failed(why))?;
            self.evaluate(&[gathered.pending()])?;
            if let Some(all) = gathered.into_root() {
                self.own(Ok(all), &(0..size).flat_map(part).collect::<Vec<_>>())?;
            }
        }
        Ok(())
    }

    /// What cannot be added is refused before it is sent.
    fn refuses_what_is_not_added(&mut self) -> Outcome {
        if self.exactness == Exactness::Bits && self.group.size() > 1 {
            let flags = Array::from_slice(&[true, false], &[2]);
            if self.group.all_sum(&flags).is_ok() {
                return Err(ConformanceError::NotRefused("all_sum of bool".to_owned()));
            }
        }
        Ok(())
    }

    fn begin<E: Element>(&mut self, operation: &str, elements: usize) {
        self.what = format!("{operation} of {elements} {:?}", E::DTYPE);
    }

    /// A result that every rank gets.
    fn alike<E: Element>(
        &mut self,
        result: Result<Array, CollectiveError>,
        expected: &[E],
    ) -> Outcome {
        let result = self.compare(result, expected)?;
        let digest = result.iter().fold(FNV_OFFSET, |digest, element| {
            (digest ^ u64::from(element.bits())).wrapping_mul(FNV_PRIME)
        });
        self.verified.digest = self.verified.digest.rotate_left(1) ^ digest;
        Ok(())
    }

    /// A result of this rank's own.
    fn own<E: Element>(
        &mut self,
        result: Result<Array, CollectiveError>,
        expected: &[E],
    ) -> Outcome {
        self.compare(result, expected).map(drop)
    }

    fn compare<E: Element>(
        &mut self,
        result: Result<Array, CollectiveError>,
        expected: &[E],
    ) -> Result<Vec<E>, ConformanceError> {
        let result = self.done(result)?;
        self.evaluate(&[&result])?;
        let elements = match result.size() {
            // An empty array has no memory to look at.
            0 => &[],
            _ => result.as_slice::<E>(),
        };
        if elements.len() != expected.len() {
            return Err(ConformanceError::Size {
                what: self.what.clone(),
                got: elements.len(),
                expected: expected.len(),
            });
        }
        let size = self.group.size();
        let right = |got: E, expected: E| match self.exactness {
            Exactness::Bits => got.bits() == expected.bits(),
            Exactness::Rounding => E::is_near(got, expected, size),
        };
        let mut pairs = elements.iter().zip(expected);
        if let Some(at) = pairs.position(|(&got, &expected)| !right(got, expected)) {
            return Err(ConformanceError::Wrong {
                what: self.what.clone(),
                at,
                got: format!("{:?}", elements[at]),
                expected: format!("{:?}", expected[at]),
            });
        }
        self.verified.operations += 1;
        Ok(elements.to_vec())
    }

    fn done(&self, result: Result<Array, CollectiveError>) -> Result<Array, ConformanceError> {
        result.map_err(|why| self.failed(why))
    }

    fn evaluate(&self, arrays: &[&Array]) -> Outcome {
        eval(arrays.iter().copied()).map_err(|why| ConformanceError::Evaluation {
            what: self.what.clone(),
            why: why.what().to_owned(),
        })?;
        self.group.handle().health().map_err(|why| self.failed(why))
    }

    fn failed(&self, why: CollectiveError) -> ConformanceError {
        ConformanceError::Failed {
            what: self.what.clone(),
            why,
        }
    }
}

/// Sums of these depend on their order, so that a rank that adds in another order is found out.
fn operands<E: Element>(ranks: usize, elements: usize) -> Vec<Vec<E>> {
    let element = |rank: usize, at: usize| {
        let noise = ((at * 31 + rank * 17 + 7) as u32).wrapping_mul(2_654_435_761) >> 8;
        let unit = f64::from(noise) / f64::from(1 << 24) - 0.5;
        E::narrow(unit * [1000.0, 1.0, 0.01][(at + rank) % 3])
    };
    (0..ranks)
        .map(|rank| (0..elements).map(|at| element(rank, at)).collect())
        .collect()
}

fn array<E: Element>(elements: &[E], shape: &[usize]) -> Array {
    let shape: Vec<i32> = shape.iter().map(|&length| length as i32).collect();
    E::array(elements, &shape)
}

/// An element type, and plain arithmetic on it.
trait Element: ArrayElement + Copy + std::fmt::Debug {
    fn array(elements: &[Self], shape: &[i32]) -> Array;
    fn narrow(wide: f64) -> Self;
    fn wide(self) -> f64;
    fn bits(self) -> u32;
    /// The operands of all ranks, in rank order, each step in the type that sums are made in.
    fn fold(operands: impl Iterator<Item = Self>, combine: fn(f64, f64) -> f64) -> Self;

    /// Whether two sums of `size` operands may differ by rounding alone. Operands are below
    /// 500.
    fn is_near(a: Self, b: Self, size: usize) -> bool {
        let bound = Self::EPSILON * 500.0 * size as f64;
        (a.wide() - b.wide()).abs() <= bound
    }
    /// The relative error of one rounding.
    const EPSILON: f64 = 0.0;
}

macro_rules! element {
    ($element:ty, added in $sum:ty, rounded by $epsilon:expr,
     $narrow:expr, $wide:expr, $bits:expr) => {
        impl Element for $element {
            const EPSILON: f64 = $epsilon;
            fn array(elements: &[Self], shape: &[i32]) -> Array {
                Array::from_slice(elements, shape)
            }
            fn narrow(wide: f64) -> Self {
                $narrow(wide)
            }
            fn wide(self) -> f64 {
                $wide(self)
            }
            fn bits(self) -> u32 {
                $bits(self)
            }
            // A sum of two f32 in f64, rounded to f32, is what f32 itself gives.
            fn fold(
                mut operands: impl Iterator<Item = Self>,
                combine: fn(f64, f64) -> f64,
            ) -> Self {
                let first = operands.next().map_or(0.0, Element::wide);
                let all = operands.fold(first, |all, next| {
                    f64::from(combine(all, next.wide()) as $sum)
                });
                Element::narrow(all)
            }
        }
    };
}

element!(f32, added in f32, rounded by 1.0 / 8_388_608.0,
    |wide| wide as f32, f64::from, f32::to_bits);
element!(f16, added in f32, rounded by 1.0 / 1024.0,
    |wide| f16::from_f32(wide as f32), f16::to_f64, |x: f16| x.to_bits().into());
element!(bf16, added in f32, rounded by 1.0 / 128.0,
    |wide| bf16::from_f32(wide as f32), bf16::to_f64, |x: bf16| x.to_bits().into());
element!(i32, added in i32, rounded by 0.0, |wide| wide as i32, f64::from, |x| x as u32);
element!(u32, added in u32, rounded by 0.0, |wide: f64| wide.abs() as u32, f64::from, |x| x);
element!(u8, added in u8, rounded by 0.0, |wide: f64| wide.abs() as u8, f64::from, u32::from);

/// A gather of rows brings as many rows as there are ranks, so they are kept short.
const COLUMNS_MAX: usize = 1 << 16;

// Fowler, Noll and Vo's hash: all that is asked of it is that another bit makes another digest.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;
