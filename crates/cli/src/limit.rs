//! `genmill limit`: how much of a lane, or of every lane for a tenant, may run at once.

use crate::exit::Ending;
use crate::output;
use clap::value_parser;
use genmill_client::{Client, TenantLimits};

/// Set the limits of a lane or a tenant, all of them: what is left out is lifted
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    of: Of,
}

#[derive(Debug, clap::Subcommand)]
enum Of {
    /// A lane, such as vllm:NAME or litellm:openai; `genmill lanes` lists them
    Lane {
        /// Its name
        name: String,
        /// At most so many jobs run at once
        #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
        max_running: Option<u32>,
    },
    /// A tenant, in all lanes
    Tenant {
        /// Its name
        name: String,
        /// At most so many of its jobs run at once in each lane
        #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
        max_running: Option<u32>,
        /// Its share where tenants compete for a lane, in percent of the usual one, 1 to 10,000
        #[arg(long, value_name = "PERCENT", value_parser = value_parser!(u32).range(1..=10_000))]
        weight_percent: Option<u32>,
    },
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let client = Client::connect(server).await?;
    let told = match args.of {
        Of::Lane { name, max_running } => {
            client.set_lane_limits(&name, max_running).await?;
            format!("lane {name}: {}", bound(max_running, "at once"))
        }
        Of::Tenant { name, max_running, weight_percent } => {
            client.set_tenant_limits(&name, TenantLimits { max_running, weight_percent }).await?;
            let bound = bound(max_running, "at once in each lane");
            format!("tenant {name}: {bound}, weight {} %", weight_percent.unwrap_or(100))
        }
    };
    output::line(&told)?;
    Ok(Ending::Done)
}

fn bound(max_running: Option<u32>, when: &str) -> String {
    match max_running {
        Some(1) => format!("at most 1 job {when}"),
        Some(most) => format!("at most {most} jobs {when}"),
        None => "no limit".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_reads_well() {
        assert_eq!(bound(None, "at once"), "no limit");
        assert_eq!(bound(Some(1), "at once"), "at most 1 job at once");
        assert_eq!(bound(Some(2), "at once"), "at most 2 jobs at once");
    }
}
