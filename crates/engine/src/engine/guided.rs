//! Texts that must have a form: which tokens may come next is computed on a thread of its own, beside the step that
//! computes their logits.
//!
//! Never here: what a form is (that is the grammar's), sampling.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};

use genmill_grammar::{FormError, Guide, Mask};

use crate::sampler::FORBIDDEN;

/// The thread that computes masks. It ends when nobody can ask it any more.
#[derive(Clone)]
pub(super) struct Masker(Sender<Errand>);

/// A guide on its way, and to whom it goes back with the mask.
struct Errand {
    guide: Guide,
    back: Sender<Masked>,
}

type Masked = (Guide, Result<Mask, FormError>);

impl Masker {
    pub(super) fn start() -> std::io::Result<Self> {
        let (errands, waiting) = channel::<Errand>();
        std::thread::Builder::new().name("genmill-grammar".to_owned()).spawn(move || {
            for Errand { mut guide, back } in waiting {
                // A grammar that panics fails its own text: whoever waits finds nobody to answer.
                let Ok(mask) = catch_unwind(AssertUnwindSafe(|| guide.mask())) else { continue };
                // Whoever has ended meanwhile needs no mask.
                drop(back.send((guide, mask)));
            }
        })?;
        Ok(Self(errands))
    }
}

/// The form of one sequence: its guide is away, at work on the next token's mask.
pub(super) struct Guided {
    masker: Masker,
    /// Where the guide comes back.
    away: Receiver<Masked>,
    /// The guide, after the mask was used and before the token is known.
    here: Option<Guide>,
}

/// What follows a token.
pub(super) struct After {
    /// These tokens, whatever the model says.
    pub(super) forced: Vec<u32>,
    /// The text is whole with them.
    pub(super) whole: bool,
}

const THREAD_LOST: &str = "its masks cannot be computed";

impl Guided {
    /// Sets out from the beginning of a text.
    pub(super) fn new(masker: Masker, guide: Guide) -> Self {
        let away = send(&masker, guide);
        Self { masker, away, here: None }
    }

    /// Forbids what may not come next. `ends` are the tokens that end the text: they may come where it may end.
    pub(super) fn apply(&mut self, logits: &mut [f32], ends: &[u32], end: u32) -> Result<(), String> {
        let mask = self.mask()?;
        let may_end = mask.allows(end);
        for (token, logit) in (0..).zip(logits) {
            if !(mask.allows(token) || may_end && ends.contains(&token)) {
                *logit = FORBIDDEN;
            }
        }
        Ok(())
    }

    /// The same as a bit for each token of a vocabulary that may come, 32 to a word.
    pub(super) fn allowed(&mut self, vocabulary: usize, ends: &[u32], end: u32) -> Result<Vec<u32>, String> {
        let mask = self.mask()?;
        let ends = if mask.allows(end) { ends } else { &[] };
        let words = (0..)
            .take(vocabulary.div_ceil(32))
            .map(|word: u32| (0..32).fold(0, |bits, bit| bits | u32::from(mask.allows(32 * word + bit)) << bit));
        let mut words: Vec<u32> = words.collect();
        for end in ends {
            if let Some(word) = words.get_mut(*end as usize / 32) {
                *word |= 1 << (end % 32);
            }
        }
        Ok(words)
    }

    fn mask(&mut self) -> Result<Mask, String> {
        let (guide, mask) = self.away.recv().map_err(|_| THREAD_LOST.to_owned())?;
        self.here = Some(guide);
        mask.map_err(|error| error.to_string())
    }

    /// Takes the token that was chosen, and sends the guide away again unless the text is whole.
    pub(super) fn take(&mut self, token: u32) -> Result<After, String> {
        let Some(mut guide) = self.here.take() else { return Err(THREAD_LOST.to_owned()) };
        guide.take(token).map_err(|error| error.to_string())?;
        let forced = guide.take_forced();
        let whole = guide.is_whole();
        if !whole {
            self.away = send(&self.masker, guide);
        }
        Ok(After { forced, whole })
    }
}

fn send(masker: &Masker, guide: Guide) -> Receiver<Masked> {
    let (back, away) = channel();
    // A thread that is gone is found out when the answer is waited for.
    drop(masker.0.send(Errand { guide, back }));
    away
}
