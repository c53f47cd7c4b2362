//! Whether the worker's memory grows while providers stall, drip, never end or send far too much. Never here: speed.

use crate::figures::percentile;
use crate::mill::{Mill, WHOLE};
use crate::sample::message;
use anyhow::ensure;
use genmill_client::{Request, v1};
use genmill_tests::place::MODEL;
use std::io::Write as _;
use std::time::{Duration, Instant};
use tokio::time::{MissedTickBehavior, interval};

/// How a provider treats a call: what it is told, whether its answer is streamed, and one of how many calls is such a one.
const MANNERS: [(&str, &str, u64); 7] = [
    ("!first-byte=2500 ", MODEL, 1),
    // Each event comes in pieces of three bytes.
    ("!slow-stream=400 !split-utf8 ", MODEL, 1),
    // Ended by the limit for the first byte, or for the silence in an answer.
    ("!sleep=60000 ", MODEL, 2),
    ("!stall-after=1 ", MODEL, 2),
    // Ended by the job's own timeout…
    ("!endless !slow-stream=20 ", MODEL, 2),
    // …or by the bound of an answer.
    ("!endless ", MODEL, 20),
    // 10 MB, more than a result may have.
    ("!words=900000 ", WHOLE, 20),
];

/// Between two calls of each manner that comes every time.
const TICK: Duration = Duration::from_millis(200);

/// No more jobs than this are open, however slow the machine is.
const OPEN_MAX: u64 = 400;

/// Between two looks at the memory.
const LOOK: Duration = Duration::from_secs(5);

/// The part of the run after which memory counts.
const WARM_UP: f64 = 0.25;

/// What memory may grow by from the first third of what counts to the last: this part of it, and this many MB.
const GROWTH: (f64, f64) = (0.1, 5.0);

/// Runs a worker for so long, and fails when its memory grows.
pub(crate) async fn soak(minutes: u32) -> anyhow::Result<()> {
    let settings = [
        ("GENMILL__API__CALLS_MAX", "300"),
        ("GENMILL__API__CALLS_START", "300"),
        ("GENMILL__API__FIRST_BYTE_TIMEOUT_MS", "6000"),
        ("GENMILL__API__IDLE_TIMEOUT_MS", "6000"),
        ("GENMILL__WORKER__RETRIES_MAX", "1"),
    ];
    let mut mill = Mill::start(&settings).await?;
    let (begun, whole) = (Instant::now(), Duration::from_secs(60) * minutes);
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut looked, mut looks) = (begun, Vec::new());
    for tick in 0.. {
        ticks.tick().await;
        if begun.elapsed() > whole {
            break;
        }
        feed(&mut mill, tick).await?;
        if looked.elapsed() > LOOK {
            looked = Instant::now();
            looks.push(look(&mill, begun)?);
        }
    }
    judge(&looks)
}

/// Submits what is due.
async fn feed(mill: &mut Mill, tick: u64) -> anyhow::Result<()> {
    for (orders, model, every) in MANNERS {
        let lane = mill.lane(model).await?;
        if tick.is_multiple_of(every) && mill.open(lane).await? < OPEN_MAX {
            mill.submit_as(1, move |number| request(model, number, orders)).await?;
        }
    }
    Ok(())
}

fn request(model: &str, number: u64, orders: &str) -> v1::GenerationRequest {
    let request = Request::new(model).prompt(message(number, orders)).timeout(Duration::from_secs(15));
    request.max_tokens(1_000_000).into()
}

/// The worker's memory in MB, told with what it does.
fn look(mill: &Mill, begun: Instant) -> anyhow::Result<f64> {
    let resident_mb = mill.process().resident_mb()?;
    let bill = mill.place.provider.bill();
    let calls = mill.place.provider.calls();
    let in_flight = calls.iter().filter(|call| call.ended.is_none()).count();
    let minutes = begun.elapsed().as_secs_f64() / 60.0;
    writeln!(
        std::io::stdout(),
        "{minutes:>6.2} min  {resident_mb:>7.1} MB  {in_flight:>4} calls in flight of {}",
        bill.calls
    )?;
    Ok(resident_mb)
}

/// Fails when memory has grown.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a number of looks")]
#[expect(clippy::cast_precision_loss, reason = "a small number of looks")]
fn judge(looks: &[f64]) -> anyhow::Result<()> {
    let counted = &looks[(looks.len() as f64 * WARM_UP) as usize..];
    let third = counted.len() / 3;
    ensure!(third > 0, "too short a run to tell anything");
    let [first, last] =
        [&counted[..third], &counted[counted.len() - third..]].map(|part| percentile(&mut part.to_vec(), 50));
    let most = looks.iter().copied().fold(0.0, f64::max);
    let may = first * (1.0 + GROWTH.0) + GROWTH.1;
    writeln!(
        std::io::stdout(),
        "after the warm-up {first:.1} MB, at the end {last:.1} MB (may be {may:.1}), {most:.1} MB at most"
    )?;
    ensure!(last <= may, "the worker's memory grows");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_grows_is_told_from_memory_that_varies() {
        let steady: Vec<f64> = (0..60).map(|at| if at % 5 == 0 { 90.0 } else { 60.0 }).collect();
        let leaking: Vec<f64> = (0..60).map(|at| 60.0 + f64::from(at)).collect();
        assert!(judge(&steady).is_ok());
        assert!(judge(&leaking).is_err());
        assert!(judge(&[]).is_err());
    }
}
