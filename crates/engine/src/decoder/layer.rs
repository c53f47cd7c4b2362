//! One layer of the decoder: attention, then the feed-forward part, each added to what went in.
//!
//! Never here: embeddings, logits, a family's name.

use crate::architectures::{Mlp, Norm, Part};
use crate::backend::{Angles, Backend, Batch, Heads, Write};
use crate::config::{Activation, Config};
use crate::decoder::Buffers;
use crate::decoder::experts::Experts;
use crate::error::LoadError;
use crate::linear::{Linear, Stored};
use crate::weights::Weights;

pub(super) struct Layer<B: Backend> {
    attention_norm: NormWeights<B>,
    qkv: Linear<B>,
    /// The norms of queries and keys.
    head_norms: Option<(NormWeights<B>, NormWeights<B>)>,
    attention_out: Linear<B>,
    attention_post_norm: Option<NormWeights<B>>,
    mlp_norm: NormWeights<B>,
    mlp: FeedForward<B>,
    mlp_post_norm: Option<NormWeights<B>>,
    heads: Heads,
    /// Which of the model's rotations it has.
    pub(super) rope: usize,
    /// Weights of the projections of attention.
    attention_weights: usize,
}

enum FeedForward<B: Backend> {
    Dense(DenseMlp<B>),
    Sparse(Experts<B>),
}

/// A feed-forward part of two projections.
pub(super) struct DenseMlp<B: Backend> {
    mlp_in: Linear<B>,
    mlp_out: Linear<B>,
    form: Mlp,
    activation: Activation,
    inner: usize,
    /// How many weights it has.
    pub(super) weights: usize,
}

pub(super) struct NormWeights<B: Backend> {
    weight: B::Buffer,
    bias: Option<B::Buffer>,
    epsilon: f32,
}

/// The heads of a layer.
pub(super) fn heads(config: &Config, layer: usize) -> Heads {
    Heads {
        queries: config.heads,
        keys: config.kv_heads,
        width: config.head_dim,
        scale: config.score_scale(layer),
        cap: config.score_cap,
        window: config.windows.tokens(layer),
    }
}

impl<B: Backend> Layer<B> {
    pub(super) fn load(
        backend: &B,
        weights: &mut Weights,
        config: &Config,
        (prefix, index): (&str, usize),
    ) -> Result<Self, LoadError> {
        let row = config.architecture;
        let prefix = format!("{prefix}{}.{index}.", row.layer);
        let heads = heads(config, index);
        let (queries, keys) = (heads.queries * heads.width, heads.keys * heads.width);
        let hidden = config.hidden;
        let qkv = stored(config, &prefix, &row.qkv);
        let qkv = Linear::load(backend, weights, qkv, hidden, &[queries, keys, keys])?;
        let attention_out = stored(config, &prefix, &row.attention_out);
        let attention_out = Linear::load(backend, weights, attention_out, queries, &[hidden])?;
        let mlp = FeedForward::load(backend, weights, config, (&prefix, index))?;
        let mut norm = |name, width| NormWeights::load(backend, weights, config, (&format!("{prefix}{name}"), width));
        let head_norms = match row.head_norms {
            Some([queries, keys]) => Some((norm(queries, heads.width)?, norm(keys, heads.width)?)),
            None => None,
        };
        Ok(Self {
            attention_norm: norm(row.attention_norm, hidden)?,
            qkv,
            head_norms,
            attention_out,
            attention_post_norm: row.attention_post_norm.map(|name| norm(name, hidden)).transpose()?,
            mlp_norm: norm(row.mlp_norm, hidden)?,
            mlp,
            mlp_post_norm: row.mlp_post_norm.map(|name| norm(name, hidden)).transpose()?,
            heads,
            rope: config.rope(index),
            attention_weights: hidden * (heads.qkv_width() + queries),
        })
    }

    /// Multiply-adds of the products of one row.
    pub(super) fn work(&self) -> usize {
        self.attention_weights
            + match &self.mlp {
                FeedForward::Dense(mlp) => mlp.weights,
                FeedForward::Sparse(experts) => experts.work(),
            }
    }

    pub(super) fn weights(&self) -> usize {
        self.attention_weights
            + match &self.mlp {
                FeedForward::Dense(mlp) => mlp.weights,
                FeedForward::Sparse(experts) => experts.weights(),
            }
    }

    pub(super) fn attention(
        &self,
        backend: &B,
        (batch, index): (&Batch, usize),
        angles: Option<&Angles<B::Buffer>>,
        room: &mut Buffers<B>,
    ) {
        let (rows, heads) = (batch.rows(), &self.heads);
        self.attention_norm.forward(backend, (&room.hidden, rows), &mut room.normed, Write::Set);
        self.qkv.forward(backend, (&room.normed, rows), &mut room.qkv, Write::Set);
        let norms = self.head_norms.as_ref().map(|(queries, keys)| (&queries.weight, &keys.weight, queries.epsilon));
        backend.norm_rotate_store((&mut room.cache, index), &mut room.qkv, (batch, heads), norms, angles);
        backend.attend((&room.cache, index), &room.qkv, (batch, heads), &mut room.attended);
        let x = (&room.attended, rows);
        match &self.attention_post_norm {
            None => self.attention_out.forward(backend, x, &mut room.hidden, Write::Add),
            Some(norm) => {
                self.attention_out.forward(backend, x, &mut room.added, Write::Set);
                norm.forward(backend, (&room.added, rows), &mut room.hidden, Write::Add);
            }
        }
    }

    pub(super) fn feed_forward(&self, backend: &B, rows: usize, room: &mut Buffers<B>) {
        self.mlp_norm.forward(backend, (&room.hidden, rows), &mut room.normed, Write::Set);
        let mlp = match &self.mlp {
            FeedForward::Dense(mlp) => mlp,
            FeedForward::Sparse(experts) => return experts.forward(backend, rows, room),
        };
        let Buffers { hidden, normed, mlp_in, inner, added, .. } = room;
        let between = (mlp_in, inner);
        match &self.mlp_post_norm {
            None => mlp.forward(backend, (normed, rows), between, (hidden, Write::Add)),
            Some(norm) => {
                mlp.forward(backend, (normed, rows), between, (added, Write::Set));
                norm.forward(backend, (added, rows), hidden, Write::Add);
            }
        }
    }
}

impl<B: Backend> FeedForward<B> {
    fn load(
        backend: &B,
        weights: &mut Weights,
        config: &Config,
        (prefix, index): (&str, usize),
    ) -> Result<Self, LoadError> {
        let row = config.architecture;
        match (config.experts(index), &row.experts) {
            (Some(shape), Some(experts)) => {
                Experts::load(backend, weights, config, (prefix, experts, shape)).map(Self::Sparse)
            }
            _ => {
                let parts = (&row.mlp_in, &row.mlp_out, config.inner);
                DenseMlp::load(backend, weights, config, (prefix, parts)).map(Self::Dense)
            }
        }
    }
}

/// Where a projection of a layer or an expert lies.
pub(super) fn stored<'a>(config: &Config, prefix: &'a str, part: &'a Part) -> Stored<'a> {
    Stored { prefix, names: part.names, bias: config.has_bias(part), orientation: config.architecture.orientation }
}

impl<B: Backend> DenseMlp<B> {
    pub(super) fn load(
        backend: &B,
        weights: &mut Weights,
        config: &Config,
        (prefix, (mlp_in, mlp_out, inner)): (&str, (&Part, &Part, usize)),
    ) -> Result<Self, LoadError> {
        let hidden = config.hidden;
        let widths = config.mlp_in(inner);
        let count = hidden * (widths.iter().sum::<usize>() + inner);
        let (mlp_in, mlp_out) = (stored(config, prefix, mlp_in), stored(config, prefix, mlp_out));
        Ok(Self {
            mlp_in: Linear::load(backend, weights, mlp_in, hidden, &widths)?,
            mlp_out: Linear::load(backend, weights, mlp_out, inner, &[hidden])?,
            form: config.architecture.mlp,
            activation: config.activation,
            inner,
            weights: count,
        })
    }

    /// From `x` to `out`, by way of two buffers.
    pub(super) fn forward(
        &self,
        backend: &B,
        (x, rows): (&B::Buffer, usize),
        (mlp_in, inner): (&mut B::Buffer, &mut B::Buffer),
        (out, write): (&mut B::Buffer, Write),
    ) {
        self.mlp_in.forward(backend, (x, rows), mlp_in, Write::Set);
        match self.form {
            Mlp::Gated => backend.activate_gated(self.activation, (mlp_in, rows), self.inner, inner),
            Mlp::Plain => backend.activate(self.activation, (mlp_in, rows), self.inner, inner),
        }
        self.mlp_out.forward(backend, (inner, rows), out, write);
    }
}

impl<B: Backend> NormWeights<B> {
    pub(super) fn load(
        backend: &B,
        weights: &mut Weights,
        config: &Config,
        (name, width): (&str, usize),
    ) -> Result<Self, LoadError> {
        let mut vector = |kind| weights.vector(&format!("{name}.{kind}"), &[width]);
        let mut weight = vector("weight")?;
        let bias = match config.architecture.norm {
            Norm::Rms => None,
            Norm::RmsPlusOne => {
                weight.iter_mut().for_each(|weight| *weight += 1.0);
                None
            }
            Norm::Layer => Some(backend.upload(vector("bias")?)),
        };
        Ok(Self { weight: backend.upload(weight), bias, epsilon: config.norm_epsilon })
    }

    pub(super) fn forward(&self, backend: &B, x: (&B::Buffer, usize), out: &mut B::Buffer, write: Write) {
        match &self.bias {
            None => backend.rms_norm(x, (&self.weight, self.epsilon), out, write),
            Some(bias) => backend.layer_norm(x, (&self.weight, bias, self.epsilon), out, write),
        }
    }
}
