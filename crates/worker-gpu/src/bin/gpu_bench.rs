//! How fast a GPU is: `gpu_bench FIXTURES [NUMBER OF THE GPU [PART OF A MODEL'S NAME]]`, which writes gpu_bench.json. Built by
//! `cargo xtask gpu-bench`.
//!
//! Never here: what is measured (`genmill_engine::gpu`).

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let fixtures = PathBuf::from(args.next().ok_or("where are the fixtures?")?);
    let ordinal = args.next().map_or(Ok(0), |text| text.parse())?;
    let part = args.next().unwrap_or_default();
    let found = genmill_engine::gpu::bench((ordinal, &part), &fixtures.join("qwen2"), &mut std::io::stdout())?;
    std::fs::write("gpu_bench.json", serde_json::to_string_pretty(&found)?)?;
    Ok(())
}
