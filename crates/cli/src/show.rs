//! Parts of a job as people read them: states, times, money.

use crate::exit::Ending;
use genmill_client::{Error, v1};
use genmill_core::money::Nanodollars;

/// What stands for a value that is not there.
pub(crate) const NOTHING: &str = "-";

/// A state by the name that filters take.
pub(crate) fn state(state: v1::JobState) -> String {
    state.as_str_name().trim_start_matches("JOB_STATE_").to_lowercase()
}

/// A point in time, to the second.
pub(crate) fn time(at: Option<&prost_types::Timestamp>) -> String {
    at.map_or_else(|| NOTHING.to_owned(), |at| prost_types::Timestamp { seconds: at.seconds, nanos: 0 }.to_string())
}

/// An amount of money, behind a `~` when it is estimated.
pub(crate) fn cost(cost: Option<&v1::Cost>) -> String {
    cost.map_or_else(|| "unknown".to_owned(), |cost| money(cost.nanodollars, cost.estimated))
}

/// An amount of money in nanodollars.
pub(crate) fn money(nanodollars: u64, estimated: bool) -> String {
    format!("{}{}", if estimated { "~" } else { "" }, Nanodollars(nanodollars))
}

/// What a job has cost: nothing yet before its first attempt.
pub(crate) fn cost_of(job: &v1::Job) -> String {
    if job.attempts == 0 { NOTHING.to_owned() } else { cost(job.cost.as_ref()) }
}

/// Milliseconds, in the unit that reads best.
pub(crate) fn milliseconds(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        _ => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1_000),
    }
}

/// How the command ends for a job that has ended; says on standard error why there is no result.
pub(crate) fn ending(job: v1::Job) -> Ending {
    if job.state() == v1::JobState::Succeeded {
        return Ending::Done;
    }
    crate::output::note(&format!("error: {}", Error::JobFailed { job: Box::new(job) }));
    Ending::JobFailed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_well() {
        assert_eq!(state(v1::JobState::Queued), "queued");
        assert_eq!(time(None), "-");
        let at = prost_types::Timestamp { seconds: 1, nanos: 5 };
        assert_eq!(time(Some(&at)), "1970-01-01T00:00:01Z");
        assert_eq!(cost(None), "unknown");
        let about = |estimated| cost(Some(&v1::Cost { nanodollars: 1_500, estimated }));
        assert_eq!([about(false), about(true)], ["$0.0000015", "~$0.0000015"]);
        assert_eq!(cost_of(&v1::Job::default()), "-");
        assert_eq!(cost_of(&v1::Job { attempts: 1, ..v1::Job::default() }), "unknown");
        assert_eq!(milliseconds(999), "999 ms");
        assert_eq!(milliseconds(1_550), "1.5 s");
        assert_eq!(milliseconds(61_000), "1 min 1 s");
    }

    #[test]
    fn every_state_has_the_name_that_a_filter_takes() {
        for known in genmill_core::state::State::ALL {
            assert_eq!(state(genmill_wire::to_pb::state(known)), known.name());
        }
    }
}
