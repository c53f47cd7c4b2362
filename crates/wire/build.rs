//! Generates the Rust side of `proto/` with protox, so that no protoc is needed.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use prost::Message as _;

fn main() -> anyhow::Result<()> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", proto.display());
    let files = ["job_service.proto", "model_service.proto", "queue_service.proto"]
        .map(|file| proto.join("genmill/v1").join(file));
    let descriptors = protox::compile(&files, [&proto]).context("cannot compile proto/")?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_transport(true)
        .compile_fds(descriptors)
        .context("cannot generate code for proto/")?;
    Ok(())
}
