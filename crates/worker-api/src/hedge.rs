//! A second call that goes out when the first one does not begin to answer, and which of the two counts.
//!
//! Never here: one call (`call`), and what its end means (`perform`).

mod delays;

use crate::call::Ended;
use crate::catalog::Endpoint;
use crate::collect::Collected;
use crate::perform::{Attempt, Performer, Ran, Tried, in_all};
use delays::{Delays, Percentile};
use genmill_core::attempt::{Outcome, Performed};
use genmill_core::gate::KeyId;
use genmill_core::job::JobSpec;
use genmill_core::model::{BadModelName, ModelName};
use genmill_daemon::config;
use genmill_worker::perform::Progress;
use genmill_worker::permits::Leave;
use std::future::pending;
use std::sync::OnceLock;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::sleep;

/// When second calls go out.
#[derive(Debug, Default)]
pub struct Hedges {
    rows: Vec<(Pattern, Hedge)>,
    delays: Delays,
}

/// When a second call goes out, and to which model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hedge {
    /// So long after the first, unless something else is learnt. `None`: not at all until then.
    pub after: Option<Duration>,
    /// When so many of the model's answers begin by then.
    pub share: Option<Percentile>,
    /// `None`: the same, with another key where there is one.
    pub to: Option<ModelName>,
}

/// The models that a row is about.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    One(ModelName),
    /// All whose names begin so.
    Beginning(String),
}

/// What is wrong with the configured second calls.
#[derive(Debug, thiserror::Error)]
pub enum BadHedge {
    /// A name is none of a model.
    #[error("api.hedging: `{name}` is not the name of a model with its prefix")]
    Name {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: BadModelName,
    },
    /// Every call would be made twice.
    #[error(
        "api.hedging, of {model}: set after_ms, the milliseconds after which a second call goes out, or after, such as \"p95\""
    )]
    AtOnce {
        /// The model.
        model: String,
    },
    /// What is to be learnt is none of a model's times.
    #[error("api.hedging, of {model}: after is a percentile from \"p1\" to \"p99\", not \"{after}\"")]
    Share {
        /// The model.
        model: String,
        /// What is set.
        after: String,
    },
}

impl Hedges {
    /// The second calls of a configuration.
    ///
    /// # Errors
    /// [`BadHedge`] when a row means nothing.
    pub fn new(settings: &[config::Hedge]) -> Result<Self, BadHedge> {
        let model =
            |name: &String| ModelName::parse(name).map_err(|source| BadHedge::Name { name: name.clone(), source });
        let row = |row: &config::Hedge| {
            let share = |after: &String| {
                let bad = || BadHedge::Share { model: row.model.clone(), after: after.clone() };
                Percentile::parse(after).ok_or_else(bad)
            };
            let share = row.after.as_ref().map(share).transpose()?;
            let after = (row.after_ms > 0).then(|| Duration::from_millis(row.after_ms));
            if after.is_none() && share.is_none() {
                return Err(BadHedge::AtOnce { model: row.model.clone() });
            }
            let pattern = match row.model.strip_suffix('*') {
                Some(beginning) => Pattern::Beginning(beginning.to_owned()),
                None => Pattern::One(model(&row.model)?),
            };
            let to = row.to.as_ref().map(model).transpose()?;
            Ok((pattern, Hedge { after, share, to }))
        };
        let rows = settings.iter().map(row).collect::<Result<_, _>>()?;
        Ok(Self { rows, delays: Delays::default() })
    }

    /// When a model's second call goes out: the first row that is about it counts.
    #[must_use]
    pub fn of(&self, model: &ModelName) -> Option<&Hedge> {
        let is_about = |pattern: &Pattern| match pattern {
            Pattern::One(one) => one == model,
            Pattern::Beginning(beginning) => model.as_str().starts_with(beginning),
        };
        self.rows.iter().find(|(pattern, _)| is_about(pattern)).map(|(_, hedge)| hedge)
    }

    /// Every model that is named as the second one.
    pub fn models(&self) -> impl Iterator<Item = &ModelName> {
        self.rows.iter().filter_map(|(_, hedge)| hedge.to.as_ref())
    }

    /// How long after the first call of `model` the second one goes out, by what is known now.
    fn delay(&self, hedge: &Hedge, model: &ModelName) -> Option<Duration> {
        hedge.share.and_then(|share| self.delays.of(model, share)).or(hedge.after)
    }

    /// Learns from an answer of `model` how long it took to begin. Where that of a second call was first, the time until then is
    /// less, but longer than what was waited for, so that percentiles stay what they are.
    fn learn(&self, hedge: &Hedge, model: &ModelName, took: Duration) {
        if hedge.share.is_some() {
            self.delays.note(model, took);
        }
    }
}

/// Who of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runner {
    First,
    Second,
}

/// Two calls, of which the first that has something to say counts, and nothing that the other says.
#[derive(Debug)]
pub(crate) struct Race(watch::Sender<Option<Runner>>);

impl Race {
    fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// Goes on only for the one that counts.
    pub(crate) async fn lead(&self, runner: Runner) {
        let leads = |leader: &mut Option<Runner>| leader.is_none() && leader.replace(runner).is_none();
        self.0.send_if_modified(leads);
        if *self.0.borrow() != Some(runner) {
            pending::<()>().await;
        }
    }

    /// Completes once one counts.
    async fn decided(&self) -> Runner {
        let mut seen = self.0.subscribe();
        let leader = seen.wait_for(Option::is_some).await.ok().and_then(|leader| *leader);
        match leader {
            Some(leader) => leader,
            None => pending().await,
        }
    }
}

impl Performer {
    /// Asks a model, and once more if it does not begin to answer in time.
    pub(crate) async fn hedged<'a>(
        &'a self,
        attempt: &Attempt<'a>,
        endpoint: &'a Endpoint,
        hedge: &Hedge,
        progress: &Progress,
    ) -> Tried {
        let model = hedge.to.as_ref().unwrap_or(&attempt.spec.model);
        let spec = JobSpec { model: model.clone(), ..attempt.spec.clone() };
        let (race, lent) = (Race::new(), OnceLock::new());
        let stops = &spec.sampling.stop;
        let fresh = || Collected::new(stops).of_samples(spec.sampling.controls.samples());
        let (mut one, mut two) = (fresh(), fresh());
        let second = async {
            match self.hedges.delay(hedge, &attempt.spec.model) {
                Some(after) => sleep(after).await,
                None => pending().await,
            }
            let Some((leave, endpoint)) = self.second_leave(attempt, endpoint, &spec, progress).await else {
                return pending().await;
            };
            tracing::info!(job = %attempt.job, model = %attempt.spec.model, by = %spec.model, "slow: calling once more");
            let lent = lent.get_or_init(|| (leave, endpoint));
            self.call(lent.1, &spec, attempt.begun, progress, Some((&race, Runner::Second)), &mut two).await
        };
        let first = self.call(endpoint, attempt.spec, attempt.begun, progress, Some((&race, Runner::First)), &mut one);
        let (mut first, mut second) = (Some(Box::pin(first)), Some(Box::pin(second)));
        let (mut ended_first, mut ended_second) = (None, None);
        let (mut leader, mut took) = (None, None);
        loop {
            tokio::select! {
                biased;
                ended = of(&mut first), if ended_first.is_none() => (first, ended_first) = (None, Some(ended)),
                ended = of(&mut second), if ended_second.is_none() => (second, ended_second) = (None, Some(ended)),
                runner = race.decided(), if leader.is_none() => {
                    (leader, took) = (Some(runner), Some(attempt.begun.elapsed()));
                    match runner {
                        Runner::First => second = None,
                        Runner::Second => first = None,
                    }
                }
                () = attempt.stop.cancelled() => break,
            }
            // A failure before anybody was asked in its place is one like any other.
            if first.is_none() && (second.is_none() || lent.get().is_none()) {
                break;
            }
        }
        drop((first, second));
        let leader = leader.or_else(|| *race.0.borrow());
        if leader.is_some() {
            self.hedges.learn(hedge, &attempt.spec.model, took.unwrap_or_else(|| attempt.begun.elapsed()));
        }
        let ran = Ran { endpoint, spec: attempt.spec, ended: ended_first.unwrap_or(Ended::Stopped), collected: one };
        let Some((leave, endpoint)) = lent.into_inner() else { return self.concluded(attempt.job, ran).await };
        let other = Ran { endpoint, spec: &spec, ended: ended_second.unwrap_or(Ended::Stopped), collected: two };
        let (own, other) = tokio::join!(self.concluded(attempt.job, ran), self.concluded(attempt.job, other));
        leave.settle(other.performed.observation.as_ref()).await;
        joined(own, other, leader, hedge.to.as_ref())
    }

    /// Leave for the second call: of the same model with another key, where there is one.
    async fn second_leave<'a>(
        &'a self,
        attempt: &Attempt<'a>,
        first: &Endpoint,
        spec: &JobSpec,
        progress: &Progress,
    ) -> Option<(Leave, &'a Endpoint)> {
        let lane = spec.model.lane();
        let mut keys = self.keys.of(&lane)?;
        if spec.model == attempt.spec.model && keys.len() > 1 {
            let used = |key: &KeyId| self.keys.endpoint(&lane, Some(key)).is_some_and(|used| std::ptr::eq(used, first));
            keys.retain(|key| !used(key));
        }
        let leave = progress.permits.ask(spec, &keys).await?;
        let endpoint = self.keys.endpoint(&lane, leave.key.as_ref().or(keys.first()))?;
        Some((leave, endpoint))
    }
}

/// Completes as what is there does.
async fn of<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

/// What came of two calls: what came of the one that counts, at the cost of both.
fn joined(own: Tried, other: Tried, leader: Option<Runner>, by: Option<&ModelName>) -> Tried {
    let cost = own.performed.cost.zip(other.performed.cost).map(|(own, other)| own.plus(other));
    // The job's own permit is for the first.
    let observation = own.performed.observation;
    let mut counts = match leader {
        Some(Runner::First) => own,
        Some(Runner::Second) => other,
        None => Tried {
            performed: Performed { outcome: in_all(own.performed.outcome, other.performed.outcome), ..own.performed },
            ..own
        },
    };
    if let (Outcome::Generated(generation), Some(Runner::Second)) = (&mut counts.performed.outcome, leader) {
        generation.answered_by = by.cloned();
    }
    (counts.performed.cost, counts.performed.observation) = (cost, observation);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(model: &str, after_ms: u64, to: Option<&str>) -> config::Hedge {
        config::Hedge { model: model.to_owned(), after_ms, after: None, to: to.map(str::to_owned) }
    }

    #[test]
    fn the_first_row_about_a_model_counts() {
        let rows = [row("litellm_gpt-4o", 100, Some("openrouter_x/y")), row("litellm_gpt*", 200, None)];
        let hedges = Hedges::new(&rows).unwrap();
        let of = |name: &str| {
            hedges.of(&ModelName::parse(name).unwrap()).and_then(|hedge| hedge.after).map(|after| after.as_millis())
        };
        assert_eq!(
            [of("litellm_gpt-4o"), of("litellm_gpt-4o-mini"), of("openrouter_x/y")],
            [Some(100), Some(200), None]
        );
        assert_eq!(hedges.models().map(ModelName::as_str).collect::<Vec<_>>(), ["openrouter_x/y"]);
    }

    #[test]
    fn what_means_nothing_is_refused() {
        let told = |row| Hedges::new(&[row]).unwrap_err().to_string();
        assert_eq!(told(row("gpt", 1, None)), "api.hedging: `gpt` is not the name of a model with its prefix");
        assert_eq!(told(row("litellm_x", 1, Some("y"))), "api.hedging: `y` is not the name of a model with its prefix");
        assert!(told(row("litellm_x", 0, None)).starts_with("api.hedging, of litellm_x: set after_ms"));
        let learns = config::Hedge { after: Some("95".to_owned()), ..row("litellm_x", 1, None) };
        assert!(told(learns).ends_with("after is a percentile from \"p1\" to \"p99\", not \"95\""));
    }

    #[tokio::test]
    async fn one_leads_and_the_other_never_goes_on() {
        let race = Race::new();
        race.lead(Runner::Second).await;
        race.lead(Runner::Second).await;
        assert_eq!(race.decided().await, Runner::Second);
        let behind = tokio::time::timeout(Duration::from_millis(1), race.lead(Runner::First));
        assert!(behind.await.is_err());
    }
}
