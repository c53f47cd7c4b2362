//! The engine's peers, in a Python of their own under `target`. Never here: measuring.

use crate::tool::{is_there, root, run, say};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The variable that names other pythons, see `bench engine --help`.
pub(crate) const VARIABLE: &str = "GENMILL_BENCH_PYTHON";

/// What each peer is imported as, and what pip installs for it.
const PEERS: [(&str, &[&str]); 2] =
    [("llama_cpp", &["llama-cpp-python==0.3.36"]), ("transformers", &["transformers==5.23.0", "torch==2.15.0"])];

/// A python with whatever peers could be installed; those that could not are told.
pub(crate) fn python() -> PathBuf {
    let folder = root().join("target/bench-peers");
    let python = folder.join("bin/python");
    if !python.exists() {
        try_to("python3 is needed", Command::new("python3").args(["-m", "venv"]).arg(&folder));
    }
    for (name, packages) in PEERS {
        if !is_there(&python.to_string_lossy(), &["-c", &format!("import {name}")]) {
            say(&format!("installing {name} (once; minutes for llama.cpp, gigabytes for torch)"));
            try_to(&format!("{name} is not measured"), &mut pip(&python, packages));
        }
    }
    python
}

fn try_to(otherwise: &str, command: &mut Command) {
    if let Err(error) = run(command) {
        say(&format!("{otherwise}: {error:#}"));
    }
}

fn pip(python: &Path, packages: &[&str]) -> Command {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python"]).args(packages);
    pip.env("CMAKE_ARGS", llama_options());
    pip
}

/// How llama.cpp is built: for this processor's vector instructions, one by one. Its own detection also takes matrix
/// instructions (AMX), which some virtual machines announce and do not have.
fn llama_options() -> String {
    let mut options =
        "-DGGML_NATIVE=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_CURL=OFF -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF".to_owned();
    #[cfg(target_arch = "x86_64")]
    {
        let sets = [
            ("AVX", is_x86_feature_detected!("avx")),
            ("AVX2", is_x86_feature_detected!("avx2")),
            ("FMA", is_x86_feature_detected!("fma")),
            ("F16C", is_x86_feature_detected!("f16c")),
            ("BMI2", is_x86_feature_detected!("bmi2")),
            ("AVX512", is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")),
            ("AVX512_VBMI", is_x86_feature_detected!("avx512vbmi")),
            ("AVX512_VNNI", is_x86_feature_detected!("avx512vnni")),
        ];
        options.extend(sets.map(|(set, there)| format!(" -DGGML_{set}={}", if there { "ON" } else { "OFF" })));
    }
    options
}
