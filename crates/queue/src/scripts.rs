//! The scripts: one transition each, sent by their hash. A script's file opens with its KEYS, ARGV and return value.

use crate::keys::lua_prelude;
use crate::script::Script;

/// All scripts, ready to be called.
#[derive(Clone, Debug)]
pub(crate) struct Scripts {
    pub(crate) advance_batch: Script,
    pub(crate) age: Script,
    pub(crate) append: Script,
    pub(crate) apply: Script,
    pub(crate) bury: Script,
    pub(crate) cancel: Script,
    pub(crate) claim: Script,
    pub(crate) enqueue: Script,
    pub(crate) expire: Script,
    pub(crate) finish: Script,
    pub(crate) free_request_id: Script,
    pub(crate) keep_answer: Script,
    pub(crate) gates: Script,
    pub(crate) heartbeat: Script,
    pub(crate) hold_batches: Script,
    pub(crate) leave: Script,
    pub(crate) open_lane: Script,
    pub(crate) park: Script,
    pub(crate) part_batch: Script,
    pub(crate) permit: Script,
    pub(crate) promote: Script,
    pub(crate) purge: Script,
    pub(crate) reclaim: Script,
    pub(crate) redrive: Script,
    pub(crate) set: Script,
    pub(crate) settle_permit: Script,
}

impl Scripts {
    pub(crate) fn new() -> Self {
        let prelude = lua_prelude();
        // The scripts below that are not of a lane must not get the lane's prelude.
        // Gates are functions within one: lanes without any do not pay for making them.
        let permits = [
            "local function open_permits(stand_leaf, job_of, digits)\n",
            include_str!("scripts/gates.lua"),
            include_str!("scripts/permits.lua"),
            "end\n",
        ]
        .concat();
        let of_lane =
            |code: &str| Script::new(&[&prelude, &permits, include_str!("scripts/common.lua"), code].concat());
        Self {
            advance_batch: of_lane(include_str!("scripts/advance_batch.lua")),
            age: of_lane(include_str!("scripts/age.lua")),
            append: of_lane(include_str!("scripts/append.lua")),
            apply: of_lane(include_str!("scripts/apply.lua")),
            bury: of_lane(include_str!("scripts/bury.lua")),
            cancel: of_lane(include_str!("scripts/cancel.lua")),
            claim: of_lane(include_str!("scripts/claim.lua")),
            enqueue: of_lane(include_str!("scripts/enqueue.lua")),
            expire: of_lane(include_str!("scripts/expire.lua")),
            finish: of_lane(include_str!("scripts/finish.lua")),
            free_request_id: Script::new(include_str!("scripts/free_request_id.lua")),
            gates: of_lane(include_str!("scripts/gates_of_lane.lua")),
            heartbeat: of_lane(include_str!("scripts/heartbeat.lua")),
            hold_batches: of_lane(include_str!("scripts/hold_batches.lua")),
            keep_answer: Script::new(&[&prelude, include_str!("scripts/keep_answer.lua")].concat()),
            leave: of_lane(include_str!("scripts/leave.lua")),
            open_lane: Script::new(include_str!("scripts/open_lane.lua")),
            park: of_lane(include_str!("scripts/park.lua")),
            part_batch: of_lane(include_str!("scripts/part_batch.lua")),
            permit: of_lane(include_str!("scripts/permit.lua")),
            promote: of_lane(include_str!("scripts/promote.lua")),
            purge: of_lane(include_str!("scripts/purge.lua")),
            reclaim: of_lane(include_str!("scripts/reclaim.lua")),
            redrive: of_lane(include_str!("scripts/redrive.lua")),
            set: Script::new(include_str!("scripts/set.lua")),
            settle_permit: of_lane(include_str!("scripts/settle_permit.lua")),
        }
    }
}
