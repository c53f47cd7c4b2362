//! The one decoder: what every family does, with their differences read from data.
//!
//! Never here: a family's name, a kernel, a request. A step computes rows of any sequences, each
//! at any position, and writes their keys and values; which rows those are is the schedule's
//! business.

mod experts;
mod layer;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;
use std::time::Duration;

use rayon::ThreadPool;

use crate::architectures::Position;
use crate::ask::{Ask, Chosen};
use crate::backend::{Angles, Backend, Batch, Largest, Write};
use crate::config::Config;
use crate::decoder::layer::{Layer, NormWeights, heads};
use crate::error::LoadError;
use crate::linear::Linear;
use crate::measure::Cost;
use crate::rope::Rope;
use crate::weights::Weights;

/// What the engine runs: something that turns a batch into logits.
pub(crate) trait Forward: Send {
    /// Makes room for steps of that size; called once, before the first step.
    fn reserve(&mut self, room: Room);

    /// Computes a step. Returns the logits of the rows in `batch.outputs`, in their order, each
    /// `vocabulary` values.
    fn forward(&mut self, batch: &Batch) -> &[f32];

    /// Whether tokens are chosen where the logits are: then a step is [`Self::start`], [`Self::choose`] and, any time
    /// later, [`Self::chosen`], and not [`Self::forward`].
    fn chooses(&self) -> bool {
        false
    }

    /// Begins a step up to its logits. It may be filled up with rows of no sequence.
    fn start(&mut self, batch: &mut Batch) {
        let _ = batch;
    }

    /// Begins to choose, with an ask for each of the step's outputs.
    fn choose(&mut self, asks: &[Ask]) {
        let _ = asks;
    }

    /// Waits for what the first of the steps chose whose tokens were not asked for yet. None when the device has failed.
    fn chosen(&mut self) -> Option<Vec<Chosen>> {
        None
    }

    /// Bytes that are free for a cache, where the device has a memory of its own.
    fn free_bytes(&self) -> Option<u64> {
        None
    }

    /// What the model costs to run.
    fn cost(&self) -> Cost {
        Cost::default()
    }

    /// The time of the last step by the device's own clock, where that is not the time that passed.
    fn device_time(&mut self) -> Option<Duration> {
        None
    }

    /// What the device could not do, once it could not do something: nothing that it gives is to be used any more.
    fn fault(&self) -> Option<String> {
        None
    }

    /// Forgets all copies of these blocks.
    fn forget(&mut self, blocks: &[u32]) {
        let _ = blocks;
    }

    /// Logits per row.
    fn vocabulary(&self) -> usize;

    /// The threads that steps should run on, where there are some.
    fn pool(&self) -> Option<Arc<ThreadPool>> {
        None
    }

    /// A length in tokens: a sequence that grows beyond it is computed again from its beginning.
    fn restarts_after(&self) -> Option<usize> {
        None
    }

    /// Into how many lanes a step of so many rows is best divided.
    fn lanes(&self, rows: usize) -> usize {
        let _ = rows;
        1
    }

    /// How a lane of so many sequences may go on by itself after a step.
    fn encore(&self, sequences: usize) -> Encore {
        let _ = sequences;
        Encore::default()
    }

    /// Computes the lanes of a step side by side, each on one thread with what follows its logits.
    fn forward_lanes(&mut self, lanes: Vec<Lane<'_>>) {
        for Lane { batch, mut finish } in lanes {
            while finish(self.forward(batch), batch) == Next::Again {}
        }
    }
}

/// A part of a step that shares no sequence with the others.
pub(crate) struct Lane<'a> {
    /// Its rows.
    pub(crate) batch: &'a mut Batch,
    /// What happens with its logits.
    pub(crate) finish: Finish<'a>,
}

/// Takes a lane's logits, and may fill its batch again: with rows of the same sequences only.
pub(crate) type Finish<'a> = Box<dyn FnMut(&[f32], &mut Batch) -> Next + Send + 'a>;

/// What a lane does after its logits were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It computes its batch, which was filled again.
    Again,
    /// It is done.
    Done,
}

/// Further turns that a lane may take by itself when nobody waits for the end of the step: a few of its sequences at a
/// time, whose keys and values then stay in the cache of their core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Encore {
    /// Sequences at a time.
    pub(crate) sequences: usize,
    /// Turns of each.
    pub(crate) turns: usize,
}

/// The largest step and the size of the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Rows per step.
    pub(crate) rows: usize,
    /// Rows per step whose logits are wanted.
    pub(crate) outputs: usize,
    /// Blocks in the cache.
    pub(crate) blocks: usize,
    /// Tokens of the longest sequence, unless the model can do fewer.
    pub(crate) tokens: usize,
}

/// A lane of fewer multiply-adds costs more to hand over than it saves.
const LANE_WORK: usize = 1 << 19;

/// Multiply-adds of all that a lane does in one go: about a millisecond.
const ENCORE_WORK: usize = 1 << 25;

/// Values of keys and values that a core's own cache holds beside the weights: half of a usual second-level cache.
const ENCORE_VALUES: usize = 1 << 18;

/// The tokens of a sequence that are expected when its keys and values are counted.
const ENCORE_TOKENS: usize = 256;

/// Fewer rows at a time do not pay for the way through the weights.
const ENCORE_SEQUENCES_MIN: usize = 4;

/// A decoder on a backend.
pub(crate) struct Decoder<B: Backend> {
    backend: B,
    body: Body<B>,
    cost: Cost,
    /// The angles of each of the model's rotations.
    angles: Vec<Angles<B::Buffer>>,
    lanes: Vec<Buffers<B>>,
    /// A block behind those of sequences, and how many sequences may run.
    spare_block: u32,
    outputs: usize,
}

/// The weights and what is known of them.
struct Body<B: Backend> {
    config: Config,
    embedding: Linear<B>,
    /// Learned positions.
    positions: Option<Linear<B>>,
    layers: Vec<Layer<B>>,
    final_norm: NormWeights<B>,
    /// The projection to logits, where it is not the embedding.
    head: Option<Linear<B>>,
}

/// The buffers of a lane, made once.
struct Buffers<B: Backend> {
    /// The keys and values of the sequences that this lane computed last.
    cache: B::Cache,
    hidden: B::Buffer,
    normed: B::Buffer,
    qkv: B::Buffer,
    attended: B::Buffer,
    mlp_in: B::Buffer,
    inner: B::Buffer,
    /// What a part adds, before its norm or its weight.
    added: B::Buffer,
    /// A score for each expert.
    routing: B::Buffer,
    logits: B::Buffer,
}

impl<B: Backend> Decoder<B> {
    /// Loads all weights that the architecture names.
    pub(crate) fn load(backend: B, config: Config, weights: &mut Weights) -> Result<Self, LoadError> {
        let body = Body::load(&backend, config, weights)?;
        if let Some(message) = backend.fault() {
            return Err(LoadError::Device { message });
        }
        let cost = Cost::of(&body.config, backend.widths(weights.bytes()));
        Ok(Self { backend, body, cost, angles: Vec::new(), lanes: Vec::new(), spare_block: 0, outputs: 0 })
    }

    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    /// Adds rows of no sequence to a step of decode, which write to a block that nobody reads, up to a number of which there
    /// are few.
    fn fill_up(&self, batch: &mut Batch) {
        let each_is_alone =
            batch.outputs.len() == batch.rows() && batch.row_tables.iter().is_sorted_by(|a, b| a.end <= b.start);
        let rows = if each_is_alone { self.backend.rows_of(batch.rows(), self.outputs) } else { None };
        for _ in batch.rows()..rows.unwrap_or(0) {
            batch.push(&[0], 0, 1, &[self.spare_block]);
            batch.share(|_| false);
            batch.want_logits();
        }
    }

    /// Brings the blocks of a batch to its lane.
    fn gather(&mut self, lane: usize, batch: &Batch) {
        let (before, rest) = self.lanes.split_at_mut(lane);
        let Some((to, after)) = rest.split_first_mut() else { return };
        for from in before.iter_mut().chain(after) {
            self.backend.move_blocks(&mut from.cache, &mut to.cache, batch);
        }
    }
}

impl<B: Backend> Forward for Decoder<B> {
    fn reserve(&mut self, room: Room) {
        let (backend, config) = (&self.backend, &self.body.config);
        // What there was goes first, so that both need not fit at once.
        self.lanes.clear();
        self.angles = angles(backend, config, room);
        let Room { rows, outputs, tokens, .. } = room;
        let context = config.context.min(tokens);
        backend.reserve(&Largest { rows, outputs, context, vocabulary: config.vocabulary, heads: heads(config, 0) });
        (self.spare_block, self.outputs) = (u32::try_from(room.blocks).unwrap_or(u32::MAX), outputs);
        let lanes = backend.lanes(self.body.weights()).min(room.outputs);
        self.lanes = (0..lanes).map(|_| Buffers::new(backend, config, room)).collect();
    }

    fn cost(&self) -> Cost {
        self.cost
    }

    fn fault(&self) -> Option<String> {
        self.backend.fault()
    }

    fn forget(&mut self, blocks: &[u32]) {
        for lane in &mut self.lanes {
            self.backend.drop_blocks(&mut lane.cache, blocks);
        }
    }

    fn forward(&mut self, batch: &Batch) -> &[f32] {
        self.gather(0, batch);
        let Some(room) = self.lanes.first_mut() else { return &[] };
        self.body.step(&self.backend, (batch, &self.angles), room)
    }

    fn chooses(&self) -> bool {
        self.backend.chooses()
    }

    fn start(&mut self, batch: &mut Batch) {
        self.gather(0, batch);
        self.fill_up(batch);
        if let Some(room) = self.lanes.first_mut() {
            self.body.compute(&self.backend, (batch, &self.angles), room);
        }
    }

    fn choose(&mut self, asks: &[Ask]) {
        if let Some(room) = self.lanes.first() {
            self.backend.choose((&room.logits, self.body.config.vocabulary), asks);
        }
    }

    fn chosen(&mut self) -> Option<Vec<Chosen>> {
        self.backend.chosen()
    }

    fn free_bytes(&self) -> Option<u64> {
        self.backend.free_bytes()
    }

    fn vocabulary(&self) -> usize {
        self.body.config.vocabulary
    }

    fn pool(&self) -> Option<Arc<ThreadPool>> {
        self.backend.pool()
    }

    fn restarts_after(&self) -> Option<usize> {
        self.body.config.ropes.iter().find_map(Rope::switches_after)
    }

    fn lanes(&self, rows: usize) -> usize {
        (self.body.work(rows) / LANE_WORK).min(self.lanes.len()).max(1)
    }

    fn encore(&self, sequences: usize) -> Encore {
        // Alone, or without lanes, there is nothing to gain. A sequence that begins anew must come
        // back to the schedule first.
        if self.lanes.len() < 2 || sequences < 2 || self.restarts_after().is_some() {
            return Encore::default();
        }
        let config = &self.body.config;
        let values = 2 * config.layers * config.kv_heads * config.head_dim * ENCORE_TOKENS;
        Encore {
            sequences: (ENCORE_VALUES / values).max(ENCORE_SEQUENCES_MIN),
            turns: (ENCORE_WORK / self.body.work(sequences)).saturating_sub(1),
        }
    }

    fn forward_lanes(&mut self, lanes: Vec<Lane<'_>>) {
        for (index, lane) in lanes.iter().enumerate() {
            self.gather(index, lane.batch);
        }
        let (backend, body, angles) = (&self.backend, &self.body, self.angles.as_slice());
        let parts = lanes.into_iter().zip(&mut self.lanes).collect();
        backend.side_by_side(
            parts,
            |(Lane { batch, mut finish }, room): (Lane<'_>, &mut Buffers<B>)| {
                while finish(body.step(backend, (batch, angles), room), batch) == Next::Again {}
            },
        );
    }
}

impl<B: Backend> Body<B> {
    fn load(backend: &B, config: Config, weights: &mut Weights) -> Result<Self, LoadError> {
        let architecture = config.architecture;
        let prefix = prefix(&config, weights);
        let (vocabulary, hidden) = (config.vocabulary, config.hidden);
        let tables = Tables::choose(&config, weights, prefix);
        let embedding = Linear::table(backend, weights, &tables.embedding, vocabulary, hidden)?;
        let head = tables.head.map(|name| Linear::table(backend, weights, &name, vocabulary, hidden)).transpose()?;
        let positions = match architecture.position {
            Position::Rope(_) => None,
            Position::Learned(name) => {
                let name = format!("{prefix}{name}");
                // Nothing is multiplied with it, so nothing is gained by another format.
                Some(weights.exactly(|weights| Linear::table(backend, weights, &name, config.context, hidden))?)
            }
        };
        let layers = (0..config.layers)
            .map(|index| Layer::load(backend, weights, &config, (prefix, index)))
            .collect::<Result<_, _>>()?;
        let name = format!("{prefix}{}", architecture.final_norm);
        let final_norm = NormWeights::load(backend, weights, &config, (&name, hidden))?;
        Ok(Self { config, embedding, positions, layers, final_norm, head })
    }

    /// Multiply-adds of the products of so many rows.
    fn work(&self, rows: usize) -> usize {
        let layers: usize = self.layers.iter().map(Layer::work).sum();
        rows * (layers + self.config.hidden * self.config.vocabulary)
    }

    /// How many weights there are; a row needs all of them but those of the experts that it does
    /// not use.
    fn weights(&self) -> usize {
        let layers: usize = self.layers.iter().map(Layer::weights).sum();
        layers + self.config.hidden * self.config.vocabulary
    }

    /// One step: from tokens to the logits of the chosen rows.
    fn step<'a>(&self, backend: &'a B, rows: (&Batch, &[Angles<B::Buffer>]), room: &'a mut Buffers<B>) -> &'a [f32] {
        let length = self.compute(backend, rows, room);
        backend.read(&mut room.logits, length)
    }

    /// The same without reading them; how many there are.
    fn compute(&self, backend: &B, (batch, angles): (&Batch, &[Angles<B::Buffer>]), room: &mut Buffers<B>) -> usize {
        backend.begin(batch);
        backend.repeat(batch, &mut || self.kernels(backend, (batch, angles), room));
        batch.outputs.len() * self.config.vocabulary
    }

    fn kernels(&self, backend: &B, (batch, angles): (&Batch, &[Angles<B::Buffer>]), room: &mut Buffers<B>) {
        self.embedding.embed(backend, &batch.ids, &mut room.hidden, Write::Set);
        if let Some(positions) = &self.positions {
            positions.embed(backend, &batch.positions, &mut room.hidden, Write::Add);
        }
        if let Some(factor) = self.config.embedding_scale {
            backend.scale(&mut room.hidden, batch.rows() * self.config.hidden, factor);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            layer.attention(backend, (batch, index), angles.get(layer.rope), room);
            layer.feed_forward(backend, batch.rows(), room);
        }
        let count = batch.outputs.len();
        backend.pick(&room.hidden, &batch.outputs, self.config.hidden, &mut room.attended);
        self.final_norm.forward(backend, (&room.attended, count), &mut room.normed, Write::Set);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        head.forward(backend, (&room.normed, count), &mut room.logits, Write::Set);
        if let Some(cap) = self.config.logit_cap {
            backend.cap(&mut room.logits, count * self.config.vocabulary, cap);
        }
    }
}

impl<B: Backend> Buffers<B> {
    fn new(backend: &B, config: &Config, room: Room) -> Self {
        let heads = heads(config, 0);
        let rows = room.rows;
        let spare = usize::from(backend.rows_of(1, 1).is_some());
        let experts = config.experts.as_ref();
        let inner = config.widest_inner();
        let zeros = |width: usize| backend.zeros(rows * width);
        Self {
            cache: backend.cache(config.layers, room.blocks + spare, &heads),
            hidden: zeros(config.hidden),
            normed: zeros(config.hidden),
            qkv: zeros(config.qkv_width()),
            // Also holds the rows picked for logits and for experts.
            attended: zeros(config.hidden.max(heads.queries * heads.width)),
            mlp_in: zeros(config.mlp_in(inner).iter().sum()),
            inner: zeros(inner),
            added: zeros(config.hidden),
            routing: backend.readable(rows * experts.map_or(0, |experts| experts.count)),
            logits: backend.readable(room.outputs * config.vocabulary),
        }
    }
}

fn angles<B: Backend>(backend: &B, config: &Config, room: Room) -> Vec<Angles<B::Buffer>> {
    let positions = config.context.min(room.tokens);
    let angles = config.ropes.iter().map(|rope| Angles {
        table: backend.upload(rope.table(positions)),
        width: rope.width,
        switch: rope.switches_after().map(|longest| (positions, longest)),
    });
    angles.collect()
}

/// The prefix under which this checkpoint has its weights. When none fits, the first, so that the
/// error names the tensor as it is usually called.
fn prefix(config: &Config, weights: &Weights) -> &'static str {
    let row = config.architecture;
    let has = |name: &str| row.prefixes.iter().find(|p| weights.has(&format!("{p}{name}")));
    has(row.embedding).or_else(|| has(&format!("{}.weight", row.final_norm))).unwrap_or(&row.prefixes[0])
}

/// Which tensors are the embedding and the projection to logits.
struct Tables {
    embedding: String,
    /// None when it is the embedding.
    head: Option<String>,
}

impl Tables {
    /// As transformers 5 ties weights: what is in the file counts. A tied model whose file has
    /// both uses both (equal ones give the same logits), one whose file lacks the embedding uses
    /// the projection for it.
    fn choose(config: &Config, weights: &Weights, prefix: &str) -> Self {
        let embedding = format!("{prefix}{}", config.architecture.embedding);
        let heads = config.architecture.heads;
        let head = heads.iter().find(|name| weights.has(name)).unwrap_or(&heads[0]).to_string();
        match (config.tied, weights.has(&embedding), weights.has(&head)) {
            (true, false, true) => Self { embedding: head, head: None },
            (true, _, false) => Self { embedding, head: None },
            _ => Self { embedding, head: Some(head) },
        }
    }
}
