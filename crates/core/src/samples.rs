//! The running text of a job with several samples, as one text to which all of them append: parts that name their
//! sample. A job with one sample has its text as it is.

/// Writes more text of a sample: its number, the bytes of text, and the text.
#[must_use]
pub fn part(sample: u32, text: &str) -> String {
    format!("{sample} {}\n{text}", text.len())
}

/// The parts that `log` begins with, each a sample and its text, and how many bytes they are; what is left is a part
/// that has not come whole.
#[must_use]
pub fn parts(log: &str) -> (Vec<(u32, &str)>, usize) {
    let (mut parts, mut taken) = (Vec::new(), 0);
    while let Some((sample, text, bytes)) = first(&log[taken..]) {
        parts.push((sample, text));
        taken += bytes;
    }
    (parts, taken)
}

fn first(log: &str) -> Option<(u32, &str, usize)> {
    let (head, rest) = log.split_once('\n')?;
    let (sample, bytes) = head.split_once(' ')?;
    let text = rest.get(..bytes.parse().ok()?)?;
    Some((sample.parse().ok()?, text, head.len() + 1 + text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_back_whatever_their_text_and_cut() {
        let written = [(0, "a\n1 2\n"), (12, "ü"), (0, ""), (3, "0 0\n")];
        let log: String = written.iter().map(|(sample, text)| part(*sample, text)).collect();
        assert_eq!(parts(&log), (written.to_vec(), log.len()));
        for cut in (0..log.len()).filter(|cut| log.is_char_boundary(*cut)) {
            let (before, taken) = parts(&log[..cut]);
            let (after, _) = parts(&log[taken..]);
            assert_eq!([before, after].concat(), written, "cut at {cut}");
        }
    }
}
