//! How fast this machine reads memory: a short streaming read on all of its cores, against which steps are compared.
//!
//! Never here: what is done with the figure.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Values that each thread reads in turns: 32 MiB, more than the caches of a core and its share of the last level.
const VALUES: usize = 4 << 20;

/// Memory is busy with fewer threads than that.
const THREADS_MAX: usize = 16;

/// Reads memory for about `time` with so many threads, and returns the bytes per second of all together. It takes a
/// buffer of 32 MiB for each thread, and somewhat longer than `time` to fill them.
#[must_use]
pub fn read_bytes_per_s(threads: usize, time: Duration) -> f64 {
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads.clamp(1, THREADS_MAX)).map(|_| scope.spawn(move || read(time))).collect();
        // A thread that could not finish adds nothing.
        readers.into_iter().map(|reader| reader.join().unwrap_or(0.0)).sum()
    })
}

/// The bytes per second of one thread.
fn read(time: Duration) -> f64 {
    let values = vec![1_u64; VALUES];
    let (begun, mut bytes) = (Instant::now(), 0.0);
    while begun.elapsed() < time {
        // In parts, so that the time is kept on slow machines too.
        for part in values.chunks(VALUES / 16) {
            black_box(sum(part));
            bytes += size_of_val(part) as f64;
            if begun.elapsed() >= time {
                break;
            }
        }
    }
    bytes / begun.elapsed().as_secs_f64()
}

/// Eight sums side by side, so that no addition waits for the one before.
fn sum(values: &[u64]) -> u64 {
    let mut sums = [0_u64; 8];
    for chunk in values.as_chunks::<8>().0 {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*value);
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_at_a_speed_that_machines_have() {
        let speed = read_bytes_per_s(1, Duration::from_millis(20));
        assert!((1e8..1e13).contains(&speed), "{speed}");
    }
}
