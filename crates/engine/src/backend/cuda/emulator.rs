//! The kernels on the host: the very same sources, compiled by the system's C++ compiler, in a process behind a pipe.
//!
//! Never here: arithmetic. It shows what the kernels do, reads and write out of bounds included; it does not show what
//! only a device has, such as threads that really run at once.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

use crate::backend::cuda::device::{Address, Adds, Device, DeviceError, Dtype, Launch, Product, Written};

const ALLOCATE: u32 = 0;
const RELEASE: u32 = 1;
const WRITE: u32 = 2;
const READ: u32 = 3;
const LAUNCH: u32 = 4;
const PRODUCT: u32 = 5;

/// A device that is a process.
#[derive(Clone, Debug)]
pub(crate) struct Emulator {
    pipe: Arc<Mutex<Pipe>>,
}

#[derive(Debug)]
struct Pipe {
    process: Child,
    to: ChildStdin,
    from: ChildStdout,
}

/// Memory of the process.
#[derive(Debug)]
pub(crate) struct EmulatorMemory {
    pipe: Arc<Mutex<Pipe>>,
    address: Address,
}

impl Drop for EmulatorMemory {
    fn drop(&mut self) {
        // A process that is gone has no memory to give back.
        drop(request(
            &self.pipe,
            "giving memory back",
            &[&RELEASE.to_le_bytes(), &self.address.to_le_bytes()],
            &mut [],
        ));
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

impl Emulator {
    /// Compiles the kernels unless they are compiled, and starts the process. None, with the reason printed, where
    /// there is no C++ compiler.
    pub(crate) fn start() -> Option<Self> {
        if !Command::new("c++").arg("--version").output().is_ok_and(|output| output.status.success()) {
            println!("skipped: there is no C++ compiler (c++) to compile the kernels for the host");
            return None;
        }
        let mut process =
            Command::new(compile()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it was just built");
        let (to, from) = (process.stdin.take().expect("it is piped"), process.stdout.take().expect("it is piped"));
        Some(Self { pipe: Arc::new(Mutex::new(Pipe { process, to, from })) })
    }

    fn request(&self, doing: &str, parts: &[&[u8]], answer: &mut [u8]) -> Result<(), DeviceError> {
        request(&self.pipe, doing, parts, answer)
    }
}

fn request(pipe: &Mutex<Pipe>, doing: &str, parts: &[&[u8]], answer: &mut [u8]) -> Result<(), DeviceError> {
    let mut pipe = pipe.lock().unwrap_or_else(PoisonError::into_inner);
    let done = parts.iter().try_for_each(|part| pipe.to.write_all(part)).and_then(|()| pipe.to.flush());
    let done = done.and_then(|()| pipe.from.read_exact(answer));
    done.map_err(|error| DeviceError { doing: doing.to_owned(), message: format!("{error}; see standard error") })
}

/// The program, compiled for these sources.
fn compile() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [here.join("src/backend/cuda/kernels"), here.join("tests/emulator")];
    let mut hash = Sha256::new();
    for folder in &folders {
        let mut files: Vec<_> =
            std::fs::read_dir(folder).expect("it is there").map(|file| file.expect("readable").path()).collect();
        files.sort();
        files.iter().for_each(|file| hash.update(std::fs::read(file).expect("readable")));
    }
    let name: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    // Beside the tests themselves.
    let target = std::env::current_exe().expect("a test has a path");
    let target = target.parent().expect("it lies in a folder").join(format!("emulator-{name}"));
    if target.exists() {
        return target;
    }
    // Several tests may come here at once; the last one's program stays.
    let made = target.with_extension(std::process::id().to_string());
    let mut compiler = Command::new("c++");
    compiler.args(["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]);
    for folder in &folders {
        compiler.arg("-I").arg(folder);
    }
    let status =
        compiler.arg("-o").arg(&made).arg(folders[1].join("emulator.cpp")).status().expect("there is a compiler");
    assert!(status.success(), "the kernels do not compile for the host");
    std::fs::rename(&made, &target).expect("both lie in one folder");
    target
}

impl Device for Emulator {
    type Memory = EmulatorMemory;

    fn name(&self) -> String {
        "emulator".to_owned()
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        Ok(1 << 30)
    }

    fn allocate(&self, bytes: usize) -> Result<EmulatorMemory, DeviceError> {
        let mut address = [0; 8];
        self.request("allocating", &[&ALLOCATE.to_le_bytes(), &(bytes as u64).to_le_bytes()], &mut address)?;
        Ok(EmulatorMemory { pipe: self.pipe.clone(), address: Address::from_le_bytes(address) })
    }

    fn address(memory: &EmulatorMemory) -> Address {
        memory.address
    }

    fn clear(&self, _: Address, _: usize) -> Result<(), DeviceError> {
        // What is there stays there, no numbers, to show that nobody relies on zeros.
        Ok(())
    }

    fn write(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        let count = (bytes.len() as u64).to_le_bytes();
        self.request("writing", &[&WRITE.to_le_bytes(), &to.to_le_bytes(), &count, bytes], &mut [])
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let count = (bytes.len() as u64).to_le_bytes();
        self.request("reading", &[&READ.to_le_bytes(), &from.to_le_bytes(), &count], bytes)
    }

    fn launch(&self, launch: &Launch) -> Result<(), DeviceError> {
        let name = launch.kernel.as_bytes();
        let [x, y, z] = launch.grid;
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("short");
        let shape = [LAUNCH, length(name)].map(u32::to_le_bytes).concat();
        let params = launch.params.bytes();
        let rest = [x, y, z, launch.threads, launch.shared_bytes, length(params)].map(u32::to_le_bytes).concat();
        self.request(&format!("running {}", launch.kernel), &[&shape, name, &rest, params], &mut [])
    }

    fn product(&self, product: &Product) -> Result<(), DeviceError> {
        let pointers = [product.weights, product.x, product.bias, product.out].map(Address::to_le_bytes).concat();
        let size = |size: usize| u32::try_from(size).expect("small");
        let single = u32::from(product.written == Written::Single);
        let adds = u32::from(product.adds == Adds::Yes);
        let dtype = u32::from(product.dtype == Dtype::F16);
        // The struct ends on a multiple of 8, then comes the type.
        let numbers = [size(product.rows), size(product.outputs), size(product.inputs), single, adds, 0, dtype];
        let numbers = numbers.map(u32::to_le_bytes).concat();
        self.request("multiplying", &[&PRODUCT.to_le_bytes(), &pointers, &numbers], &mut [])
    }
}
