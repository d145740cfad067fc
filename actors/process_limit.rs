//! What this process may take of the machine's memory, as the system enforces it: whoever takes more is
//! refused, and ends. A shard is then started again; the machine does not fall.

use std::{fs, io};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// From now on the system refuses this process more than so many bytes of data beyond those that it has, and
/// the process gives back what it frees.
/// False where the system does not say how many these are, and nothing is bounded: on macOS.
///
/// # Errors
/// When the system takes no limit.
pub fn limit_data(beyond: u64) -> io::Result<bool> {
    let Some(now) = status_bytes("VmData:") else {
        return Ok(false);
    };
    let limit = Rlimit {
        current: Some(now.saturating_add(beyond)),
        maximum: getrlimit(Resource::Data).maximum,
    };
    setrlimit(Resource::Data, limit)?;
    give_back_what_is_freed();
    Ok(true)
}

/// glibc maps large blocks by themselves only until the first of a size is freed; from then on it cuts them
/// from one heap, whose holes count against the limit. With a threshold that is fixed it goes on mapping them.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
fn give_back_what_is_freed() {
    unsafe extern "C" {
        /// Of `malloc.h`.
        fn mallopt(parameter: i32, value: i32) -> i32;
    }
    // SAFETY: it sets a number of the allocator's, under its own lock.
    let is_set = unsafe { mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES_MIN) };
    if is_set == 0 {
        tracing::debug!("the allocator keeps what is freed");
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back_what_is_freed() {}

/// How much more data the system would give this process; `None` where nothing is bounded.
pub(crate) fn left_bytes() -> Option<u64> {
    let limit = getrlimit(Resource::Data).current?;
    Some(limit.saturating_sub(status_bytes("VmData:")?))
}

/// What a shard that MLX keeps to `limit_bytes` may take beyond what it has when it begins: as much again as
/// an eighth, for what MLX rounds up, and for the tensor that is read while the weights are there.
pub(crate) fn with_headroom(limit_bytes: u64) -> u64 {
    limit_bytes
        .saturating_add(limit_bytes / 8)
        .saturating_add(HEADROOM_BYTES)
}

/// Of this process, from `/proc/self/status`; `None` where the system does not say.
#[must_use]
pub fn status_bytes(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Its number in `malloc.h`.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const M_MMAP_THRESHOLD: i32 = -3;
/// What layers compute from a chunk is larger, all that comes and goes in numbers is smaller.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES_MIN: i32 = 1 << 20;
/// Stacks of threads, messages, and what libraries keep for themselves.
const HEADROOM_BYTES: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    use std::process::Command;

    use super::*;

    /// The process of the test below, when it starts this binary anew: no other test sets its allocator.
    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn child_process() {
        if std::env::var_os("TEST_GIVES_BACK").is_none() {
            return;
        }
        // Having freed one as large, glibc would keep what it cuts the others from.
        drop(std::hint::black_box(block()));
        assert!(limit_data(64 << 30).unwrap());
        let of_blocks = |count: usize| (count * BLOCK_BYTES) as u64;
        let mut blocks: Vec<_> = (0..BLOCKS).map(|_| Some(block())).collect();
        let (held, left) = (resident(), left_bytes().unwrap());
        blocks.iter_mut().step_by(2).for_each(|block| *block = None);
        let given_back = held.saturating_sub(resident());
        assert!(given_back > of_blocks(BLOCKS / 4), "{given_back} of memory");
        let given_back = left_bytes().unwrap().saturating_sub(left);
        assert!(
            given_back > of_blocks(BLOCKS / 4),
            "{given_back} of the limit"
        );
        // Larger than the holes: whoever keeps these needs as much again.
        let larger: Vec<_> = (0..BLOCKS / 4)
            .map(|_| vec![1u8; 2 * BLOCK_BYTES])
            .collect();
        let more = resident().saturating_sub(held);
        assert!(
            more < of_blocks(BLOCKS / 4),
            "{more} beside {}",
            larger.len()
        );
        println!("{GAVE_BACK}");
    }

    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn a_process_with_a_limit_gives_back_what_lies_between() {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([
            "process_limit::tests::child_process",
            "--exact",
            "--nocapture",
        ]);
        let output = child.env("TEST_GIVES_BACK", "yes").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let failed = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}{failed}");
        assert!(said.contains(GAVE_BACK), "{said}{failed}");
    }

    /// As what a layer computes: every page of it in use.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn block() -> Vec<u8> {
        vec![1; BLOCK_BYTES]
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn resident() -> u64 {
        status_bytes("VmRSS:").expect("Linux says so")
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_limit_lies_beyond_what_the_process_has() {
        let before = status_bytes("VmData:").expect("Linux says so");
        let beyond = 64 << 30;
        assert!(limit_data(beyond).unwrap());
        let limit = getrlimit(Resource::Data).current.expect("it is bounded");
        assert!(limit >= before + beyond, "{limit} of {before}");
        let left = left_bytes().expect("it is bounded");
        assert!(left <= beyond && left > beyond / 2, "{left}");
        let mut room = Vec::<u8>::new();
        assert!(room.try_reserve_exact(1 << 20).is_ok());
        let mut too_much = Vec::<u8>::new();
        assert!(too_much.try_reserve_exact(65 << 30).is_err());
    }

    #[test]
    fn headroom_does_not_overflow() {
        assert_eq!(with_headroom(u64::MAX), u64::MAX);
        assert_eq!(with_headroom(8 << 30), (9 << 30) + HEADROOM_BYTES);
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const BLOCKS: usize = 32;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const BLOCK_BYTES: usize = 4 << 20;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const GAVE_BACK: &str = "gave back what it freed";
}
