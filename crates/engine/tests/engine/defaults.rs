//! What a config.json that states nothing means: the defaults of transformers 5.23.

use genmill_engine::config::Config;
use genmill_engine::rope::Scaling;
use serde_json::{Value, json};
use tempfile::TempDir;

fn config(architecture: &str) -> Config {
    read(&json!({ "architectures": [architecture] }))
}

fn read(config: &Value) -> Config {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    Config::read(folder.path()).unwrap()
}

/// Vocabulary, hidden width, layers, heads, key heads, head width, inner width and context; then the
/// bases of the rotations.
fn check(architecture: &str, sizes: [usize; 8], thetas: &[f64]) {
    let config = config(architecture);
    let Config { vocabulary, hidden, layers, heads, kv_heads, head_dim, inner, context, .. } = config;
    let found = [vocabulary, hidden, layers, heads, kv_heads, head_dim, inner, context];
    assert_eq!(found, sizes, "{architecture}");
    assert!(config.ropes.iter().map(|rope| rope.theta).eq(thetas.iter().copied()), "{architecture}");
    assert!(config.ropes.iter().all(|rope| rope.scaling == Scaling::None && rope.width == head_dim));
}

#[test]
fn sizes() {
    check("LlamaForCausalLM", [32_000, 4096, 32, 32, 32, 128, 11_008, 2048], &[1e4]);
    check("MistralForCausalLM", [32_000, 4096, 32, 32, 8, 128, 14_336, 131_072], &[1e4]);
    check("MixtralForCausalLM", [32_000, 4096, 32, 32, 8, 128, 14_336, 131_072], &[1e6]);
    check("Qwen2ForCausalLM", [151_936, 4096, 32, 32, 32, 128, 22_016, 32_768], &[1e4]);
    check("Qwen3ForCausalLM", [151_936, 4096, 32, 32, 32, 128, 22_016, 32_768], &[1e4]);
    check("Qwen3MoeForCausalLM", [151_936, 2048, 24, 32, 4, 64, 6144, 32_768], &[1e4]);
    check("GemmaForCausalLM", [256_000, 3072, 28, 16, 16, 256, 24_576, 8192], &[1e4]);
    check("Gemma2ForCausalLM", [256_000, 2304, 26, 8, 4, 256, 9216, 8192], &[1e4]);
    check("Gemma3ForCausalLM", [262_208, 2304, 26, 8, 4, 256, 9216, 131_072], &[1e6, 1e4]);
    check("Gemma3ForConditionalGeneration", [262_208, 2304, 26, 8, 4, 256, 9216, 131_072], &[1e6, 1e4]);
    check("Phi3ForCausalLM", [32_064, 3072, 32, 32, 32, 96, 8192, 4096], &[1e4]);
    check("GPT2LMHeadModel", [50_257, 768, 12, 12, 12, 64, 3072, 1024], &[]);
}

#[test]
fn constants_ends_and_ties() {
    for (architecture, epsilon, tied, ends) in [
        ("LlamaForCausalLM", 1e-6, false, &[2][..]),
        ("MistralForCausalLM", 1e-6, false, &[2]),
        ("MixtralForCausalLM", 1e-5, false, &[2]),
        ("Qwen2ForCausalLM", 1e-6, false, &[]),
        ("Qwen3ForCausalLM", 1e-6, false, &[]),
        ("Qwen3MoeForCausalLM", 1e-6, false, &[]),
        ("GemmaForCausalLM", 1e-6, true, &[1]),
        ("Gemma2ForCausalLM", 1e-6, true, &[1]),
        ("Gemma3ForCausalLM", 1e-6, true, &[1]),
        ("Phi3ForCausalLM", 1e-5, false, &[32_000]),
        ("GPT2LMHeadModel", 1e-5, true, &[50_256]),
    ] {
        let config = config(architecture);
        assert_eq!((config.norm_epsilon, config.tied, config.end_tokens.as_slice()), (epsilon, tied, ends));
    }
}

#[test]
fn windows_caps_and_experts() {
    let windows = |architecture| {
        let config = config(architecture);
        [0, 1, 4, 5, 6].map(|layer| config.windows.tokens(layer).unwrap_or(0))
    };
    for open in ["LlamaForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "Phi3ForCausalLM"] {
        assert_eq!(windows(open), [0; 5]);
    }
    assert_eq!(windows("MistralForCausalLM"), [4096; 5]);
    assert_eq!(windows("Gemma2ForCausalLM"), [4096, 0, 4096, 0, 4096]);
    assert_eq!(windows("Gemma3ForCausalLM"), [4096, 4096, 4096, 0, 4096]);
    let gemma2 = config("Gemma2ForCausalLM");
    assert_eq!((gemma2.score_cap, gemma2.logit_cap, gemma2.score_scale(0)), (Some(50.0), Some(30.0), 0.0625));
    let gemma3 = config("Gemma3ForCausalLM");
    assert_eq!((gemma3.score_cap, gemma3.logit_cap), (None, None));
    let experts = |architecture| config(architecture).experts.map(|e| (e.count, e.chosen, e.inner, e.normalised));
    assert_eq!(experts("MixtralForCausalLM"), Some((8, 2, 14_336, true)));
    assert_eq!(experts("Qwen3MoeForCausalLM"), Some((128, 8, 768, false)));
}

/// Beyond the context it would stretch wavelengths; no sequence is longer.
#[test]
fn a_dynamic_rotation_is_the_plain_one() {
    let dynamic = read(&json!({
        "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
    }));
    assert_eq!((dynamic.context, &dynamic.ropes), (4096, &config("LlamaForCausalLM").ropes));
}
