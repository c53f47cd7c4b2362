//! The scheduler daemon: load, connect, serve, drain.

use clap::Parser;
use genmill_daemon::run::{CommonArgs, daemon};
use std::process::ExitCode;

/// Takes jobs over gRPC, admits them, and keeps the queue going. Stateless: run as many as you like on one Redis.
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "Everything is set in genmill.toml or by GENMILL__SECTION__KEY variables, such \
    as GENMILL__REDIS__URL. --check-config shows what is in effect."
)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// Where gRPC is served; port 0 picks a free one [default: 127.0.0.1:50051]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    daemon(
        &args.common,
        |_| Ok(Vec::new()),
        async move |mut context| {
            if let Some(listen) = args.listen {
                context.config.scheduler.listen = listen;
            }
            genmill_scheduler::run(context).await
        },
    )
}
