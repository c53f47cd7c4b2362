//! Every key, and the fields of every hash. Nowhere else is a key built, in Rust or in Lua: scripts get theirs from
//! [`lua_prelude`].
//!
//! All keys of a lane share the hash tag `{number}`, so that each transition is one script on one slot of a cluster.
//! Numbers instead of names keep keys short (a million jobs have several millions of them) and need no escaping.
//!
//! | key | type | holds |
//! |---|---|---|
//! | `NS:{N}:j:ID` | hash | the job: fields below |
//! | `NS:{N}:s:ID` | string | its spec |
//! | `NS:{N}:t:ID` | string | text of the running attempt |
//! | `NS:{N}:r:ID` | string | its result |
//! | `NS:{N}:a:ID` | list | its ended attempts |
//! | `NS:{N}:stream` | stream | jobs delivered to workers |
//! | `NS:{N}:flows` | sorted set | flows with waiting jobs, by virtual time |
//! | `NS:{N}:b:FLOW` | sorted set | the waiting jobs of a flow, by submission |
//! | `NS:{N}:flow` | hash | number of each flow name, `n` counts them |
//! | `NS:{N}:weights` | hash | weight of each flow |
//! | `NS:{N}:leases` | sorted set | running jobs, by end of lease |
//! | `NS:{N}:delayed` | sorted set | delayed jobs, by due time |
//! | `NS:{N}:deadlines` | sorted set | unfinished jobs with a deadline, by it |
//! | `NS:{N}:jobs` | sorted set | all jobs, by id |
//! | `NS:{N}:x:EXPERIMENT` | sorted set | all jobs of an experiment, by id |
//! | `NS:{N}:open` | hash | how many jobs are unfinished, by experiment; `` is the whole lane |
//! | `NS:{N}:done` | stream | finished jobs, in order |
//! | `NS:{N}:meta` | hash | `vt` virtual time, `un` undelivered entries, `la` look-ahead |
//! | `NS:{N}:slots` | hash | each live worker's capacity and until when it counts |
//! | `NS:{N}:hints` | channel | to workers: `w` there is work, `c` a running job was cancelled |
//! | `NS:{N}:events` | channel | to schedulers: jobs' ids, after `t` (more text) or `f` (finished); several ids may follow each other |
//! | `NS:{T:TENANT}:q:ID` | string | the job that a tenant's request id stands for |
//! | `NS:{registry}:lanes` | hash | number of each lane name, `#` counts them |
//! | `NS:{registry}:workers` | set | every registered worker |
//! | `NS:{registry}:w:WORKER` | string | its registration, expiring |
//!
//! Fields of a job: `st` state, `ep` epoch, `fl` flow, `tk` estimated tokens, `ex` experiment, `dl` deadline, `cr`
//! created, `sa` started, `fa` finished, `du` due, `wk` worker, `fc` failures, `lc` losses, `en` stream entry, `cx`
//! cancel asked for, `kN` once a verdict of epoch N is kept, `fN` once the fenced attempt of epoch N is booked. Times in unix ms.

use genmill_core::ids::{JobId, LaneNumber, WorkerId};
use genmill_core::names::{Experiment, Tenant};
use genmill_core::state::State;

/// The consumer group that reads every lane's stream.
pub(crate) const GROUP: &str = "workers";

/// Builds keys in a namespace.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    namespace: String,
}

impl Keys {
    pub(crate) fn new(namespace: &str) -> Self {
        Self { namespace: namespace.to_owned() }
    }

    /// What all keys of a lane begin with. Scripts get this as their one key.
    pub(crate) fn lane(&self, lane: LaneNumber) -> String {
        format!("{}:{{{}}}", self.namespace, lane.0)
    }

    fn of_job(&self, kind: char, id: JobId) -> Vec<u8> {
        let mut key = format!("{}:{kind}:", self.lane(id.lane())).into_bytes();
        key.extend_from_slice(id.as_bytes());
        key
    }

    pub(crate) fn job(&self, id: JobId) -> Vec<u8> {
        self.of_job('j', id)
    }

    pub(crate) fn spec(&self, id: JobId) -> Vec<u8> {
        self.of_job('s', id)
    }

    pub(crate) fn text(&self, id: JobId) -> Vec<u8> {
        self.of_job('t', id)
    }

    pub(crate) fn result(&self, id: JobId) -> Vec<u8> {
        self.of_job('r', id)
    }

    pub(crate) fn attempts(&self, id: JobId) -> Vec<u8> {
        self.of_job('a', id)
    }

    pub(crate) fn jobs(&self, lane: LaneNumber, experiment: Option<&Experiment>) -> String {
        match experiment {
            Some(experiment) => format!("{}:x:{experiment}", self.lane(lane)),
            None => format!("{}:jobs", self.lane(lane)),
        }
    }

    pub(crate) fn open(&self, lane: LaneNumber) -> String {
        format!("{}:open", self.lane(lane))
    }

    pub(crate) fn done(&self, lane: LaneNumber) -> String {
        format!("{}:done", self.lane(lane))
    }

    pub(crate) fn stream(&self, lane: LaneNumber) -> String {
        format!("{}:stream", self.lane(lane))
    }

    pub(crate) fn hints(&self, lane: LaneNumber) -> String {
        format!("{}:hints", self.lane(lane))
    }

    /// A pattern for the event channels of all lanes.
    pub(crate) fn all_events(&self) -> String {
        format!("{}:{{*}}:events", self.namespace)
    }

    /// The job that `request_id` of `tenant` stands for.
    pub(crate) fn request(&self, tenant: &Tenant, request_id: &str) -> String {
        format!("{}:{{T:{tenant}}}:q:{request_id}", self.namespace)
    }

    pub(crate) fn lanes(&self) -> String {
        format!("{}:{{registry}}:lanes", self.namespace)
    }

    pub(crate) fn workers(&self) -> String {
        format!("{}:{{registry}}:workers", self.namespace)
    }

    pub(crate) fn registration(&self, worker: &WorkerId) -> String {
        format!("{}:{{registry}}:w:{worker}", self.namespace)
    }
}

/// What every script begins with: the names of states and functions that build the keys above.
pub(crate) fn lua_prelude() -> String {
    let states = State::ALL.map(|state| format!("local {} = '{}'\n", state.name().to_uppercase(), state.name()));
    let finals = State::ALL.into_iter().filter(|state| state.is_final());
    let finals: Vec<String> = finals.map(|state| format!("['{}'] = true", state.name())).collect();
    format!(
        "{}local FINAL = {{{}}}\nlocal GROUP = '{GROUP}'\n{}",
        states.concat(),
        finals.join(", "),
        r"local base = KEYS[1]
local function key(name) return base .. ':' .. name end
local function job_key(id) return base .. ':j:' .. id end
local function spec_key(id) return base .. ':s:' .. id end
local function text_key(id) return base .. ':t:' .. id end
local function result_key(id) return base .. ':r:' .. id end
local function attempts_key(id) return base .. ':a:' .. id end
local function backlog_key(flow) return base .. ':b:' .. flow end
local function experiment_key(name) return base .. ':x:' .. name end
"
    )
}
