//! The form of a text: what is compiled from a JSON schema, a regular expression, a list of choices or a grammar, and
//! which tokens it lets come next. llguidance does the work.
//!
//! Never here: logits, requests. Whoever admits a request checks its form with [`Compiler::of_bytes`], without any
//! model; an engine compiles it again for the tokens of its model.

#[cfg(test)]
mod tests;
mod tokens;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{SimpleVob, TokEnv};
use llguidance::{Matcher, ParserFactory};
use std::sync::{Mutex, PoisonError};

pub use tokens::{Tokenize, Vocabulary};

/// What a text must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// A JSON value that this JSON schema (as JSON text) allows.
    JsonSchema(String),
    /// The whole text matches this regular expression.
    Regex(String),
    /// One of these.
    Choice(Vec<String>),
    /// A sentence of this grammar in Lark's notation.
    Lark(String),
}

/// Why a form cannot be used, in the words of the parser.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FormError(String);

impl FormError {
    fn new(error: &dyn std::fmt::Display) -> Self {
        /// Parsers quote what they read.
        const BYTES_MAX: usize = 1_024;
        let mut message = error.to_string();
        message.truncate(message.floor_char_boundary(BYTES_MAX));
        Self(message)
    }
}

impl Form {
    fn grammar(&self) -> Result<TopLevelGrammar, FormError> {
        Ok(match self {
            Self::JsonSchema(schema) => {
                let schema: serde_json::Value = serde_json::from_str(schema).map_err(|error| FormError::new(&error))?;
                if !schema.is_object() && !schema.is_boolean() {
                    return Err(FormError::new(&"a JSON schema is an object"));
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Choice(choices) => {
                let choices: Vec<String> = choices.iter().map(|choice| escaped(choice)).collect();
                TopLevelGrammar::from_regex(&choices.join("|"))
            }
            Self::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        })
    }
}

/// A text as a regular expression that it alone matches.
fn escaped(text: &str) -> String {
    let escape = |letter: char| r"\.+*?()|[]{}^$#&-~/".contains(letter).then_some('\\');
    text.chars().flat_map(|letter| escape(letter).into_iter().chain([letter])).collect()
}

/// Forms that are kept compiled.
const KEPT: usize = 32;

/// Compiles forms for one vocabulary; those used last are kept.
pub struct Compiler {
    factory: ParserFactory,
    /// By the time of use, the last one at the end.
    kept: Mutex<Vec<(Form, Guide)>>,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").finish_non_exhaustive()
    }
}

impl Compiler {
    /// A compiler for the tokens of a model.
    ///
    /// # Errors
    /// When llguidance cannot use them.
    pub fn new(vocabulary: Vocabulary) -> Result<Self, FormError> {
        Self::of(&vocabulary.into_env())
    }

    /// A compiler whose tokens are single bytes, to check forms with.
    ///
    /// # Errors
    /// Never, short of a defect of llguidance.
    pub fn of_bytes() -> Result<Self, FormError> {
        Self::of(&llguidance::toktrie::ApproximateTokEnv::single_byte_env())
    }

    fn of(env: &TokEnv) -> Result<Self, FormError> {
        let mut factory = ParserFactory::new_simple(env).map_err(|error| FormError::new(&error))?;
        factory.quiet();
        // Errors go to whoever sent the form, who knows it.
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory, kept: Mutex::default() })
    }

    /// What leads a text along a form, at its beginning. Takes milliseconds for a form that is not kept.
    ///
    /// # Errors
    /// When the form is malformed, or too large.
    pub fn compile(&self, form: &Form) -> Result<Guide, FormError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = kept.iter().position(|(known, _)| known == form) {
            let entry = kept.remove(index);
            let guide = entry.1.fork();
            kept.push(entry);
            return Ok(guide);
        }
        drop(kept);
        let grammar = form.grammar()?;
        let parser =
            llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| self.factory.create_parser(grammar)));
        let matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(FormError::new(&error));
        }
        let guide = Guide(matcher);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push((form.clone(), guide.fork()));
        Ok(guide)
    }
}

/// Leads one text along its form, token by token.
pub struct Guide(Matcher);

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").finish_non_exhaustive()
    }
}

/// Which tokens may come next.
#[derive(Debug)]
pub struct Mask(SimpleVob);

impl Mask {
    /// Whether a token may.
    #[must_use]
    pub fn allows(&self, token: u32) -> bool {
        usize::try_from(token).is_ok_and(|index| index < self.0.len()) && self.0.is_allowed(token)
    }
}

impl Guide {
    /// The same place of the same text, to go on from by itself.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self(self.0.deep_clone())
    }

    /// Which tokens may come next. Among them is the vocabulary's end token where the text may end.
    ///
    /// # Errors
    /// When a limit is exceeded.
    pub fn mask(&mut self) -> Result<Mask, FormError> {
        self.0.compute_mask_or_eos().map(Mask).map_err(|error| FormError::new(&error))
    }

    /// Takes the next token.
    ///
    /// # Errors
    /// When it may not come here.
    pub fn take(&mut self, token: u32) -> Result<(), FormError> {
        self.0.consume_token(token).map_err(|error| FormError::new(&error))
    }

    /// Takes the tokens that must come next whatever a model says, and returns them.
    pub fn take_forced(&mut self) -> Vec<u32> {
        if self.is_whole() { Vec::new() } else { self.0.consume_ff_tokens() }
    }

    /// Whether nothing more can come.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.0.is_stopped()
    }
}
