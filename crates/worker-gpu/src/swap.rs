//! Which model is loaded or given up next, decided from what waits and what a swap costs.
//!
//! Never here: loading, memory, the clock. [`next`] is a function of what stands where.

/// While another worker holds the model, its work waits here so much longer than loading takes.
const WARM_FIRST_MS: u64 = 2_000;

/// A model with work keeps its place for so many times what its loading took, so that swapping takes a tenth of the time
/// at most; and none waits longer than so many times what the swap costs, once a place may be taken.
const STAY: u64 = 10;

/// A model as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) phase: Phase,
    /// Bytes that it holds, or that it has to be given before it is loaded.
    pub(crate) bytes: u64,
    /// Jobs that wait for it and could start.
    pub(crate) waiting: u64,
    /// What loading it takes.
    pub(crate) load_ms: u64,
    /// Whether it shall be loaded without work as well, where nothing else has to go.
    pub(crate) preload: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It can be loaded.
    Cold {
        /// For how long jobs have been waiting for it.
        waiting_ms: u64,
        /// Whether another worker holds it.
        elsewhere: bool,
    },
    /// It is being loaded.
    Loading,
    /// It is held.
    Resident {
        /// Jobs that it runs.
        running: usize,
        /// Since it was loaded.
        held_ms: u64,
        /// Since its last job ended.
        unused_ms: u64,
    },
    /// It takes no more jobs, and goes when those that run have ended.
    Leaving,
    /// It cannot be loaded, or what it takes is not known yet.
    Out,
}

/// What to do about the model with that index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Move {
    Load(usize),
    Evict(usize),
}

/// The next move, if there is one now. Who has waited longest is served first, and nobody overtakes it by taking memory
/// that is being freed for it.
pub(crate) fn next(all: &[Standing], budget: u64) -> Option<Move> {
    if all.iter().any(|one| one.phase == Phase::Loading) {
        return None;
    }
    let held = all.iter().filter(|one| holds(one)).fold(0_u64, |sum, one| sum.saturating_add(one.bytes));
    let free = budget.saturating_sub(held);
    let mut due: Vec<(u64, usize)> = (0..).zip(all).filter_map(|(index, one)| Some((due(one)?, index))).collect();
    due.sort_by_key(|(waiting_ms, index)| (std::cmp::Reverse(*waiting_ms), *index));
    if let Some((waiting_ms, index)) = due.first() {
        return match &all[*index] {
            candidate if candidate.bytes <= free => Some(Move::Load(*index)),
            _ if all.iter().any(|one| one.phase == Phase::Leaving) => None,
            candidate => victim(all, (candidate, *waiting_ms)).map(Move::Evict),
        };
    }
    let preloaded = |one: &Standing| one.preload && matches!(one.phase, Phase::Cold { .. }) && one.bytes <= free;
    all.iter().position(preloaded).map(Move::Load)
}

const fn holds(one: &Standing) -> bool {
    matches!(one.phase, Phase::Resident { .. } | Phase::Leaving | Phase::Loading)
}

/// How long work has waited for a model that may be loaded for it now.
fn due(one: &Standing) -> Option<u64> {
    match one.phase {
        Phase::Cold { waiting_ms, elsewhere } if one.waiting > 0 => {
            (!elsewhere || waiting_ms >= WARM_FIRST_MS.saturating_add(one.load_ms)).then_some(waiting_ms)
        }
        _ => None,
    }
}

/// The model that goes for another: the one that has been without work for longest, else of those that have had their
/// stay the one with the least work, if the swap pays.
fn victim(all: &[Standing], candidate: (&Standing, u64)) -> Option<usize> {
    let residents = (0..).zip(all).filter_map(|(index, one)| match one.phase {
        Phase::Resident { running, held_ms, unused_ms } => {
            Some((index, one, one.waiting.saturating_add(running as u64), held_ms, unused_ms))
        }
        _ => None,
    });
    let (idle, busy): (Vec<_>, Vec<_>) = residents.partition(|(_, _, work, ..)| *work == 0);
    if let Some((index, ..)) = idle.iter().max_by_key(|(_, _, _, _, unused_ms)| *unused_ms) {
        return Some(*index);
    }
    let gives = |(_, one, work, held_ms, _): &(usize, &Standing, u64, u64, u64)| {
        *held_ms >= STAY.saturating_mul(one.load_ms) && pays(candidate, (one, *work))
    };
    let least = busy.iter().filter(|one| gives(one)).min_by_key(|(_, _, work, held_ms, _)| (*work, u64::MAX - held_ms));
    least.map(|(index, ..)| *index)
}

/// Whether what has been waited for one model outweighs what those of the other will wait for the swap and back.
fn pays((candidate, waiting_ms): (&Standing, u64), (resident, work): (&Standing, u64)) -> bool {
    let cost_ms = candidate.load_ms.saturating_add(resident.load_ms);
    waiting_ms >= STAY.saturating_mul(cost_ms)
        || candidate.waiting.saturating_mul(waiting_ms) >= work.saturating_add(1).saturating_mul(cost_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLD: Standing = Standing {
        phase: Phase::Cold { waiting_ms: 0, elsewhere: false },
        bytes: 4,
        waiting: 0,
        load_ms: 100,
        preload: false,
    };

    fn cold(waiting: u64, waiting_ms: u64) -> Standing {
        Standing { phase: Phase::Cold { waiting_ms, elsewhere: false }, waiting, ..COLD }
    }

    fn resident(waiting: u64, running: usize, held_ms: u64, unused_ms: u64) -> Standing {
        Standing { phase: Phase::Resident { running, held_ms, unused_ms }, waiting, ..COLD }
    }

    fn check(all: &[Standing], expect: Option<Move>) {
        assert_eq!(next(all, 10), expect, "{all:?}");
    }

    #[test]
    fn what_fits_is_loaded_for_whoever_has_waited_longest() {
        check(&[cold(0, 0)], None);
        check(&[cold(1, 0), cold(1, 5)], Some(Move::Load(1)));
        check(&[cold(1, 0), Standing { phase: Phase::Loading, ..COLD }], None);
        check(&[cold(1, 0), resident(9, 9, 0, 0)], Some(Move::Load(0)));
    }

    #[test]
    fn who_is_without_work_goes_first_and_of_those_the_least_lately_used() {
        check(&[cold(1, 0), resident(0, 0, 9, 5), resident(0, 0, 9, 7)], Some(Move::Evict(2)));
        check(&[cold(1, 0), resident(0, 1, 9, 9), resident(0, 0, 9, 0)], Some(Move::Evict(2)));
        check(&[cold(0, 0), resident(0, 0, 9, 5), resident(0, 0, 9, 7)], None);
        let leaving = Standing { phase: Phase::Leaving, ..COLD };
        check(&[cold(1, 0), leaving, resident(0, 0, 9, 9)], None);
    }

    #[test]
    fn work_keeps_its_place_for_ten_times_what_loading_took() {
        let waits = cold(1_000, 10_000);
        check(&[waits, resident(5, 1, 999, 0), resident(5, 1, 999, 0)], None);
        check(&[waits, resident(5, 1, 999, 0), resident(5, 1, 1000, 0)], Some(Move::Evict(2)));
    }

    #[test]
    fn a_swap_is_made_when_more_was_waited_than_it_costs_the_others() {
        let busy = resident(9, 0, 5_000, 0);
        // (9 + 1) jobs times 200 ms there and back.
        check(&[cold(10, 199), busy, busy], None);
        check(&[cold(10, 200), busy, busy], Some(Move::Evict(1)));
        check(&[cold(10, 200), busy, resident(3, 0, 5_000, 0)], Some(Move::Evict(2)));
    }

    #[test]
    fn nobody_starves_behind_a_model_with_ever_so_much_work() {
        let endless = resident(1_000_000, 32, 5_000, 0);
        check(&[cold(1, 1_999), endless, endless], None);
        check(&[cold(1, 2_000), endless, endless], Some(Move::Evict(1)));
    }

    #[test]
    fn a_worker_that_holds_the_model_is_left_the_first_chance() {
        let elsewhere = |waiting_ms| Standing { phase: Phase::Cold { waiting_ms, elsewhere: true }, ..cold(5, 0) };
        check(&[elsewhere(2_099)], None);
        check(&[elsewhere(2_100)], Some(Move::Load(0)));
        check(&[elsewhere(0), cold(1, 0)], Some(Move::Load(1)));
    }

    #[test]
    fn preloading_takes_nothing_from_anybody() {
        let listed = Standing { preload: true, ..COLD };
        check(&[listed, listed, listed], Some(Move::Load(0)));
        check(&[resident(0, 0, 0, 0), listed, listed], Some(Move::Load(1)));
        check(&[resident(0, 0, 0, 0), resident(0, 0, 0, 0), listed], None);
        check(&[listed, cold(1, 0)], Some(Move::Load(1)));
    }

    /// Three models with endless work and room for two: all get turns, and swapping takes little of the time.
    #[test]
    fn turns_go_round_and_swapping_takes_a_small_part_of_the_time() {
        let (mut since, mut places) = ([0_u64; 3], [true, true, false]);
        let (mut served, mut swaps) = ([0_u64; 3], 0_u64);
        let mut now = 0;
        while now < 100_000 {
            let all: Vec<Standing> = (0..3)
                .map(|one| match places[one] {
                    true => resident(50, 8, now - since[one], 0),
                    false => cold(50, now - since[one]),
                })
                .collect();
            match next(&all, 10) {
                Some(Move::Evict(one) | Move::Load(one)) => {
                    places[one] = !places[one];
                    since[one] = now;
                    if places[one] {
                        swaps += 1;
                        now += COLD.load_ms;
                    }
                }
                None => {
                    (0..3).filter(|one| places[*one]).for_each(|one| served[one] += 10);
                    now += 10;
                }
            }
        }
        assert!(served.iter().all(|ms| *ms > 40_000), "{served:?}");
        assert!(swaps * COLD.load_ms <= 100_000 / 5, "two places, each a tenth at most: {swaps}");
    }
}
