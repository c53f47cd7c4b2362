//! How much memory this process may still take: what the machine has available, or what its control groups leave it.
//!
//! Never here: who gets it.

use std::path::{Path, PathBuf};

/// Where control groups are mounted.
const GROUPS: &str = "/sys/fs/cgroup";

/// Bytes that can still be taken. `None` when the system does not tell.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let left = group_folders(&groups).into_iter().filter_map(|folder| {
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let limit = read("memory.max").or_else(|| read("memory.limit_in_bytes"))?;
        let used = read("memory.current").or_else(|| read("memory.usage_in_bytes"))?;
        left(&limit, &used, &read("memory.stat").unwrap_or_default())
    });
    machine.into_iter().chain(left).min()
}

/// `MemAvailable` of /proc/meminfo in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.saturating_mul(1024))
}

/// The folders of the groups that a process is in, as /proc/self/cgroup tells, and those around them. In a container the
/// innermost one is often mounted at the top.
fn group_folders(groups: &str) -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from(GROUPS), Path::new(GROUPS).join("memory")];
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let root = match controllers {
            "" => Path::new(GROUPS).to_owned(),
            _ if controllers.split(',').any(|name| name == "memory") => Path::new(GROUPS).join("memory"),
            _ => continue,
        };
        let inner = root.join(path.trim_start_matches('/'));
        let around = inner.ancestors().take_while(|folder| *folder != root && folder.starts_with(&root));
        folders.extend(around.map(Path::to_owned));
    }
    folders
}

/// What a group's limit leaves; `None` without a limit. Files that were read and not used since give way.
fn left(limit: &str, used: &str, stat: &str) -> Option<u64> {
    let limit = limit.trim().parse::<u64>().ok()?;
    let used = used.trim().parse::<u64>().ok()?;
    let idle = ["total_inactive_file ", "inactive_file "].into_iter().find_map(|name| {
        let line = stat.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    });
    Some(limit.saturating_sub(used.saturating_sub(idle.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_tells_in_kibibytes() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2048 * 1024));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        assert!(available_bytes().is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn a_group_leaves_what_is_not_used_or_can_give_way() {
        assert_eq!(left("1000\n", "600\n", "anon 1\ninactive_file 100\n"), Some(500));
        assert_eq!(left("1000", "600", "total_inactive_file 50\ninactive_file 10\n"), Some(450));
        assert_eq!(left("500", "600", ""), Some(0));
        assert_eq!(left("max", "600", ""), None, "no limit");
    }

    #[test]
    fn the_groups_around_a_process_count_too() {
        let found = group_folders("0::/a/b\n");
        assert!(
            found.contains(&PathBuf::from("/sys/fs/cgroup/a")) && found.contains(&PathBuf::from("/sys/fs/cgroup/a/b"))
        );
        assert!(found.contains(&PathBuf::from(GROUPS)));
        let old = group_folders("4:memory:/x\n3:cpu:/y\n");
        assert!(
            old.contains(&PathBuf::from("/sys/fs/cgroup/memory/x")) && !old.iter().any(|folder| folder.ends_with("y"))
        );
    }
}
