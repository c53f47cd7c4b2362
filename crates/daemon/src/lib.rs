//! What every daemon needs: configuration, telemetry, shutdown, health endpoints, the clock, memory and random numbers.
//!
//! Never here: what a daemon is for. This crate does not know what a job is.

pub mod clock;
pub mod config;
pub mod documents;
pub mod environment;
pub mod health;
pub mod host;
pub mod memory;
pub mod models;
pub mod parent;
pub mod random;
pub mod run;
pub mod secret;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
