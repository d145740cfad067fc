//! Our transports by themselves, without arrays: all sizes, all patterns, in any order of arrival.

mod support;

use std::time::Instant;

use offbook_collectives::{Exchange, Operation, QuicOptions, SharedMemoryOptions, Transport, Wait};

use support::{PATIENCE, on_threads, shared_memory, transports};

#[test]
fn operands_of_all_sizes_arrive_whole() {
    over_each_transport(3, |transport: &mut dyn Transport| {
        for bytes in [0, 1, 1199, 6144, 65_536, 1_000_003, 20 << 20] {
            // Uneven: rank r brings r more bytes than rank 0.
            let operand = |rank: usize| vec![(rank + bytes) as u8; bytes + rank];
            let received = exchange(transport, Operation::AllGather, operand, |_, _| true);
            for (rank, body) in received
                .iter()
                .enumerate()
                .filter(|(rank, _)| *rank != transport.rank())
            {
                assert_eq!(*body, operand(rank));
            }
        }
    });
}

#[test]
fn who_has_nothing_to_say_to_another_does_not_wait_for_it() {
    over_each_transport(3, |transport: &mut dyn Transport| {
        // A thousand rounds to the right, with nothing coming back.
        for round in 0..1000 {
            let operand = |rank: usize| vec![(rank + round) as u8; 100];
            exchange(transport, Operation::Send, operand, |from, to| {
                (from + 1) % 3 == to
            });
        }
    });
}

#[test]
fn ranks_that_send_around_a_circle_make_room_for_each_other() {
    over_each_transport(3, |transport: &mut dyn Transport| {
        // Far more than anybody may send ahead; all send first, and only then receive.
        let (rank, operand) = (transport.rank(), |rank: usize| vec![rank as u8; 20 << 20]);
        let to_next = |from: usize, to: usize| from == rank && (from + 1) % 3 == to;
        exchange(transport, Operation::Send, operand, to_next);
        let from_last = |from: usize, to: usize| to == rank && (from + 1) % 3 == to;
        let received = exchange(transport, Operation::Receive, operand, from_last);
        let last = (rank + 2) % 3;
        assert!(received[last] == operand(last));
    });
}

#[test]
fn the_last_operand_of_a_rank_that_leaves_arrives() {
    for _ in 0..20 {
        over_each_transport(2, |transport: &mut dyn Transport| {
            // Rank 0 sends and is gone; rank 1 has it all, however it comes.
            let operand = |_| vec![7; 3 << 20];
            let received = exchange(transport, Operation::Broadcast, operand, |from, _| {
                from == 0
            });
            assert!(transport.rank() == 0 || received[0] == operand(0));
        });
    }
}

/// Runs `rank` on a thread per rank: over QUIC, through memory as it comes, and through memory so
/// narrow that every operand goes in pieces.
fn over_each_transport(size: usize, rank: fn(&mut dyn Transport)) {
    on_threads(transports(size, QuicOptions::default()), move |mut quic| {
        rank(&mut quic)
    });
    for channel_bytes in [None, Some(4096)] {
        let options = SharedMemoryOptions {
            channel_bytes,
            ..SharedMemoryOptions::default()
        };
        on_threads(shared_memory(size, &options), move |mut memory| {
            rank(&mut memory)
        });
    }
}

/// One exchange in which `from` sends its operand to `to` where `sends` says so.
fn exchange(
    transport: &mut dyn Transport,
    operation: Operation,
    operand: impl Fn(usize) -> Vec<u8>,
    sends: impl Fn(usize, usize) -> bool,
) -> Vec<Vec<u8>> {
    let (rank, size) = (transport.rank(), transport.size());
    let own = operand(rank);
    let mut places: Vec<_> = (0..size).map(|from| vec![0; operand(from).len()]).collect();
    let outgoing: Vec<_> = (0..size)
        .map(|to| (to != rank && sends(rank, to)).then_some(&own[..]))
        .collect();
    let mut incoming: Vec<_> = places
        .iter_mut()
        .enumerate()
        .map(|(from, place)| (from != rank && sends(from, rank)).then_some(&mut place[..]))
        .collect();
    let wait = Wait {
        since: Instant::now(),
        deadline: PATIENCE,
        interrupted: &|| None,
    };
    let exchange = Exchange {
        operation,
        dtype: 1,
        outgoing: &outgoing,
        incoming: &mut incoming,
    };
    transport.exchange(exchange, wait).unwrap();
    places
}
