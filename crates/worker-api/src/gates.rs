//! Where calls wait for the circuit breakers of their models. Never here: when a circuit opens (`breaker`).

use crate::breaker::{Breaker, Came, Circuit, Pass, Wait};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// So many gates are kept at least; a gate whose circuit is closed is as good as none.
const GATES_KEPT: usize = 4_096;

/// A model of a provider.
type Place = (String, String);

/// A gate for each model that was called.
#[derive(Clone, Debug, Default)]
pub struct Gates(Arc<Mutex<HashMap<Place, Arc<Gate>>>>);

/// Where the calls to one model pass.
#[derive(Debug)]
pub struct Gate {
    place: Place,
    breaker: Mutex<Breaker>,
    changed: Notify,
}

/// A call that has passed a gate. Dropped without saying what came of it, it says that nothing did.
#[derive(Debug)]
pub struct Passage {
    gate: Arc<Gate>,
    pass: Pass,
    told: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gates {
    /// The gate of a model of a provider.
    #[must_use]
    pub fn of(&self, provider: &str, model: &str) -> Arc<Gate> {
        let place = (provider.to_owned(), model.to_owned());
        let mut gates = lock(&self.0);
        if gates.len() >= GATES_KEPT {
            gates.retain(|_, gate| gate.circuit() != Circuit::Closed || Arc::strong_count(gate) > 1);
        }
        let new = || Gate { place: place.clone(), breaker: Mutex::default(), changed: Notify::new() };
        gates.entry(place.clone()).or_insert_with(|| Arc::new(new())).clone()
    }

    /// The models whose circuits are not closed, in the text format of Prometheus.
    #[must_use]
    pub fn metrics(&self) -> String {
        let mut text = "# HELP genmill_api_circuit_open Whether calls to a model wait because its provider fails or \
                        asked to be spared\n# TYPE genmill_api_circuit_open gauge\n"
            .to_owned();
        let gates = lock(&self.0);
        let mut open: Vec<&Place> =
            gates.values().filter(|gate| gate.circuit() != Circuit::Closed).map(|gate| &gate.place).collect();
        open.sort_unstable();
        let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        for (provider, model) in open {
            let (provider, model) = (escaped(provider), escaped(model));
            // Writing to a string cannot fail.
            writeln!(text, "genmill_api_circuit_open{{provider=\"{provider}\",model=\"{model}\"}} 1")
                .unwrap_or_default();
        }
        text
    }
}

impl Gate {
    fn circuit(&self) -> Circuit {
        lock(&self.breaker).circuit()
    }

    /// Waits until a call may go out, until `patience_ends` at the longest.
    ///
    /// # Errors
    /// When it may not until then: the time from which it may, as far as that is known.
    pub async fn pass(self: &Arc<Self>, patience_ends: Instant) -> Result<Passage, Option<Instant>> {
        loop {
            // Listens before it asks, so that no change falls between.
            let changed = self.changed.notified();
            let answer = lock(&self.breaker).ask(Instant::now());
            let until = match answer {
                Ok(pass) => return Ok(Passage { gate: self.clone(), pass, told: false }),
                Err(Wait::Until(until)) => Some(until),
                Err(Wait::Probed) => None,
            };
            if Instant::now() >= patience_ends {
                return Err(until);
            }
            tokio::select! {
                () = changed => {}
                () = sleep_until(until.unwrap_or(patience_ends).min(patience_ends)) => {}
            }
        }
    }
}

impl Passage {
    /// Says what came of the call.
    pub fn came(mut self, came: Came) {
        self.tell(came);
    }

    fn tell(&mut self, came: Came) {
        self.told = true;
        let (changed, circuit) = {
            let mut breaker = lock(&self.gate.breaker);
            (breaker.came(self.pass, came, Instant::now()), breaker.circuit())
        };
        if !changed {
            return;
        }
        let (provider, model) = &self.gate.place;
        match circuit {
            Circuit::Closed => tracing::info!(provider, model, "answers again: calls go out"),
            Circuit::Open(until) => {
                let wait_ms = until.saturating_duration_since(Instant::now()).as_millis();
                tracing::warn!(provider, model, wait_ms, "fails or asks to be spared: calls wait");
            }
            Circuit::HalfOpen => {}
        }
        self.gate.changed.notify_waiters();
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        if !self.told {
            self.tell(Came::Nothing);
        }
    }
}

/// The end of a wait that begins now.
#[must_use]
pub fn patience(wait: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(wait).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Health;

    const MINUTE: Duration = Duration::from_secs(60);

    fn spare(seconds: u64) -> Came {
        Came::Told(Health::Spare, Some(Duration::from_secs(seconds)))
    }

    #[tokio::test(start_paused = true)]
    async fn calls_wait_while_a_provider_is_spared_and_one_of_them_probes() {
        let gates = Gates::default();
        let gate = gates.of("p", "m");
        gate.pass(patience(MINUTE)).await.unwrap().came(spare(10));
        let begun = Instant::now();
        let probe = gates.of("p", "m").pass(patience(MINUTE)).await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), 10);
        let waiting = gate.pass(patience(MINUTE));
        let ended = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            probe.came(Came::Told(Health::Works, None));
        };
        let (passed, ()) = tokio::join!(waiting, ended);
        assert!(passed.is_ok() && begun.elapsed().as_secs() == 13);
        assert!(gates.of("p", "other").pass(Instant::now()).await.is_ok(), "another model is another circuit");
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends() {
        let gate = Gates::default().of("p", "m");
        gate.pass(patience(MINUTE)).await.unwrap().came(spare(100));
        let open_from = Instant::now() + Duration::from_secs(100);
        assert_eq!(gate.pass(patience(MINUTE)).await.map(|_| ()), Err(Some(open_from)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_is_dropped_lets_the_next_go() {
        let gate = Gates::default().of("p", "m");
        gate.pass(patience(MINUTE)).await.unwrap().came(spare(1));
        drop(gate.pass(patience(MINUTE)).await.unwrap());
        assert!(gate.pass(Instant::now()).await.is_ok());
    }

    #[tokio::test]
    async fn open_circuits_are_told() {
        let gates = Gates::default();
        gates.of("p", "a\"b").pass(Instant::now()).await.unwrap().came(spare(100));
        drop(gates.of("p", "closed").pass(Instant::now()).await.unwrap());
        let told = gates.metrics();
        assert_eq!(
            told.lines().skip(2).collect::<Vec<_>>(),
            ["genmill_api_circuit_open{provider=\"p\",model=\"a\\\"b\"} 1"]
        );
    }
}
