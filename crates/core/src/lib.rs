//! What a job is, what may happen to it and what it costs.
//!
//! Everything here is a value or a pure function of values: the clock and random numbers are arguments. Never here:
//! Redis, protobuf, HTTP, async, or anything else that does I/O.

pub mod admit;
pub mod attempt;
pub mod controls;
pub mod gate;
pub mod ids;
pub mod image;
pub mod job;
pub mod judge;
pub mod model;
pub mod money;
pub mod names;
pub mod prefix;
pub mod registration;
pub mod request;
pub mod samples;
pub mod state;
pub mod time;
