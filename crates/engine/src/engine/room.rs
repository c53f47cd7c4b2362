//! How much room keys and values get on a device with a memory of its own: what is left once all else has its place.
//!
//! Never here: how a machine's or a device's memory is divided among models.

use crate::decoder::{Forward, Room};
use crate::engine::StartError;
use crate::kv::BLOCK_TOKENS;
use crate::schedule::Limits;

/// One part in so many of what is free stays free: for what the driver keeps for itself, and for whole pages.
const SPARE: u64 = 32;

/// Makes room for steps, and for so many blocks or as many as fit; how many there are. `rehearse` computes the largest step
/// with a cache of so many blocks, after which nothing takes memory any more.
pub(super) fn make(
    forward: &mut dyn Forward,
    (limits, wanted): (&Limits, u32),
    rehearse: impl Fn(&mut dyn Forward, u32) -> Result<(), StartError>,
) -> Result<u32, StartError> {
    let tokens = wanted as usize * BLOCK_TOKENS;
    let make = |forward: &mut dyn Forward, blocks: u32| {
        let (rows, outputs) = (limits.step_tokens, limits.max_sequences);
        forward.reserve(Room { rows, outputs, blocks: blocks as usize, tokens });
        working(forward)?;
        rehearse(forward, blocks)?;
        working(forward)
    };
    let mut blocks = wanted;
    if forward.free_bytes().is_some() {
        let least = wanted.min(least_blocks(limits));
        make(forward, least)?;
        let block_bytes = forward.cost().kv_bytes.saturating_mul(BLOCK_TOKENS as u64);
        let free = forward.free_bytes();
        working(forward)?;
        // The small cache goes before the other one comes.
        blocks = wanted.min(fitting(free.unwrap_or(0), block_bytes).saturating_add(least));
        if blocks == least {
            return Ok(blocks);
        }
    }
    make(forward, blocks)?;
    Ok(blocks)
}

/// Blocks with which the largest step can be computed.
fn least_blocks(limits: &Limits) -> u32 {
    let blocks = limits.max_sequences + limits.step_tokens.div_ceil(BLOCK_TOKENS);
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

/// How many blocks fit into what is free.
fn fitting(free: u64, block_bytes: u64) -> u32 {
    let blocks = (free - free / SPARE).checked_div(block_bytes).unwrap_or(0);
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

fn working(forward: &dyn Forward) -> Result<(), StartError> {
    forward.fault().map_or(Ok(()), |message| Err(StartError::Device { message }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_of_what_is_free_stays_free() {
        assert_eq!((fitting(3200, 100), fitting(3199, 31), fitting(99, 100)), (31, 100, 0));
        assert_eq!((fitting(u64::MAX, 1), fitting(100, 0)), (u32::MAX, 0));
    }

    #[test]
    fn the_largest_step_has_its_blocks() {
        assert_eq!(least_blocks(&Limits { step_tokens: 256, max_sequences: 32 }), 48);
        assert_eq!(least_blocks(&Limits { step_tokens: 1, max_sequences: 1 }), 2);
    }
}
