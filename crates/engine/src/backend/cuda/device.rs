//! What the backend asks of a device: memory, copies, launches and matrix products, in the order in which they are asked.
//!
//! Never here: which kernel computes what (`launch.rs`). There are two devices: the CUDA driver, and in tests the same
//! kernels compiled for the host, behind a pipe.

use std::sync::Arc;

/// A place in a device's memory, in bytes. 0 stands for nothing, as a null pointer does.
pub(crate) type Address = u64;

/// Something that runs kernels. All calls take effect one after another.
pub(crate) trait Device: std::fmt::Debug + Send + Sync + 'static {
    /// Memory that is given back when it is dropped.
    type Memory: Send + Sync + std::fmt::Debug;

    /// A copy to the host that is on its way.
    type Fetched: Send + std::fmt::Debug;

    /// The type of the device, which decides the bits of a product.
    fn name(&self) -> String;

    /// Bytes of memory that nobody has.
    fn free_bytes(&self) -> Result<u64, DeviceError>;

    /// Memory of so many bytes, with anything in it.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, DeviceError>;

    /// Where memory begins; a multiple of 16.
    fn address(memory: &Self::Memory) -> Address;

    /// Fills with zeros.
    fn clear(&self, to: Address, bytes: usize) -> Result<(), DeviceError>;

    /// How many bytes [`Self::fill`] takes at most: whole mebibytes.
    fn fill_bytes_max(&self) -> usize;

    /// Copies to the device what `fill` writes, straight from where it is written.
    fn fill(&self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), DeviceError>;

    /// Copies to the device.
    fn write(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        let parts = (to..).step_by(self.fill_bytes_max()).zip(bytes.chunks(self.fill_bytes_max()));
        parts.into_iter().try_for_each(|(to, part)| self.fill(to, part.len(), &mut |room| room.copy_from_slice(part)))
    }

    /// Copies from the device, when all before it is done.
    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError>;

    /// Begins a copy from the device of what is there when all before it is done.
    fn fetch(&self, from: Address, bytes: usize) -> Result<Self::Fetched, DeviceError>;

    /// Waits for a copy.
    fn fetched(&self, fetched: Self::Fetched) -> Result<Vec<u8>, DeviceError>;

    /// Starts a kernel.
    fn launch(&self, launch: &Launch) -> Result<(), DeviceError>;

    /// Kernels and products that were recorded.
    type Graph: Send + std::fmt::Debug;

    /// Records what `work` starts, in place of doing it. It may start kernels and products, and nothing else.
    fn record(&self, work: &mut dyn FnMut()) -> Result<Self::Graph, DeviceError>;

    /// Does what was recorded.
    fn repeat(&self, graph: &Self::Graph) -> Result<(), DeviceError>;

    /// Starts a matrix product. What it makes of a row depends on that row alone.
    fn product(&self, product: &Product) -> Result<(), DeviceError>;
}

/// A device that several have.
impl<D: Device> Device for Arc<D> {
    type Memory = D::Memory;
    type Fetched = D::Fetched;
    type Graph = D::Graph;

    fn name(&self) -> String {
        D::name(self)
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        D::free_bytes(self)
    }

    fn allocate(&self, bytes: usize) -> Result<D::Memory, DeviceError> {
        D::allocate(self, bytes)
    }

    fn address(memory: &D::Memory) -> Address {
        D::address(memory)
    }

    fn clear(&self, to: Address, bytes: usize) -> Result<(), DeviceError> {
        D::clear(self, to, bytes)
    }

    fn fill_bytes_max(&self) -> usize {
        D::fill_bytes_max(self)
    }

    fn fill(&self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), DeviceError> {
        D::fill(self, to, bytes, fill)
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        D::read(self, from, bytes)
    }

    fn fetch(&self, from: Address, bytes: usize) -> Result<D::Fetched, DeviceError> {
        D::fetch(self, from, bytes)
    }

    fn fetched(&self, fetched: D::Fetched) -> Result<Vec<u8>, DeviceError> {
        D::fetched(self, fetched)
    }

    fn launch(&self, launch: &Launch) -> Result<(), DeviceError> {
        D::launch(self, launch)
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<D::Graph, DeviceError> {
        D::record(self, work)
    }

    fn repeat(&self, graph: &D::Graph) -> Result<(), DeviceError> {
        D::repeat(self, graph)
    }

    fn product(&self, product: &Product) -> Result<(), DeviceError> {
        D::product(self, product)
    }
}

/// The element type of weights, activations, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Dtype {
    /// What the names of its kernels end with.
    pub(crate) const fn suffix(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The value of bits.
    pub(crate) fn widen(self, bits: u16) -> f32 {
        match self {
            Self::Bf16 => half::bf16::from_bits(bits).to_f32(),
            Self::F16 => half::f16::from_bits(bits).to_f32(),
        }
    }

    /// Rounds to the nearest, ties to even.
    pub(crate) fn round(self, value: f32) -> u16 {
        match self {
            Self::Bf16 => half::bf16::from_f32(value).to_bits(),
            Self::F16 => half::f16::from_f32(value).to_bits(),
        }
    }
}

/// A kernel with its parameters.
#[derive(Debug)]
pub(crate) struct Launch {
    /// Its name in the sources.
    pub(crate) kernel: String,
    /// Blocks along x, y and z.
    pub(crate) grid: [u32; 3],
    /// Threads of a block; each kernel has a fixed number.
    pub(crate) threads: u32,
    /// Bytes of shared memory that the kernel does not declare itself.
    pub(crate) shared_bytes: u32,
    /// The kernel's one struct.
    pub(crate) params: Params,
}

/// A kernel's struct of parameters: pointers first, then 32-bit values, without gaps.
#[derive(Debug, Default)]
pub(crate) struct Params {
    bytes: Vec<u8>,
}

impl Params {
    /// Adds a pointer.
    #[must_use]
    pub(crate) fn pointer(mut self, address: Address) -> Self {
        self.bytes.extend(address.to_le_bytes());
        self
    }

    /// Adds pointers.
    #[must_use]
    pub(crate) fn pointers(self, addresses: &[Address]) -> Self {
        addresses.iter().fold(self, |params, address| params.pointer(*address))
    }

    /// Adds whole numbers; what is beyond 32 bits becomes the largest, which stands for "all" or fails every check.
    #[must_use]
    pub(crate) fn numbers(mut self, numbers: &[usize]) -> Self {
        for number in numbers {
            self.bytes.extend(u32::try_from(*number).unwrap_or(u32::MAX).to_le_bytes());
        }
        self
    }

    /// Adds a float.
    #[must_use]
    pub(crate) fn float(mut self, value: f32) -> Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    /// The struct's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// `out = x W^T + bias`, or `out += ...`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    /// Element type of all but `out` where that is float32.
    pub(crate) dtype: Dtype,
    /// `[outputs, inputs]`.
    pub(crate) weights: Address,
    /// `[rows, inputs]`.
    pub(crate) x: Address,
    /// `[outputs]`, or nothing.
    pub(crate) bias: Address,
    /// `[rows, outputs]`.
    pub(crate) out: Address,
    /// Rows of the input.
    pub(crate) rows: usize,
    /// Outputs of the projection.
    pub(crate) outputs: usize,
    /// Its inputs.
    pub(crate) inputs: usize,
    /// The type of `out`.
    pub(crate) written: Written,
    /// Whether `out` is added to.
    pub(crate) adds: Adds,
}

/// The type of a product's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// That of its inputs.
    Half,
    /// float32.
    Single,
}

/// What happens to what was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Adds {
    /// It is replaced.
    No,
    /// The result is added to it.
    Yes,
}

/// What a device could not do.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the device failed while {doing}: {message}")]
pub(crate) struct DeviceError {
    /// What was being done.
    pub(crate) doing: String,
    /// What the device said of it.
    pub(crate) message: String,
}
