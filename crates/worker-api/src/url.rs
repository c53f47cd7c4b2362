//! Texts as parts of URLs. Never here: whole URLs.

/// A text as one segment of a path, or one value of a query: everything that could mean something is escaped.
pub(crate) fn escaped(text: &str) -> String {
    escaped_but(text, b"")
}

/// The same, but for the bytes of `kept`.
pub(crate) fn escaped_but(text: &str, kept: &[u8]) -> String {
    let keeps = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || kept.contains(&byte);
    text.bytes().map(|byte| if keeps(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_one_segment() {
        assert_eq!(escaped("anthropic.claude-3-5-v1:0"), "anthropic.claude-3-5-v1%3A0");
        assert_eq!(escaped("arn:x/é?y=1"), "arn%3Ax%2F%C3%A9%3Fy%3D1");
    }

    #[test]
    fn a_segment_that_is_escaped_is_escaped_again() {
        assert_eq!(escaped_but("/model/a.b-v1%3A0/converse", b"/"), "/model/a.b-v1%253A0/converse");
    }
}
