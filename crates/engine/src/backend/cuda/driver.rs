//! A CUDA device: the driver, and cuBLASLt for matrix products.
//!
//! Never here: which kernel computes what. One stream takes everything in order; whoever owns the model's thread is the
//! only one who calls.
//!
//! cuBLASLt chooses an algorithm by the number of rows, and algorithms differ in the order of their sums. So one is
//! chosen for each shape of weights, as if for a fixed number of rows, and used for every other: without a division of
//! sums among blocks (split-K), a row's result then depends on that row alone. `gpu-check` compares the bits.
//!
//! All copies go by way of pinned host memory: those to the device through a ring, so that what is copied may change as
//! soon as a call returns, and nothing waits for the device but a ring that is full.

#![expect(unsafe_code, reason = "the driver's interface is C; addresses come from Memory and are used in order")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys::{self as lt_sys, cublasLtMatmulDescAttributes_t as Desc};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaModule, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg as _, result,
    sys,
};
use cudarc::nvrtc::Ptx;

use crate::backend::cuda::device::{Address, Adds, Device, DeviceError, Dtype, Launch, Product, Written};
use crate::backend::cuda::ring::{PARTS as RING_PARTS, Ring};

/// The kernels, compiled by build.rs.
const MODULES: [&[u8]; 8] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/norm.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/elementwise.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/rope.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/decode.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/prefill.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/sampler.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/quantized.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/stored.fatbin")),
];

/// The number of rows for which algorithms are chosen: a full batch of decode, which is what has to be fast.
const ROWS_CHOSEN_FOR: u64 = 256;

/// Numbers of rows that an algorithm must take to be chosen: below, at and above what blocks of the usual kernels have.
const ROWS_TRIED: [u64; 8] = [1, 2, 17, 64, 129, 256, 1000, 8192];

/// Bytes of workspace for products that may have any algorithm.
const WORKSPACE_BYTES: usize = 32 << 20;

/// How many algorithms are looked at for a shape.
const ALGORITHMS_TRIED: usize = 32;

/// Bytes of the ring through which copies to the device go.
const RING_BYTES: usize = 64 << 20;

/// Copies to the host have memory of so many bytes or more.
const LANDING_BYTES_MIN: usize = 1 << 16;

/// Shared memory that a kernel may be started with: heads of 256 values with 16 to a group take 64 KiB.
const SHARED_BYTES_MAX: i32 = 72 * 1024;

/// A GPU.
#[derive(Debug)]
pub(crate) struct Driver {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    modules: Vec<Arc<CudaModule>>,
    functions: Mutex<HashMap<String, CudaFunction>>,
    products: Mutex<Products>,
    staging: Mutex<Staging>,
    /// Host memory that no copy has now.
    landings: Mutex<Vec<Pinned>>,
    name: String,
    /// Where products may have any algorithm: what these need beside.
    workspace: Option<Memory>,
}

/// Pinned host memory.
#[derive(Debug)]
struct Pinned {
    context: Arc<CudaContext>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it is memory, and whoever has it may use it from any thread.
unsafe impl Send for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made by `malloc_host`, and given back once; whoever had it has waited for its copies.
            unsafe { result::free_host(self.start.cast()) }.unwrap_or_default();
        }
    }
}

impl Pinned {
    fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, DeviceError> {
        let doing = format!("allocating {bytes} bytes of pinned memory");
        context.bind_to_thread().map_err(|error| failed(&doing, error))?;
        // SAFETY: written before it is read, as `slice` says.
        let start = unsafe { result::malloc_host(bytes, 0) }.map_err(|error| failed(&doing, error))?;
        // SAFETY: it is ours, and has so many bytes.
        unsafe { std::ptr::write_bytes(start.cast::<u8>(), 0, bytes) };
        Ok(Self { context: context.clone(), start: start.cast(), bytes })
    }

    /// A part of it, which no copy must be using.
    fn slice(&mut self, part: std::ops::Range<usize>) -> &mut [u8] {
        let part = part.start.min(self.bytes)..part.end.min(self.bytes);
        // SAFETY: within what was allocated and filled, and borrowed as a whole for as long.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(part.start), part.len()) }
    }
}

/// When something on the stream is done.
#[derive(Debug)]
struct Fence {
    context: Arc<CudaContext>,
    event: sys::CUevent,
}

// SAFETY: an event may be used by any thread.
unsafe impl Send for Fence {}

impl Drop for Fence {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made by `create`, and given back once.
            unsafe { result::event::destroy(self.event) }.unwrap_or_default();
        }
    }
}

impl Fence {
    /// Reached when all that the stream has now is done.
    fn after(stream: &CudaStream) -> Result<Self, DeviceError> {
        let context = stream.context();
        context.bind_to_thread().map_err(|error| failed("marking a place", error))?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(|error| failed("marking a place", error))?;
        let fence = Self { context: context.clone(), event };
        // SAFETY: both live until the call returns.
        unsafe { result::event::record(event, stream.cu_stream()) }
            .map_err(|error| failed("marking a place", error))?;
        Ok(fence)
    }

    fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.event) }.map_err(|error| failed("waiting for a copy", error))
    }
}

/// The ring through which copies to the device go.
#[derive(Debug)]
struct Staging {
    ring: Ring<Fence>,
    memory: Pinned,
}

impl Drop for Staging {
    fn drop(&mut self) {
        // The last is reached last; a device that fails reaches none and copies nothing.
        if let Some(last) = self.ring.drain().last() {
            last.wait().unwrap_or_default();
        }
    }
}

/// What was recorded.
pub(crate) struct Graph(CudaGraph);

// SAFETY: it may be used by any thread, one at a time; it is never shared.
unsafe impl Send for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

/// A copy to the host on its way.
#[derive(Debug)]
pub(crate) struct Fetched {
    /// None once it was taken.
    landing: Option<Pinned>,
    bytes: usize,
    fence: Fence,
}

impl Drop for Fetched {
    fn drop(&mut self) {
        if self.landing.is_some() {
            // The device may be writing there.
            self.fence.wait().unwrap_or_default();
        }
    }
}

/// cuBLASLt, with the algorithm of each shape.
struct Products {
    handle: lt_sys::cublasLtHandle_t,
    algorithms: HashMap<Shape, lt_sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: the handle may be used by any thread, one at a time, which the mutex sees to.
unsafe impl Send for Products {}

impl std::fmt::Debug for Products {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Products").field("shapes", &self.algorithms.len()).finish_non_exhaustive()
    }
}

/// What decides the algorithm of a product: everything but its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    half: bool,
    single: bool,
    outputs: usize,
    inputs: usize,
    bias: bool,
    adds: bool,
    /// Where any algorithm will do: for how many rows it is the best.
    rows: Option<usize>,
}

/// Memory of the device.
#[derive(Debug)]
pub(crate) struct Memory {
    context: Arc<CudaContext>,
    address: Address,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A device that cannot give memory back has failed, and says so at the next call.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the address came from `malloc_sync`, and nobody else gives it back.
            unsafe { result::free_sync(self.address) }.unwrap_or_default();
        }
    }
}

/// A kernel's struct of parameters; the driver takes as many bytes as the kernel's has.
#[repr(C)]
struct Words([u64; 24]);

// SAFETY: plain numbers, and the kernel's struct is made of such, see `Params`.
unsafe impl DeviceRepr for Words {}

fn failed(doing: &str, error: impl std::fmt::Display) -> DeviceError {
    DeviceError { doing: doing.to_owned(), message: error.to_string() }
}

/// The context of a device, which stays for as long as the process does: it takes a while to make, and whoever asks how much
/// memory is free does so between two models.
fn context(ordinal: usize) -> Result<Arc<CudaContext>, DeviceError> {
    static CONTEXTS: Mutex<BTreeMap<usize, Arc<CudaContext>>> = Mutex::new(BTreeMap::new());
    let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(context) = contexts.get(&ordinal) {
        return Ok(context.clone());
    }
    let context = CudaContext::new(ordinal).map_err(|error| failed("opening the device", error))?;
    contexts.insert(ordinal, context.clone());
    Ok(context)
}

impl Driver {
    /// The device of that number, in the order of `CUDA_VISIBLE_DEVICES`.
    pub(crate) fn open(ordinal: usize) -> Result<Self, DeviceError> {
        let context = context(ordinal)?;
        // SAFETY: everything runs on one stream, so there is nothing to be tracked.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(|error| failed("making a stream", error))?;
        let module = |image: &&[u8]| context.load_module(Ptx::from_binary(image.to_vec()));
        let modules = MODULES.iter().map(module).collect::<Result<_, _>>();
        let modules = modules.map_err(|error| failed("loading the kernels", error))?;
        let handle = lt::create_handle().map_err(|error| failed("opening cuBLASLt", error))?;
        let products = Mutex::new(Products { handle, algorithms: HashMap::new() });
        let name = context.name().map_err(|error| failed("asking for the device's name", error))?;
        // SAFETY: it asks for a number.
        let version = unsafe { lt_sys::cublasLtGetVersion() };
        // Another version may choose other algorithms, whose sums have another order.
        let name = format!("{name}, cuBLASLt {version}");
        let staging = Mutex::new(Staging { ring: Ring::new(RING_BYTES), memory: Pinned::new(&context, RING_BYTES)? });
        let (functions, landings) = (Mutex::new(HashMap::new()), Mutex::new(Vec::new()));
        let workspace = None;
        Ok(Self { context, stream, modules, functions, products, staging, landings, name, workspace })
    }

    /// The same with whatever algorithm is best for the number of rows, sums divided among blocks included: a row's bits depend
    /// on how many there are. For measurements only.
    pub(crate) fn with_any_algorithm(self) -> Result<Self, DeviceError> {
        let workspace = Some(self.allocate(WORKSPACE_BYTES)?);
        Ok(Self { workspace, ..self })
    }

    /// Bytes of a device's memory that nobody has.
    pub(crate) fn free_bytes_of(ordinal: usize) -> Result<u64, DeviceError> {
        let (free, _) = context(ordinal)?.mem_get_info().map_err(|error| failed("asking for free memory", error))?;
        Ok(free as u64)
    }

    fn landings(&self) -> MutexGuard<'_, Vec<Pinned>> {
        self.landings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until everything is done.
    pub(crate) fn wait(&self) -> Result<(), DeviceError> {
        self.stream.synchronize().map_err(|error| failed("waiting", error))
    }

    fn bind(&self, doing: &str) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(|error| failed(doing, error))
    }

    fn function(&self, name: &str) -> Result<CudaFunction, DeviceError> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(function.clone());
        }
        let found = self.modules.iter().find_map(|module| module.load_function(name).ok());
        let function = found.ok_or_else(|| failed(&format!("looking for the kernel {name}"), "there is none"))?;
        // What is above the usual limit has to be asked for; every GPU since the A100 has this much.
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function
            .set_attribute(attribute, SHARED_BYTES_MAX)
            .map_err(|error| failed("asking for shared memory", error))?;
        functions.insert(name.to_owned(), function.clone());
        Ok(function)
    }
}

impl Device for Driver {
    type Memory = Memory;
    type Fetched = Fetched;
    type Graph = Graph;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        let (free, _) = self.context.mem_get_info().map_err(|error| failed("asking for free memory", error))?;
        Ok(free as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, DeviceError> {
        let doing = format!("allocating {bytes} bytes");
        self.bind(&doing)?;
        // SAFETY: given back in `Memory::drop`. Nothing of no bytes is ever asked for.
        let address = unsafe { result::malloc_sync(bytes.max(16)) }.map_err(|error| failed(&doing, error))?;
        Ok(Memory { context: self.context.clone(), address })
    }

    fn address(memory: &Memory) -> Address {
        memory.address
    }

    fn clear(&self, to: Address, bytes: usize) -> Result<(), DeviceError> {
        self.bind("clearing")?;
        // SAFETY: the caller has this memory.
        unsafe { result::memset_d8_async(to, 0, bytes, self.stream.cu_stream()) }
            .map_err(|error| failed("clearing", error))
    }

    fn fill_bytes_max(&self) -> usize {
        RING_BYTES / RING_PARTS
    }

    fn fill(&self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), DeviceError> {
        self.bind("writing")?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let (part, reached) = staging.ring.take(bytes);
        if part.len() < bytes {
            return Err(failed("writing", format!("{bytes} bytes are too many for the ring")));
        }
        if let Some(last) = reached.last() {
            last.wait()?;
        }
        let room = staging.memory.slice(part.clone());
        fill(room);
        // SAFETY: the caller has the device's memory, and the ring keeps the host's until the fence is reached.
        unsafe { result::memcpy_htod_async(to, room, self.stream.cu_stream()) }
            .map_err(|error| failed("writing", error))?;
        staging.ring.close(part, Fence::after(&self.stream)?);
        Ok(())
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let fetched = self.fetch(from, bytes.len())?;
        bytes.copy_from_slice(&self.fetched(fetched)?);
        Ok(())
    }

    fn fetch(&self, from: Address, bytes: usize) -> Result<Fetched, DeviceError> {
        self.bind("reading")?;
        let spare = {
            let mut landings = self.landings();
            let fits = landings.iter().position(|landing| landing.bytes >= bytes);
            fits.map(|index| landings.swap_remove(index))
        };
        let mut landing = match spare {
            Some(landing) => landing,
            None => Pinned::new(&self.context, bytes.max(LANDING_BYTES_MIN).next_power_of_two())?,
        };
        if bytes > 0 {
            // SAFETY: the caller has the device's memory, and the host's is kept until the fence is reached.
            unsafe { result::memcpy_dtoh_async(landing.slice(0..bytes), from, self.stream.cu_stream()) }
                .map_err(|error| failed("reading", error))?;
        }
        Ok(Fetched { landing: Some(landing), bytes, fence: Fence::after(&self.stream)? })
    }

    fn fetched(&self, mut fetched: Fetched) -> Result<Vec<u8>, DeviceError> {
        self.bind("reading")?;
        fetched.fence.wait()?;
        let Some(mut landing) = fetched.landing.take() else { return Ok(Vec::new()) };
        let bytes = landing.slice(0..fetched.bytes).to_vec();
        self.landings().push(landing);
        Ok(bytes)
    }

    fn launch(&self, launch: &Launch) -> Result<(), DeviceError> {
        let doing = format!("starting {}", launch.kernel);
        let mut words = Words([0; 24]);
        let bytes = launch.params.bytes();
        if bytes.len() > size_of::<Words>() {
            return Err(failed(&doing, "too many parameters"));
        }
        for (word, bytes) in words.0.iter_mut().zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(whole);
        }
        let function = self.function(&launch.kernel)?;
        let config = LaunchConfig {
            grid_dim: launch.grid.into(),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared_bytes,
        };
        let mut builder = self.stream.launch_builder(&function);
        builder.arg(&words);
        // SAFETY: the parameters are those of the kernel (the emulator checks their size for each), and hold addresses
        // of memory that outlives the step.
        unsafe { builder.launch(config) }.map(drop).map_err(|error| failed(&doing, error))
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<Graph, DeviceError> {
        // Of this thread only: what others do with other streams is theirs.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(|error| failed("beginning to record", error))?;
        work();
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        let graph = graph.map_err(|error| failed("recording", error))?;
        let graph = graph.ok_or_else(|| failed("recording", "nothing was started"))?;
        graph.upload().map_err(|error| failed("recording", error))?;
        Ok(Graph(graph))
    }

    fn repeat(&self, graph: &Graph) -> Result<(), DeviceError> {
        graph.0.launch().map_err(|error| failed("repeating what was recorded", error))
    }

    fn product(&self, product: &Product) -> Result<(), DeviceError> {
        self.bind("multiplying")?;
        if product.bias != 0 && product.written == Written::Single {
            return Err(failed("multiplying", "a bias has the type of the result, and there is none in float32"));
        }
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = self.stream.cu_stream().cast();
        let workspace = self.workspace.as_ref().map(|memory| memory.address);
        products.run(product, workspace, stream).map_err(|error| failed(&format!("multiplying {product:?}"), error))
    }
}

/// A descriptor that is given back when it is dropped.
struct Layout(lt_sys::cublasLtMatrixLayout_t);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `create_matrix_layout`, and given back once.
        unsafe { lt::destroy_matrix_layout(self.0) }.unwrap_or_default();
    }
}

/// How a product is computed; given back when it is dropped.
struct Operation(lt_sys::cublasLtMatmulDesc_t);

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made by `create_matmul_desc`, and given back once.
        unsafe { lt::destroy_matmul_desc(self.0) }.unwrap_or_default();
    }
}

/// What an algorithm is chosen by; given back when it is dropped.
struct Preference(lt_sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `create_matmul_pref`, and given back once.
        unsafe { lt::destroy_matmul_pref(self.0) }.unwrap_or_default();
    }
}

impl Operation {
    /// In the words of a library that stores columns: the result's transpose is `W x^T`, with W's rows as columns.
    fn new(bias: Address) -> Result<Self, lt::CublasError> {
        let (compute, scale) = (lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt_sys::cudaDataType::CUDA_R_32F);
        let operation = Self(lt::create_matmul_desc(compute, scale)?);
        operation.set(Desc::CUBLASLT_MATMUL_DESC_TRANSA, &1_i32)?;
        if bias != 0 {
            let epilogue = lt_sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            operation.set(Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            operation.set(Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        Ok(operation)
    }

    fn set<V>(&self, attribute: Desc, value: &V) -> Result<(), lt::CublasError> {
        // SAFETY: the value is of the attribute's type and is copied.
        unsafe { lt::set_matmul_desc_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<V>()) }
    }
}

impl Preference {
    /// No workspace, and no sum that is divided among blocks.
    fn invariant() -> Result<Self, lt::CublasError> {
        use lt_sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(lt::create_matmul_pref()?);
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &0_u64)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &0_u32)?;
        Ok(preference)
    }

    /// Whatever there is.
    fn any() -> Result<Self, lt::CublasError> {
        use lt_sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(lt::create_matmul_pref()?);
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE_BYTES as u64))?;
        Ok(preference)
    }

    fn set<V>(
        &self,
        attribute: lt_sys::cublasLtMatmulPreferenceAttributes_t,
        value: &V,
    ) -> Result<(), lt::CublasError> {
        // SAFETY: the value is of the attribute's type and is copied.
        unsafe { lt::set_matmul_pref_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<V>()) }
    }
}

/// The layouts of W, x and the result for so many rows.
fn layouts(product: &Product, rows: u64) -> Result<[Layout; 3], lt::CublasError> {
    let half = match product.dtype {
        Dtype::Bf16 => lt_sys::cudaDataType::CUDA_R_16BF,
        Dtype::F16 => lt_sys::cudaDataType::CUDA_R_16F,
    };
    let out = if product.written == Written::Single { lt_sys::cudaDataType::CUDA_R_32F } else { half };
    let (outputs, inputs) = (product.outputs as u64, product.inputs as u64);
    let layout = |kind, rows: u64, columns| {
        lt::create_matrix_layout(kind, rows, columns, i64::try_from(rows).unwrap_or(i64::MAX)).map(Layout)
    };
    Ok([layout(half, inputs, outputs)?, layout(half, inputs, rows)?, layout(out, outputs, rows)?])
}

impl Products {
    fn run(
        &mut self,
        product: &Product,
        workspace: Option<Address>,
        stream: lt_sys::cudaStream_t,
    ) -> Result<(), lt::CublasError> {
        let operation = Operation::new(product.bias)?;
        let algorithm = self.algorithm((product, workspace.map(|_| product.rows)), &operation)?;
        let [weights, x, out] = layouts(product, product.rows as u64)?;
        let (alpha, beta) = (1.0_f32, if product.adds == Adds::Yes { 1.0_f32 } else { 0.0 });
        let pointer = |address: Address| address as *mut c_void;
        // SAFETY: all descriptors live until the call returns, and the addresses are of memory of these shapes.
        unsafe {
            lt::matmul(
                self.handle,
                operation.0,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(product.weights),
                weights.0,
                pointer(product.x),
                x.0,
                pointer(product.out),
                out.0,
                pointer(product.out),
                out.0,
                std::ptr::from_ref(&algorithm),
                pointer(workspace.unwrap_or(0)),
                workspace.map_or(0, |_| WORKSPACE_BYTES),
                stream,
            )
        }
    }

    fn algorithm(
        &mut self,
        (product, rows): (&Product, Option<usize>),
        operation: &Operation,
    ) -> Result<lt_sys::cublasLtMatmulAlgo_t, lt::CublasError> {
        let shape = Shape {
            half: product.dtype == Dtype::F16,
            single: product.written == Written::Single,
            outputs: product.outputs,
            inputs: product.inputs,
            bias: product.bias != 0,
            adds: product.adds == Adds::Yes,
            rows,
        };
        if let Some(algorithm) = self.algorithms.get(&shape) {
            return Ok(*algorithm);
        }
        let algorithm = match rows {
            Some(rows) => self.best((product, rows as u64), operation, &Preference::any()?)?.next(),
            None => self
                .best((product, ROWS_CHOSEN_FOR), operation, &Preference::invariant()?)?
                .find(|algorithm| ROWS_TRIED.iter().all(|rows| self.takes(algorithm, (product, *rows), operation))),
        };
        let algorithm = algorithm.ok_or(lt::CublasError(lt_sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED))?;
        self.algorithms.insert(shape, algorithm);
        Ok(algorithm)
    }

    /// Algorithms for so many rows, the best first.
    fn best(
        &self,
        (product, rows): (&Product, u64),
        operation: &Operation,
        preference: &Preference,
    ) -> Result<impl Iterator<Item = lt_sys::cublasLtMatmulAlgo_t>, lt::CublasError> {
        let [weights, x, out] = layouts(product, rows)?;
        let mut found = [const { MaybeUninit::<lt_sys::cublasLtMatmulHeuristicResult_t>::uninit() }; ALGORITHMS_TRIED];
        let mut count = 0;
        // SAFETY: all descriptors live until the call returns, and there is room for so many results.
        unsafe {
            lt_sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                operation.0,
                weights.0,
                x.0,
                out.0,
                out.0,
                preference.0,
                i32::try_from(ALGORITHMS_TRIED).unwrap_or(1),
                found.as_mut_ptr().cast(),
                &raw mut count,
            )
        }
        .result()?;
        // SAFETY: so many were written.
        let found =
            found.into_iter().take(usize::try_from(count).unwrap_or(0)).map(|found| unsafe { found.assume_init() });
        Ok(found.filter(|found| found.state.result().is_ok()).map(|found| found.algo))
    }

    /// Whether an algorithm takes a product with so many rows, and no workspace.
    fn takes(
        &self,
        algorithm: &lt_sys::cublasLtMatmulAlgo_t,
        (product, rows): (&Product, u64),
        operation: &Operation,
    ) -> bool {
        let Ok([weights, x, out]) = layouts(product, rows) else { return false };
        let mut found = MaybeUninit::<lt_sys::cublasLtMatmulHeuristicResult_t>::uninit();
        // SAFETY: all descriptors live until the call returns.
        let checked = unsafe {
            lt_sys::cublasLtMatmulAlgoCheck(
                self.handle,
                operation.0,
                weights.0,
                x.0,
                out.0,
                out.0,
                algorithm,
                found.as_mut_ptr(),
            )
        };
        // SAFETY: it was written, unless there was an error.
        checked.result().is_ok() && unsafe { found.assume_init() }.workspaceSize == 0
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made by `create_handle`, and given back once.
        unsafe { lt::destroy_handle(self.handle) }.unwrap_or_default();
    }
}
