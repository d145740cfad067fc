//! The threads that share a kernel's work. The thread that MLX computes on takes part itself: it hands pieces
//! out, works through them, and waits for nobody who has not taken one. Which thread computes a piece changes
//! no number.

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use rayon::{ThreadPool, ThreadPoolBuilder};

thread_local! {
    /// Of the thread that MLX computes on; `None` where one core is all there is to use.
    static CREW: Option<ThreadPool> = ThreadPoolBuilder::new()
        .use_current_thread()
        .num_threads(threads())
        .thread_name(|index| format!("kernels-{index}"))
        .build()
        .ok()
        .filter(|crew| crew.current_num_threads() > 1);
}

/// As many as [`CPU_THREADS`] says; else 0, which stands for all cores.
fn threads() -> usize {
    let said = std::env::var(CPU_THREADS).ok();
    said.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// How many threads there are to share work of so many multiplications: 1 where sharing costs more than it
/// saves.
pub(super) fn hands(multiplications: usize) -> usize {
    let threads = CREW.with(|crew| crew.as_ref().map_or(1, ThreadPool::current_num_threads));
    (multiplications / MULTIPLICATIONS_MIN).clamp(1, threads)
}

/// Does all pieces, each once, on whichever thread.
pub(super) fn share<T: Send>(pieces: Vec<T>, work: impl Fn(T) + Send + Sync) {
    CREW.with(|crew| match crew {
        // One at a time: pieces of one product take a few times as long as others of it.
        Some(crew) if pieces.len() > 1 => {
            crew.install(|| pieces.into_par_iter().with_max_len(1).for_each(work));
        }
        _ => pieces.into_iter().for_each(work),
    });
}

/// The environment variable that says on how many threads a process computes when it computes on a CPU. Without
/// it there are as many as cores: whoever starts several such processes on one machine divides them.
pub const CPU_THREADS: &str = "OFFBOOK_CPU_THREADS";
/// What one thread does in about the time in which another wakes up.
const MULTIPLICATIONS_MIN: usize = 300_000;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn every_piece_is_done_once_whoever_does_it() {
        for count in [0, 1, 2, 50] {
            let done: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(0)).collect();
            share((0..count).collect(), |piece: usize| {
                done[piece].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn little_work_is_not_shared() {
        assert_eq!(hands(MULTIPLICATIONS_MIN), 1);
        let cores = std::thread::available_parallelism().unwrap().get();
        assert_eq!(
            hands(usize::MAX) > 1,
            cores > 1 && std::env::var_os(CPU_THREADS).is_none()
        );
    }
}
