//! Every key, and the fields of every hash. Nowhere else is a key built, in Rust or in Lua: scripts get theirs from
//! [`lua_prelude`].
//!
//! All keys of a lane share the hash tag `{number}`, so that each transition is one script on one slot of a cluster.
//! Numbers instead of names keep keys short (a million jobs have several millions of them) and need no escaping.
//!
//! | key | type | holds |
//! |---|---|---|
//! | `NS:{N}:j:ID` | hash | the job: fields below |
//! | `NS:{N}:s:ID` | string | its spec; empty and expiring: the job is gone and must not be stored again |
//! | `NS:{N}:t:ID` | string | text of the running attempt |
//! | `NS:{N}:r:ID` | string | its result |
//! | `NS:{N}:a:ID` | string | its ended attempts, one record behind the other |
//! | `NS:{N}:stream` | stream | jobs delivered to workers |
//! | `NS:{N}:flows` | sorted set | flows (a class of a tenant) with waiting jobs, by virtual time |
//! | `NS:{N}:f:FLOW` | sorted set | leaves of a flow (an experiment, a remote model) with waiting jobs, by virtual time |
//! | `NS:{N}:b:LEAF` | sorted set | the waiting jobs of a leaf, by submission, those of a prefix group together |
//! | `NS:{N}:numbers` | hash | number of each name of a flow or a leaf, `n` counts them |
//! | `NS:{N}:leaves` | hash | what each leaf is part of: `FLOW:WEIGHT:TENANT:EXPERIMENT` |
//! | `NS:{N}:models` | hash | the model of each leaf of a remote lane. Not in `leaves`, which earlier versions read |
//! | `NS:{N}:gates` | hash | gates by `KEY:MODEL`, `KEY:` for all models of a key: MessagePack, told in gates.lua |
//! | `NS:{N}:shut` | sorted set | models of which leaves are set aside because no gate lets them pass, by when to try again |
//! | `NS:{N}:shut:MODEL` | sorted set | these leaves, by when they were set aside |
//! | `NS:{N}:lent` | sorted set | permits of calls beside those of jobs, by when they end by themselves |
//! | `NS:{N}:used` | hash | virtual time that a flow or leaf had used up when it left; `in/FLOW` virtual time among its leaves |
//! | `NS:{N}:paused` | set | flows and leaves set aside because they are paused |
//! | `NS:{N}:full:TENANT` | set | flows set aside because their tenant has reached its cap |
//! | `NS:{N}:places` | hash | how many jobs are in the stream or run, by tenant; `` is the whole lane |
//! | `NS:{N}:settings` | hash | `VERSION:VALUE` of each setting that was ever made |
//! | `NS:{N}:g:LEAF:PREFIX` | string | when a prefix group started, expiring |
//! | `NS:{N}:leases` | sorted set | running jobs, by end of lease |
//! | `NS:{N}:batches` | sorted set | batches of a lane whose jobs go out in such, by when nobody holds them any more |
//! | `NS:{N}:bt:TAG` | hash | a batch: `st` state, `wk` who holds it, `ep` how often it was taken over, `md` model, `ky` key, `cr` made, `sl` filled until, `tr` it takes no more jobs, and 1: it was being submitted, `it` with how many items, `rm` the provider's name of it, `lv` jobs that are wanted still |
//! | `NS:{N}:bj:TAG` | sorted set | its jobs, by the epoch under which they are in it |
//! | `NS:{N}:delayed` | sorted set | delayed jobs, by due time |
//! | `NS:{N}:deadlines` | sorted set | unfinished jobs with a deadline, by it |
//! | `NS:{N}:jobs` | stream | all jobs, in the order of acceptance |
//! | `NS:{N}:x:EXPERIMENT` | stream | all jobs of an experiment, at the same places as in `jobs` |
//! | `NS:{N}:open` | hash | how many jobs are unfinished, by experiment; `` is the whole lane |
//! | `NS:{N}:done` | stream | finished jobs, in order |
//! | `NS:{N}:dead` | stream | failed jobs, in order |
//! | `NS:{N}:meta` | hash | `vt` virtual time, `un` undelivered entries, `ca` what live workers can run, `tb` whether tokens bound that, `gt` keys and limits that live workers have declared (MessagePack), `bt` jobs in batches, `ag` when flows were aged, `rc` when leases were looked at, `rw` until when they are left alone |
//! | `NS:{N}:slots` | hash | of each live worker: places, until when they count, free places, tokens that these can hold, what it declares of keys and limits |
//! | `NS:{N}:hints` | channel | to workers: `w` there is work, `c` a running job was cancelled |
//! | `NS:{N}:events` | channel | to schedulers: jobs' ids, after `t` (more text) or `f` (finished); several ids may follow each other |
//! | `NS:{T:TENANT}:q:BUCKET` | hash | the job and content that each of a tenant's request ids stands for, by its hash |
//! | `NS:{T:TENANT}:c:HASH` | string | a kept answer, by the hash of its request; expiring |
//! | `NS:{T:TENANT}:answers` | sorted set | these hashes, each with its answer's size, by when they expire; expiring |
//! | `NS:{T:TENANT}:answers-bytes` | string | the sum of these sizes; expiring |
//! | `NS:{registry}:layout` | string | the number of this layout of keys |
//! | `NS:{registry}:lanes` | hash | number of each lane name, `#` counts them |
//! | `NS:{registry}:settings` | hash | `VERSION:VALUE` of each setting, `#` counts versions |
//! | `NS:{registry}:probe` | string | nothing, for a moment: whether writes are taken |
//! | `NS:{registry}:workers` | set | every registered worker |
//! | `NS:{registry}:w:WORKER` | string | its registration, expiring |
//!
//! Fields of a job: `st` state, `ep` epoch, `lf` leaf, `tk` estimated tokens, `gp` order and start of its prefix group, `dl` deadline, `cr` created, `sa` started, `fa` finished, `du` due, `wk` worker, `fc` failures, `lc` losses,
//! `pm` the key of its permit, with a `+` when it passed the gate of all models too, `en` stream entry, `de` entry among failed jobs, `rd` job that it was redriven as, `rg` that job was purged, `cx` cancel
//! asked for, `bt` the batch that it is in, `kN` once a verdict of epoch N is kept, `fN` once the fenced attempt of epoch N is booked. Times in unix ms.

use genmill_core::ids::{JobId, LaneNumber, WorkerId};
use genmill_core::names::{Experiment, Tenant};
use genmill_core::request::Priority;
use genmill_core::state::State;

/// The consumer group that reads every lane's stream.
pub(crate) const GROUP: &str = "workers";

/// How long jobs with the same prefix join the group that the first of them started. So a group overtakes only what
/// was submitted within that time.
const GROUP_MS: u64 = 30_000;

/// When nobody has looked for lost leases for so long, Redis or all schedulers were away.
const RECLAIM_GAP_MS: u64 = 3_000;

/// How long gates are remembered that nobody passes.
const GATE_IDLE_MS: u64 = 7 * 24 * 3_600_000;

/// How keys and values are laid out. Another number means that this program cannot read what is stored.
pub(crate) const LAYOUT: u32 = 2;

/// How long the id of a job that is gone cannot be enqueued: far longer than from reserving a request id to enqueueing.
const BURIED_MS: u64 = 600_000;

/// Which jobs of a lane are listed.
#[derive(Clone, Copy, Debug)]
pub enum Which<'a> {
    /// All, in the order of acceptance.
    All,
    /// Those of an experiment, in the order of acceptance.
    Of(&'a Experiment),
    /// Those that failed, in the order of failing.
    Failed,
}

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

    /// The stream that lists the jobs of a lane which are `which`.
    pub(crate) fn listed(&self, lane: LaneNumber, which: Which<'_>) -> String {
        match which {
            Which::All => format!("{}:jobs", self.lane(lane)),
            Which::Of(experiment) => format!("{}:x:{experiment}", self.lane(lane)),
            Which::Failed => format!("{}:dead", self.lane(lane)),
        }
    }

    pub(crate) fn of_lane(&self, lane: LaneNumber, what: &str) -> String {
        format!("{}:{what}", self.lane(lane))
    }

    /// What is kept of a batch.
    pub(crate) fn batch(&self, lane: LaneNumber, tag: &str) -> String {
        format!("{}:bt:{tag}", self.lane(lane))
    }

    /// The jobs of a batch.
    pub(crate) fn batch_jobs(&self, lane: LaneNumber, tag: &str) -> String {
        format!("{}:bj:{tag}", self.lane(lane))
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

    /// Where a tenant's request ids are kept whose hashes begin with the same bits: small hashes are stored tightly.
    pub(crate) fn request_ids(&self, tenant: &Tenant, hash: &[u8; 12]) -> String {
        let bucket = u16::from_be_bytes([hash[0], hash[1]]) >> 2;
        format!("{}:{{T:{tenant}}}:q:{bucket}", self.namespace)
    }

    /// What the keys of a tenant's kept answers begin with.
    pub(crate) fn tenant(&self, tenant: &Tenant) -> String {
        format!("{}:{{T:{tenant}}}", self.namespace)
    }

    pub(crate) fn answer(&self, tenant: &Tenant, request: &[u8; 32]) -> Vec<u8> {
        let mut key = format!("{}:c:", self.tenant(tenant)).into_bytes();
        key.extend_from_slice(request);
        key
    }

    pub(crate) fn settings(&self) -> String {
        format!("{}:{{registry}}:settings", self.namespace)
    }

    pub(crate) fn probe(&self) -> String {
        format!("{}:{{registry}}:probe", self.namespace)
    }

    pub(crate) fn layout(&self) -> String {
        format!("{}:{{registry}}:layout", self.namespace)
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

/// The key that every call of a script names beside `key`; it never exists. While a cluster moves a slot, a command that
/// names several keys of it, of which one is missing, is answered TRYAGAIN. So no script starts where only some of a
/// lane's keys are.
pub(crate) fn whole_slot(key: &str) -> String {
    format!("{key}:whole")
}

/// What every script begins with: the names of states and functions that build the keys above.
pub(crate) fn lua_prelude() -> String {
    let states = State::ALL.map(|state| format!("local {} = '{}'\n", state.name().to_uppercase(), state.name()));
    let finals = State::ALL.into_iter().filter(|state| state.is_final());
    let finals: Vec<String> = finals.map(|state| format!("['{}'] = true", state.name())).collect();
    format!(
        "{}local FINAL = {{{}}}\nlocal GROUP, GROUP_MS, RECLAIM_GAP_MS, WEIGHT_MAX, AGING_MS = '{GROUP}', {}, {}, {}, {}\nlocal BURIED_MS, GATE_IDLE_MS = {}, {}\n{}",
        states.concat(),
        finals.join(", "),
        GROUP_MS,
        RECLAIM_GAP_MS,
        Priority::WEIGHT_MAX,
        Priority::AGING_MS,
        BURIED_MS,
        GATE_IDLE_MS,
        r"local base = KEYS[1]
local keys = {}
local function key(name)
  keys[name] = keys[name] or base .. ':' .. name
  return keys[name]
end
local function job_key(id) return base .. ':j:' .. id end
local function spec_key(id) return base .. ':s:' .. id end
local function text_key(id) return base .. ':t:' .. id end
local function result_key(id) return base .. ':r:' .. id end
local function attempts_key(id) return base .. ':a:' .. id end
local function flow_key(flow) return base .. ':f:' .. flow end
local function backlog_key(leaf) return base .. ':b:' .. leaf end
local function full_key(tenant) return base .. ':full:' .. tenant end
local function shut_key(model) return base .. ':shut:' .. model end
local function group_key(leaf, prefix) return base .. ':g:' .. leaf .. ':' .. prefix end
local function batch_key(tag) return base .. ':bt:' .. tag end
local function batch_jobs_key(tag) return base .. ':bj:' .. tag end
local function experiment_key(name) return base .. ':x:' .. name end
local function answer_key(hash) return base .. ':c:' .. hash end
"
    )
}
