//! Steps of a device that chooses tokens itself: the next one is started before the tokens of the one before are here, where
//! nobody in it needs the host between the two.
//!
//! Never here: what is chosen. A row that takes its token from the step before reads it on the device; whatever the host
//! finds out later (an end token, a stop string, a cancellation) makes a row of the next step one too many, and nothing
//! else: all is done in order there, so its blocks are not another's before that row is computed.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::ask::{Ask, CHOSEN_BEFORE};
use crate::engine::run::{End, Given, Runner, Sequence, Share, shares, words};
use crate::engine::{RequestError, RequestId};
use crate::schedule::Step;

/// A step on its way.
pub(super) struct Flight {
    step: Step,
    /// For each sequence that samples, the number of that output.
    outputs: BTreeMap<RequestId, u32>,
    /// What could not be asked for.
    failed: BTreeMap<RequestId, RequestError>,
    begun: Instant,
    /// Whether the next step may start before its tokens are known.
    is_open: bool,
}

impl Runner {
    /// Starts the next step, and takes what the one before chose.
    pub(super) fn step_ahead(&mut self) {
        let step = self.next();
        let next = catch_unwind(AssertUnwindSafe(|| self.launch(step)));
        let before = self.flight.take();
        let waited = before.is_some();
        if let Some(before) = before {
            self.land(before, matches!(&next, Ok(Some(_))));
        }
        match next {
            Ok(None) => {}
            Ok(Some(mut flight)) => {
                if waited {
                    // Until now the device had the step before.
                    flight.begun = Instant::now();
                }
                if flight.is_open && !self.stopping {
                    self.flight = Some(flight);
                } else {
                    self.land(flight, false);
                }
            }
            Err(panic) => {
                // What is known of the step is not to be trusted, and nothing of it can be computed again in part.
                tracing::error!(message = words(panic.as_ref()), "a step could not be started, and this engine ends");
                self.stopping = true;
            }
        }
    }

    /// Starts a step. From then on the schedule takes it for done.
    fn launch(&mut self, mut step: Step) -> Option<Flight> {
        let none = BTreeMap::new();
        let before = self.flight.as_ref().map_or(&none, |flight| &flight.outputs);
        step.slices.retain(|slice| {
            let whole = |sequence: &Sequence| sequence.is_whole_with(before.contains_key(&slice.id));
            !self.sequences.get(&slice.id).is_some_and(whole)
        });
        if step.slices.is_empty() {
            return None;
        }
        self.gauge.begin(&step);
        let begun = Instant::now();
        self.lanes.resize_with(1, Default::default);
        let lane = self.lanes.first_mut()?;
        lane.batch.clear();
        let mut shares = shares(&step, &mut self.sequences);
        let (mut outputs, mut on_their_way) = (BTreeMap::new(), BTreeMap::new());
        for Share { slice, sequence } in &shares {
            let end = slice.start + slice.tokens;
            let mut ids: Vec<u32> = sequence.ids.iter().copied().take(end).skip(slice.start).collect();
            let chosen_before = before.get(&slice.id).map(|output| CHOSEN_BEFORE | output);
            let known = sequence.ids.len() + usize::from(chosen_before.is_some());
            if let Some(chosen) = chosen_before.filter(|_| end > sequence.ids.len()) {
                ids.push(chosen);
                let last = lane.batch.rows() + ids.len() - 1;
                on_their_way.insert(slice.id, u32::try_from(last).unwrap_or(u32::MAX));
            }
            lane.batch.push(&ids, slice.start, known, self.schedule.table(slice.id));
            lane.batch.share(|block| self.schedule.is_shared(block));
            lane.batch.want_logits_of(slice.outputs);
            if slice.samples {
                outputs.insert(slice.id, u32::try_from(lane.batch.outputs.len()).unwrap_or(1) - 1);
            }
        }
        self.forward.start(&mut lane.batch);
        // While logits are computed, masks are waited for.
        let (vocabulary, mut failed, mut asks) = (self.forward.vocabulary(), BTreeMap::new(), Vec::new());
        for share in &mut shares {
            let on_its_way = on_their_way.get(&share.slice.id).copied();
            match share.asks(vocabulary, on_its_way) {
                Ok(all) => asks.extend(all),
                Err(error) => {
                    asks.extend(std::iter::repeat_n(Ask::nothing(), share.slice.outputs));
                    failed.insert(share.slice.id, error);
                }
            }
        }
        self.forward.choose(&asks);
        let open = |share: &Share<'_>| !share.slice.samples || share.sequence.guided.is_none();
        let is_open = self.forward.restarts_after().is_none() && shares.iter().all(open);
        self.schedule.commit(&step);
        step.slices.sort_unstable_by_key(|slice| slice.id);
        Some(Flight { step, outputs, failed, begun, is_open })
    }

    /// Takes what a step chose. Whoever has ended since it was started has no part in it.
    fn land(&mut self, mut flight: Flight, another_is_underway: bool) {
        let chosen = self.forward.chosen();
        if !another_is_underway {
            self.gauge.end();
        }
        if self.has_failed() || self.stopping {
            return;
        }
        let mut chosen = chosen.into_iter().flatten().map(Given::Chosen);
        let Some(lane) = self.lanes.first_mut() else { return };
        for slice in &flight.step.slices {
            let mut rows = chosen.by_ref().take(slice.outputs);
            let Some(sequence) = self.sequences.get_mut(&slice.id) else {
                rows.for_each(drop);
                continue;
            };
            let mut share = Share { slice: *slice, sequence };
            let failed = flight.failed.remove(&slice.id);
            let turn = || failed.map_or_else(|| share.turn(&mut rows, &mut lane.workspace), |e| Some(End::Failed(e)));
            let end = catch_unwind(AssertUnwindSafe(turn));
            let end =
                end.unwrap_or_else(|panic| Some(End::Failed(RequestError::Step { message: words(panic.as_ref()) })));
            // Of a slice whose sequence has failed some may be left.
            rows.for_each(drop);
            lane.ends.extend(end.map(|end| (slice.id, end)));
        }
        flight.step.slices.retain(|slice| self.sequences.contains_key(&slice.id));
        self.settle(&flight.step, flight.begun.elapsed());
    }
}

impl Share<'_> {
    /// What the device is asked for the outputs of the slice, whose last token may be on its way in a row.
    fn asks(&mut self, vocabulary: usize, on_its_way: Option<u32>) -> Result<Vec<Ask>, RequestError> {
        let end = self.slice.start + self.slice.tokens;
        (end - self.slice.outputs + 1..=end)
            .map(|next| self.sequence.ask((next, on_its_way), self.slice.samples && next == end, vocabulary))
            .collect()
    }
}

impl Sequence {
    /// Whether it has all its tokens with the one that is on its way.
    fn is_whole_with(&self, on_its_way: bool) -> bool {
        on_its_way && self.ids.len() + 1 - self.prompt_tokens >= self.max_tokens
    }

    /// What the device is asked for the token at a position, where the one before it may be on its way in a row.
    fn ask(
        &mut self,
        (position, on_its_way): (usize, Option<u32>),
        samples: bool,
        vocabulary: usize,
    ) -> Result<Ask, RequestError> {
        if let Some(token) = self.ids.get(position) {
            let logprobs =
                if position < self.prompt_tokens { self.scores.wanted_of_prompt } else { self.scores.wanted };
            return Ok(Ask { known: Some(*token), logprobs, ..Ask::nothing() });
        }
        if !samples || self.ending.is_some() {
            return Ok(Ask::nothing());
        }
        let allowed = match &mut self.guided {
            None => None,
            Some((guided, end)) => {
                let allowed = guided.allowed(vocabulary, &self.end_tokens, *end);
                Some(allowed.map_err(|message| RequestError::Form { message })?)
            }
        };
        Ok(Ask {
            sampling: self.sampling,
            position: u32::try_from(position).unwrap_or(u32::MAX),
            known: None,
            changes: self.shaper.changes(on_its_way),
            allowed,
            logprobs: self.scores.wanted,
        })
    }
}
