//! The scenarios of `queue.rs` on a Redis Cluster of three processes: they ask their crate's name what to start.

#[path = "queue.rs"]
mod queue;
