//! How fast the host brings weights on their way to a device: from the files through a ring, hashed.
//!
//! `cargo run --release -p genmill-engine --example loading -- FOLDER`
//!
//! Never here: a device. What a device would fetch from the ring is copied to other memory by a processor.

#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use genmill_engine::raw::read_all;

/// As `driver.rs` has them.
const RING: (usize, usize) = (16 << 20, 4);

/// The first run brings the files into the system's memory.
const RUNS: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(std::env::args().nth(1).ok_or("which folder?")?);
    for run in 0..RUNS {
        let begun = Instant::now();
        let bytes = read_all(&folder, RING, &mut |_| ())?;
        let read = begun.elapsed();
        let mut there = vec![0; RING.0];
        let begun = Instant::now();
        read_all(&folder, RING, &mut |piece| there[..piece.len()].copy_from_slice(piece))?;
        let rates = [read, begun.elapsed()].map(|time| bytes as f64 / time.as_secs_f64() / 1e9);
        println!(
            "run {run}: {:.2} GB, read and hashed {:.2} GB/s, and copied {:.2} GB/s",
            bytes as f64 / 1e9,
            rates[0],
            rates[1]
        );
    }
    Ok(())
}
