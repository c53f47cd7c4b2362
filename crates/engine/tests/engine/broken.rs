//! Broken and hostile checkpoints: always an error that names file and tensor or field.

use std::fs;
use std::path::Path;

use genmill_engine::config::Config;
use genmill_engine::{LoadOptions, Model, ModelPaths};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{fixture, load};

/// A copy of a fixture, to be broken.
pub(crate) fn copy(name: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

fn error(folder: &Path) -> String {
    let paths = ModelPaths { model_path: folder.to_owned(), tokenizer_path: None };
    Model::load(&paths, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap_err().to_string()
}

/// Sets one field of config.json (null removes nothing: it is null) and expects this error.
fn check_config(name: &str, field: &str, value: Value, expected: &str) {
    let folder = copy(name);
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[field] = value;
    fs::write(&path, config.to_string()).unwrap();
    let error = error(folder.path());
    assert!(error.contains(expected), "{error}");
}

#[test]
fn an_unknown_architecture_lists_the_known_ones() {
    let name = json!(["BertForMaskedLM"]);
    check_config("qwen2", "architectures", name, "BertForMaskedLM is not known; known are: Qwen2");
}

#[test]
fn the_type_of_a_model_decides_where_no_architecture_stands() {
    let change = |model_type: Value| {
        let folder = copy("qwen2");
        let path = folder.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["architectures"] = Value::Null;
        config["model_type"] = model_type;
        fs::write(&path, config.to_string()).unwrap();
        folder
    };
    assert_eq!(load(change(json!("qwen2")).path()).card().context_tokens(), 512);
    assert!(error(change(json!("bert")).path()).contains("architecture bert is not known"));
    assert!(error(change(json!(null)).path()).contains("architectures names no class"));
}

#[test]
fn what_is_not_supported_is_named() {
    check_config("qwen2", "hidden_act", json!("quick_gelu"), "hidden_act is quick_gelu; supported");
    check_config("qwen2", "quantization_config", json!({"bits": 4}), "quantization_config is set");
    check_config("gpt2", "add_cross_attention", json!(true), "add_cross_attention is true");
    check_config("gemma2", "use_bidirectional_attention", json!(true), "use_bidirectional_attention is true");
    let chunks = json!(["chunked_attention", "full_attention"]);
    check_config("qwen2", "layer_types", chunks, "layer_types has \"chunked_attention\"");
    let windows = json!(["sliding_attention", "full_attention"]);
    check_config("qwen2", "layer_types", windows.clone(), "has \"sliding_attention\", but no window is set");
    check_config("llama2", "layer_types", windows.clone(), "has \"sliding_attention\", which is not supported here");
    check_config("mistral", "layer_types", windows, "has \"full_attention\" where all layers have a window");
}

#[test]
fn a_rotation_that_is_not_supported_is_named() {
    let check = |scaling: Value, expected: &str| check_config("llama2", "rope_scaling", scaling, expected);
    check(json!({"type": "ntk", "factor": 4.0}), "rope_scaling has type ntk; supported are");
    check(json!({"type": "linear"}), "rope_scaling has no factor");
    check(json!({"type": "linear", "factor": 0}), "factor is 0, not a positive number");
    check(json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling has no low_freq_factor");
    check(
        json!({"rope_type": "longrope", "long_factor": [1.0]}),
        "rope_scaling has no short_factor of 8 positive numbers",
    );
    check(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5");
    check(json!({"full_attention": {"rope_type": "default"}}), "differs between layer types");
    check(json!("linear"), "rope_scaling is not an object");
}

#[test]
fn wrong_numbers_are_named() {
    check_config("qwen2", "num_hidden_layers", json!(0), "num_hidden_layers is 0");
    check_config("qwen2", "hidden_size", json!("64"), "hidden_size is \"64\"");
    check_config("qwen2", "hidden_size", json!(1_u64 << 60), "hidden_size is");
    check_config("qwen2", "num_key_value_heads", json!(3), "num_key_value_heads is 3");
    check_config("qwen2", "head_dim", json!(15), "head_dim is 15");
    check_config("gpt2", "n_head", json!(5), "n_head is 5");
    check_config("qwen2", "rms_norm_eps", json!(-1), "rms_norm_eps is -1");
    check_config("mistral", "sliding_window", json!(0), "sliding_window is 0");
    check_config("mixtral", "num_experts_per_tok", json!(5), "num_experts_per_tok is 5, but there are 4 experts");
    check_config("gemma2", "attn_logit_softcapping", json!(-50), "attn_logit_softcapping is -50");
    check_config("gemma2", "layer_types", json!(["full_attention"]), "layer_types has 1 entries for 2 layers");
}

/// Every field of config.json, replaced by values that are none: an error that names
/// the file or another model, never a panic.
#[test]
fn no_value_in_a_config_panics() {
    let values = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(1_u64 << 28),
        json!(u64::MAX),
        json!(0.37),
        json!(1e300),
        json!(true),
        json!("x"),
        json!([]),
        json!([1, "x"]),
        json!({}),
        json!({"type": "yarn"}),
        json!({"rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 1_u64 << 28}),
        json!({"rope_type": "llama3", "factor": 1e-300, "low_freq_factor": 1.0, "high_freq_factor": 1e300}),
    ];
    for name in ["gemma3-nested", "gpt2", "llama-yarn", "phi3-long", "qwen3-moe-step"] {
        let config: Value = serde_json::from_slice(&fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
        let folder = TempDir::new().unwrap();
        for path in ["", "/text_config"] {
            let Some(fields) = config.pointer(path).and_then(Value::as_object) else { continue };
            let more = ["rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"];
            for field in fields.keys().map(String::as_str).chain(more) {
                for value in &values {
                    let mut config = config.clone();
                    config.pointer_mut(path).unwrap()[field] = value.clone();
                    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
                    if let Err(error) = Config::read(folder.path()) {
                        assert!(error.to_string().contains("config.json"), "{error}");
                    }
                }
            }
        }
    }
}

#[test]
fn an_end_token_that_is_none_is_named() {
    let folder = copy("qwen2");
    let path = folder.path().join("generation_config.json");
    fs::write(path, json!({"eos_token_id": ["x"]}).to_string()).unwrap();
    let error = error(folder.path());
    assert!(error.contains("generation_config.json: eos_token_id is [\"x\"]"), "{error}");
}

#[test]
fn a_shape_that_does_not_fit_names_the_tensor() {
    let expected = "tensor model.embed_tokens.weight has shape [640, 64], config.json asks for [641, 64]";
    check_config("qwen2", "vocab_size", json!(641), expected);
    check_config("llama2", "num_hidden_layers", json!(3), "model.layers.2.self_attn.q_proj.weight is missing");
    check_config("gpt2", "n_inner", json!(100), "transformer.h.0.mlp.c_fc.weight has shape");
    check_config("qwen2", "tie_word_embeddings", json!(false), "tensor lm_head.weight is missing");
    check_config("mixtral", "num_local_experts", json!(5), "block_sparse_moe.gate.weight has shape [4, 64]");
    check_config("mixtral", "num_experts_per_tok", json!(0), "num_experts_per_tok is 0");
    check_config("qwen3", "head_dim", json!(64), "tensor model.layers.0.self_attn.q_proj.weight has shape");
    check_config("llama3", "attention_bias", json!(true), "tensor model.layers.0.self_attn.q_proj.bias is missing");
}

#[test]
fn missing_files_are_named() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = copy("qwen2");
        fs::remove_file(folder.path().join(name)).unwrap();
        assert!(error(folder.path()).contains(name));
    }
    let folder = copy("qwen2-untied");
    fs::remove_file(folder.path().join("model-00002-of-00004.safetensors")).unwrap();
    assert!(error(folder.path()).contains("model-00002-of-00004.safetensors"));
}

#[test]
fn files_that_are_not_json_are_named() {
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        let folder = copy("qwen2");
        fs::write(folder.path().join(name), "{\"a\": ").unwrap();
        assert!(error(folder.path()).contains(name));
    }
    let folder = copy("qwen2-untied");
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(index, json!({"weight_map": {"a": "../../etc/passwd"}}).to_string()).unwrap();
    assert!(error(folder.path()).contains("weight_map has \"../../etc/passwd\""));
}

#[test]
fn a_truncated_file_is_an_error() {
    let folder = copy("qwen2");
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in [0, 7, 8, 100, 2000, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        assert!(error(folder.path()).contains("model.safetensors"), "{length} bytes");
    }
}

#[test]
fn an_entry_that_lies_is_an_error() {
    for (entry, expected) in [
        (json!({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}), "has 12 bytes"),
        (json!({"dtype": "F32", "shape": [1_u64 << 40, 1_u64 << 40], "data_offsets": [0, 16]}), "has 16 bytes"),
        (json!({"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}), "truncated or damaged"),
        (json!({"dtype": "F32", "shape": [4], "data_offsets": [0, 1_u64 << 40]}), "truncated or damaged"),
        (json!({"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}), "malformed entry"),
        (json!([1]), "malformed entry"),
    ] {
        let folder = copy("qwen2");
        let header = json!({ "x": entry }).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 16]);
        fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        let error = error(folder.path());
        assert!(error.contains("tensor x") && error.contains(expected), "{error}");
    }
}

#[test]
fn a_tokenizer_that_adds_a_token_it_does_not_have_is_an_error() {
    let folder = copy("llama2");
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["post_processor"]["special_tokens"] = json!({});
    fs::write(&path, tokenizer.to_string()).unwrap();
    let error = error(folder.path());
    assert!(error.contains("cannot load tokenizer") && error.contains("tokenizer.json"), "{error}");
}

/// Writes model.safetensors of a copy of a fixture with a changed header.
fn check_header(change: impl FnOnce(&mut Value), expected: &str) {
    let folder = copy("qwen2");
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let end = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let mut header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    change(&mut header);
    let text = header.to_string();
    let parts = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &bytes[end..]];
    fs::write(path, parts.concat()).unwrap();
    let error = error(folder.path());
    assert!(error.contains(expected), "{error}");
}

#[test]
fn tensors_that_share_bytes_are_an_error() {
    let (one, other) = ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight");
    check_header(|header| header[other] = header[one].clone(), &format!("tensors {one} and {other} overlap"));
}

#[test]
fn weights_that_are_no_floating_point_numbers_are_an_error() {
    let norm = "model.norm.weight";
    check_header(|header| header[norm]["dtype"] = json!("I32"), "tensor model.norm.weight has type I32");
}

/// Nothing is made of a width that no layer has.
#[test]
fn a_width_that_no_layer_has_costs_nothing() {
    let folder = copy("qwen3-moe");
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let widest = |config: &Value| {
        fs::write(&path, config.to_string()).unwrap();
        Config::read(folder.path()).unwrap().widest_inner()
    };
    config["intermediate_size"] = json!(1 << 28);
    assert_eq!(widest(&config), 1 << 28);
    config["mlp_only_layers"] = json!([]);
    assert_eq!(widest(&config), 20);
}

#[test]
fn a_broken_template_is_an_error() {
    let folder = copy("qwen2");
    fs::write(folder.path().join("chat_template.jinja"), "{% if %}").unwrap();
    assert!(error(folder.path()).contains("chat_template.jinja: the chat template does not compile"));
}

#[test]
fn fingerprints_tell_models_apart() {
    let fingerprint = |folder: &Path| load(folder).card().fingerprint().clone();
    let one = fingerprint(&fixture("qwen2"));
    assert_eq!(one, fingerprint(copy("qwen2").path()));
    assert_ne!(one, fingerprint(&fixture("qwen2-untied")));
    let folder = copy("qwen2");
    fs::write(folder.path().join("chat_template.jinja"), "other").unwrap();
    assert_ne!(one, fingerprint(folder.path()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Flipped bytes in a header give an error or another model, never a panic.
    #[test]
    fn damaged_headers_never_panic(at in 0_usize..3000, value in any::<u8>()) {
        let folder = copy("qwen2");
        let path = folder.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        bytes[at] = value;
        fs::write(&path, bytes).unwrap();
        let paths = ModelPaths { model_path: folder.path().to_owned(), tokenizer_path: None };
        drop(Model::load(&paths, &LoadOptions { threads: 1, ..LoadOptions::default() }));
    }
}
