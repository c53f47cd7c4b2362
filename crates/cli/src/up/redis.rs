//! The private Redis: finding the program, its arguments, and whether it answers. Never here: its data.

use anyhow::{Context as _, bail, ensure};
use std::net::Ipv4Addr;
use std::path::Path;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::Command;

/// The programs that will do.
const PROGRAMS: [&str; 2] = ["redis-server", "valkey-server"];
/// The first version that has everything the queue needs.
const VERSION_MIN: u32 = 7;

/// Finds a Redis that can be used.
///
/// # Errors
/// When there is none, or it is too old; the message tells what to do.
pub(crate) async fn find_program() -> anyhow::Result<&'static str> {
    for program in PROGRAMS {
        let asked = match Command::new(program).arg("--version").output().await {
            Ok(asked) => asked,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot run {program}")),
        };
        let told = String::from_utf8_lossy(&asked.stdout);
        let version = major_version(&told).with_context(|| format!("{program} does not tell its version: {told}"))?;
        ensure!(
            version >= VERSION_MIN,
            "{program} is of version {version}, which is too old: install {VERSION_MIN} or later, or name another Redis with \
             --redis URL"
        );
        return Ok(program);
    }
    bail!(
        "redis-server is not installed: install it (`apt install redis-server`, `dnf install redis`, `brew install redis`), \
         or name a running Redis with --redis URL"
    )
}

fn major_version(told: &str) -> Option<u32> {
    let (_, version) = told.split_once("v=")?;
    version.split('.').next()?.parse().ok()
}

/// A port that is free now. It may be taken until Redis binds it; then Redis ends, and is started on another one.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot find a free port")?;
    Ok(listener.local_addr().context("cannot find a free port")?.port())
}

/// The address of the Redis on `port`.
pub(crate) fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}")
}

/// The arguments of a Redis that keeps every write in `folder` and never drops a key.
pub(crate) fn arguments(port: u16, folder: &Path) -> Vec<std::ffi::OsString> {
    let port = port.to_string();
    let folder = folder.as_os_str();
    let pairs: [(&str, &std::ffi::OsStr); 9] = [
        ("--bind", "127.0.0.1".as_ref()),
        ("--port", port.as_ref()),
        ("--dir", folder),
        ("--appendonly", "yes".as_ref()),
        ("--appendfsync", "everysec".as_ref()),
        ("--save", "".as_ref()),
        ("--maxmemory-policy", "noeviction".as_ref()),
        ("--protected-mode", "yes".as_ref()),
        ("--logfile", "".as_ref()),
    ];
    pairs.into_iter().flat_map(|(name, value)| [name.into(), value.into()]).collect()
}

/// Whether the Redis of process `pid` answers on `port`. False while it starts or loads its data, and when another
/// process has the port.
pub(crate) async fn answers(port: u16, pid: u32) -> bool {
    ask(port).await.is_ok_and(|answer| is_ready(&answer, pid))
}

async fn ask(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    // QUIT makes it close the connection, so that everything can be read to the end.
    stream.write_all(b"PING\r\nINFO server\r\nQUIT\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn is_ready(answer: &str, pid: u32) -> bool {
    let is_ours = answer.lines().any(|line| line.strip_prefix("process_id:") == Some(pid.to_string().as_str()));
    answer.starts_with("+PONG") && is_ours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read() {
        assert_eq!(major_version("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc"), Some(7));
        assert_eq!(major_version("Valkey server v=8.1.0 sha=00000000:0"), Some(8));
        assert_eq!(major_version("something else"), None);
    }

    #[test]
    fn only_our_own_redis_counts_and_only_when_loaded() {
        assert!(is_ready("+PONG\r\n$40\r\n# Server\r\nprocess_id:12\r\n\r\n+OK\r\n", 12));
        assert!(!is_ready("+PONG\r\n$40\r\n# Server\r\nprocess_id:13\r\n\r\n+OK\r\n", 12));
        assert!(!is_ready("-LOADING Redis is loading\r\n$40\r\nprocess_id:12\r\n", 12));
        assert!(!is_ready("", 12));
    }
}
