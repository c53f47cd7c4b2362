//! The loop from lease to verdict, shared by all workers: claim, perform, judge, finish.
//!
//! Never here: how work is done (a daemon implements [`perform::Perform`]), nor Redis commands (`genmill-queue`).

pub mod answers;
mod attempt;
mod batch;
pub mod batches;
mod batching;
mod finisher;
pub mod hold;
mod lane;
pub mod perform;
pub mod permits;
mod refusal;
mod run;
mod serve;
mod submitting;
mod text;

pub use batching::Batching;
pub use run::{Options, run};
pub use serve::{Kind, serve, serve_batches};
