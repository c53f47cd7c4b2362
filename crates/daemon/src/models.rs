//! Model configuration as users of this field write it: lists of models, in YAML or JSON, a file or a top-level key
//! for each backend.
//!
//! Never here: whether a listed model can be served.

use crate::config::{Models, nearest, with_nearest};
use crate::documents;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Every section, and the backend prefix whose models it lists.
pub const SECTIONS: &[(&str, &str)] = &[
    ("litellm_models", "litellm"),
    ("openrouter_models", "openrouter"),
    ("vllm_models", "vllm"),
    ("hf_models", "hf"),
    ("llamacpp_models", "llamacpp"),
];

/// A model that a configuration lists.
#[derive(Clone, Debug, PartialEq)]
pub struct ListedModel {
    /// The backend prefix of its section.
    pub prefix: &'static str,
    /// Its name as written, with or without the prefix.
    pub name: String,
    /// Where it lies; `None` for remote models.
    pub path: Option<ModelPath>,
    /// Where its tokenizer lies, when not beside it.
    pub tokenizer: Option<ModelPath>,
    /// What the configuration says about it.
    pub description: String,
    /// Longest input plus output in tokens, when limited by the configuration.
    pub context_tokens: Option<u64>,
    /// Compute threads, when the configuration gives it a number of its own.
    pub threads: Option<usize>,
    /// The device that it runs on, when the configuration names one: `simulated:h200`.
    pub device: Option<String>,
    /// What else the configuration gives it of its own, for the engine.
    pub local: LocalSettings,
    /// The file that lists it.
    pub file: PathBuf,
}

/// What an entry of a local model has in place of those of `[gpu]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LocalSettings {
    /// How many of its sequences run at once.
    pub sequences_max: Option<u32>,
    /// The part of the worker's memory for models that it may take, above 0 and at most 1.
    pub memory_utilization: Option<f64>,
    /// Layers to compute on a GPU; below 0: all.
    pub gpu_layers: Option<i64>,
    /// What its float weights are brought to at load: `q8_0`, or `none`.
    pub quantize: Option<String>,
}

/// A path, as written and as meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPath {
    /// As the configuration writes it.
    pub written: PathBuf,
    /// Where it leads.
    pub resolved: PathBuf,
}

impl ModelPath {
    /// What to say when nothing is there.
    #[must_use]
    pub fn missing(&self) -> String {
        let resolved = self.resolved.display();
        if self.written.is_absolute() {
            return format!("{resolved} does not exist: correct its path in the model configuration");
        }
        format!(
            "{resolved} does not exist: set MODELS_DIR to the folder that has `{}`, or write an absolute path in the \
             model configuration",
            self.written.display()
        )
    }
}

/// Why the model configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelsError {
    /// The folder or a file cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The folder or file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {problem}")]
    Wrong {
        /// The file.
        path: String,
        /// What is wrong, and where.
        problem: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    #[serde(default)]
    models: Option<Vec<Value>>,
}

/// All that an entry may say. Which of it a backend takes is told by [`allowed`].
#[derive(Default, Deserialize)]
struct Fields {
    name: String,
    model_path: Option<PathBuf>,
    tokenizer_path: Option<PathBuf>,
    #[serde(default)]
    description: Option<String>,
    #[serde(alias = "max_model_len")]
    context: Option<u64>,
    threads: Option<usize>,
    device: Option<String>,
    gpu_layers: Option<i64>,
    max_num_seqs: Option<u32>,
    gpu_memory_utilization: Option<f64>,
    quantize: Option<String>,
}

/// What entries of local models may say.
const LOCAL: &[&str] = &[
    "name",
    "model_path",
    "tokenizer_path",
    "description",
    "device",
    "context",
    "max_model_len",
    "max_num_seqs",
    "gpu_memory_utilization",
    "threads",
    "gpu_layers",
    "quantize",
];

fn allowed(prefix: &str) -> &'static [&'static str] {
    match prefix {
        "vllm" | "hf" | "llamacpp" => LOCAL,
        _ => &["name", "description"],
    }
}

/// Reads every model file in the configured folder. A folder that does not exist lists nothing.
///
/// # Errors
/// [`ModelsError`] naming the file and what is wrong in it.
pub fn read(models: &Models) -> Result<Vec<ListedModel>, ModelsError> {
    let unreadable = |path: &Path, source| ModelsError::Unreadable { path: path.display().to_string(), source };
    if !models.dir.exists() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&models.dir).map_err(|error| unreadable(&models.dir, error))? {
        let path = entry.map_err(|error| unreadable(&models.dir, error))?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if path.is_file() && matches!(extension, Some("yaml" | "yml" | "json")) {
            files.push(path);
        }
    }
    files.sort();
    let mut listed = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).map_err(|error| unreadable(&file, error))?;
        listed.extend(read_file(&file, &text, models.root.as_deref())?);
    }
    refuse_duplicates(&listed)?;
    Ok(listed)
}

/// A local model that is listed twice would be two models of one name.
fn refuse_duplicates(listed: &[ListedModel]) -> Result<(), ModelsError> {
    let mut seen = BTreeSet::new();
    for model in listed {
        let section = format!("{}_", model.prefix);
        let name = model.name.strip_prefix(&section).unwrap_or(&model.name);
        if model.path.is_some() && !seen.insert((model.prefix, name)) {
            let problem = format!("the model `{}` is listed twice in {}_models", model.name, model.prefix);
            return Err(ModelsError::Wrong { path: model.file.display().to_string(), problem });
        }
    }
    Ok(())
}

fn read_file(file: &Path, text: &str, root: Option<&Path>) -> Result<Vec<ListedModel>, ModelsError> {
    let wrong = |problem: String| ModelsError::Wrong { path: file.display().to_string(), problem };
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let content: Value = if text.trim().is_empty() {
        Value::Null
    } else {
        documents::parse(text).map_err(|error| wrong(error.to_string()))?
    };
    let sections = sections(stem, content).map_err(wrong)?;
    let mut listed = Vec::new();
    for (prefix, content) in sections {
        if content.is_null() {
            continue;
        }
        let section: Section =
            serde_json::from_value(content).map_err(|error| wrong(with_nearest(&error.to_string())))?;
        for (index, entry) in section.models.unwrap_or_default().into_iter().enumerate() {
            let place = |problem: String| wrong(format!("{prefix}_models, entry {}: {problem}", index + 1));
            let fields = fields(prefix, entry).map_err(place)?;
            listed.push(listed_model(prefix, fields, file, root));
        }
    }
    Ok(listed)
}

/// The sections of a file: it is one itself when named like one, else its top-level keys are.
fn sections(stem: &str, content: Value) -> Result<Vec<(&'static str, Value)>, String> {
    let known: Vec<&str> = SECTIONS.iter().map(|(name, _)| *name).collect();
    let find = |name: &str| SECTIONS.iter().find(|(section, _)| *section == name).map(|(_, prefix)| *prefix);
    let is_sectioned = |object: &serde_json::Map<String, Value>| object.keys().any(|key| find(key).is_some());
    match (find(stem), content) {
        (Some(prefix), Value::Object(object)) if !is_sectioned(&object) => Ok(vec![(prefix, Value::Object(object))]),
        (Some(prefix), Value::Null) => Ok(vec![(prefix, Value::Null)]),
        (_, Value::Object(object)) if is_sectioned(&object) => {
            let section = |(key, value): (String, Value)| {
                let prefix = find(&key).ok_or_else(|| unknown_key(&key, &known))?;
                Ok((prefix, value))
            };
            object.into_iter().map(section).collect()
        }
        (Some(_), _) => Err("must be a mapping with the key `models`".to_owned()),
        // Another file in the same folder, unless its name is a slip of the pen.
        (None, _) => match nearest(stem, &known).filter(|near| strsim::jaro_winkler(stem, near) > 0.9) {
            Some(near) => Err(format!("unknown model file: did you mean `{near}`?")),
            None => Ok(Vec::new()),
        },
    }
}

fn unknown_key(key: &str, known: &[&str]) -> String {
    match nearest(key, known) {
        Some(near) => format!("unknown key `{key}`: did you mean `{near}`?"),
        None => format!("unknown key `{key}`: known are {}", known.join(", ")),
    }
}

fn fields(prefix: &str, entry: Value) -> Result<Fields, String> {
    let fields = match entry {
        Value::String(_) if prefix == "vllm" || prefix == "llamacpp" => {
            return Err("must be a mapping with `name` and `model_path`".to_owned());
        }
        Value::String(name) => Fields { name, ..Fields::default() },
        Value::Object(object) => {
            let allowed = allowed(prefix);
            if let Some(key) = object.keys().find(|key| !allowed.contains(&key.as_str())) {
                return Err(unknown_key(key, allowed));
            }
            serde_json::from_value(Value::Object(object)).map_err(|error| error.to_string())?
        }
        other => return Err(format!("`{other}` is neither a name nor a mapping with `name`")),
    };
    let needs_path = prefix == "vllm" || prefix == "llamacpp";
    match () {
        () if fields.name.trim().is_empty() => Err("`name` must not be empty".to_owned()),
        () if needs_path && fields.model_path.is_none() => Err("`model_path` must be set".to_owned()),
        () if fields.context == Some(0) => Err("`context` must be at least 1".to_owned()),
        () if fields.max_num_seqs == Some(0) => Err("`max_num_seqs` must be at least 1".to_owned()),
        () if fields.gpu_memory_utilization.is_some_and(|part| !(part > 0.0 && part <= 1.0)) => {
            Err("`gpu_memory_utilization` must be above 0 and at most 1".to_owned())
        }
        () => Ok(fields),
    }
}

fn listed_model(prefix: &'static str, fields: Fields, file: &Path, root: Option<&Path>) -> ListedModel {
    let base = root.or_else(|| file.parent()).unwrap_or(Path::new("."));
    let resolve = |written: PathBuf| ModelPath { resolved: base.join(&written), written };
    // A Hugging Face name without a path is looked for under the root, as in `MODELS_DIR/org/model`.
    let named = (prefix == "hf").then(|| PathBuf::from(fields.name.strip_prefix("hf_").unwrap_or(&fields.name)));
    ListedModel {
        prefix,
        path: fields.model_path.or(named).map(resolve),
        tokenizer: fields.tokenizer_path.map(resolve),
        name: fields.name,
        description: fields.description.unwrap_or_default(),
        context_tokens: fields.context,
        threads: fields.threads,
        device: fields.device,
        local: LocalSettings {
            sequences_max: fields.max_num_seqs,
            memory_utilization: fields.gpu_memory_utilization,
            gpu_layers: fields.gpu_layers,
            quantize: fields.quantize,
        },
        file: file.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(stem: &str, text: &str) -> Result<Vec<String>, String> {
        let file = PathBuf::from(format!("/configs/{stem}"));
        let listed = read_file(&file, text, None).map_err(|error| error.to_string())?;
        refuse_duplicates(&listed).map_err(|error| error.to_string())?;
        Ok(listed.into_iter().map(|model| format!("{}:{}", model.prefix, model.name)).collect())
    }

    fn check(stem: &str, text: &str, expect: &[&str]) {
        assert_eq!(names(stem, text).unwrap(), expect);
    }

    fn refused(stem: &str, text: &str, says: &str) {
        let error = names(stem, text).unwrap_err();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn a_file_lists_the_models_of_its_section() {
        check(
            "litellm_models.yaml",
            "models:\n  - gpt-4\n  - groq/llama3\n",
            &["litellm:gpt-4", "litellm:groq/llama3"],
        );
        check("openrouter_models.json", r#"{"models": ["a/b"]}"#, &["openrouter:a/b"]);
        check("hf_models.yml", "models: [gpt2, {name: x, model_path: /m}]", &["hf:gpt2", "hf:x"]);
        check(
            "llamacpp_models.yaml",
            "models: [{name: x, model_path: a.gguf, context: 4096, threads: 2, gpu_layers: 0}]",
            &["llamacpp:x"],
        );
    }

    #[test]
    fn an_entry_may_have_numbers_of_its_own() {
        let text = "models: [{name: x, model_path: /x, max_model_len: 99, max_num_seqs: 3, gpu_memory_utilization: 0.5, \
                    threads: 1, gpu_layers: -1, quantize: q8_0}]";
        let listed = read_file(Path::new("/configs/vllm_models.yaml"), text, None).unwrap();
        let own = LocalSettings {
            sequences_max: Some(3),
            memory_utilization: Some(0.5),
            gpu_layers: Some(-1),
            quantize: Some("q8_0".to_owned()),
        };
        assert_eq!((listed[0].context_tokens, listed[0].threads, &listed[0].local), (Some(99), Some(1), &own));
    }

    #[test]
    fn sections_may_share_a_file() {
        check(
            "models.yaml",
            "litellm_models:\n  models: [gpt-4]\nvllm_models:\n  models:\n    - {name: q, model_path: /q}\n",
            &["litellm:gpt-4", "vllm:q"],
        );
        check("vllm_models.yaml", "vllm_models:\n  models:\n    - {name: q, model_path: /q}\n", &["vllm:q"]);
    }

    #[test]
    fn an_empty_list_is_a_list() {
        for text in ["", "models:", "models: []", "# nothing"] {
            check("vllm_models.yaml", text, &[]);
        }
        check("models.yaml", "litellm_models:\nvllm_models:\n  models:\n", &[]);
    }

    #[test]
    fn other_files_are_left_alone_but_slips_of_the_pen_are_not() {
        check("values.yaml", "anything: 1", &[]);
        refused("litelm_models.yaml", "models: []", "did you mean `litellm_models`?");
        refused("models.yaml", "vllm_models:\nlitelm_models:\n", "did you mean `litellm_models`?");
        refused("vllm_models.yaml", "modles: []", "did you mean `models`?");
        refused("vllm_models.yaml", "models: [{name: x, model_paht: /x}]", "did you mean `model_path`?");
        refused("vllm_models.yaml", "models: [{name: x}]", "entry 1: `model_path` must be set");
        refused("vllm_models.yaml", "models: [{name: x, model_path: /x, max_num_seqs: 0}]", "entry 1: `max_num_seqs`");
        refused("hf_models.yaml", "models: [{name: x, gpu_memory_utilization: 2}]", "at most 1");
        refused("hf_models.yaml", "models: [{name: x, context: 1, max_model_len: 2}]", "duplicate field");
        refused("litellm_models.yaml", "models: [{name: x, max_num_seqs: 2}]", "max_num_seqs");
        refused("litellm_models.yaml", "- gpt-4", "`models`");
        refused("litellm_models.yaml", "models: [5]", "entry 1: `5` is neither a name");
        refused("hf_models.yaml", "models: [a, {name: hf_a, model_path: /x}]", "listed twice");
        refused("litellm_models.yaml", "models: [", "litellm_models.yaml");
    }

    #[test]
    fn a_relative_path_starts_from_the_root_else_from_the_file() {
        let resolved = |root: Option<&str>, path: &str| {
            let text = format!("models: [{{name: x, model_path: {path}}}]");
            let listed = read_file(Path::new("/configs/vllm_models.yaml"), &text, root.map(Path::new)).unwrap();
            listed[0].path.clone().unwrap()
        };
        assert_eq!(resolved(None, "m").resolved, Path::new("/configs/m"));
        assert_eq!(resolved(Some("/models"), "m").resolved, Path::new("/models/m"));
        assert_eq!(resolved(Some("/models"), "/abs/m").resolved, Path::new("/abs/m"));
        assert!(resolved(Some("/models"), "m").missing().contains("MODELS_DIR"));
        assert!(!resolved(None, "/abs/m").missing().contains("MODELS_DIR"));
    }
}
