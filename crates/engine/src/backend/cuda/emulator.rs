//! The kernels on the host: the very same sources, compiled by the system's C++ compiler, in a process behind a pipe.
//!
//! Never here: arithmetic. It shows what the kernels do, reads and write out of bounds included; it does not show what
//! only a device has, such as threads that really run at once.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    memory: Arc<Usage>,
    /// What is asked for is kept here while a step is recorded.
    recording: Arc<Mutex<Option<Vec<Vec<u8>>>>>,
    /// Whether steps can be recorded.
    records: bool,
}

/// The memory that the device is said to have.
#[derive(Debug)]
struct Usage {
    capacity: u64,
    used: AtomicU64,
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
    memory: Arc<Usage>,
    address: Address,
    bytes: u64,
}

impl Drop for EmulatorMemory {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(self.bytes, Ordering::Relaxed);
        // A process that is gone has no memory to give back.
        let parts: [&[u8]; 2] = [&RELEASE.to_le_bytes(), &self.address.to_le_bytes()];
        if self.address != 0 {
            drop(request(&self.pipe, "giving memory back", &parts, &mut []));
        }
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
        Self::with_memory(1 << 30)
    }

    /// The same with so many bytes of memory.
    pub(crate) fn with_memory(capacity: u64) -> Option<Self> {
        if !Command::new("c++").arg("--version").output().is_ok_and(|output| output.status.success()) {
            println!("skipped: there is no C++ compiler (c++) to compile the kernels for the host");
            return None;
        }
        let mut process =
            Command::new(compile()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it was just built");
        let (to, from) = (process.stdin.take().expect("it is piped"), process.stdout.take().expect("it is piped"));
        let memory = Arc::new(Usage { capacity, used: AtomicU64::new(0) });
        Some(Self {
            pipe: Arc::new(Mutex::new(Pipe { process, to, from })),
            memory,
            recording: Arc::default(),
            records: true,
        })
    }

    /// The same, which cannot record steps.
    pub(crate) fn that_does_not_record(self) -> Self {
        Self { records: false, ..self }
    }

    /// Fails, as a device does that falls off the bus.
    pub(crate) fn fail(&self) {
        let mut pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        pipe.process.kill().expect("it runs");
    }

    /// Bytes that were asked for and not given back.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.memory.used.load(Ordering::Relaxed)
    }

    fn request(&self, doing: &str, parts: &[&[u8]], answer: &mut [u8]) -> Result<(), DeviceError> {
        if self.recording().is_some() {
            let message = "nothing but kernels may be recorded".to_owned();
            return Err(DeviceError { doing: doing.to_owned(), message });
        }
        request(&self.pipe, doing, parts, answer)
    }
}

impl Emulator {
    fn recording(&self) -> MutexGuard<'_, Option<Vec<Vec<u8>>>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for what may be recorded.
    fn start_work(&self, doing: &str, parts: &[&[u8]]) -> Result<(), DeviceError> {
        if let Some(recorded) = self.recording().as_mut() {
            recorded.push(parts.concat());
            return Ok(());
        }
        request(&self.pipe, doing, parts, &mut [])
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
    type Fetched = Vec<u8>;
    type Graph = Vec<Vec<u8>>;

    fn name(&self) -> String {
        "emulator".to_owned()
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        Ok(self.memory.capacity.saturating_sub(self.used_bytes()))
    }

    fn allocate(&self, bytes: usize) -> Result<EmulatorMemory, DeviceError> {
        let used = self.memory.used.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        // Given back with what was asked for, where there is not so much.
        let mut held =
            EmulatorMemory { pipe: self.pipe.clone(), memory: self.memory.clone(), address: 0, bytes: bytes as u64 };
        if used > self.memory.capacity {
            let message = format!("out of memory: {used} of {} bytes", self.memory.capacity);
            return Err(DeviceError { doing: format!("allocating {bytes} bytes"), message });
        }
        let mut address = [0; 8];
        self.request("allocating", &[&ALLOCATE.to_le_bytes(), &(bytes as u64).to_le_bytes()], &mut address)?;
        held.address = Address::from_le_bytes(address);
        Ok(held)
    }

    fn address(memory: &EmulatorMemory) -> Address {
        memory.address
    }

    fn clear(&self, _: Address, _: usize) -> Result<(), DeviceError> {
        // What is there stays there, no numbers, to show that nobody relies on zeros.
        Ok(())
    }

    fn fill_bytes_max(&self) -> usize {
        // Far fewer than a GPU takes, so that tests have weights that come in pieces.
        1 << 20
    }

    fn fill(&self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), DeviceError> {
        let mut filled = vec![0; bytes];
        fill(&mut filled);
        self.write(to, &filled)
    }

    fn write(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        let count = (bytes.len() as u64).to_le_bytes();
        self.request("writing", &[&WRITE.to_le_bytes(), &to.to_le_bytes(), &count, bytes], &mut [])
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let count = (bytes.len() as u64).to_le_bytes();
        self.request("reading", &[&READ.to_le_bytes(), &from.to_le_bytes(), &count], bytes)
    }

    fn fetch(&self, from: Address, bytes: usize) -> Result<Vec<u8>, DeviceError> {
        // Everything before it is done, and what comes after it must not show.
        let mut fetched = vec![0; bytes];
        self.read(from, &mut fetched)?;
        Ok(fetched)
    }

    fn fetched(&self, fetched: Vec<u8>) -> Result<Vec<u8>, DeviceError> {
        Ok(fetched)
    }

    fn launch(&self, launch: &Launch) -> Result<(), DeviceError> {
        let name = launch.kernel.as_bytes();
        let [x, y, z] = launch.grid;
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("short");
        let shape = [LAUNCH, length(name)].map(u32::to_le_bytes).concat();
        let params = launch.params.bytes();
        let rest = [x, y, z, launch.threads, launch.shared_bytes, length(params)].map(u32::to_le_bytes).concat();
        self.start_work(&format!("running {}", launch.kernel), &[&shape, name, &rest, params])
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<Vec<Vec<u8>>, DeviceError> {
        *self.recording() = Some(Vec::new());
        work();
        let recorded = self.recording().take().unwrap_or_default();
        let error = || DeviceError { doing: "recording".to_owned(), message: "this one cannot".to_owned() };
        self.records.then_some(recorded).ok_or_else(error)
    }

    fn repeat(&self, graph: &Vec<Vec<u8>>) -> Result<(), DeviceError> {
        graph.iter().try_for_each(|recorded| self.start_work("repeating", &[recorded]))
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
        self.start_work("multiplying", &[&PRODUCT.to_le_bytes(), &pointers, &numbers])
    }
}
