//! Ends a text before the first of its stop strings, whether or not the provider did. Providers take few of them, and
//! some take none.

/// Takes a text in pieces and gives back what is certain to come before any stop string.
#[derive(Clone, Debug)]
pub struct StopCut {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopCut {
    /// A cut at the first of `stops`.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new(), stopped: false }
    }

    /// True once a stop string has come.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Takes more text and returns what of it, and of what was held back, is certain.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        // The one that is complete first, so that the borders of pieces do not matter.
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop.len())));
        if let Some((at, _)) = found.min_by_key(|(at, length)| (at + length, *at)) {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let uncertain = self.held.split_off(self.held.len() - self.uncertain_bytes());
        std::mem::replace(&mut self.held, uncertain)
    }

    /// What was held back, when no more text comes.
    pub fn end(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The length of the longest end of what is held that a stop string begins with.
    fn uncertain_bytes(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0).saturating_sub(1);
        let from = self.held.len().saturating_sub(longest);
        let starts = self.held.char_indices().map(|(at, _)| at).filter(|at| *at >= from);
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        starts.into_iter().find(begins).map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut cut = StopCut::new(&stops);
        let mut text: String = pieces.iter().map(|piece| cut.push(piece)).collect();
        text.push_str(&cut.end());
        (text, cut.stopped())
    }

    fn check(stops: &[&str], pieces: &[&str], expect: &str, stopped: bool) {
        assert_eq!(cut(stops, pieces), (expect.to_owned(), stopped));
    }

    #[test]
    fn the_text_ends_before_the_first_stop_string() {
        check(&["END"], &["a END b"], "a ", true);
        check(&["END"], &["a E", "N", "D b", "c"], "a ", true);
        check(&["b", "a"], &["xab"], "x", true);
        check(&["é!"], &["aé", "!b"], "a", true);
    }

    #[test]
    fn text_that_only_looked_like_a_stop_string_is_kept() {
        check(&["END"], &["a EN", "ding"], "a ENding", false);
        check(&["END"], &["a EN"], "a EN", false);
        check(&[], &["a"], "a", false);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[abé]{0,20}", a in "[abé]{1,4}", b in "[abé]{1,2}", at in 0_usize..20) {
            let at = text.floor_char_boundary(at);
            prop_assert_eq!(cut(&[&a, &b], &[&text]), cut(&[&a, &b], &[&text[..at], &text[at..]]));
        }
    }
}
