//! The one decoder: what every family does, with their differences read from data.
//!
//! Never here: a family's name, a kernel, a request. A step computes rows of any sequences, each
//! at any position, and writes their keys and values; which rows those are is the schedule's
//! business.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use rayon::ThreadPool;

use crate::architectures::{Mlp, Norm, Part, Position};
use crate::backend::{Backend, Batch, Heads, Write};
use crate::config::{Config, Rope};
use crate::error::LoadError;
use crate::kv::BLOCK_TOKENS;
use crate::linear::Linear;
use crate::weights::Weights;

/// What the engine runs: something that turns a batch into logits.
pub(crate) trait Forward: Send {
    /// Makes room for steps of that size; called once, before the first step.
    fn reserve(&mut self, room: Room);

    /// Computes a step. Returns the logits of the rows in `batch.outputs`, in their order, each
    /// `vocabulary` values.
    fn forward(&mut self, batch: &Batch) -> &[f32];

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
    /// Cosines and sines of every position.
    angles: Option<B::Buffer>,
    lanes: Vec<Buffers<B>>,
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

struct Layer<B: Backend> {
    attention_norm: NormWeights<B>,
    qkv: Linear<B>,
    attention_out: Linear<B>,
    mlp_norm: NormWeights<B>,
    mlp_in: Linear<B>,
    mlp_out: Linear<B>,
    heads: Heads,
}

struct NormWeights<B: Backend> {
    weight: B::Buffer,
    bias: Option<B::Buffer>,
    epsilon: f32,
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
    logits: B::Buffer,
}

impl<B: Backend> Decoder<B> {
    /// Loads all weights that the architecture names.
    pub(crate) fn load(backend: B, config: Config, weights: &mut Weights) -> Result<Self, LoadError> {
        let body = Body::load(&backend, config, weights)?;
        Ok(Self { backend, body, angles: None, lanes: Vec::new() })
    }

    pub(crate) fn backend(&self) -> &B {
        &self.backend
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
        self.angles = angles(backend, config, room);
        let lanes = backend.lanes(self.body.work(1)).min(room.outputs);
        self.lanes = (0..lanes).map(|_| Buffers::new(backend, config, room)).collect();
    }

    fn forget(&mut self, blocks: &[u32]) {
        for lane in &mut self.lanes {
            self.backend.drop_blocks(&mut lane.cache, blocks);
        }
    }

    fn forward(&mut self, batch: &Batch) -> &[f32] {
        self.gather(0, batch);
        let Some(room) = self.lanes.first_mut() else { return &[] };
        self.body.step(&self.backend, (batch, self.angles.as_ref()), room)
    }

    fn vocabulary(&self) -> usize {
        self.body.config.vocabulary
    }

    fn pool(&self) -> Option<Arc<ThreadPool>> {
        self.backend.pool()
    }

    fn lanes(&self, rows: usize) -> usize {
        (self.body.work(rows) / LANE_WORK).min(self.lanes.len()).max(1)
    }

    fn encore(&self, sequences: usize) -> Encore {
        // Alone, or without lanes, there is nothing to gain.
        if self.lanes.len() < 2 || sequences < 2 {
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
        let (backend, body, angles) = (&self.backend, &self.body, self.angles.as_ref());
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
            Position::Rope => None,
            Position::Learned(name) => {
                let name = format!("{prefix}{name}");
                Some(Linear::table(backend, weights, &name, config.context, hidden)?)
            }
        };
        let layers = (0..config.layers)
            .map(|index| Layer::load(backend, weights, &config, (prefix, index)))
            .collect::<Result<_, _>>()?;
        let name = format!("{prefix}{}", architecture.final_norm);
        let final_norm = NormWeights::load(backend, weights, &config, &name)?;
        Ok(Self { config, embedding, positions, layers, final_norm, head })
    }

    /// Multiply-adds of the products of so many rows; those of one row are also the weights.
    fn work(&self, rows: usize) -> usize {
        let config = &self.config;
        let widths = config.qkv_width() + config.hidden + config.mlp_in_width() + config.inner;
        rows * config.hidden * (config.layers * widths + config.vocabulary)
    }

    /// One step: from tokens to the logits of the chosen rows.
    fn step<'a>(
        &self,
        backend: &'a B,
        (batch, angles): (&Batch, Option<&B::Buffer>),
        room: &'a mut Buffers<B>,
    ) -> &'a [f32] {
        self.embedding.embed(backend, &batch.ids, &mut room.hidden, Write::Set);
        if let Some(positions) = &self.positions {
            positions.embed(backend, &batch.positions, &mut room.hidden, Write::Add);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            layer.attention(backend, (batch, index), angles, room);
            layer.feed_forward(backend, &self.config, batch.rows(), room);
        }
        let count = batch.outputs.len();
        backend.pick(&room.hidden, &batch.outputs, self.config.hidden, &mut room.attended);
        self.final_norm.forward(backend, (&room.attended, count), &mut room.normed);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        head.forward(backend, (&room.normed, count), &mut room.logits, Write::Set);
        backend.read(&room.logits, count * self.config.vocabulary)
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        backend: &B,
        weights: &mut Weights,
        config: &Config,
        (prefix, index): (&str, usize),
    ) -> Result<Self, LoadError> {
        let row = config.architecture;
        let prefix = format!("{prefix}{}.{index}.", row.layer);
        let heads = heads(config, index);
        let (queries, keys) = (heads.queries * heads.width, heads.keys * heads.width);
        let (hidden, inner) = (config.hidden, config.inner);
        let gate_and_up = [inner; 2];
        let mlp_in = &gate_and_up[..if row.mlp == Mlp::Gated { 2 } else { 1 }];
        let mut linear = |part: &Part, inputs: usize, outputs: &[usize]| {
            Linear::load(backend, weights, (&prefix, part, row.orientation), inputs, outputs)
        };
        let qkv = linear(&row.qkv, hidden, &[queries, keys, keys])?;
        let attention_out = linear(&row.attention_out, queries, &[hidden])?;
        let mlp_in = linear(&row.mlp_in, hidden, mlp_in)?;
        let mlp_out = linear(&row.mlp_out, inner, &[hidden])?;
        let mut norm = |name| NormWeights::load(backend, weights, config, &format!("{prefix}{name}"));
        let (attention_norm, mlp_norm) = (norm(row.attention_norm)?, norm(row.mlp_norm)?);
        Ok(Self { attention_norm, qkv, attention_out, mlp_norm, mlp_in, mlp_out, heads })
    }

    fn attention(
        &self,
        backend: &B,
        (batch, index): (&Batch, usize),
        angles: Option<&B::Buffer>,
        room: &mut Buffers<B>,
    ) {
        let (rows, heads) = (batch.rows(), &self.heads);
        self.attention_norm.forward(backend, (&room.hidden, rows), &mut room.normed);
        self.qkv.forward(backend, (&room.normed, rows), &mut room.qkv, Write::Set);
        if let Some(angles) = angles {
            backend.rotate(&mut room.qkv, batch, heads, angles);
        }
        backend.store(&mut room.cache, index, &room.qkv, (batch, heads));
        backend.attend((&room.cache, index), &room.qkv, (batch, heads), &mut room.attended);
        self.attention_out.forward(backend, (&room.attended, rows), &mut room.hidden, Write::Add);
    }

    fn feed_forward(&self, backend: &B, config: &Config, rows: usize, room: &mut Buffers<B>) {
        self.mlp_norm.forward(backend, (&room.hidden, rows), &mut room.normed);
        self.mlp_in.forward(backend, (&room.normed, rows), &mut room.mlp_in, Write::Set);
        let (x, inner) = ((&room.mlp_in, rows), &mut room.inner);
        match config.architecture.mlp {
            Mlp::Gated => backend.activate_gated(config.activation, x, config.inner, inner),
            Mlp::Plain => backend.activate(config.activation, x, config.inner, inner),
        }
        self.mlp_out.forward(backend, (&room.inner, rows), &mut room.hidden, Write::Add);
    }
}

impl<B: Backend> NormWeights<B> {
    fn load(backend: &B, weights: &mut Weights, config: &Config, name: &str) -> Result<Self, LoadError> {
        let mut vector = |kind| {
            let values = weights.vector(&format!("{name}.{kind}"), &[config.hidden])?;
            Ok::<_, LoadError>(backend.upload(values))
        };
        let weight = vector("weight")?;
        let bias = match config.architecture.norm {
            Norm::Rms => None,
            Norm::Layer => Some(vector("bias")?),
        };
        Ok(Self { weight, bias, epsilon: config.norm_epsilon })
    }

    fn forward(&self, backend: &B, x: (&B::Buffer, usize), out: &mut B::Buffer) {
        match &self.bias {
            None => backend.rms_norm(x, &self.weight, self.epsilon, out),
            Some(bias) => backend.layer_norm(x, (&self.weight, bias), self.epsilon, out),
        }
    }
}

impl<B: Backend> Buffers<B> {
    fn new(backend: &B, config: &Config, room: Room) -> Self {
        let heads = heads(config, 0);
        let rows = room.rows;
        Self {
            cache: backend.cache(config.layers, room.blocks, &heads),
            hidden: backend.zeros(rows * config.hidden),
            normed: backend.zeros(rows * config.hidden),
            qkv: backend.zeros(rows * config.qkv_width()),
            // Also holds the last hidden rows, picked for the logits.
            attended: backend.zeros(rows * config.hidden.max(heads.queries * heads.width)),
            mlp_in: backend.zeros(rows * config.mlp_in_width()),
            inner: backend.zeros(rows * config.inner),
            logits: backend.zeros(room.outputs * config.vocabulary),
        }
    }
}

fn angles<B: Backend>(backend: &B, config: &Config, room: Room) -> Option<B::Buffer> {
    let positions = config.context.min(room.blocks * BLOCK_TOKENS);
    config.rope.map(|rope| backend.upload(angle_table(rope, config.head_dim, positions)))
}

fn heads(config: &Config, layer: usize) -> Heads {
    Heads { queries: config.heads, keys: config.kv_heads, width: config.head_dim, scale: config.score_scale(layer) }
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
        let head = "lm_head.weight".to_owned();
        match (config.tied, weights.has(&embedding), weights.has(&head)) {
            (true, false, true) => Self { embedding: head, head: None },
            (true, _, false) => Self { embedding, head: None },
            _ => Self { embedding, head: Some(head) },
        }
    }
}

/// For each position the cosines, then the sines, of the angles by which pairs are rotated:
/// position / theta^(2i / width). As transformers does, frequencies and angles are rounded to
/// float32. The functions are libm's own, so that the table is the same on every system.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "positions and widths are exact in float64, and the table is float32"
)]
fn angle_table(rope: Rope, width: usize, positions: usize) -> Vec<f32> {
    let frequencies: Vec<f32> = (0..width / 2)
        .map(|pair| libm::pow(rope.theta, -2.0 * pair as f64 / width as f64) / rope.factor)
        .map(|frequency| frequency as f32)
        .collect();
    let mut table = Vec::with_capacity(positions * width);
    for position in 0..positions {
        let angles = frequencies.iter().map(|frequency| f64::from(position as f32 * frequency));
        table.extend(angles.clone().map(|angle| libm::cos(angle) as f32));
        table.extend(angles.map(|angle| libm::sin(angle) as f32));
    }
    table
}
