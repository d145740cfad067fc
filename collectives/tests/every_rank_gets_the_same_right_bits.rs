//! Every operation, type and size, over QUIC, gives every rank the bits that a plain calculation
//! gives. Ranks are threads, each with its own stream of MLX's.

mod support;

use half::{bf16, f16};
use mlx_rs::{Array, ArrayElement, Dtype, transforms::eval};
use offbook_collectives::{FastSynch, Group, QuicOptions, QuicTransport};

use support::{PATIENCE, on_threads, transports};

/// Elements: one, an odd number, 6 KiB of f32, and a prefill's 4 MiB of f32.
const SIZES: [usize; 4] = [1, 1237, 1536, 1 << 20];

#[test]
fn over_two_ranks() {
    over(2);
}

#[test]
fn over_three_ranks() {
    over(3);
}

#[test]
fn over_five_ranks() {
    over(5);
}

fn over(ranks: usize) {
    let bits = on_threads(
        transports(ranks, QuicOptions::default()),
        |transport: QuicTransport| {
            let group = Group::over(Box::new(transport), PATIENCE, FastSynch::Off).unwrap();
            let mut bits = Vec::new();
            for elements in SIZES {
                floats::<f32>(&group, elements, &mut bits);
                if elements < 1 << 20 {
                    floats::<f16>(&group, elements, &mut bits);
                    integers::<u32>(&group, elements, &mut bits);
                }
                floats::<bf16>(&group, elements, &mut bits);
                integers::<i32>(&group, elements, &mut bits);
            }
            as_bytes(&group);
            assert_eq!(group.handle().health(), Ok(()));
            assert!(group.handle().operations() > 0);
            assert!(group.handle().waited() < PATIENCE);
            bits
        },
    );
    assert!(bits.iter().all(|rank| *rank == bits[0]), "the ranks differ");
}

fn floats<E: Element>(group: &Group, elements: usize, bits: &mut Vec<u64>) {
    let operands = operands::<E>(group.size(), elements);
    let x = E::array(&operands[group.rank()], &[elements as i32]);
    let fold = |f: fn(f32, f32) -> f32| -> Vec<E> {
        (0..elements)
            .map(|at| {
                operands
                    .iter()
                    .map(|rank| rank[at].wide())
                    .reduce(f)
                    .unwrap()
            })
            .map(E::narrow)
            .collect()
    };
    bits.push(same(&group.all_sum(&x).unwrap(), &fold(|a, b| a + b)));
    bits.push(same(&group.all_max(&x).unwrap(), &fold(f32::max)));
    bits.push(same(&group.all_min(&x).unwrap(), &fold(f32::min)));
    moves(group, &x, &operands, bits);
}

fn integers<E: Element>(group: &Group, elements: usize, bits: &mut Vec<u64>) {
    let operands = operands::<E>(group.size(), elements);
    let x = E::array(&operands[group.rank()], &[elements as i32]);
    // Small enough for f32 to be exact.
    let sums: Vec<E> = (0..elements)
        .map(|at| E::narrow(operands.iter().map(|rank| rank[at].wide()).sum()))
        .collect();
    bits.push(same(&group.all_sum(&x).unwrap(), &sums));
    moves(group, &x, &operands, bits);
}

/// What moves elements and adds at most.
fn moves<E: Element>(group: &Group, x: &Array, operands: &[Vec<E>], bits: &mut Vec<u64>) {
    let (rank, size) = (group.rank(), group.size());
    bits.push(same(&group.all_gather(x).unwrap(), &operands.concat()));
    for root in [0, size - 1] {
        bits.push(same(&group.broadcast(x, root).unwrap(), &operands[root]));
    }

    // Scattered: the sum of `size` copies of the operand in rows, of which ours is one.
    let rows: Vec<E> = operands[rank].repeat(size);
    let rows = E::array(&rows, &[size as i32, x.size() as i32]);
    let scattered = group.sum_scatter(&rows).unwrap();
    assert_eq!(scattered.shape(), [1, x.size() as i32]);
    let summed = group.all_sum(x).unwrap();
    eval([&scattered, &summed]).unwrap();
    assert_eq!(scattered.as_slice::<E>(), summed.as_slice::<E>());

    // Around the circle: to the next, from the one before.
    let (next, before) = ((rank + 1) % size, (rank + size - 1) % size);
    let sent = group.send(x, next).unwrap();
    let received = group.recv(x.shape(), x.dtype(), before).unwrap();
    eval([&sent, &received]).unwrap();
    assert_eq!(group.handle().health(), Ok(()));
    same(&received, &operands[before]);
    same(&sent, &operands[rank]);

    // Uneven rows to one root; rank 1 brings none.
    let rows: Vec<i32> = (0..size as i32)
        .map(|rank| if rank == 1 { 0 } else { rank + 1 })
        .collect();
    let own = rows[rank] as usize;
    let columns = x.size().min(1 << 16);
    let part = |rank: usize, rows: usize| operands[rank][..columns].repeat(rows);
    let mine = E::array(&part(rank, own), &[own as i32, columns as i32]);
    for root in [0, 1] {
        let gathered = group.gather_to(&mine, &rows, root).unwrap();
        eval([gathered.pending()]).unwrap();
        let all = gathered.into_root();
        assert_eq!(all.is_some(), rank == root);
        if let Some(all) = all {
            let expected: Vec<E> = (0..size)
                .flat_map(|rank| part(rank, rows[rank] as usize))
                .collect();
            assert_eq!(all.shape(), [rows.iter().sum::<i32>(), columns as i32]);
            same(&all, &expected);
        }
    }
}

/// Types that nobody adds travel as they are; what cannot be added is refused before it is sent.
fn as_bytes(group: &Group) {
    let flags = Array::from_slice(&[group.rank() == 0, true], &[2]);
    let gathered = group.all_gather(&flags).unwrap();
    gathered.eval().unwrap();
    let expected: Vec<bool> = (0..group.size())
        .flat_map(|rank| [rank == 0, true])
        .collect();
    assert_eq!(gathered.as_slice::<bool>(), expected);
    let first = group.broadcast(&flags, 0).unwrap();
    first.eval().unwrap();
    assert_eq!(first.as_slice::<bool>(), [true, true]);
    assert!(group.all_sum(&flags).is_err());
    assert!(group.recv(&[1], Dtype::Float32, group.rank()).is_err());
    let rows = vec![1; group.size()];
    assert!(
        group.gather_to(&flags, &rows, 0).is_err(),
        "two rows are not one"
    );
}

/// A digest of the array's bits, after a look whether they are the expected ones.
fn same<E: Element>(array: &Array, expected: &[E]) -> u64 {
    array.eval().unwrap();
    let elements = array.as_slice::<E>();
    assert_eq!(elements.len(), expected.len());
    let wrong = elements
        .iter()
        .zip(expected)
        .position(|(a, b)| a.bits() != b.bits());
    assert_eq!(wrong, None, "{:?}: first wrong element", array.dtype());
    elements.iter().fold(0, |digest, element| {
        digest.rotate_left(5) ^ u64::from(element.bits())
    })
}

/// Sums of these depend on their order, so that a rank that adds in another order is found out.
fn operands<E: Element>(ranks: usize, elements: usize) -> Vec<Vec<E>> {
    let element = |rank: usize, at: usize| {
        let noise = ((at * 31 + rank * 17 + 7) as u32).wrapping_mul(2_654_435_761) >> 8;
        let unit = noise as f32 / (1 << 24) as f32 - 0.5;
        E::narrow(unit * [1000.0, 1.0, 0.01][(at + rank) % 3])
    };
    (0..ranks)
        .map(|rank| (0..elements).map(|at| element(rank, at)).collect())
        .collect()
}

trait Element: ArrayElement + Copy + PartialEq + std::fmt::Debug {
    fn array(elements: &[Self], shape: &[i32]) -> Array;
    fn wide(self) -> f32;
    fn narrow(wide: f32) -> Self;
    fn bits(self) -> u32;
}

macro_rules! element {
    ($element:ty, $wide:expr, $narrow:expr, $bits:expr) => {
        impl Element for $element {
            fn array(elements: &[Self], shape: &[i32]) -> Array {
                Array::from_slice(elements, shape)
            }
            fn wide(self) -> f32 {
                $wide(self)
            }
            fn narrow(wide: f32) -> Self {
                $narrow(wide)
            }
            fn bits(self) -> u32 {
                $bits(self)
            }
        }
    };
}

element!(f32, |x| x, |wide| wide, f32::to_bits);
element!(f16, f16::to_f32, f16::from_f32, |x: f16| x.to_bits().into());
element!(bf16, bf16::to_f32, bf16::from_f32, |x: bf16| x
    .to_bits()
    .into());
element!(i32, |x| x as f32, |wide| wide as i32, |x| x as u32);
element!(u32, |x| x as f32, |wide: f32| wide.abs() as u32, |x| x);
