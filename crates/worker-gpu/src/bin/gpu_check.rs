//! Whether a GPU computes what the CPU does: `gpu_check FIXTURES [NUMBER OF THE GPU]`. Built by `cargo xtask gpu-check`.
//!
//! Never here: what is compared (`genmill_engine::gpu`).

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let fixtures = PathBuf::from(args.next().ok_or("where are the fixtures?")?);
    let ordinal = args.next().map_or(Ok(0), |text| text.parse())?;
    match genmill_engine::gpu::check(ordinal, &fixtures, &mut std::io::stdout())? {
        0 => Ok(()),
        wrong => Err(format!("{wrong} checks went wrong").into()),
    }
}
