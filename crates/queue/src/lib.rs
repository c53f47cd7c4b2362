//! The job queue on Redis.
//!
//! Only this crate speaks Redis, and only `keys` builds a key. A job's state changes only inside a script, one
//! transition each. Never here: protobuf, HTTP, or how work is done.

mod answers;
mod batches;
mod cluster;
mod connection;
mod dead;
mod demand;
pub mod error;
mod events;
mod gates;
mod keys;
mod lanes;
mod list;
mod payload;
mod queue;
mod read;
mod registry;
mod script;
mod scripts;
mod settings;
mod submit;
mod upkeep;
mod work;

pub use answers::Keep;
pub use batches::{Advance, BatchRecord, BatchState, Member, Members, Moved, Parking};
pub use dead::{Purge, Redrive, Redriven};
pub use demand::Demand;
pub use error::QueueError;
pub use events::{Event, Events, Hint, Hints};
pub use gates::{GateState, Gates, HeldBack, HeldBy, Opens, Passage, Permit, SideCall};
pub use keys::Which;
pub use lanes::LaneState;
pub use list::{Finished, ListQuery, Listed, Place, Tally};
pub use queue::{Options, Queue};
pub use read::{Head, Watched};
pub use settings::{Setting, Settings};
pub use submit::{ContentHash, Enqueued, NewJob, RequestId, Reservation, content_hash};
pub use work::{Beat, Booked, Ended, Finish, Held, Holding, Kept, Lease, Piece, Room, Slots};
