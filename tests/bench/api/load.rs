//! The load on whatever speaks OpenAI's chat completions, and the limit that it finds itself: straight to the stand-in.

use crate::Sizes;
use crate::figures::{Figures, Goal, percentile};
use crate::process::Process;
use crate::sample::{Seen, add_times, message, ms};
use anyhow::ensure;
use genmill_standin::{Options, Standin};
use http::HeaderMap;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

/// Calls that are out at once while they go out as fast as they are answered; as many as a worker has.
pub(crate) const AT_ONCE: usize = 64;

/// How long held calls are held: longer than the slowest takes to get all of them out.
pub(crate) const HOLD: Duration = Duration::from_secs(25);

/// How long all held calls may take to arrive.
const ARRIVE_WITHIN: Duration = Duration::from_secs(20);

/// Whom calls go to.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) http: reqwest::Client,
    pub(crate) url: String,
    pub(crate) headers: HeaderMap,
    pub(crate) model: String,
    /// Whether answers are to come in pieces.
    pub(crate) streams: bool,
}

impl Route {
    /// One call, as the worker makes it, to its end.
    pub(crate) async fn call(&self, number: u64, orders: &str) -> anyhow::Result<()> {
        let mut body = json!({
            "model": self.model, "messages": [{"role": "user", "content": message(number, orders)}], "max_tokens": 16,
            "temperature": 1.0, "seed": number,
        });
        if self.streams {
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
        }
        let answer = self.http.post(&self.url).headers(self.headers.clone()).json(&body).send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        ensure!(status.is_success() && text.contains("four"), "{status}: {text}");
        Ok(())
    }

    /// Calls as fast as they are answered. Returns how many there were, and how long they took.
    pub(crate) async fn saturate(&self, time: Duration) -> anyhow::Result<(u64, Duration)> {
        let (next, begun) = (Arc::new(AtomicU64::new(1)), Instant::now());
        let mut callers = JoinSet::new();
        for _ in 0..AT_ONCE {
            let (route, next) = (self.clone(), next.clone());
            callers.spawn(async move {
                while begun.elapsed() < time {
                    route.call(next.fetch_add(1, Ordering::Relaxed), "").await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = callers.join_next().await {
            ended??;
        }
        Ok((next.load(Ordering::Relaxed) - 1, begun.elapsed()))
    }

    /// So many calls each second, whether or not those before are answered. Numbers begin with `first`.
    pub(crate) async fn pace(&self, pace: u64, seconds: u64, first: u64) -> anyhow::Result<Seen> {
        let mut ticks = interval(Duration::from_secs(1) / u32::try_from(pace)?);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let (mut calls, mut seen) = (JoinSet::new(), Seen::default());
        for number in first..first + pace * seconds {
            ticks.tick().await;
            let route = self.clone();
            calls.spawn(async move {
                let called = Instant::now();
                route.call(number, "").await.map(|()| (number, called, Instant::now()))
            });
        }
        while let Some(ended) = calls.join_next().await {
            let (number, called, ended) = ended??;
            seen.called.insert(number, called);
            seen.ended.insert(number, ended);
        }
        Ok(seen)
    }

    /// Makes calls whose answers the stand-in holds. Returns those that run; some may fail.
    pub(crate) fn hold(&self, count: usize) -> JoinSet<anyhow::Result<()>> {
        let orders = orders_to_hold();
        let mut calls = JoinSet::new();
        for number in (1 << 40..).take(count) {
            let (route, orders) = (self.clone(), orders.clone());
            calls.spawn(async move { route.call(number, &orders).await });
        }
        calls
    }
}

pub(crate) fn orders_to_hold() -> String {
    format!("!sleep={} ", HOLD.as_millis())
}

/// Waits until the stand-in holds `count` calls, or for as long as that may take. Returns how many it holds.
pub(crate) async fn until_held(standin: &Standin, count: usize) -> usize {
    let begun = Instant::now();
    loop {
        let held = standin.calls().iter().filter(|call| call.ended.is_none()).count();
        if held >= count || begun.elapsed() > ARRIVE_WITHIN {
            return held;
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// A client that has a connection for each call, as a service has for each of its users.
pub(crate) fn client() -> anyhow::Result<reqwest::Client> {
    Ok(reqwest::Client::builder().no_proxy().tcp_nodelay(true).build()?)
}

/// Measures the load itself, with nothing between it and the stand-in.
pub(crate) async fn measure_direct(figures: &mut Figures, sizes: Sizes) -> anyhow::Result<()> {
    let standin = Standin::start(Options::default()).await?;
    let url = format!("{}/chat/completions", standin.base_url());
    let headers = HeaderMap::from_iter([(http::header::AUTHORIZATION, "Bearer sk-direct".parse()?)]);
    let route = Route { http: client()?, url, headers, model: "gpt-4o-mini".to_owned(), streams: true };
    figures.heading("straight to the stand-in: the limit of load, stand-in and machine")?;
    let own = Process(std::process::id());
    let before = own.cpu_ms()?;
    let (calls, took) = route.saturate(sizes.saturated / 3).await?;
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let count = calls as f64;
    figures.add("calls", count / took.as_secs_f64(), "calls/s", Goal::Nothing)?;
    figures.add("CPU of a call: load and stand-in", (own.cpu_ms()? - before) / count, "ms", Goal::Nothing)?;
    let first = calls + 1;
    let seen = route.pace(sizes.pace, sizes.seconds, first).await?;
    let added = seen.added(&standin, first + sizes.pace);
    add_times(figures, &format!("added to a call, {}/s", sizes.pace), added, Goal::Nothing)?;
    let mut whole: Vec<f64> = seen.ended.iter().map(|(number, ended)| ms(seen.called[number], *ended)).collect();
    figures.add("a whole call, p99", percentile(&mut whole, 99), "ms", Goal::Nothing)
}
