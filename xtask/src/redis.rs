//! Sees to it that `redis-server` is there: the demo and the tests run their own, on free ports.

use crate::tool::{is_there, run, say};
use anyhow::bail;
use std::process::Command;

/// Package managers, and what makes each install a Redis. The first that is there is used.
const PACKAGE_MANAGERS: &[(&str, &[&[&str]])] = &[
    ("apt-get", &[&["update"], &["install", "--yes", "--no-install-recommends", "redis-server"]]),
    ("dnf", &[&["install", "--assumeyes", "redis"]]),
    ("yum", &[&["install", "--assumeyes", "redis"]]),
    ("apk", &[&["add", "redis"]]),
    ("pacman", &[&["--sync", "--refresh", "--noconfirm", "redis"]]),
    ("zypper", &[&["--non-interactive", "install", "redis"]]),
    ("brew", &[&["install", "redis"]]),
];

/// Installs `redis-server` when it is missing; says so first.
pub(crate) fn install_if_missing() -> anyhow::Result<()> {
    if is_there("redis-server", &["--version"]) {
        return Ok(());
    }
    let Some((manager, calls)) = PACKAGE_MANAGERS.iter().find(|(manager, _)| is_there(manager, &["--version"])) else {
        bail!("redis-server is missing, and so is every package manager known here: install Redis 7 or Valkey by hand");
    };
    say(&format!("redis-server is missing: installing it with {manager}"));
    for args in *calls {
        run(as_root(manager).args(*args))?;
    }
    if is_there("redis-server", &["--version"]) {
        return Ok(());
    }
    bail!("{manager} installed a package without redis-server: install Redis 7 or Valkey by hand")
}

/// Package managers other than brew want root.
fn as_root(manager: &str) -> Command {
    let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0");
    let mut command = if root || manager == "brew" || !is_there("sudo", &["--version"]) {
        Command::new(manager)
    } else {
        let mut command = Command::new("sudo");
        command.arg(manager);
        command
    };
    // A service that the package starts is of no use here; Debian's installer must not ask about it either.
    command.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1");
    command
}
