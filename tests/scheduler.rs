//! A scheduler process by itself, for scenarios that submit and claim through the queue in the namespace `test`.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use crate::daemons::{Daemon, Start};
use genmill_client::v1::job_service_client::JobServiceClient;
use tempfile::TempDir;
use tonic::transport::Channel;

/// A running scheduler.
#[derive(Debug)]
pub struct Scheduler {
    // The process ends before its folder.
    daemon: Daemon,
    _folder: TempDir,
}

impl Scheduler {
    /// Starts one on the Redis at `url`.
    #[must_use]
    pub fn start(url: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let start = Start::new("genmill-scheduler", folder.path()).unwrap().env("GENMILL__REDIS__URL", url);
        let start = start.env("GENMILL__REDIS__NAMESPACE", "test").env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0");
        Self { daemon: start.until_ready().unwrap(), _folder: folder }
    }

    /// A connection of its own, without what the client does when something fails.
    pub async fn connect(&self) -> JobServiceClient<Channel> {
        JobServiceClient::connect(format!("http://{}", self.daemon.place("grpc"))).await.unwrap()
    }
}
