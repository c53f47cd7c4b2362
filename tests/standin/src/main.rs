//! The stand-in as a process of its own: prints `ready http=HOST:PORT` and serves until it is stopped.

use anyhow::Context as _;
use clap::Parser;
use genmill_standin::{Options, Standin};
use std::io::Write as _;
use std::net::SocketAddr;
use tokio::signal::unix::{SignalKind, signal};

/// A provider that answers like OpenAI and misbehaves on demand.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where to listen; port 0 picks a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let listen = Arguments::parse().listen;
    let standin = Standin::start(Options { listen, ..Options::default() })
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
    writeln!(std::io::stdout(), "ready http={}", standin.address())?;
    let mut terminated = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminated.recv() => (),
    }
    Ok(())
}
