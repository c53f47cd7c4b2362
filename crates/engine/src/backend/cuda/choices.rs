//! Tokens that the device chose: what it is asked, and what comes back while it goes on.
//!
//! Never here: how a token is chosen.

use std::collections::VecDeque;

use crate::ask::{Ask, Chosen};
use crate::backend::Largest;
use crate::backend::cuda::device::{Address, Device, DeviceError};
use crate::backend::cuda::launch::{Kernels, Sample};
use crate::backend::cuda::sampling::{NONE, SamplerRow, entry_bytes, sampled};
use crate::backend::cuda::step::Room;
use crate::engine::Request;
use crate::sampler::{NotFinite, Scored};

/// Rows whose logits change and that are sampled with one launch at most; each needs a copy of its logits.
const SHAPED_ROWS: usize = 64;

/// Changes of logits that go with one launch at most, unless a single row has more.
const ENTRIES: usize = 1 << 18;

/// Bytes of a change, see sampler.cu.
const ENTRY_BYTES: usize = 16;

/// Bytes of a row, see sampler.cu.
const ROW_BYTES: usize = 72;

const WORD: usize = size_of::<u32>();

/// What is asked and answered.
#[derive(Debug)]
pub(crate) struct Choices<D: Device> {
    rows: Room<D>,
    entries: Room<D>,
    masks: Room<D>,
    shaped: Room<D>,
    /// Of the last step: ids, log probabilities, best ids, their log probabilities.
    found: Room<D>,
    coming: VecDeque<Coming<D>>,
}

/// Answers on their way to the host.
#[derive(Debug)]
struct Coming<D: Device> {
    fetched: D::Fetched,
    top: usize,
    /// For each row how many best tokens were asked for; None: not the log probability either.
    asked: Vec<Option<usize>>,
}

impl<D: Device> Default for Choices<D> {
    fn default() -> Self {
        let room = Room::default;
        Self { rows: room(), entries: room(), masks: room(), shaped: room(), found: room(), coming: VecDeque::new() }
    }
}

impl<D: Device> Choices<D> {
    /// Takes the memory that steps up to this size need.
    pub(crate) fn reserve(&mut self, device: &D, largest: &Largest) -> Result<(), DeviceError> {
        let (rows, vocabulary) = (largest.outputs, largest.vocabulary);
        let shaped = rows.min(SHAPED_ROWS);
        self.rows.of(device, rows * ROW_BYTES)?;
        // A row changes each token once, and no more of them than a sequence and its biases have.
        self.entries.of(device, ENTRY_BYTES * (shaped * vocabulary).min(ENTRIES.max(vocabulary)))?;
        self.masks.of(device, shaped * vocabulary.div_ceil(32) * WORD)?;
        self.shaped.of(device, shaped * vocabulary * WORD)?;
        self.found.of(device, rows * 2 * (1 + Request::LOGPROBS_MAX) * WORD)?;
        Ok(())
    }

    /// Where the ids are that the step before chose.
    pub(crate) fn ids(&self) -> Address {
        self.found.at()
    }

    /// Begins to choose, and to bring what is chosen to the host. `inputs` are the tokens of the step's rows.
    pub(crate) fn choose(
        &mut self,
        kernels: &Kernels<D>,
        (inputs, logits, vocabulary): (Address, Address, usize),
        asks: &[Ask],
    ) -> Result<(), DeviceError> {
        let (device, count) = (&kernels.device, asks.len());
        let top = asks.iter().filter_map(|ask| ask.logprobs).max().unwrap_or(0).min(vocabulary);
        let words = 2 * count * (1 + top);
        let found = self.found.of(device, words * WORD)?;
        let rows = self.rows.of(device, count * ROW_BYTES)?;
        let mut first = 0;
        for launch in sampled(asks, SHAPED_ROWS, ENTRIES) {
            let place = |array: usize, width: usize| found + ((array + first * width) * WORD) as Address;
            let at = rows + (first * ROW_BYTES) as Address;
            device.write(at, &launch.rows.iter().flat_map(SamplerRow::bytes).collect::<Vec<_>>())?;
            let entries: Vec<u8> = launch.entries.iter().flat_map(entry_bytes).collect();
            let masks: Vec<u8> = launch.masks.iter().flat_map(|word| word.to_le_bytes()).collect();
            kernels.sample(&Sample {
                logits: logits + (first * vocabulary * WORD) as Address,
                shaped: self.shaped.of(device, launch.shaped * vocabulary * WORD)?,
                rows: at,
                entries: self.entries.with(device, &entries)?,
                masks: self.masks.with(device, &masks)?,
                inputs,
                ids: place(0, 1),
                logprobs: place(count, 1),
                top_ids: place(2 * count, top),
                top_logprobs: place((2 + top) * count, top),
                count: launch.rows.len(),
                vocabulary,
                top,
            })?;
            first += launch.rows.len();
        }
        let asked = asks.iter().map(|ask| ask.logprobs.map(|top| top.min(vocabulary))).collect();
        self.coming.push_back(Coming { fetched: device.fetch(found, words * WORD)?, top, asked });
        Ok(())
    }

    /// Waits for what was chosen first.
    pub(crate) fn take(&mut self, device: &D) -> Result<Vec<Chosen>, DeviceError> {
        let Some(coming) = self.coming.pop_front() else {
            return Err(DeviceError { doing: "waiting for tokens".to_owned(), message: "none were chosen".to_owned() });
        };
        let bytes = device.fetched(coming.fetched)?;
        let words: Vec<u32> = bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let Coming { top, asked, .. } = coming;
        let (ids, rest) = words.split_at(asked.len());
        let (logprobs, rest) = rest.split_at(asked.len());
        let (top_ids, top_logprobs) = rest.split_at(asked.len() * top);
        let rows = ids.iter().zip(logprobs).zip(&asked).enumerate();
        Ok(rows
            .map(|(row, ((token, logprob), asked))| {
                if *token == NONE {
                    return Err(NotFinite { token: *logprob });
                }
                let best = row * top..row * top + asked.unwrap_or(0);
                let best =
                    top_ids[best.clone()].iter().copied().zip(top_logprobs[best].iter().copied().map(f32::from_bits));
                let logprob = if asked.is_some() { f32::from_bits(*logprob) } else { 0.0 };
                Ok(Scored { token: *token, logprob, top: best.collect() })
            })
            .collect())
    }
}
