//! What can be wrong with a checkpoint, said with the file and the tensor or field.

use std::path::PathBuf;

/// Why a model could not be loaded. Nothing of a broken checkpoint is ever used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is missing or unreadable.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{} is not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it stops being JSON.
        #[source]
        source: serde_json::Error,
    },
    /// The model is of a family without a row in [`crate::architectures::ARCHITECTURES`].
    #[error("{}: architecture {found} is not known; known are: {known}", path.display())]
    UnknownArchitecture {
        /// The config.json.
        path: PathBuf,
        /// The name that stands there.
        found: String,
        /// The names that could stand there.
        known: String,
    },
    /// A field of config.json has a value that is wrong or not supported.
    #[error("{}: {field} {reason}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field as it is spelled there.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The folder holds no safetensors weights.
    #[error(
        "{} holds neither model.safetensors nor model.safetensors.index.json; \
         convert other weight files to safetensors",
        path.display()
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A simulated device could not hold the model.
    #[error("{}: its weights have {needed_bytes} bytes, a {device} has {memory_bytes}", path.display())]
    TooLarge {
        /// The model.
        path: PathBuf,
        /// The device.
        device: &'static str,
        /// Bytes of the weights.
        needed_bytes: u64,
        /// Bytes of the device's memory.
        memory_bytes: u64,
    },
    /// A weight file is truncated or inconsistent.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that the architecture needs is not in the checkpoint.
    #[error("{}: tensor {tensor} is missing", path.display())]
    MissingTensor {
        /// The folder.
        path: PathBuf,
        /// The full name of the tensor.
        tensor: String,
    },
    /// A tensor does not have the shape that config.json implies.
    #[error("{}: tensor {tensor} has shape {found:?}, config.json asks for {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The full name of the tensor.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that config.json implies.
        expected: Vec<usize>,
    },
    /// A tensor could not be converted to float32.
    #[error("{}: cannot convert tensor {tensor} of type {dtype} to float32", path.display())]
    Convert {
        /// The file.
        path: PathBuf,
        /// The full name of the tensor.
        tensor: String,
        /// The type in the file.
        dtype: String,
        /// What candle said.
        #[source]
        source: Box<candle_core::Error>,
    },
    /// The tokenizer could not be read.
    #[error("cannot load tokenizer {}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizers library said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The chat template does not compile.
    #[error("{}: the chat template does not compile", path.display())]
    Template {
        /// The file.
        path: PathBuf,
        /// Where it stops being a template.
        #[source]
        source: minijinja::Error,
    },
    /// A device is not there, or failed while weights were brought to it.
    #[error("{message}")]
    Device {
        /// What was being done, and what the device said.
        message: String,
    },
    /// The worker threads could not be started.
    #[error("cannot start {threads} compute threads")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the thread pool said.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
}
