//! A device that is only simulated: it has the speed and the memory of a named GPU and makes up the logits, so that
//! schedules, residency and the queue can be tried at the scale of hundreds of GPUs on a small machine.
//!
//! Never here: weights. A step takes as long as the roofline model says: the longer one of reading what it must read and
//! of computing what it must compute (Williams, Waterman and Patterson 2009), which is what the GPU could do at best. The
//! logits of a token depend on that token and its position alone, so results do not depend on the batch here either.

use std::time::Duration;

use crate::backend::Batch;
use crate::config::Config;
use crate::decoder::{Forward, Room};
use crate::measure::{Cost, Part, Widths, Work};

/// A row of [`GPUS`].
#[derive(Debug, PartialEq)]
pub struct Gpu {
    /// Its name in configuration.
    pub name: &'static str,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes read from it in a second.
    pub bytes_per_s: f64,
    /// Bytes that come to it from the machine in a second: PCIe 4.0 or 5.0 with 16 lanes.
    pub link_bytes_per_s: u64,
    /// Dense operations in a second: in float32 (outside tensor cores), in bfloat16, in float8 where it has that.
    pub operations_per_s: [Option<f64>; 3],
}

const GB: u64 = 1_000_000_000;

/// The GPUs that can be simulated, with the figures of NVIDIA's data sheets (SXM modules; without sparsity).
pub const GPUS: &[Gpu] = &[
    row("h200", 141, 4.8, 64, [Some(67.0), Some(989.0), Some(1_979.0)]),
    row("h100", 80, 3.35, 64, [Some(67.0), Some(989.0), Some(1_979.0)]),
    row("a100", 80, 2.039, 32, [Some(19.5), Some(312.0), None]),
    row("l40s", 48, 0.864, 32, [Some(91.6), Some(362.0), Some(733.0)]),
    row("rtx4090", 24, 1.008, 32, [Some(82.6), Some(165.2), Some(330.3)]),
];

/// Gigabytes, terabytes in a second, gigabytes in a second, tera-operations in a second.
const fn row(
    name: &'static str,
    memory_gb: u64,
    tb_per_s: f64,
    link_gb_per_s: u64,
    tera_operations: [Option<f64>; 3],
) -> Gpu {
    let [float32, bfloat16, float8] = tera_operations;
    let each = [tera(float32), tera(bfloat16), tera(float8)];
    Gpu {
        name,
        memory_bytes: memory_gb * GB,
        bytes_per_s: tb_per_s * 1e12,
        link_bytes_per_s: link_gb_per_s * GB,
        operations_per_s: each,
    }
}

const fn tera(count: Option<f64>) -> Option<f64> {
    match count {
        Some(count) => Some(count * 1e12),
        None => None,
    }
}

/// The numbers that weights, keys and values are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 4 bytes.
    Float32,
    /// 2 bytes.
    Bfloat16,
    /// 1 byte.
    Float8,
}

/// Every dtype by its name in configuration, in the order of [`Gpu::operations_per_s`].
const DTYPES: [(&str, Dtype); 3] =
    [("float32", Dtype::Float32), ("bfloat16", Dtype::Bfloat16), ("float8", Dtype::Float8)];

impl Dtype {
    /// Its name in configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        DTYPES[self as usize].0
    }

    pub(crate) const fn bytes(self) -> u64 {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 => 2,
            Self::Float8 => 1,
        }
    }
}

/// A device to simulate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Device {
    /// Which GPU.
    pub gpu: &'static Gpu,
    /// What it computes in.
    pub dtype: Dtype,
    /// How long a step takes, as a multiple of the GPU's time; 0: as long as this machine needs to make it up, while the
    /// device's own clock goes as the GPU's would.
    pub pace: f64,
    /// The step, from 1, which never ends: for trying what becomes of a device that hangs.
    pub hangs_at: Option<u64>,
    /// Which of the worker's GPUs, where models share one; a model without has one for itself.
    pub index: Option<u32>,
}

/// Why a text names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no device: {problem}")]
pub struct NoDevice {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

impl Device {
    /// Reads `simulated:GPU`, which may be followed by `,pace=NUMBER` (1 unless told), `,dtype=NAME` (bfloat16 unless
    /// told), `,hang=STEP` and `,index=NUMBER`.
    ///
    /// # Errors
    /// [`NoDevice`], with what there is to choose from.
    pub fn parse(text: &str) -> Result<Self, NoDevice> {
        let wrong = |problem: String| NoDevice { text: text.to_owned(), problem };
        let named =
            text.strip_prefix("simulated:").ok_or_else(|| wrong("it must begin with `simulated:`".to_owned()))?;
        let mut parts = named.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let known = || GPUS.iter().map(|gpu| gpu.name).collect::<Vec<_>>().join(", ");
        let gpu = GPUS.iter().find(|gpu| gpu.name == name);
        let gpu = gpu.ok_or_else(|| wrong(format!("known GPUs are {}", known())))?;
        let mut device = Self { gpu, dtype: Dtype::Bfloat16, pace: 1.0, hangs_at: None, index: None };
        for part in parts {
            let understood = part.split_once('=').is_some_and(|(key, value)| device.set(key, value).is_some());
            if !understood {
                return Err(wrong(format!(
                    "`{part}` is not one of pace=NUMBER, dtype=float32|bfloat16|float8, hang=STEP, index=NUMBER"
                )));
            }
        }
        if device.operations_per_s().is_none() {
            return Err(wrong(format!("a {name} does not compute in {}", device.dtype.name())));
        }
        Ok(device)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "pace" => self.pace = value.parse().ok().filter(|pace: &f64| pace.is_finite() && *pace >= 0.0)?,
            "dtype" => self.dtype = DTYPES.iter().find(|(name, _)| *name == value)?.1,
            "hang" => self.hangs_at = Some(value.parse().ok()?),
            "index" => self.index = Some(value.parse().ok()?),
            _ => return None,
        }
        Some(())
    }

    /// What a model of that shape costs on it.
    pub(crate) fn cost(&self, config: &Config) -> Cost {
        Cost::of(config, Widths { weights: None, kv_value: self.dtype.bytes() })
    }

    /// Operations in a second in its dtype.
    const fn operations_per_s(&self) -> Option<f64> {
        self.gpu.operations_per_s[self.dtype as usize]
    }

    /// Whether a model on the other one is on this one too.
    #[must_use]
    pub fn is_shared_with(&self, other: &Self) -> bool {
        self.index.is_some() && (self.gpu.name, self.index) == (other.gpu.name, other.index)
    }

    /// The time in which so many bytes of weights come to the GPU at best.
    #[must_use]
    pub fn load_time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.gpu.link_bytes_per_s as f64).mul_f64(self.pace)
    }

    /// The time that the GPU would need for a step at best.
    #[must_use]
    pub fn time(&self, work: Work) -> Duration {
        let reading = work.bytes as f64 / self.gpu.bytes_per_s;
        let computing = work.operations as f64 / self.operations_per_s().unwrap_or(f64::INFINITY);
        Duration::from_secs_f64(reading.max(computing))
    }
}

/// Likely tokens after each token.
const LIKELY: usize = 8;

/// Sleeping for less than this is not worth it: it is made up for later.
const SLEEP_MIN: Duration = Duration::from_millis(1);

/// A model on a simulated device.
pub(crate) struct Simulated {
    device: Device,
    cost: Cost,
    vocabulary: usize,
    /// All 0 but for the places in `marks`.
    logits: Vec<f32>,
    marks: Vec<usize>,
    steps: u64,
    time: Duration,
    /// Time not yet slept.
    owed: Duration,
}

impl Simulated {
    pub(crate) fn new(config: &Config, device: &Device) -> Self {
        Self {
            device: *device,
            cost: device.cost(config),
            vocabulary: config.vocabulary,
            logits: Vec::new(),
            marks: Vec::new(),
            steps: 0,
            time: Duration::ZERO,
            owed: Duration::ZERO,
        }
    }

    /// Takes the time of a step.
    fn pass(&mut self, batch: &Batch) {
        self.time = self.device.time(self.cost.work(parts(batch)));
        self.owed += self.time.mul_f64(self.device.pace);
        if self.owed >= SLEEP_MIN {
            let begun = std::time::Instant::now();
            #[expect(
                clippy::disallowed_methods,
                reason = "this thread is the engine's own, and stands for a device at work"
            )]
            std::thread::sleep(self.owed);
            // Waking up late is made up for as well.
            self.owed = self.owed.saturating_sub(begun.elapsed());
        }
    }
}

impl Forward for Simulated {
    fn reserve(&mut self, room: Room) {
        self.logits = vec![0.0; room.outputs * self.vocabulary];
    }

    fn forward(&mut self, batch: &Batch) -> &[f32] {
        self.steps += 1;
        while self.device.hangs_at == Some(self.steps) {
            std::thread::park();
        }
        self.pass(batch);
        for mark in self.marks.drain(..) {
            self.logits[mark] = 0.0;
        }
        let wanted = batch.outputs.len() * self.vocabulary;
        let rows = self.logits[..wanted].chunks_mut(self.vocabulary).zip(&batch.outputs).enumerate();
        for (index, (logits, row)) in rows {
            let row = *row as usize;
            for (place, logit) in likely(batch.ids[row], batch.positions[row], self.vocabulary) {
                logits[place] = logit;
                self.marks.push(index * self.vocabulary + place);
            }
        }
        &self.logits[..wanted]
    }

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn cost(&self) -> Cost {
        self.cost
    }

    fn device_time(&mut self) -> Option<Duration> {
        Some(std::mem::take(&mut self.time))
    }
}

/// The sequences of a batch, in whose rows one position follows the other.
fn parts(batch: &Batch) -> Vec<Part> {
    let mut parts: Vec<(Part, &std::ops::Range<usize>)> = Vec::new();
    let mut outputs = batch.outputs.iter().peekable();
    for (row, (position, table)) in batch.positions.iter().zip(&batch.row_tables).enumerate() {
        let wanted = usize::from(outputs.next_if(|output| **output as usize == row).is_some());
        match parts.last_mut() {
            Some((part, of)) if *of == table => {
                part.tokens += 1;
                part.outputs += wanted;
            }
            _ => parts.push((Part { start: *position as usize, tokens: 1, outputs: wanted }, table)),
        }
    }
    parts.into_iter().map(|(part, _)| part).collect()
}

/// The tokens that may well follow a token at a position, with their logits.
fn likely(token: u32, position: u32, vocabulary: usize) -> impl Iterator<Item = (usize, f32)> {
    // SplitMix64 (Steele, Lea and Flood 2014): each call mixes the next number of the sequence.
    let mut state = u64::from(token) << 32 | u64::from(position);
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    let count = vocabulary.max(1) as u64;
    (0..LIKELY).map(move |rank| {
        let place = usize::try_from(next() % count).unwrap_or(0);
        let rank = u8::try_from(rank).map_or(0.0, f32::from);
        (place, 12.0 - rank)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Footprint;
    use crate::engine::{Completion, Engine, EngineOptions, Event, Prompt, Request};
    use crate::model::{Model, ModelPaths};
    use std::path::Path;
    use std::sync::mpsc::channel;

    /// Llama 3.1 70B's shape with the words of a tiny model.
    fn large() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama3");
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(fixture.join(file), folder.path().join(file)).unwrap();
        }
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(fixture.join("config.json")).unwrap()).unwrap();
        for (field, value) in [
            ("hidden_size", 8_192),
            ("num_hidden_layers", 80),
            ("num_attention_heads", 64),
            ("num_key_value_heads", 8),
            ("head_dim", 128),
            ("intermediate_size", 28_672),
            ("max_position_embeddings", 131_072),
        ] {
            config[field] = value.into();
        }
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        folder
    }

    fn model(folder: &Path, device: &str) -> Result<Model, crate::error::LoadError> {
        let paths = ModelPaths { model_path: folder.to_owned(), tokenizer_path: None };
        Model::simulated(&paths, &Device::parse(device).unwrap())
    }

    fn run(engine: &Engine, prompts: &[String]) -> Vec<Completion> {
        let submit = |prompt: &String| {
            let (sender, events) = channel();
            let request = Request {
                temperature: 1.0,
                seed: 7,
                ignore_end: true,
                ..Request::greedy(Prompt::Text(prompt.clone()), 40)
            };
            engine.submit(request, Box::new(move |event| drop(sender.send(event)))).unwrap();
            events
        };
        let all: Vec<_> = prompts.iter().map(submit).collect();
        let last = |events: std::sync::mpsc::Receiver<Event>| match events.iter().last() {
            Some(Event::Finished(done)) => done,
            other => panic!("{other:?}"),
        };
        all.into_iter().map(last).collect()
    }

    #[test]
    fn a_device_is_named_with_its_options() {
        let device = Device::parse("simulated:h100,pace=0.5,dtype=float8,hang=9,index=3").unwrap();
        assert_eq!((device.gpu.name, device.dtype, device.hangs_at), ("h100", Dtype::Float8, Some(9)));
        assert_eq!(device.load_time(64_000_000_000), Duration::from_millis(500));
        let other = |text| Device::parse(text).unwrap();
        assert!(device.is_shared_with(&other("simulated:h100,index=3")));
        assert!(!device.is_shared_with(&other("simulated:h100,index=2")));
        assert!(!other("simulated:h100").is_shared_with(&other("simulated:h100")), "each has one for itself");
        for (text, says) in [
            ("h100", "begin with"),
            ("simulated:h10", "h200, h100"),
            ("simulated:h100,pase=1", "pace=NUMBER"),
            ("simulated:h100,pace=-1", "pace=NUMBER"),
            ("simulated:a100,dtype=float8", "does not compute in float8"),
        ] {
            let error = Device::parse(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_model_that_does_not_fit_is_refused_with_the_numbers() {
        let folder = large();
        let footprint = |device| Footprint::simulated(folder.path(), &Device::parse(device).unwrap());
        let error = footprint("simulated:h100").unwrap_err().to_string();
        assert!(error.contains("136912568320") && error.contains("80000000000"), "{error}");
        // 141 GB less 137 GB of weights, at 320 KiB for each token.
        let footprint = footprint("simulated:h200").unwrap();
        let tokens = footprint.kv_tokens(141 * GB - footprint.weights_bytes);
        assert!((1_000..20_000).contains(&tokens), "{tokens}");
    }

    #[test]
    fn a_decode_takes_the_time_of_reading_the_weights() {
        let folder = large();
        let engine = Engine::start(model(folder.path(), "simulated:h200,pace=0").unwrap(), EngineOptions::default());
        let engine = engine.unwrap();
        run(&engine, &["O".to_owned()]);
        let (totals, cost) = (engine.totals(), *engine.cost());
        assert_eq!((totals.decode_tokens, totals.steps), (39, 40));
        let each = totals.decode_time.as_secs_f64() / 39.0;
        let reading = cost.weight_bytes as f64 / 4.8e12;
        assert!((each / reading - 1.0).abs() < 0.01, "{each} {reading}");
        // On the roof: all of the bandwidth.
        assert!((totals.bytes_per_s() / 4.8e12 - 1.0).abs() < 0.05, "{totals:?}");
    }

    #[test]
    fn a_text_does_not_depend_on_the_batch() {
        let folder = large();
        let prompts: Vec<String> = (0..12).map(|n| "Once upon ".repeat(1 + n * 7)).collect();
        let engine = |step_tokens, prefix_cache| {
            let options = EngineOptions { step_tokens, prefix_cache, ..EngineOptions::default() };
            Engine::start(model(folder.path(), "simulated:h200,pace=0").unwrap(), options).unwrap()
        };
        let texts = |done: Vec<Completion>| done.into_iter().map(|done| done.text).collect::<Vec<_>>();
        let together = texts(run(&engine(256, true), &prompts));
        let one = engine(32, false);
        let alone: Vec<String> =
            prompts.iter().flat_map(|prompt| texts(run(&one, std::slice::from_ref(prompt)))).collect();
        assert_eq!(together, alone);
        assert!(together.iter().any(|text| text != &together[0]));
    }
}
