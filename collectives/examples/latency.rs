//! Prints how long an all-sum takes over our QUIC transport and over MLX's ring, on this machine,
//! one rank per process. Usage: `latency [ranks] [KiB] [spin µs]`.

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use mlx_rs::{Array, ops::ones, transforms::eval};
use offbook_collectives::{
    Exchange, FastSynch, Group, Operation, QuicOptions, RingSpec, Transport, Wait,
};

use support::{PATIENCE, Place, processes, say};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse::<u64>().ok());
    let (ranks, kib) = (
        number(0).unwrap_or(3) as usize,
        number(1).unwrap_or(6) as usize,
    );
    let spin = number(2).map(Duration::from_micros);
    if let Some(place) = Place::of_this_process() {
        return measure(&place, kib << 10, spin);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{ranks} ranks, {cores} cores, all_sum of {kib} KiB of f32, µs:");
    println!(
        "{:24} {:>9} {:>9} {:>9} {:>14}",
        "", "p50", "p90", "p99", "chained x64"
    );
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    for carrier in ["quic, no MLX", "quic", "ring"] {
        let mut ranks = processes(ranks, &arguments, &[(CARRIER, carrier)]);
        let figures = ranks[0].says("figures");
        println!("{carrier:24} {figures}");
        ranks.iter_mut().for_each(|rank| drop(rank.child.wait()));
    }
}

fn measure(place: &Place, bytes: usize, spin: Option<Duration>) {
    let options = QuicOptions {
        spin,
        ..QuicOptions::default()
    };
    let group = match std::env::var(CARRIER).unwrap().as_str() {
        "ring" => {
            let spec = RingSpec {
                rank: place.rank,
                addresses: place.ring_addresses(),
            };
            Group::ring(&spec).unwrap()
        }
        "quic" => {
            Group::over(Box::new(place.join_quic(options)), PATIENCE, FastSynch::Off).unwrap()
        }
        _ => return measure_transport(place.join_quic(options), bytes),
    };
    let x = ones::<f32>(&[bytes as i32 / 4]).unwrap();
    let scale = Array::from_f32(1.0 / group.size() as f32);
    eval([&x, &scale]).unwrap();
    let alone = || {
        let sum = group.all_sum(&x).unwrap();
        sum.eval().unwrap();
    };
    let chained = || {
        let mut y = x.clone();
        for _ in 0..CHAIN {
            y = group.all_sum(&y).unwrap().multiply(&scale).unwrap();
        }
        y.eval().unwrap();
    };
    report((place.rank, bytes), alone, chained);
    group.handle().health().unwrap();
}

fn measure_transport(mut transport: impl Transport, bytes: usize) {
    let (rank, size) = (transport.rank(), transport.size());
    let (operand, mut places) = (vec![1; bytes], vec![0; bytes * size]);
    let mut exchange = || {
        let outgoing: Vec<_> = (0..size)
            .map(|to| (to != rank).then_some(&operand[..]))
            .collect();
        let mut incoming: Vec<_> = places
            .chunks_mut(bytes)
            .enumerate()
            .map(|(from, place)| (from != rank).then_some(place))
            .collect();
        let wait = Wait {
            since: Instant::now(),
            deadline: PATIENCE,
            interrupted: &|| None,
        };
        let exchange = Exchange {
            operation: Operation::AllSum,
            dtype: 10,
            outgoing: &outgoing,
            incoming: &mut incoming,
        };
        transport.exchange(exchange, wait).unwrap();
    };
    let exchange = std::cell::RefCell::new(&mut exchange);
    report(
        (rank, bytes),
        || exchange.borrow_mut()(),
        || (0..CHAIN).for_each(|_| exchange.borrow_mut()()),
    );
}

/// Warms up, then measures until enough is known; all ranks do the same number of operations.
fn report((rank, bytes): (usize, usize), alone: impl Fn(), chained: impl Fn()) {
    let less = 1 + bytes / FULL_ROUNDS_BYTES;
    let (rounds, chains) = (ROUNDS / less, 1 + CHAINS / less);
    (0..rounds / 10).for_each(|_| alone());
    let mut times: Vec<_> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            alone();
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (0..chains / 5).for_each(|_| chained());
    let start = Instant::now();
    (0..chains).for_each(|_| chained());
    let per_operation = start.elapsed().as_secs_f64() * 1e6 / (chains * CHAIN) as f64;
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    if rank == 0 {
        let (p50, p90, p99) = (at(0.5), at(0.9), at(0.99));
        say(
            "figures",
            format!("{p50:9.1} {p90:9.1} {p99:9.1} {per_operation:14.1}"),
        );
    }
}

const CARRIER: &str = "OFFBOOK_LATENCY_CARRIER";
/// Larger operands are measured less often, so that the whole takes a minute at most.
const FULL_ROUNDS_BYTES: usize = 256 << 10;
const ROUNDS: usize = 500;
const CHAINS: usize = 10;
const CHAIN: usize = 64;
