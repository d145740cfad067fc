//! What the system says of its memory.

mod control_groups;

use std::process::Command;

use crate::process_limit;

/// Of the whole machine and this process's part of it, now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct SystemMemory {
    /// What this process could still be given without swapping, or ending at a limit of its own or of its
    /// control group; `None` where the system does not say.
    pub(crate) available_bytes: Option<u64>,
    /// Share of the last ten seconds in which some process waited for memory, from 0 to 1; 0 where the
    /// system does not say.
    pub(crate) stalled: f64,
}

impl SystemMemory {
    /// As it is now. On macOS this starts a process, which takes milliseconds.
    pub(crate) fn read() -> Self {
        if cfg!(target_os = "macos") {
            let answers = sysctl(&["kern.memorystatus_level", "hw.memsize"]);
            let available = match answers.as_deref() {
                Some(&[percent, bytes]) => Some(bytes / 100 * percent.min(100)),
                _ => None,
            };
            return Self {
                available_bytes: available,
                stalled: 0.0,
            };
        }
        let read = |path| std::fs::read_to_string(path).ok();
        let machine = read("/proc/meminfo").and_then(|text| available_in(&text));
        let groups = control_groups::available_bytes();
        Self {
            available_bytes: [machine, groups, process_limit::left_bytes()]
                .into_iter()
                .flatten()
                .min(),
            stalled: read("/proc/pressure/memory").map_or(0.0, |text| stalled_in(&text)),
        }
    }

    /// What a process that is about to load could be given. On macOS that is all there is: what is idle
    /// is moved out of the way.
    pub(crate) fn loadable_bytes() -> Option<u64> {
        if cfg!(target_os = "macos") {
            return sysctl(&["hw.memsize"])?.first().copied();
        }
        Self::read().available_bytes
    }
}

fn sysctl(names: &[&str]) -> Option<Vec<u64>> {
    let output = Command::new("sysctl").arg("-n").args(names).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split_whitespace()
        .map(|word| word.parse().ok())
        .collect()
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available_in(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let rest = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// `some avg10` of `/proc/pressure/memory`, from percent to a share.
fn stalled_in(pressure: &str) -> f64 {
    let mut lines = pressure.lines();
    let some = lines.find_map(|line| line.strip_prefix("some "));
    let average = some.and_then(|some| {
        let mut fields = some.split_whitespace();
        fields.find_map(|field| field.strip_prefix("avg10="))
    });
    let percent: f64 = average
        .and_then(|text| text.parse().ok())
        .unwrap_or_default();
    percent / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_says_what_it_has() {
        let available = SystemMemory::loadable_bytes().expect("Linux and macOS say so");
        assert!(available > 1 << 20, "{available} bytes");
        let now = SystemMemory::read();
        assert!(now.available_bytes.is_some_and(|bytes| bytes > 1 << 20));
        assert!((0.0..=1.0).contains(&now.stalled));
    }

    #[test]
    fn linux_is_read_as_it_writes() {
        let meminfo = "MemTotal:       24013508 kB\nMemAvailable:    7431668 kB\n";
        assert_eq!(available_in(meminfo), Some(7_431_668 * 1024));
        assert_eq!(available_in("MemFree: 1 kB"), None);
        let pressure = "some avg10=12.50 avg60=3.00 avg300=1.00 total=9\n\
                        full avg10=99.00 avg60=0.00 avg300=0.00 total=9\n";
        assert!((stalled_in(pressure) - 0.125).abs() < 1e-9);
        assert!(stalled_in("nothing of the kind").abs() < 1e-9);
    }
}
