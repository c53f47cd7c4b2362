//! With the feature `cuda`: compiles the kernels for the GPU that `CUDA_COMPUTE_CAP` names, with the nvcc of
//! docs/cuda.md. Without it: nothing.

use std::env::var_os;
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNELS: [&str; 8] = ["norm", "elementwise", "rope", "decode", "prefill", "sampler", "quantized", "stored"];

fn main() {
    println!("cargo::rerun-if-changed=src/backend/cuda/kernels");
    for name in ["CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if var_os("CARGO_FEATURE_CUDA").is_some()
        && let Err(error) = compile()
    {
        println!("cargo::error=cannot compile the CUDA kernels: {error}");
    }
}

/// One file of machine code and PTX for each source, so that a later GPU of the same kind can translate it.
fn compile() -> Result<(), String> {
    let home = var_os("CUDA_HOME").ok_or("CUDA_HOME is not set; `cargo xtask build-cuda` sets it")?;
    let out = PathBuf::from(var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let capability = var_os("CUDA_COMPUTE_CAP").ok_or("CUDA_COMPUTE_CAP is not set, such as to 90")?;
    let capability = capability.to_str().ok_or("CUDA_COMPUTE_CAP is no text")?;
    let code = format!("arch=compute_{capability},code=[sm_{capability},compute_{capability}]");
    for kernel in KERNELS {
        let source = format!("src/backend/cuda/kernels/{kernel}.cu");
        let mut nvcc = Command::new(Path::new(&home).join("bin/nvcc"));
        // Without contraction the bits are those of the kernels compiled for the host.
        nvcc.args(["-std=c++17", "-O3", "--fmad=false", "-fatbin", "-gencode", &code, &source, "-o"]);
        let status = nvcc.arg(out.join(format!("{kernel}.fatbin"))).status().map_err(|error| error.to_string())?;
        if !status.success() {
            return Err(format!("nvcc failed on {source}"));
        }
    }
    Ok(())
}
