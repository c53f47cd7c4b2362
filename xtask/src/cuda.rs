//! `cargo xtask cuda-toolchain | build-cuda | gpu-check | gpu-bench`: the CUDA build on a machine without a GPU, see docs/cuda.md.
//!
//! Never here: anything that needs a driver. The compiler comes from the package registry as wheels with pinned
//! versions; they have no libraries to link against, so empty ones are made with the right names.

use crate::tool::{cargo, root, run, say};
use anyhow::{Context as _, bail};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The compiler with its headers. Version 13.0, since a driver refuses the PTX of later ones.
const WHEELS: &[&str] = &[
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-nvrtc==13.0.88",
];

/// The libraries that cudarc links by name: its module, and the name that the loader looks for.
const LIBRARIES: &[(&str, &str, &str)] = &[
    ("cuda", "driver", "libcuda.so.1"),
    ("cublasLt", "cublaslt", "libcublasLt.so.13"),
    ("nvrtc", "nvrtc", "libnvrtc.so.13"),
];

/// What a build needs, and where it is.
struct Toolchain {
    /// The wheels' own folder.
    home: PathBuf,
    /// Libraries to link against.
    link: PathBuf,
}

/// Fetches the toolchain if it is not there, and prints the environment of a build by hand.
pub(crate) fn print_toolchain() -> anyhow::Result<()> {
    let toolchain = Toolchain::fetch()?;
    for (name, value) in toolchain.environment("90")? {
        say(&format!("export {name}={value}"));
    }
    Ok(())
}

/// Builds the worker for one generation of GPUs, such as "90" for Hopper.
pub(crate) fn build_worker(capability: &str) -> anyhow::Result<()> {
    let built = build(capability, "genmill-worker-gpu")?;
    say(&format!("built {}", built.join("genmill-worker-gpu").display()));
    Ok(())
}

/// Builds a check or benchmark of GPUs and runs it, or puts it into a folder to be carried to a machine that has one.
pub(crate) fn gpu(name: &str, capability: &str, pack: Option<&Path>) -> anyhow::Result<()> {
    let (program, fixtures) = (build(capability, name)?.join(name), root().join("crates/engine/tests/fixtures"));
    match pack {
        None => run(Command::new(program).arg(fixtures).env("LD_LIBRARY_PATH", libraries())),
        Some(folder) => {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
            fs::copy(&program, folder.join(name)).context("cannot copy the program")?;
            run(Command::new("strip").arg(folder.join(name)))?;
            run(Command::new("cp").arg("-r").arg(&fixtures).arg(folder))?;
            let script = folder.join(format!("{name}.sh"));
            fs::write(&script, SCRIPT.replace("PROGRAM", name)).context("cannot write the script")?;
            say(&format!("on the machine with the GPU: bash {}", script.display()));
            Ok(())
        }
    }
}

/// Finds the libraries of PyTorch's wheels and runs what lies beside it.
const SCRIPT: &str = r#"#!/usr/bin/env bash
# Needs an NVIDIA driver of CUDA 13, and cuBLASLt of CUDA 13, such as PyTorch's wheels bring.
set -euo pipefail
cd "$(dirname "$0")"
purelib=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' || true)
export LD_LIBRARY_PATH="$purelib/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec ./PROGRAM fixtures "$@"
"#;

/// Where the loader looks for cuBLASLt: among PyTorch's wheels first.
fn libraries() -> std::ffi::OsString {
    let purelib = Command::new("python3")
        .args(["-c", "import sysconfig; print(sysconfig.get_paths()['purelib'], end='')"])
        .output()
        .map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned());
    let mut paths = std::ffi::OsString::from(format!("{purelib}/nvidia/cu13/lib"));
    if let Some(before) = std::env::var_os("LD_LIBRARY_PATH") {
        paths.push(":");
        paths.push(before);
    }
    paths
}

/// Builds a program of the worker's package in release; the folder where it is then.
fn build(capability: &str, program: &str) -> anyhow::Result<PathBuf> {
    let toolchain = Toolchain::fetch()?;
    let mut build = cargo();
    build.envs(toolchain.environment(capability)?);
    // Its own folder: other features would build everything else anew, each time.
    let target = folder().join(format!("build-{capability}"));
    let what = ["--package", "genmill-worker-gpu", "--features", "cuda", "--bin", program];
    run(build.args(["build", "--release"]).args(what).arg("--target-dir").arg(&target))?;
    Ok(target.join("release"))
}

fn folder() -> PathBuf {
    root().join("target/cuda")
}

impl Toolchain {
    fn fetch() -> anyhow::Result<Self> {
        let folder = folder();
        let (wheels, link) = (folder.join("toolkit"), folder.join("link"));
        let found = Self { home: wheels.join("nvidia/cu13"), link };
        // Written last, so that a download that broke off is begun again.
        let (done, pins) = (folder.join("pins"), WHEELS.join("\n"));
        if fs::read_to_string(&done).is_ok_and(|text| text == pins) {
            return Ok(found);
        }
        fs::create_dir_all(&found.link).with_context(|| format!("cannot make {}", found.link.display()))?;
        drop(fs::remove_dir_all(&wheels));
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]);
        run(pip.arg(&wheels).args(WHEELS))?;
        let cudarc = cudarc_source()?;
        for (library, module, soname) in LIBRARIES {
            let bindings = cudarc.join("src").join(module).join("sys/mod.rs");
            let text = fs::read_to_string(&bindings).with_context(|| format!("cannot read {}", bindings.display()))?;
            stub(&found.link, library, soname, &functions(&text))?;
        }
        fs::write(&done, pins).with_context(|| format!("cannot write {}", done.display()))?;
        Ok(found)
    }

    fn environment(&self, capability: &str) -> anyhow::Result<Vec<(&'static str, String)>> {
        let path = std::env::var_os("PATH").context("PATH is not set")?;
        Ok(vec![
            ("CUDA_HOME", self.home.display().to_string()),
            ("PATH", format!("{}:{}", self.home.join("bin").display(), path.display())),
            ("CUDA_COMPUTE_CAP", capability.to_owned()),
            ("CUDARC_CUDA_VERSION", "13000".to_owned()),
            ("LIBRARY_PATH", self.link.display().to_string()),
        ])
    }
}

/// Where cargo keeps the sources of cudarc.
fn cudarc_source() -> anyhow::Result<PathBuf> {
    run(cargo().args(["fetch", "--locked"]))?;
    let output = cargo().args(["metadata", "--all-features", "--format-version", "1", "--locked"]).output()?;
    let text = String::from_utf8(output.stdout).context("cargo metadata is no text")?;
    let paths = text.split("\"manifest_path\":\"").skip(1).filter_map(|rest| rest.split('"').next());
    let mut found = paths
        .filter_map(|path| Path::new(path).parent())
        .filter(|folder| folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cudarc-")));
    found.next().map(Path::to_owned).context("cargo metadata tells of no cudarc")
}

/// The names of the functions that bindings declare: of each `extern "C"` block the word after `fn`.
fn functions(bindings: &str) -> BTreeSet<&str> {
    let blocks = bindings.split("extern \"C\" {").skip(1);
    blocks.filter_map(|block| block.split_once("fn ")?.1.split_once('(')).map(|(name, _)| name.trim()).collect()
}

/// Makes an empty shared library that has these functions and the name of the real one.
fn stub(folder: &Path, library: &str, soname: &str, functions: &BTreeSet<&str>) -> anyhow::Result<()> {
    if functions.is_empty() {
        bail!("cudarc declares no functions of {library}");
    }
    let source = folder.join(format!("{library}.c"));
    let text: Vec<String> = functions.iter().map(|name| format!("void {name}(void){{}}")).collect();
    fs::write(&source, text.join("\n")).with_context(|| format!("cannot write {}", source.display()))?;
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-nostdlib", "-O0", &format!("-Wl,-soname,{soname}"), "-o"]);
    run(compiler.arg(folder.join(format!("lib{library}.so"))).arg(&source))?;
    fs::remove_file(&source).with_context(|| format!("cannot remove {}", source.display()))
}
