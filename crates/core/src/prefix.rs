//! Which jobs begin alike, so that a worker can compute the common part once.

use crate::request::{ChatMessage, Input};
use serde::{Deserialize, Serialize};

/// Leading parts shorter than this are not worth a group: a few KV blocks are quickly computed again.
const BYTES_MIN: usize = 128;

/// What of a plain prompt counts as its leading part, when the prompt is longer.
const PROMPT_BYTES: usize = 256;

/// The hash of a prompt's leading part. Jobs of one local model that have the same one are fed next to each other.
/// A chance collision costs nothing but a place in the order: caches compare tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PrefixKey(pub u64);

impl PrefixKey {
    /// The key of an input: of a conversation everything before its last message (system text, few-shot examples), of a
    /// plain prompt its first 256 bytes. `None` when that is too little to be worth it.
    #[must_use]
    pub fn of(input: &Input) -> Option<Self> {
        match input {
            Input::Prompt(prompt) if prompt.len() > PROMPT_BYTES => {
                Some(Self(hash(prompt.as_bytes()[..PROMPT_BYTES].iter())))
            }
            Input::Prompt(_) => None,
            Input::Messages(messages) => Self::of_messages(messages),
        }
    }

    fn of_messages(messages: &[ChatMessage]) -> Option<Self> {
        let (last, before) = messages.split_last()?;
        if before.is_empty() {
            return Self::of(&Input::Prompt(last.content.clone()));
        }
        let bytes: usize = before.iter().map(|message| message.content.len()).sum();
        // The role and a byte that no text has keep messages apart.
        let parts = before
            .iter()
            .flat_map(|message| message.role.name().as_bytes().iter().chain(message.content.as_bytes()).chain(&[0xff]));
        (bytes >= BYTES_MIN).then(|| Self(hash(parts)))
    }
}

/// FNV-1a, 64 bits: the same everywhere and always, as stored keys must be
/// (<https://datatracker.ietf.org/doc/html/draft-eastlake-fnv>).
fn hash<'a>(bytes: impl Iterator<Item = &'a u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Role;

    fn prompt(text: &str) -> Option<PrefixKey> {
        PrefixKey::of(&Input::Prompt(text.to_owned()))
    }

    fn chat(messages: &[(Role, &str)]) -> Option<PrefixKey> {
        let message = |(role, content): &(Role, &str)| ChatMessage::new(*role, *content);
        PrefixKey::of(&Input::Messages(messages.iter().map(message).collect()))
    }

    #[test]
    fn prompts_with_the_same_beginning_share_a_key() {
        let examples = "Q: 1+1? A: 2\n".repeat(30);
        assert_eq!(prompt(&format!("{examples}Q: 2+2?")), prompt(&format!("{examples}Q: 3+3?")));
        assert_ne!(prompt(&format!("{examples}Q: 2+2?")), prompt(&format!("!{examples}Q: 2+2?")));
        assert_eq!(prompt("short"), None);
    }

    #[test]
    fn conversations_share_what_comes_before_the_last_message() {
        let system = "You answer in one word. ".repeat(10);
        let ask = |question| chat(&[(Role::System, &system), (Role::User, question)]);
        assert_eq!(ask("Yes?"), ask("No?"));
        assert!(ask("Yes?").is_some());
        assert_ne!(ask("Yes?"), chat(&[(Role::User, &system), (Role::User, "Yes?")]));
        assert_eq!(chat(&[(Role::System, "Be brief."), (Role::User, "Yes?")]), None);
    }
}
