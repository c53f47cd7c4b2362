//! The Rust client of Genmill: submit generation jobs, follow them, read their results.
//!
//! ```no_run
//! use genmill_client::{Client, Request};
//!
//! # async fn run() -> Result<(), genmill_client::Error> {
//! let client = Client::connect("http://127.0.0.1:50051").await?;
//! let request = Request::new("vllm_tictactoe-qwen2").prompt("Best move (1-9):").max_tokens(4).temperature(0.0);
//! let generation = client.generate(request).await?;
//! println!("{}", generation.text);
//! # Ok(())
//! # }
//! ```
//!
//! A stream that breaks is resumed where it broke: [`Client::watch`], [`Client::watch_jobs`] and [`Client::submit_all`]
//! go on by themselves when the server comes back within the client's patience (a minute, see
//! [`Client::with_patience`]). Single calls are tried once. What went wrong is an [`Error`] to branch on.
//!
//! Requests are built with [`Request`]; jobs are the protobuf messages of [`v1`]. Never here: Redis, or anything that
//! only the server decides, such as whether a request is valid.

mod client;
mod connect;
mod error;
mod follow;
mod patience;
mod queue;
mod request;
mod submit_all;
mod watch;
mod watch_jobs;

pub use client::{Client, Generation, Submitted};
pub use error::Error;
pub use genmill_wire::error::Reason;
pub use genmill_wire::v1;
pub use queue::{Pausable, TenantLimits};
pub use request::{Request, Role};
pub use submit_all::{Acknowledgement, Outcome, Refusal};
pub use watch::{Event, Position};
pub use watch_jobs::{FinishedJob, Until};
