//! What the scenarios share: a real Redis of their own, real daemons, a provider stand-in.
//!
//! Never here: mocks of our own code.

pub mod chaos;
pub mod daemons;
pub mod dice;
pub mod place;
pub mod puppet;
pub mod redis_cluster;
pub mod redis_server;
pub mod scheduler;
pub mod specs;
