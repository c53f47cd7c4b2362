//! The tokenizer of a GGUF file, told as a tokenizer.json and a tokenizer_config.json.
//!
//! Never here: encoding. Two kinds are read: byte-level BPE (`gpt2`), whose way of splitting text has a name in the
//! file, and SentencePiece BPE (`llama`), whose merges follow from the scores of its pieces.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use crate::error::LoadError;
use crate::gguf::Metadata;

/// How byte-level BPE splits text before it merges.
struct Splitting {
    /// The values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// The patterns, each of which splits what those before it left.
    patterns: &'static [&'static str],
    /// Whether a piece that is a token as a whole is taken as it is.
    whole_pieces: bool,
    /// Whether text is composed first (Unicode NFC).
    composed: bool,
    /// Whether a begin token is added when the file does not say.
    begins: bool,
}

/// A row that does nothing but split.
const PLAIN: Splitting = Splitting { names: &[], patterns: &[], whole_pieces: false, composed: false, begins: false };

/// GPT-2's own.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The table of splittings; the patterns are those of the models' tokenizer.json, and for `default` and `falcon` those of
/// llama.cpp (`llama-vocab.cpp`), by which such files are made.
const SPLITTINGS: &[Splitting] = &[
    Splitting {
        names: &["qwen2", "deepseek-r1-qwen"],
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        composed: true,
        ..PLAIN
    },
    Splitting {
        names: &["qwen35"],
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        ..PLAIN
    },
    Splitting {
        names: &["llama-bpe", "llama3", "llama-v3", "smaug-bpe", "pixtral", "falcon3"],
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        whole_pieces: true,
        begins: true,
        ..PLAIN
    },
    Splitting {
        names: &["tekken"],
        patterns: &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        whole_pieces: true,
        begins: true,
        ..PLAIN
    },
    Splitting { names: &["gpt-2", "mpt", "olmo", "jais"], patterns: &[WORDS], ..PLAIN },
    // SmolLM and others that write digits one by one.
    Splitting {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        patterns: &[r"\p{N}", WORDS],
        ..PLAIN
    },
    Splitting {
        names: &["deepseek-coder"],
        patterns: &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+",
            r"\p{N}",
        ],
        ..PLAIN
    },
    Splitting { names: &["falcon"], patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", WORDS, "[0-9][0-9][0-9]"], ..PLAIN },
    Splitting {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
        ..PLAIN
    },
];

/// All names of splittings.
pub(super) fn splittings() -> impl Iterator<Item = &'static str> {
    SPLITTINGS.iter().flat_map(|row| row.names).copied()
}

/// What a token is (`tokenizer.ggml.token_type`).
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;
const UNUSED: f64 = 5.0;

/// The space of SentencePiece.
const SPACE: &str = "\u{2581}";

/// Tokens that end an assistant's turn, where the template writes them and the file does not say it.
const TURN_ENDS: &[&str] = &["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"];

/// The vocabulary of a file.
struct Vocabulary<'a> {
    metadata: &'a Metadata,
    tokens: &'a [String],
    types: Option<&'a [f64]>,
}

impl<'a> Vocabulary<'a> {
    fn of(metadata: &'a Metadata) -> Result<Self, LoadError> {
        let key = "tokenizer.ggml.tokens";
        let tokens = metadata.texts(key)?.ok_or_else(|| metadata.wrong(key, "is missing"))?;
        let key = "tokenizer.ggml.token_type";
        let types = metadata.numbers(key)?;
        match types.map(<[_]>::len) {
            Some(count) if count != tokens.len() => {
                Err(metadata.wrong(key, format!("has {count} entries for {} tokens", tokens.len())))
            }
            _ => Ok(Self { metadata, tokens, types }),
        }
    }

    /// The token that the file names as its `kind` (`bos`, `eos`, ...).
    fn named(&self, kind: &str) -> Result<Option<&'a str>, LoadError> {
        let key = format!("tokenizer.ggml.{kind}_token_id");
        let Some(id) = self.metadata.whole(&key)? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        token.map(|token| Some(token.as_str())).ok_or_else(|| {
            self.metadata.wrong(&key, format!("is {id}, but there are only {} tokens", self.tokens.len()))
        })
    }

    fn is(&self, id: usize, kind: f64) -> bool {
        self.types.is_some_and(|types| types[id] == kind)
    }

    /// All but the names that fill up ids which the model's own tokenizer does not have.
    fn ids(&self) -> Map<String, Json> {
        let used = self.tokens.iter().enumerate().filter(|(id, _)| !self.is(*id, UNUSED));
        used.map(|(id, token)| (token.clone(), id.into())).collect()
    }

    /// The tokens that are found in a text before it is split.
    fn added(&self) -> Vec<Json> {
        let special = |id| self.is(id, CONTROL) || self.is(id, UNKNOWN);
        let added = (0..self.tokens.len()).filter(|id| special(*id) || self.is(*id, USER_DEFINED));
        added
            .filter(|id| !self.tokens[*id].is_empty())
            .map(|id| {
                json!({
                    "id": id, "content": self.tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special(id),
                })
            })
            .collect()
    }

    /// Adds the begin and end tokens that the file asks for, or that its kind of tokenizer has when it is silent.
    fn post_processor(&self, begins: bool) -> Result<Json, LoadError> {
        let flag = |key: &str, default| Ok::<_, LoadError>(self.metadata.flag(key)?.unwrap_or(default));
        let begin = flag("tokenizer.ggml.add_bos_token", begins)?.then(|| self.named("bos")).transpose()?.flatten();
        let end = flag("tokenizer.ggml.add_eos_token", false)?.then(|| self.named("eos")).transpose()?.flatten();
        let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
        let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        let template = |names: &[&str]| {
            let parts = names.iter().flat_map(|name| {
                let (begin, end) = (begin.map(special), end.map(special));
                begin.into_iter().chain([sequence(name)]).chain(end)
            });
            parts.collect::<Vec<_>>()
        };
        let tokens: Map<_, _> = [("bos", begin), ("eos", end)]
            .into_iter()
            .filter_map(|(kind, token)| Some((kind, token?)))
            .map(|(kind, token)| {
                let id = self.metadata.whole(&format!("tokenizer.ggml.{kind}_token_id"))?;
                Ok((token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
            })
            .collect::<Result<_, LoadError>>()?;
        Ok(json!({
            "type": "TemplateProcessing",
            "single": template(&["A"]),
            "pair": template(&["A", "B"]),
            "special_tokens": tokens,
        }))
    }
}

/// What tokenizer.json would say.
pub(super) fn tokenizer(metadata: &Metadata) -> Result<Json, LoadError> {
    let vocabulary = Vocabulary::of(metadata)?;
    let key = "tokenizer.ggml.model";
    let parts = match metadata.text(key)? {
        Some("gpt2") => byte_level(&vocabulary)?,
        Some("llama") => sentence_pieces(&vocabulary)?,
        Some(other) => return Err(metadata.wrong(key, format!("is {other}; read are: gpt2, llama"))),
        None => return Err(metadata.wrong(key, "is missing")),
    };
    let Parts { model, normalizer, pre_tokenizer, decoder, begins } = parts;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": vocabulary.post_processor(begins)?,
        "decoder": decoder,
        "model": model,
    }))
}

/// What differs between kinds of tokenizers.
struct Parts {
    model: Json,
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    begins: bool,
}

fn byte_level(vocabulary: &Vocabulary<'_>) -> Result<Parts, LoadError> {
    let metadata = vocabulary.metadata;
    let key = "tokenizer.ggml.pre";
    let known = || splittings().collect::<Vec<_>>().join(", ");
    let name = metadata.text(key)?.ok_or_else(|| {
        metadata
            .wrong(key, format!("is missing: convert the model again with a newer llama.cpp; read are: {}", known()))
    })?;
    let row = SPLITTINGS.iter().find(|row| row.names.contains(&name));
    let row = row.ok_or_else(|| metadata.wrong(key, format!("is {name}; read are: {}", known())))?;
    let key = "tokenizer.ggml.merges";
    let merges = metadata.texts(key)?.ok_or_else(|| metadata.wrong(key, "is missing"))?;
    let pairs = merges.iter().map(|merge| {
        let pair = merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty());
        pair.map(|(left, right)| json!([left, right]))
            .ok_or_else(|| metadata.wrong(key, format!("has {merge:?}, not two parts")))
    });
    let merges = pairs.collect::<Result<Vec<_>, _>>()?;
    let bytes = |splits: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": splits});
    let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let splits: Vec<Json> = row.patterns.iter().map(split).chain([bytes(false)]).collect();
    Ok(Parts {
        model: json!({
            "type": "BPE", "byte_fallback": false, "fuse_unk": false, "ignore_merges": row.whole_pieces,
            "vocab": vocabulary.ids(), "merges": merges,
        }),
        normalizer: if row.composed { json!({"type": "NFC"}) } else { Json::Null },
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": splits}),
        decoder: bytes(true),
        begins: row.begins,
    })
}

fn sentence_pieces(vocabulary: &Vocabulary<'_>) -> Result<Parts, LoadError> {
    let metadata = vocabulary.metadata;
    let key = "tokenizer.ggml.scores";
    let scores = metadata.numbers(key)?.ok_or_else(|| metadata.wrong(key, "is missing"))?;
    if scores.len() != vocabulary.tokens.len() {
        let (found, tokens) = (scores.len(), vocabulary.tokens.len());
        return Err(metadata.wrong(key, format!("has {found} entries for {tokens} tokens")));
    }
    let space_first = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if space_first {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Parts {
        model: json!({
            "type": "BPE", "byte_fallback": true, "fuse_unk": true, "ignore_merges": false,
            "unk_token": vocabulary.named("unknown")?,
            "vocab": vocabulary.ids(), "merges": merges(vocabulary, scores),
        }),
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        begins: true,
    })
}

/// A longer piece is a word that no merge leads to, or a broken file: trying its cuts would take for ever.
const PIECE_BYTES_MAX: usize = 1 << 10;

/// Every way to cut a piece into two others is a merge; merges into pieces of a higher score come first, and among
/// those of one piece the one with the earlier parts, as `transformers` makes them from a SentencePiece model.
fn merges(vocabulary: &Vocabulary<'_>, scores: &[f64]) -> Vec<Json> {
    // Only what text can become takes part.
    let usual = |id: &usize| ![UNKNOWN, CONTROL, USER_DEFINED, UNUSED].iter().any(|kind| vocabulary.is(*id, *kind));
    let usual_ids = || (0..vocabulary.tokens.len()).filter(usual);
    let ids: HashMap<&str, usize> = usual_ids().map(|id| (vocabulary.tokens[id].as_str(), id)).collect();
    let mut merges = Vec::new();
    for id in usual_ids().filter(|id| vocabulary.tokens[*id].len() <= PIECE_BYTES_MAX) {
        let token = vocabulary.tokens[id].as_str();
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut ways: Vec<(usize, usize)> =
            cuts.filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?))).collect();
        ways.sort_unstable();
        merges.extend(ways.into_iter().map(|way| (scores[id], way)));
    }
    merges.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    let text = |id: usize| vocabulary.tokens[id].as_str();
    merges.into_iter().map(|(_, (left, right))| json!([text(left), text(right)])).collect()
}

/// What tokenizer_config.json would say.
pub(super) fn settings(metadata: &Metadata) -> Result<Json, LoadError> {
    let vocabulary = Vocabulary::of(metadata)?;
    let template = metadata.text("tokenizer.chat_template")?;
    let mut settings = Map::new();
    for (kind, field) in [("bos", "bos_token"), ("unknown", "unk_token"), ("padding", "pad_token")] {
        if let Some(token) = vocabulary.named(kind)? {
            settings.insert(field.to_owned(), token.into());
        }
    }
    // The token that ends a turn is also what templates mean by the end token; a base model's own is another.
    let written = |token: &&&str| template.is_some_and(|template| template.contains(**token));
    let end = match (vocabulary.named("eot")?, vocabulary.named("eos")?) {
        (Some(turn), _) => Some(turn),
        (None, Some(end)) if template.is_some_and(|template| template.contains(end)) => Some(end),
        (None, end) => {
            let known = |token: &&&str| vocabulary.tokens.iter().any(|known| known == **token);
            TURN_ENDS.iter().find(|token| written(token) && known(token)).copied().or(end)
        }
    };
    if let Some(end) = end {
        settings.insert("eos_token".to_owned(), end.into());
    }
    if let Some(template) = template {
        settings.insert("chat_template".to_owned(), template.into());
    }
    Ok(Json::Object(settings))
}
