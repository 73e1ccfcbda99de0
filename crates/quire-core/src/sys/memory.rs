//! How much memory may still be used: the machine's and the cgroup's word.

use std::fs;

use crate::{Error, Result};

/// Bytes that could be allocated now without swapping or an out-of-memory kill; None where unknown.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    let machine = field("MemAvailable:")? + field("SwapFree:").unwrap_or(0);
    Some(cgroup_headroom().map_or(machine, |room| room.min(machine)))
}

/// Refuse, with a clear error, what would certainly end in an out-of-memory kill.
pub fn ensure(bytes: u64, what: &str) -> Result<()> {
    match available_bytes() {
        Some(room) if bytes > room => {
            Err(Error::Memory(format!("{what} needs {bytes} bytes of memory and {room} are available")))
        }
        _ => Ok(()),
    }
}

fn cgroup_headroom() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut rooms = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        if controllers.split(',').any(|c| c == "memory") {
            let names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
            rooms.extend(lineage(path).filter_map(|dir| headroom(&format!("/sys/fs/cgroup/memory{dir}"), names)));
        } else if controllers.is_empty() {
            let names = ["memory.max", "memory.current", "inactive_file"];
            rooms.extend(lineage(path).filter_map(|dir| headroom(&format!("/sys/fs/cgroup{dir}"), names)));
        }
    }
    rooms.into_iter().min()
}

/// A group and its ancestors up to the root, whose path is empty: each of them limits. In a container the path may be
/// one of the host, not to be seen here; then only what is mounted as the root is found.
fn lineage(path: &str) -> impl Iterator<Item = &str> {
    let lowest = path.trim_end_matches('/');
    std::iter::successors(Some(lowest), |dir| dir.rfind('/').map(|at| &dir[..at]))
}

fn headroom(dir: &str, [limit, usage, reclaimable]: [&str; 3]) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(format!("{dir}/{name}")).ok()?.trim().parse::<u64>().ok();
    let limit = number(limit)?;
    let stat = fs::read_to_string(format!("{dir}/memory.stat")).unwrap_or_default();
    let free_at_once =
        stat.lines().find_map(|line| line.strip_prefix(reclaimable)?.trim().parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(number(usage)?.saturating_sub(free_at_once)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ancestor_counts() {
        assert_eq!(lineage("/a/b").collect::<Vec<_>>(), ["/a/b", "/a", ""]);
        assert_eq!(lineage("/").collect::<Vec<_>>(), [""]);
    }
}
