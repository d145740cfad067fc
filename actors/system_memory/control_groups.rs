//! What the control groups of this process (a container, a service with a limit) leave it, on Linux. Both
//! versions of their files are read, whichever the memory controller is in.

use std::path::{Path, PathBuf};

/// What this process may still be given before a group of its own, or one around that, is at its limit; `None`
/// where no group has one. What a group's files could be read again from is not counted as taken.
pub(super) fn available_bytes() -> Option<u64> {
    let memberships = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    available_below(Path::new("/sys/fs/cgroup"), &memberships)
}

/// The same, where groups are folders below `mount`, and `memberships` has the form of `/proc/self/cgroup`.
fn available_below(mount: &Path, memberships: &str) -> Option<u64> {
    let available = memberships.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let files = match controllers {
            "" => &UNIFIED,
            _ if controllers.split(',').any(|name| name == "memory") => &BY_CONTROLLER,
            _ => return None,
        };
        let roots = files.roots.iter().map(|root| mount.join(root));
        roots
            .filter_map(|root| least_upwards(&root, path, files))
            .min()
    });
    available.min()
}

/// The least that the group at `path` below `root`, and every group around it, may still take. Inside a
/// container the path may be one that only exists outside: then the root is the container's own group.
fn least_upwards(root: &Path, path: &str, files: &Files) -> Option<u64> {
    let mut group: PathBuf = root.join(path.trim_start_matches('/'));
    let mut least = None;
    while group.starts_with(root) {
        let here = files.available(&group);
        least = [least, here].into_iter().flatten().min();
        if !group.pop() {
            break;
        }
    }
    least
}

/// Which files of a group say what.
struct Files {
    /// Where its controllers may be mounted.
    roots: &'static [&'static str],
    limit: &'static str,
    taken: &'static str,
    /// Fields of `memory.stat`: pages of files.
    of_files: [&'static str; 2],
}

const UNIFIED: Files = Files {
    roots: &["", "unified"],
    limit: "memory.max",
    taken: "memory.current",
    of_files: ["inactive_file", "active_file"],
};

const BY_CONTROLLER: Files = Files {
    roots: &["memory"],
    limit: "memory.limit_in_bytes",
    taken: "memory.usage_in_bytes",
    of_files: ["total_inactive_file", "total_active_file"],
};

impl Files {
    fn available(&self, group: &Path) -> Option<u64> {
        let read = |name| std::fs::read_to_string(group.join(name)).ok();
        let number = |name| read(name)?.trim().parse::<u64>().ok();
        // Without a limit the file says `max`, or a number beyond any machine.
        let limit = number(self.limit).filter(|&limit| limit < NO_LIMIT)?;
        let taken = number(self.taken)?;
        let stat = read("memory.stat").unwrap_or_default();
        let of_files = self.of_files.map(|name| field(&stat, name));
        Some(limit.saturating_sub(taken.saturating_sub(of_files.iter().sum())))
    }
}

fn field(stat: &str, name: &str) -> u64 {
    let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
    let value = lines.find_map(|(field, value)| (field == name).then_some(value));
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

const NO_LIMIT: u64 = 1 << 60;

#[cfg(test)]
mod tests {
    use super::*;

    fn group(root: &Path, path: &str, files: &[(&str, &str)]) {
        let group = root.join(path);
        std::fs::create_dir_all(&group).unwrap();
        for (name, text) in files {
            std::fs::write(group.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_group_around_a_process_counts_and_pages_of_files_do_not() {
        let mount = tempfile::tempdir().unwrap();
        let root = mount.path();
        group(
            root,
            "outer",
            &[("memory.max", "5000\n"), ("memory.current", "4000\n")],
        );
        group(
            root,
            "outer/inner",
            &[
                ("memory.max", "3000\n"),
                ("memory.current", "2500\n"),
                (
                    "memory.stat",
                    "anon 900\ninactive_file 400\nactive_file 100\n",
                ),
            ],
        );
        group(
            root,
            "outer/free",
            &[("memory.max", "max\n"), ("memory.current", "1\n")],
        );
        let available = |memberships: &str| available_below(root, memberships);
        assert_eq!(available("0::/outer/inner\n"), Some(1000));
        assert_eq!(available("0::/outer/free\n"), Some(1000));
        assert_eq!(available("0::/\n"), None);
        assert_eq!(available("0::/elsewhere\n"), None);
        assert_eq!(available("nonsense"), None);
    }

    #[test]
    fn groups_by_controller_are_read_too() {
        let mount = tempfile::tempdir().unwrap();
        let root = mount.path();
        let unlimited = [
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.usage_in_bytes", "77\n"),
        ];
        let limited = [
            ("memory.limit_in_bytes", "2000\n"),
            ("memory.usage_in_bytes", "1500\n"),
            ("memory.stat", "inactive_file 9\ntotal_inactive_file 300\n"),
        ];
        group(root, "memory", &unlimited);
        group(root, "memory/a", &limited);
        let memberships = "9:name=systemd:/\n4:memory:/a\n3:cpuset:/a\n0::/\n";
        assert_eq!(available_below(root, memberships), Some(800));
        assert_eq!(available_below(root, "4:memory:/\n0::/\n"), None);
        // A path of the world outside: the container's own group is the root.
        group(root, "memory", &limited);
        assert_eq!(available_below(root, "4:memory:/outside/b\n"), Some(800));
    }
}
