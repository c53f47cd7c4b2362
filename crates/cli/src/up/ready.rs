//! The line by which a daemon says where it can be reached, and the one that `up` prints.

/// Where a daemon can be reached. What it does not serve is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Places {
    pub(crate) grpc: String,
    pub(crate) http: String,
}

/// Reads `ready grpc=HOST:PORT http=HOST:PORT`; `None` for any other line.
pub(crate) fn parse(line: &str) -> Option<Places> {
    let mut words = line.split_whitespace();
    if words.next() != Some("ready") {
        return None;
    }
    let mut places = Places::default();
    for (name, place) in words.filter_map(|word| word.split_once('=')) {
        match name {
            "grpc" => place.clone_into(&mut places.grpc),
            "http" => place.clone_into(&mut places.http),
            // A place of a later version.
            _ => {}
        }
    }
    Some(places)
}

/// The line that `up` prints.
pub(crate) fn line(scheduler: &Places, redis_url: &str) -> String {
    format!("ready grpc={} http={} redis={redis_url}", scheduler.grpc, scheduler.http)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ready_line_is_read() {
        let places = Places { grpc: "127.0.0.1:5".to_owned(), http: "[::1]:6".to_owned() };
        assert_eq!(parse("ready grpc=127.0.0.1:5 http=[::1]:6"), Some(places.clone()));
        assert_eq!(parse("ready http=[::1]:6 new=x"), Some(Places { grpc: String::new(), ..places.clone() }));
        assert_eq!(parse("already"), None);
        assert_eq!(parse(""), None);
        assert_eq!(line(&places, "redis://r"), "ready grpc=127.0.0.1:5 http=[::1]:6 redis=redis://r");
    }
}
