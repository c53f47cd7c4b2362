//! Identities: jobs, lanes' numbers, workers, lease epochs. Never here: drawing random numbers or reading a clock.

use crate::time::UnixMs;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The number of a lane in the registry. Part of every job id, so that an id tells where its job is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LaneNumber(pub u16);

/// The id of a job: a version 8 UUID (RFC 9562, section 5.8).
///
/// From the most significant bit: 48 bits of unix time in milliseconds, 4 bits version, 12 bits random, 2 bits
/// variant, 16 bits lane number, 46 bits random. So ids sort by time and tell their lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(Uuid);

/// Why a text is not a job id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a job id (a version 8 UUID such as 0199a1b2-c3d4-8e5f-8001-23456789abcd)")]
pub struct BadJobId {
    /// What was given, shortened.
    pub text: String,
}

impl JobId {
    /// Makes the id of a job submitted at `now` to lane `lane`; `random` must be fresh for every job.
    #[must_use]
    pub fn new(now: UnixMs, lane: LaneNumber, random: u64) -> Self {
        let [r0, r1, r2, r3, r4, r5, r6, r7] = random.to_be_bytes();
        let [_, _, t0, t1, t2, t3, t4, t5] = now.0.to_be_bytes();
        let [l0, l1] = lane.0.to_be_bytes();
        // The lane number sits right behind the two variant bits, so it straddles bytes 8 to 10.
        let lane_bits = u32::from_be_bytes([0, 0, l0, l1]) << 6;
        let [_, b8, b9, b10] = lane_bits.to_be_bytes();
        let mut bytes = [t0, t1, t2, t3, t4, t5, r0, r1, b8, b9, b10 | (r2 & 0x3f), r3, r4, r5, r6, r7];
        bytes[6] = (bytes[6] & 0x0f) | 0x80;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        Self(Uuid::from_bytes(bytes))
    }

    /// Parses the text form.
    ///
    /// # Errors
    /// [`BadJobId`] when `text` is no version 8 UUID.
    pub fn parse(text: &str) -> Result<Self, BadJobId> {
        let bad = || BadJobId { text: text.chars().take(80).collect() };
        Self::from_uuid(Uuid::try_parse(text).map_err(|_| bad())?).ok_or_else(bad)
    }

    /// Reads the 16-byte form; `None` when it is no job id.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::from_uuid(Uuid::from_slice(bytes).ok()?)
    }

    fn from_uuid(uuid: Uuid) -> Option<Self> {
        (uuid.get_version_num() == 8 && uuid.as_bytes()[8] & 0xc0 == 0x80).then_some(Self(uuid))
    }

    /// The 16-byte form, as stored. Sorts as the id does.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The lane the job is kept in.
    #[must_use]
    pub fn lane(&self) -> LaneNumber {
        let b = self.0.as_bytes();
        let bits = u32::from_be_bytes([0, b[8] & 0x3f, b[9], b[10]]) >> 6;
        let [_, _, high, low] = bits.to_be_bytes();
        LaneNumber(u16::from_be_bytes([high, low]))
    }

    /// When the job was submitted.
    #[must_use]
    pub fn submitted_at(&self) -> UnixMs {
        let b = self.0.as_bytes();
        UnixMs(u64::from_be_bytes([0, 0, b[0], b[1], b[2], b[3], b[4], b[5]]))
    }
}

impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Counts the leases of a job. Every claim raises it and every write of a worker names it, so that a worker whose
/// lease was lost can change nothing. 0 before the first claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Epoch(pub u32);

/// The id of a worker process, unique among all that ever ran.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerId(String);

impl WorkerId {
    /// Names a worker of `kind` on host `host`; `random` must be fresh for every process. The host part is cut so that
    /// the whole stays under 64 bytes.
    #[must_use]
    pub fn new(kind: &str, host: &str, random: u64) -> Self {
        let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
        let host: String = host.chars().filter(plain).take(24).collect();
        let tail = random & 0xffff_ffff;
        Self(format!("{kind}-{host}-{tail:08x}"))
    }

    /// Reads a stored id.
    #[must_use]
    pub fn from_stored(id: String) -> Self {
        Self(id)
    }

    /// Stands for whoever holds the batch of this tag: its jobs outlive the worker that took them.
    #[must_use]
    pub fn of_batch(tag: &str) -> Self {
        Self(format!("batch-{tag}"))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for WorkerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_id_tells_its_time_and_lane(ms in 0_u64..1 << 48, lane: u16, random: u64) {
            let id = JobId::new(UnixMs(ms), LaneNumber(lane), random);
            prop_assert_eq!(id.submitted_at(), UnixMs(ms));
            prop_assert_eq!(id.lane(), LaneNumber(lane));
            prop_assert_eq!(JobId::parse(&id.to_string()), Ok(id));
            prop_assert_eq!(JobId::from_bytes(id.as_bytes()), Some(id));
        }

        #[test]
        fn ids_sort_by_time(ms in 0_u64..(1 << 48) - 1, a: u64, b: u64, lane: u16) {
            let earlier = JobId::new(UnixMs(ms), LaneNumber(lane), a);
            prop_assert!(earlier < JobId::new(UnixMs(ms + 1), LaneNumber(lane), b));
        }

        #[test]
        fn other_random_numbers_give_other_ids(a: u64, b: u64) {
            let id = |random| JobId::new(UnixMs(1), LaneNumber(1), random);
            // 58 of the 64 bits are kept: 4 of byte 0 and 2 of byte 2 give way to version and lane.
            let kept = 0x0fff_3fff_ffff_ffff_u64;
            prop_assert_eq!(id(a) == id(b), a & kept == b & kept);
        }
    }

    #[test]
    fn other_uuids_are_no_job_ids() {
        for text in ["", "nonsense", "0199a1b2-c3d4-4e5f-8001-23456789abcd", "0199a1b2-c3d4-8e5f-c001-23456789abcd"] {
            assert!(JobId::parse(text).is_err(), "{text}");
        }
    }
}
