//! The child's end of the promise that no process outlives the one that started it.

use std::io::{ErrorKind, Read};

/// Ends this process when its parent ends, however that happens. A supervised child calls it first
/// thing in `main`, before it has anything to lose.
///
/// The parent holds the writing end of this process's standard input and never writes: its end of
/// file means that the parent is gone. On Linux the kernel also kills the process when the thread
/// that started it ends.
///
/// # Errors
/// When the thread that watches standard input cannot be started.
pub fn lifeline() -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Signal, set_parent_process_death_signal};
        // The pipe alone is enough; the signal only makes it sooner when standard input is stuck.
        if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
            tracing::debug!(%error, "no parent-death signal");
        }
    }
    std::thread::Builder::new()
        .name("lifeline".into())
        .spawn(|| {
            let mut stdin = std::io::stdin().lock();
            let mut bytes = [0; 64];
            loop {
                match stdin.read(&mut bytes) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            // Nobody is left to read a message or to care about the code.
            std::process::exit(ORPHANED);
        })?;
    Ok(())
}

/// Told apart from a crash in a log: the shell's code for a process ended by SIGHUP.
const ORPHANED: i32 = 129;
