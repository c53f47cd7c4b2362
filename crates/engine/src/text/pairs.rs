//! Tokenizers that lie as vocab.json and merges.txt, as GPT-2 and DialoGPT have them: written as the
//! tokenizer.json that transformers makes of them.
//!
//! Never here: any other form of tokenizer, or how one works.

use std::path::Path;

use serde_json::{Value, json};

use crate::error::LoadError;

/// The token that ends a text.
const END: &str = "<|endoftext|>";

/// The tokenizer.json of a folder with both files, or none.
pub(crate) fn tokenizer_json(folder: &Path) -> Result<Option<Vec<u8>>, LoadError> {
    let (vocabulary, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    if !vocabulary.exists() || !merges.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(&vocabulary).map_err(|source| LoadError::Read { path: vocabulary.clone(), source })?;
    let tokens: Value =
        serde_json::from_slice(&bytes).map_err(|source| LoadError::Json { path: vocabulary, source })?;
    let text = std::fs::read_to_string(&merges).map_err(|source| LoadError::Read { path: merges, source })?;
    let lines = text.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
    let end = tokens.get(END).map(|id| {
        json!({
            "id": id, "content": END, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    });
    let levels = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let whole = json!({
        "version": "1.0",
        "added_tokens": end.into_iter().collect::<Vec<_>>(),
        "pre_tokenizer": levels,
        "decoder": levels,
        "model": {"type": "BPE", "vocab": tokens, "merges": lines.collect::<Vec<_>>()},
    });
    Ok(Some(whole.to_string().into_bytes()))
}
