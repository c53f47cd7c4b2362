//! Which items of a batch a refusal names, where it says so in words alone. Never here: refusals that name lines (`openai`).

/// What stands before the place of an item, counted from 0: Anthropic names fields of a request as `requests.3.params`,
/// Google as `batch.input_config.requests.requests[3].request`.
const SIGNS: [&str; 2] = ["requests.", "requests["];

/// The places of the items that a message names, each once.
pub(super) fn named(message: &str) -> Vec<usize> {
    let behind = |sign: &'static str| message.match_indices(sign).map(move |(at, _)| &message[at + sign.len()..]);
    let number = |text: &str| {
        let (digits, rest) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        // Else it is part of something else, such as a number of requests.
        digits.parse::<usize>().ok().filter(|_| rest.starts_with(['.', ']', ':']))
    };
    let mut places: Vec<usize> = SIGNS.into_iter().flat_map(behind).filter_map(number).collect();
    places.sort_unstable();
    places.dedup();
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(message: &str, expect: &[usize]) {
        assert_eq!(named(message), expect, "{message}");
    }

    #[test]
    fn an_item_is_named_by_its_place() {
        check("requests.3.custom_id: String should match pattern", &[3]);
        check("requests.12.params.max_tokens: Field required; requests.3: x; requests.12.params.model: y", &[3, 12]);
        check("Invalid value at 'batch.input_config.requests.requests[7].request.contents[0]' (oneof)", &[7]);
    }

    #[test]
    fn what_names_no_item_does_not() {
        check("", &[]);
        check("requests", &[]);
        check("too many requests. 100000 are allowed", &[]);
        check("at most requests.100000 of them", &[]);
        check("requests: Field required", &[]);
        check("requests[x]", &[]);
        check("requests.99999999999999999999999999.params", &[]);
    }
}
