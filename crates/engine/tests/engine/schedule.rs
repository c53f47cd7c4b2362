//! Random runs of the schedule: arrivals, lengths, cancellations, pool sizes.

use std::collections::{BTreeMap, BTreeSet};

use genmill_engine::RequestId;
use genmill_engine::kv::{BLOCK_TOKENS, Blocks};
use genmill_engine::schedule::{Limits, Schedule, Step};
use proptest::prelude::*;

/// A request of a run.
#[derive(Clone, Debug)]
struct Arrival {
    /// Steps after the one before.
    gap: usize,
    prompt_tokens: usize,
    max_tokens: usize,
    /// How many tokens it really makes.
    output_tokens: usize,
    /// Steps after its arrival until it is cancelled.
    cancel: Option<usize>,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let lengths = (1_usize..200, 1_usize..100, 1_usize..100);
    (0_usize..4, lengths, proptest::option::weighted(0.2, 0_usize..40)).prop_map(
        |(gap, (prompt_tokens, max_tokens, output), cancel)| Arrival {
            gap,
            prompt_tokens,
            max_tokens,
            output_tokens: output.min(max_tokens),
            cancel,
        },
    )
}

/// Plays the engine's part and checks every step.
struct Run {
    schedule: Schedule,
    limits: Limits,
    blocks: u32,
    arrivals: Vec<Arrival>,
    /// Tokens made so far by what runs or waits.
    open: BTreeMap<u64, usize>,
    /// Tokens computed, to compare with each slice's start.
    computed: BTreeMap<u64, usize>,
    admitted: Vec<u64>,
    finished: BTreeSet<u64>,
}

impl Run {
    fn play(mut self) {
        let times: Vec<usize> = self
            .arrivals
            .iter()
            .scan(0, |time, arrival| {
                *time += arrival.gap;
                Some(*time)
            })
            .collect();
        let work: usize = self.arrivals.iter().map(|a| a.prompt_tokens + a.output_tokens).sum();
        let last = times.last().copied().unwrap_or(0);
        let mut now = 0;
        while now <= last || !self.open.is_empty() {
            assert!(now <= last + work + self.arrivals.len(), "no end in sight");
            self.arrive_and_cancel(now, &times);
            let step = self.schedule.next(&self.limits);
            self.check(&step);
            self.schedule.commit(&step);
            self.advance(&step);
            now += 1;
        }
        assert!(self.schedule.is_idle());
        assert_eq!(self.schedule.free_blocks(), self.blocks as usize, "blocks leaked");
        assert!(self.admitted.is_sorted(), "admission out of order");
    }

    fn arrive_and_cancel(&mut self, now: usize, times: &[usize]) {
        for (id, (arrival, time)) in (0..).zip(self.arrivals.clone().iter().zip(times)) {
            if *time == now {
                let pool = self.blocks as usize;
                let needed = Blocks::for_tokens(arrival.prompt_tokens + arrival.max_tokens);
                let added = self.schedule.add(RequestId::new(id), arrival.prompt_tokens, arrival.max_tokens);
                assert_eq!(added.is_ok(), needed <= pool);
                if added.is_ok() {
                    self.open.insert(id, 0);
                }
            }
            if arrival.cancel.is_some_and(|after| time + after == now) {
                let was_open = self.open.remove(&id).is_some();
                assert_eq!(self.schedule.remove(RequestId::new(id)), was_open);
            }
        }
    }

    /// Budget, places, positions, blocks; and work whenever there is any.
    fn check(&mut self, step: &Step) {
        assert!(step.tokens() <= self.limits.step_tokens, "over budget");
        assert!(step.slices.len() <= self.limits.max_sequences, "too many sequences");
        assert_eq!(step.slices.is_empty(), self.open.is_empty(), "idle with work to do");
        let mut lent = BTreeSet::new();
        for id in self.open.keys() {
            for block in self.schedule.table(RequestId::new(*id)) {
                assert!(*block < self.blocks && lent.insert(*block), "a block lent twice");
            }
        }
        assert_eq!(lent.len() + self.schedule.free_blocks(), self.blocks as usize);
        for slice in &step.slices {
            let table = self.schedule.table(slice.id);
            assert!(slice.start + slice.tokens <= table.len() * BLOCK_TOKENS, "outside of its blocks");
        }
    }

    fn advance(&mut self, step: &Step) {
        let numbers: BTreeMap<RequestId, u64> =
            (0..).take(self.arrivals.len()).map(|id| (RequestId::new(id), id)).collect();
        self.admitted.extend(step.admitted.iter().map(|id| numbers[id]));
        for slice in &step.slices {
            let id = numbers[&slice.id];
            let arrival = &self.arrivals[usize::try_from(id).unwrap()];
            let made = self.open.get_mut(&id).unwrap();
            let computed = self.computed.entry(id).or_default();
            assert_eq!(slice.start, *computed, "a gap or a repetition");
            *computed += slice.tokens;
            assert_eq!(slice.samples, *computed == arrival.prompt_tokens + *made);
            *made += usize::from(slice.samples);
            if *made == arrival.output_tokens {
                self.open.remove(&id);
                assert!(self.finished.insert(id));
                assert!(self.schedule.remove(slice.id));
            }
        }
    }
}

proptest! {
    #[test]
    fn nothing_leaks_starves_or_stalls(
        arrivals in proptest::collection::vec(arrival(), 1..40),
        blocks in 1_u32..60,
        max_sequences in 1_usize..12,
        spare in 0_usize..64,
    ) {
        Run {
            schedule: Schedule::new(blocks),
            limits: Limits { step_tokens: max_sequences + spare, max_sequences },
            blocks,
            arrivals,
            open: BTreeMap::new(),
            computed: BTreeMap::new(),
            admitted: Vec::new(),
            finished: BTreeSet::new(),
        }
        .play();
    }
}

#[test]
fn decoding_goes_on_while_a_long_prompt_is_prefilled() {
    let limits = Limits { step_tokens: 8, max_sequences: 4 };
    let mut schedule = Schedule::new(100);
    let (short, long) = (RequestId::new(1), RequestId::new(2));
    schedule.add(short, 3, 50).unwrap();
    schedule.add(long, 100, 5).unwrap();
    let slices = |schedule: &mut Schedule| {
        let step = schedule.next(&limits);
        schedule.commit(&step);
        step.slices.iter().map(|s| (s.id, s.start, s.tokens, s.samples)).collect::<Vec<_>>()
    };
    assert_eq!(slices(&mut schedule), [(short, 0, 3, true), (long, 0, 5, false)]);
    assert_eq!(slices(&mut schedule), [(short, 3, 1, true), (long, 5, 7, false)]);
    assert_eq!(slices(&mut schedule), [(short, 4, 1, true), (long, 12, 7, false)]);
}
