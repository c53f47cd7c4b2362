//! How fast a GPU decodes: `gpu_bench FOLDER [NUMBER OF THE GPU]`, where gpu_bench.json is written. Built by
//! `cargo xtask gpu-bench`.
//!
//! Never here: what is measured (`genmill_engine::gpu`).

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().ok_or("where shall gpu_bench.json be written?")?);
    let ordinal = args.next().map_or(Ok(0), |text| text.parse())?;
    let found = genmill_engine::gpu::bench(ordinal, &mut std::io::stdout())?;
    std::fs::write(folder.join("gpu_bench.json"), serde_json::to_string_pretty(&found)?)?;
    Ok(())
}
