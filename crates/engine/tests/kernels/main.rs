//! Every CUDA kernel compiles for every generation of GPUs, with how many registers it needs and what it spills.
//!
//! Never here: running them (`backend::cuda::check` does, compiled for the host). The compiler comes from the package
//! registry (`cargo xtask cuda-toolchain`); where it cannot be had the test says so and ends. What was found for the
//! same sources is kept, so that only who changes a kernel waits.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest as _, Sha256};

/// A100, H100 and H200, B200.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

/// Bytes that a kernel may spill. More than this is a mistake, not a trade.
const SPILL_BYTES_MAX: u32 = 512;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The sources, all of them first, then those that are compiled.
fn sources() -> (Vec<PathBuf>, Vec<PathBuf>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/cuda/kernels");
    let mut all: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    all.sort();
    let compiled = all.iter().filter(|path| path.extension().is_some_and(|end| end == "cu")).cloned().collect();
    (all, compiled)
}

/// Where nvcc and ptxas are. None, with the reason printed, where they cannot be had.
fn compiler() -> Option<PathBuf> {
    let bin = root().join("target/cuda/toolkit/nvidia/cu13/bin");
    if root().join("target/cuda/pins").exists() {
        return Some(bin);
    }
    let fetched = Command::new(env!("CARGO")).args(["xtask", "cuda-toolchain"]).current_dir(root()).output().unwrap();
    if fetched.status.success() {
        return Some(bin);
    }
    let said = String::from_utf8_lossy(&fetched.stderr);
    println!("skipped: the CUDA compiler cannot be had: {}", said.lines().last().unwrap_or_default());
    None
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// A line for each kernel, from what ptxas says.
fn lines(architecture: &str, said: &str) -> Vec<String> {
    let number = |line: &str, after: &str| -> u32 {
        let words = line.split(after).next().unwrap().split_whitespace();
        words.last().and_then(|word| word.parse().ok()).unwrap_or(0)
    };
    let mut lines = Vec::new();
    let (mut name, mut spilled) = ("", 0);
    for line in said.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            name = rest.split('\'').next().unwrap();
        } else if line.contains("bytes spill stores") {
            spilled = number(line, " bytes spill stores");
        } else if line.contains("Used ") && !name.is_empty() {
            let registers = number(line, " registers");
            assert!(registers > 0, "{line}");
            assert!(spilled <= SPILL_BYTES_MAX, "{name} spills {spilled} bytes on {architecture}");
            lines.push(format!("{architecture:7} {name:24} {registers:4} registers {spilled:4} bytes spilled"));
            name = "";
        }
    }
    lines
}

/// Compiles a source once, as a build does, and translates it for every architecture.
fn compile(bin: &Path, source: &Path, scratch: &Path) -> Vec<String> {
    let name = source.file_stem().unwrap();
    let ptx = scratch.join(name).with_extension("ptx");
    let options = ["-std=c++17", "-O3", "--fmad=false", "-ptx", "-arch=compute_80", "-o"];
    output(Command::new(bin.join("nvcc")).args(options).arg(&ptx).arg(source));
    let translate = |architecture: &str| {
        let made = scratch.join(format!("{}.{architecture}", name.to_string_lossy()));
        let mut ptxas = Command::new(bin.join("ptxas"));
        let said = output(ptxas.args(["--verbose", "--gpu-name", architecture, "--output-file"]).arg(made).arg(&ptx));
        lines(architecture, &said)
    };
    ARCHITECTURES.iter().flat_map(|architecture| translate(architecture)).collect()
}

#[test]
fn kernels_compile_for_every_generation() {
    let (all, compiled) = sources();
    let mut hash = Sha256::new();
    all.iter().for_each(|file| hash.update(fs::read(file).unwrap()));
    let hash = hash.finalize().iter().take(8).fold(String::new(), |mut name, byte| {
        write!(name, "{byte:02x}").unwrap();
        name
    });
    let known = root().join(format!("target/cuda/kernels-{hash}"));
    let report = fs::read_to_string(&known).unwrap_or_else(|_| {
        let Some(bin) = compiler() else { return String::new() };
        let scratch = tempfile::tempdir().unwrap();
        let each: Vec<String> = std::thread::scope(|scope| {
            let (bin, scratch) = (&bin, scratch.path());
            let tasks: Vec<_> =
                compiled.iter().map(|source| scope.spawn(move || compile(bin, source, scratch))).collect();
            tasks.into_iter().flat_map(|task| task.join().unwrap()).collect()
        });
        assert!(each.len() > 3 * compiled.len(), "{each:?}");
        fs::write(&known, each.join("\n")).unwrap();
        each.join("\n")
    });
    println!("{report}");
}
