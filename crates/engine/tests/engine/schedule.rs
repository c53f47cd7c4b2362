//! Random runs of the schedule: arrivals, lengths, common beginnings, cancellations, pool sizes. What lies in the blocks is
//! played along, so that a block which is lent for the wrong tokens, or written while another reads it, is seen.

use std::collections::{BTreeMap, BTreeSet};

use genmill_engine::RequestId;
use genmill_engine::kv::{BLOCK_TOKENS, Blocks};
use genmill_engine::schedule::{Arrival, Limits, Schedule, Step};
use proptest::prelude::*;
use std::sync::Arc;

/// A request of a run.
#[derive(Clone, Debug)]
struct Comer {
    /// Steps after the one before.
    gap: usize,
    /// Its prompt begins as those of its group do, for so many tokens.
    group: u32,
    common_tokens: usize,
    overtakes: u64,
    scored: bool,
    prompt_tokens: usize,
    max_tokens: usize,
    /// How many tokens it really makes.
    output_tokens: usize,
    /// Steps after its arrival until it is cancelled.
    cancel: Option<usize>,
}

fn comer() -> impl Strategy<Value = Comer> {
    let lengths = (1_usize..200, 1_usize..100, 1_usize..100);
    let rank = (0_u32..3, 0_usize..150, 0_u64..5, proptest::bool::weighted(0.1));
    (0_usize..4, lengths, rank, proptest::option::weighted(0.2, 0_usize..40)).prop_map(
        |(gap, (prompt_tokens, max_tokens, output), (group, common_tokens, overtakes, scored), cancel)| Comer {
            gap,
            group,
            common_tokens,
            overtakes,
            scored,
            prompt_tokens,
            max_tokens,
            output_tokens: output.min(max_tokens),
            cancel,
        },
    )
}

impl Comer {
    /// All tokens that it will ever have.
    fn tokens(&self, id: u64) -> Vec<u32> {
        let own = 1_000 + u32::try_from(id).unwrap();
        let token = |place| if place < self.common_tokens { self.group } else { own };
        (0..self.prompt_tokens + self.output_tokens).map(token).collect()
    }

    fn arrival(&self, id: u64) -> Arrival {
        Arrival {
            prompt: Arc::from(&self.tokens(id)[..self.prompt_tokens]),
            max_tokens: self.max_tokens,
            overtakes: self.overtakes,
            scored: self.scored,
        }
    }
}

/// Plays the engine's part and checks every step.
struct Run {
    schedule: Schedule,
    limits: Limits,
    blocks: u32,
    arrivals: Vec<Comer>,
    /// What lies in each block: for each of its places, all tokens up to there.
    contents: Vec<[Vec<u32>; BLOCK_TOKENS]>,
    /// Tokens made so far by what runs or waits.
    open: BTreeMap<u64, usize>,
    /// Tokens computed, to compare with each slice's start.
    computed: BTreeMap<u64, usize>,
    admitted: Vec<u64>,
    finished: BTreeSet<u64>,
}

impl Run {
    /// Returns the order of admission.
    fn play(mut self) -> Vec<u64> {
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
            self.compute(&step);
            self.schedule.commit(&step);
            self.advance(&step);
            now += 1;
        }
        assert!(self.schedule.is_idle());
        assert_eq!(self.schedule.free_blocks(), self.blocks as usize, "blocks leaked");
        self.admitted
    }

    fn arrive_and_cancel(&mut self, now: usize, times: &[usize]) {
        for (id, (arrival, time)) in (0..).zip(self.arrivals.clone().iter().zip(times)) {
            if *time == now {
                let pool = self.blocks as usize;
                let needed = Blocks::for_tokens(arrival.prompt_tokens + arrival.max_tokens);
                let added = self.schedule.add(RequestId::new(id), arrival.arrival(id));
                assert_eq!(added.is_ok(), needed <= pool);
                if added.is_ok() {
                    self.open.insert(id, 0);
                }
            }
            if arrival.cancel.is_some_and(|after| time + after == now) {
                let was_open = self.open.remove(&id).is_some();
                assert_eq!(self.schedule.remove(RequestId::new(id), &arrival.tokens(id)), was_open);
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
                let is_first = lent.insert(*block);
                assert!(*block < self.blocks && (is_first || self.schedule.is_shared(*block)), "a block lent twice");
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
        for admitted in &step.admitted {
            let id = numbers[&admitted.id];
            self.admitted.push(id);
            self.computed.insert(id, admitted.cached);
            assert!(
                admitted.cached < self.arrivals[usize::try_from(id).unwrap()].prompt_tokens,
                "nothing to sample from"
            );
        }
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
                assert!(self.schedule.remove(slice.id, &arrival.tokens(id)));
            }
        }
    }

    /// Writes a step's tokens to their places, then reads all that each of them sees.
    fn compute(&mut self, step: &Step) {
        let tokens_of = |id: RequestId| {
            let number = (0..).find(|number| RequestId::new(*number) == id).unwrap();
            self.arrivals[usize::try_from(number).unwrap()].tokens(number)
        };
        for slice in &step.slices {
            let (tokens, table) = (tokens_of(slice.id), self.schedule.table(slice.id));
            for place in slice.start..slice.start + slice.tokens {
                let block = table[place / BLOCK_TOKENS];
                assert!(!self.schedule.is_shared(block), "written while others read it");
                self.contents[block as usize][place % BLOCK_TOKENS] = tokens[..=place].to_vec();
            }
        }
        for slice in &step.slices {
            let (tokens, table) = (tokens_of(slice.id), self.schedule.table(slice.id));
            for place in 0..slice.start + slice.tokens {
                let found = &self.contents[table[place / BLOCK_TOKENS] as usize][place % BLOCK_TOKENS];
                assert_eq!(*found, tokens[..=place], "the keys of other tokens");
            }
        }
    }
}

fn run(arrivals: Vec<Comer>, blocks: u32, limits: Limits, keeps_prefixes: bool) -> Vec<u64> {
    let run = Run {
        schedule: Schedule::new(blocks, keeps_prefixes),
        limits,
        blocks,
        arrivals,
        contents: vec![std::array::from_fn(|_| Vec::new()); blocks as usize],
        open: BTreeMap::new(),
        computed: BTreeMap::new(),
        admitted: Vec::new(),
        finished: BTreeSet::new(),
    };
    run.play()
}

proptest! {
    #[test]
    fn nothing_leaks_starves_or_stalls(
        arrivals in proptest::collection::vec(comer(), 1..40),
        blocks in 1_u32..60,
        max_sequences in 1_usize..12,
        spare in 0_usize..64,
        keeps_prefixes: bool,
    ) {
        run(arrivals, blocks, Limits { step_tokens: max_sequences + spare, max_sequences }, keeps_prefixes);
    }

    #[test]
    fn equals_are_admitted_as_they_come(
        arrivals in proptest::collection::vec(comer().prop_map(|comer| Comer { overtakes: 0, ..comer }), 1..40),
        blocks in 1_u32..60,
        max_sequences in 1_usize..12,
    ) {
        let limits = Limits { step_tokens: max_sequences + 16, max_sequences };
        prop_assert!(run(arrivals, blocks, limits, false).is_sorted());
    }
}

fn plain(prompt: impl IntoIterator<Item = u32>, max_tokens: usize) -> Arrival {
    Arrival { prompt: prompt.into_iter().collect(), max_tokens, overtakes: 0, scored: false }
}

#[test]
fn an_urgent_one_overtakes_so_many_and_no_more() {
    let limits = Limits { step_tokens: 8, max_sequences: 1 };
    let mut schedule = Schedule::new(100, true);
    let mut order = Vec::new();
    for id in 0..6 {
        let overtakes = if id >= 3 { 2 } else { 0 };
        schedule.add(RequestId::new(id), Arrival { overtakes, ..plain([1], 1) }).unwrap();
    }
    while !schedule.is_idle() {
        let step = schedule.next(&limits);
        let id = step.admitted[0].id;
        order.extend((0..6).find(|number| RequestId::new(*number) == id));
        schedule.remove(id, &[]);
    }
    assert_eq!(order, [0, 1, 3, 2, 4, 5]);
}

#[test]
fn those_who_begin_alike_compute_the_beginning_once() {
    let limits = Limits { step_tokens: 32, max_sequences: 8 };
    let mut schedule = Schedule::new(100, true);
    let (prompt, end) = (0..100_u32, 5);
    for id in 0..8 {
        let own = 1_000 + u32::try_from(id).unwrap();
        schedule.add(RequestId::new(id), plain(prompt.clone().chain([own]), end)).unwrap();
    }
    let mut tokens = 0;
    while tokens < 101 + 7 * 5 {
        let step = schedule.next(&limits);
        tokens += step.slices.iter().filter(|slice| slice.start < 101).map(|slice| slice.tokens).sum::<usize>();
        schedule.commit(&step);
    }
    assert_eq!(tokens, 101 + 7 * 5, "96 of the 100 common tokens are whole blocks");
    // What nobody shared goes first when room is short, and the common beginning stays.
    for id in 0..8 {
        schedule.remove(RequestId::new(id), &[]);
    }
    for (id, first) in [(10, 1_000), (11, 2_000), (12, 3_000)] {
        schedule.add(RequestId::new(id), plain(first..first + 500, 8)).unwrap();
        let step = schedule.next(&Limits { step_tokens: 600, ..limits });
        schedule.commit(&step);
        schedule.remove(RequestId::new(id), &[]);
    }
    schedule.add(RequestId::new(20), plain(prompt, end)).unwrap();
    assert_eq!(schedule.next(&limits).admitted[0].cached, 96);
}

#[test]
fn what_somebody_waits_for_stays_while_anything_else_can_go() {
    let limits = Limits { step_tokens: 1_000, max_sequences: 1 };
    let mut schedule = Schedule::new(10, true);
    let mut run = |id: u64, prompt: std::ops::Range<u32>, then: Option<std::ops::Range<u32>>| {
        schedule.add(RequestId::new(id), plain(prompt, 1)).unwrap();
        if let Some(prompt) = then {
            schedule.add(RequestId::new(id + 1), plain(prompt, 1)).unwrap();
        }
        let step = schedule.next(&limits);
        schedule.commit(&step);
        schedule.remove(RequestId::new(id), &[]);
        step.admitted[0].cached
    };
    // Three blocks each, nothing of which is shared; the first is the least lately used.
    assert_eq!(run(0, 0..48, None), 0);
    assert_eq!(run(2, 100..148, None), 0);
    // Needs seven of ten, while somebody waits for the first.
    assert_eq!(run(4, 200..300, Some(0..47)), 0);
    let step = schedule.next(&limits);
    assert_eq!(step.admitted[0].cached, 32, "whole blocks of all but the last token");
}

#[test]
fn a_sequence_can_begin_anew_in_its_blocks() {
    let limits = Limits { step_tokens: 8, max_sequences: 4 };
    let mut schedule = Schedule::new(100, false);
    let id = RequestId::new(1);
    schedule.add(id, plain(0..9, 50)).unwrap();
    let mut slices = |restart: bool| {
        let step = schedule.next(&limits);
        schedule.commit(&step);
        if restart {
            schedule.restart(id);
        }
        step.slices.iter().map(|s| (s.start, s.tokens, s.samples)).collect::<Vec<_>>()
    };
    assert_eq!(slices(false), [(0, 8, false)]);
    assert_eq!(slices(true), [(8, 1, true)]);
    assert_eq!(slices(false), [(0, 8, false)]);
    assert_eq!(slices(false), [(8, 2, true)]);
    assert_eq!(slices(false), [(10, 1, true)]);
    assert_eq!(schedule.free_blocks(), 100 - Blocks::for_tokens(59));
}

#[test]
fn decoding_goes_on_while_a_long_prompt_is_prefilled() {
    let limits = Limits { step_tokens: 8, max_sequences: 4 };
    let mut schedule = Schedule::new(100, true);
    let (short, long) = (RequestId::new(1), RequestId::new(2));
    schedule.add(short, plain(0..3, 50)).unwrap();
    schedule.add(long, plain(0..100, 5)).unwrap();
    let slices = |schedule: &mut Schedule| {
        let step = schedule.next(&limits);
        schedule.commit(&step);
        step.slices.iter().map(|s| (s.id, s.start, s.tokens, s.samples)).collect::<Vec<_>>()
    };
    assert_eq!(slices(&mut schedule), [(short, 0, 3, true), (long, 0, 5, false)]);
    assert_eq!(slices(&mut schedule), [(short, 3, 1, true), (long, 5, 7, false)]);
    assert_eq!(slices(&mut schedule), [(short, 4, 1, true), (long, 12, 7, false)]);
}
