//! Where a model of the configuration runs.
//!
//! Never here: loading.

use anyhow::Context as _;
use genmill_daemon::memory::available_bytes;
use genmill_engine::sim;

/// A place with memory of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Device {
    /// This machine's processor.
    Cpu,
    /// The GPU of that number, as `CUDA_VISIBLE_DEVICES` counts them.
    Cuda(usize),
    /// One that is made up.
    Simulated(sim::Device),
}

impl Device {
    /// Reads `cuda`, which is the first GPU, `cuda:1` and so on, or `simulated:GPU`; nothing is the processor.
    pub(crate) fn parse(text: Option<&str>) -> anyhow::Result<Self> {
        let Some(text) = text else { return Ok(Self::Cpu) };
        let Some(rest) = text.strip_prefix("cuda") else { return Ok(Self::Simulated(sim::Device::parse(text)?)) };
        let number = if rest.is_empty() { Some(0) } else { rest.strip_prefix(':').and_then(|rest| rest.parse().ok()) };
        number.map(Self::Cuda).with_context(|| format!("device `{text}` is neither `cuda` nor `cuda:NUMBER`"))
    }

    /// Bytes of its memory that can be had now, where it tells.
    pub(crate) fn available_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu => available_bytes(),
            Self::Cuda(number) => free_bytes_of_gpu(*number),
            Self::Simulated(_) => None,
        }
    }

    /// Whether models on both share memory.
    pub(crate) fn is_shared_with(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Simulated(one), Self::Simulated(other)) => one.is_shared_with(other),
            _ => self == other,
        }
    }
}

#[cfg(feature = "cuda")]
fn free_bytes_of_gpu(number: usize) -> Option<u64> {
    let free = genmill_engine::gpu::free_bytes(number);
    // Whoever loads a model there is told the same, and tells it.
    free.inspect_err(|error| tracing::warn!(number, %error, "cannot ask a GPU for its memory")).ok()
}

#[cfg(not(feature = "cuda"))]
fn free_bytes_of_gpu(_: usize) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        let read = |text| Device::parse(Some(text));
        assert_eq!(Device::parse(None).unwrap(), Device::Cpu);
        assert_eq!((read("cuda").unwrap(), read("cuda:3").unwrap()), (Device::Cuda(0), Device::Cuda(3)));
        assert!(matches!(read("simulated:h200").unwrap(), Device::Simulated(_)));
        for text in ["cuda:", "cuda:x", "cuda1", "tpu", ""] {
            assert!(read(text).is_err(), "{text}");
        }
        assert!(read("cuda").unwrap().is_shared_with(&read("cuda:0").unwrap()));
        assert!(!read("cuda").unwrap().is_shared_with(&read("cuda:1").unwrap()));
        assert!(!Device::Cpu.is_shared_with(&read("cuda").unwrap()));
    }
}
