//! A CUDA device: the driver, and cuBLASLt for matrix products.
//!
//! Never here: which kernel computes what. One stream takes everything in order; whoever owns the model's thread is the
//! only one who calls.
//!
//! cuBLASLt chooses an algorithm by the number of rows, and algorithms differ in the order of their sums. So one is
//! chosen for each shape of weights, as if for a fixed number of rows, and used for every other: without a division of
//! sums among blocks (split-K), a row's result then depends on that row alone. `gpu-check` compares the bits.

#![expect(unsafe_code, reason = "the driver's interface is C; addresses come from Memory and are used in order")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc;
use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys::{self as lt_sys, cublasLtMatmulDescAttributes_t as Desc};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg as _, result, sys,
};
use cudarc::nvrtc::Ptx;

use crate::backend::cuda::device::{Address, Adds, Device, DeviceError, Dtype, Launch, Product, Written};

/// The kernels, compiled by build.rs.
const MODULES: [&[u8]; 6] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/norm.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/elementwise.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/rope.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/decode.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/prefill.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/sampler.fatbin")),
];

/// The number of rows for which algorithms are chosen: a full batch of decode, which is what has to be fast.
const ROWS_CHOSEN_FOR: u64 = 256;

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
    name: String,
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

impl Driver {
    /// The device of that number, in the order of `CUDA_VISIBLE_DEVICES`.
    pub(crate) fn open(ordinal: usize) -> Result<Self, DeviceError> {
        let context = CudaContext::new(ordinal).map_err(|error| failed("opening the device", error))?;
        // SAFETY: everything runs on one stream, so there is nothing to be tracked.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(|error| failed("making a stream", error))?;
        let module = |image: &&[u8]| context.load_module(Ptx::from_binary(image.to_vec()));
        let modules = MODULES.iter().map(module).collect::<Result<_, _>>();
        let modules = modules.map_err(|error| failed("loading the kernels", error))?;
        let handle = lt::create_handle().map_err(|error| failed("opening cuBLASLt", error))?;
        let name = context.name().map_err(|error| failed("asking for the device's name", error))?;
        let products = Mutex::new(Products { handle, algorithms: HashMap::new() });
        Ok(Self { context, stream, modules, functions: Mutex::new(HashMap::new()), products, name })
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

    fn write(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        self.bind("writing")?;
        // SAFETY: the caller has this memory, and pageable bytes are taken before the call returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }
            .map_err(|error| failed("writing", error))
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.bind("reading")?;
        // SAFETY: the caller has this memory, and the bytes outlive the wait.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) }
            .map_err(|error| failed("reading", error))?;
        self.wait()
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

    fn product(&self, product: &Product) -> Result<(), DeviceError> {
        self.bind("multiplying")?;
        if product.bias != 0 && product.written == Written::Single {
            return Err(failed("multiplying", "a bias has the type of the result, and there is none in float32"));
        }
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = self.stream.cu_stream().cast();
        products.run(product, stream).map_err(|error| failed(&format!("multiplying {product:?}"), error))
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
    fn new() -> Result<Self, lt::CublasError> {
        use lt_sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(lt::create_matmul_pref()?);
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &0_u64)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &0_u32)?;
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
    fn run(&mut self, product: &Product, stream: lt_sys::cudaStream_t) -> Result<(), lt::CublasError> {
        let operation = Operation::new(product.bias)?;
        let algorithm = self.algorithm(product, &operation)?;
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
                std::ptr::null_mut(),
                0,
                stream,
            )
        }
    }

    fn algorithm(
        &mut self,
        product: &Product,
        operation: &Operation,
    ) -> Result<lt_sys::cublasLtMatmulAlgo_t, lt::CublasError> {
        let shape = Shape {
            half: product.dtype == Dtype::F16,
            single: product.written == Written::Single,
            outputs: product.outputs,
            inputs: product.inputs,
            bias: product.bias != 0,
            adds: product.adds == Adds::Yes,
        };
        if let Some(algorithm) = self.algorithms.get(&shape) {
            return Ok(*algorithm);
        }
        let [weights, x, out] = layouts(product, ROWS_CHOSEN_FOR)?;
        let preference = Preference::new()?;
        // SAFETY: all descriptors live until the call returns.
        let found = unsafe {
            lt::get_matmul_algo_heuristic(self.handle, operation.0, weights.0, x.0, out.0, out.0, preference.0)
        }?;
        self.algorithms.insert(shape, found.algo);
        Ok(found.algo)
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made by `create_handle`, and given back once.
        unsafe { lt::destroy_handle(self.handle) }.unwrap_or_default();
    }
}
