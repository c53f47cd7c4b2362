//! A model's tokens as llguidance sees them.

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use std::sync::Arc;

/// Turns text into tokens.
pub type Tokenize = Box<dyn Fn(&str) -> Vec<u32> + Send + Sync>;

/// The tokens of a model.
pub struct Vocabulary {
    /// The bytes of each token by id; none: the token is no text, so it is never allowed.
    pub tokens: Vec<Vec<u8>>,
    /// The token that ends a text.
    pub end: u32,
    /// How the model's tokenizer writes text in the middle of another. `None` when a text's tokens depend on what stands before them: then no
    /// token is forced, only masked.
    pub tokenize: Option<Tokenize>,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("tokens", &self.tokens.len()).finish_non_exhaustive()
    }
}

impl Vocabulary {
    pub(crate) fn into_env(self) -> TokEnv {
        let Self { mut tokens, end, tokenize } = self;
        // The name of the end token, which llguidance keeps apart from text by the marker.
        if let Some(token) = usize::try_from(end).ok().and_then(|end| tokens.get_mut(end)) {
            *token = [&[TokTrie::SPECIAL_TOKEN_MARKER], b"<|end|>".as_slice()].concat();
        }
        let info = TokRxInfo::new(u32::try_from(tokens.len()).unwrap_or(u32::MAX), end);
        Arc::new(Environment { trie: TokTrie::from(&info, &tokens), tokenize })
    }
}

struct Environment {
    trie: TokTrie,
    tokenize: Option<Tokenize>,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let tokenized = self.tokenize.as_ref().map(|tokenize| self.trie.tokenize_with_greedy_fallback(bytes, tokenize));
        // A tokenizer that changes a text (composes letters, say) would force tokens of another one.
        let exact = tokenized.filter(|tokens| self.trie.decode_raw(tokens) == bytes);
        exact.unwrap_or_else(|| self.trie.greedy_tokenize(bytes))
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.tokenize.is_some()
    }
}
