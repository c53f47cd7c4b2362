//! Joins the engine to the worker loop: which models are held, and how a job becomes a request of an engine.
//!
//! Never here: leases and retries (`genmill-worker`), tensors (`genmill-engine`).

mod budget;
mod desk;
mod device;
pub mod hub;
pub mod load;
mod mailbox;
pub mod perform;
mod report;
pub mod residents;
mod swap;
pub mod watchdog;
