//! What the sampler is told of a row, as sampler.cu reads it.
//!
//! Never here: how a token is chosen.

/// Stands for no token, no mask, and no log probabilities.
pub(crate) const NONE: u32 = u32::MAX;

/// A row of the sampler.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SamplerRow {
    pub(crate) seed: u64,
    pub(crate) sample: u32,
    pub(crate) position: u32,
    /// 0 takes the best token.
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    /// 0 considers all.
    pub(crate) top_k: u32,
    pub(crate) repetition: f32,
    pub(crate) frequency: f32,
    pub(crate) presence: f32,
    /// Its part of the entries.
    pub(crate) entries: [u32; 2],
    /// The first word of its mask, or [`NONE`].
    pub(crate) mask: u32,
    /// How many best tokens are told with their log probabilities, or [`NONE`].
    pub(crate) logprobs: u32,
}

impl SamplerRow {
    /// The struct of sampler.cu.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.seed.to_le_bytes().to_vec();
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        bytes.extend([self.sample, self.position].map(u32::to_le_bytes).concat());
        bytes.extend(floats(&[self.temperature, self.top_p, self.min_p]));
        bytes.extend(self.top_k.to_le_bytes());
        bytes.extend(floats(&[self.repetition, self.frequency, self.presence]));
        let [first, end] = self.entries;
        bytes.extend([first, end, self.mask, self.logprobs, 0].map(u32::to_le_bytes).concat());
        bytes
    }
}

/// A token whose logit is changed before a token is chosen; a row has each token once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SamplerEntry {
    pub(crate) token: u32,
    pub(crate) bias: f32,
    /// How often it was generated.
    pub(crate) count: u32,
    /// It stands in the prompt or was generated, where that is penalised.
    pub(crate) repeats: bool,
    /// It may not come.
    pub(crate) forbidden: bool,
}

impl SamplerEntry {
    /// The struct of sampler.cu.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let flags = u32::from(self.repeats) | u32::from(self.forbidden) << 1;
        [self.token, self.bias.to_bits(), self.count, flags].map(u32::to_le_bytes).concat()
    }
}
