// A device on the other end of a pipe: memory, launches of the kernels that are compiled in, and matrix products.
//
// Each allocation ends at a page that cannot be touched and is full of 0xff, which is no number in any type, as is
// shared memory before each block. A warp goes on until it has to wait for others, in one launch the first warp first, in
// the next the last, so that a meeting that is missing shows. A thread that waits for others that never come ends the process.
#include <sys/mman.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <ucontext.h>
#include <vector>

#include "norm.cu"
#include "elementwise.cu"
#include "rope.cu"
#include "decode.cu"
#include "prefill.cu"
#include "sampler.cu"
#include "quantized.cu"
#include "stored.cu"

uint3 threadIdx, blockIdx, gridDim;

namespace emulator {
unsigned char* shared;

struct Kernel {
  void (*call)(const void*);
  size_t size;
  uint32_t threads;
};
static std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}
Entry::Entry(const char* name, void (*call)(const void*), size_t size, uint32_t threads) {
  kernels()[name] = {call, size, threads};
}

[[noreturn]] static void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: %s\n", what.c_str());
  std::exit(1);
}

constexpr size_t STACK = 256 * 1024, MOST_THREADS = 1024;
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool begun = false, done = true;
};
static Fiber fibers[MOST_THREADS];
static ucontext_t main_start;
static jmp_buf main_at;
static uint32_t current, threads, left;
static uint64_t progress;
static void (*running)(const void*);
static const void* params;
struct Meeting {
  uint32_t here = 0;
  uint64_t times = 0;
};
static Meeting block_meeting, warp_meetings[MOST_THREADS / 32];
static uint64_t rooms[MOST_THREADS / 32][32 * 3];

static void body() {
  for (;;) {
    running(params);
    fibers[current].done = true;
    left--;
    progress++;
    if (!_setjmp(fibers[current].at)) _longjmp(main_at, 1);
  }
}

static void resume(uint32_t index) {
  Fiber& fiber = fibers[index];
  current = index;
  threadIdx.x = index;
  if (_setjmp(main_at)) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = std::malloc(STACK);
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = &main_start;
  makecontext(&fiber.start, body, 0);
  setcontext(&fiber.start);
}

static void wait_in(Meeting& meeting, uint32_t all) {
  uint64_t time = meeting.times;
  progress++;
  if (++meeting.here == all) {
    meeting.here = 0;
    meeting.times++;
    return;
  }
  uint32_t self = current;
  while (meeting.times == time) {
    if (!_setjmp(fibers[self].at)) _longjmp(main_at, 1);
  }
}

uint64_t* warp_room() { return rooms[current / 32]; }
void meet_warp() {
  uint32_t warp = current / 32;
  wait_in(warp_meetings[warp], threads - warp * 32 < 32 ? threads - warp * 32 : 32);
}

static void run_block(size_t shared_size, bool backwards) {
  static std::vector<unsigned char> room;
  room.assign(shared_size + 16, 0xff);
  shared = room.data();
  left = threads;
  for (uint32_t i = 0; i < threads; i++) fibers[i].done = false;
  while (left > 0) {
    uint64_t before = progress;
    // A warp goes on for as long as it can, so that those that it should have waited for are behind.
    for (uint32_t first = 0; first < threads; first += 32) {
      for (uint64_t here = progress - 1; here != progress;) {
        here = progress;
        for (uint32_t i = first; i < first + 32 && i < threads; i++) {
          uint32_t index = backwards ? threads - 1 - i : i;
          if (!fibers[index].done) resume(index);
        }
      }
    }
    if (progress == before) fail("threads wait for others that have ended");
  }
  for (size_t i = shared_size; i < room.size(); i++) {
    if (room[i] != 0xff) fail("a write behind shared memory");
  }
}

static void launch(const std::string& name, const uint32_t (&shape)[5], const std::vector<unsigned char>& bytes) {
  auto found = kernels().find(name);
  if (found == kernels().end()) fail("no kernel " + name);
  const Kernel& kernel = found->second;
  if ((bytes.size() + 7) / 8 != (kernel.size + 7) / 8) fail("parameters of the wrong size for " + name);
  if (shape[3] != kernel.threads) fail("blocks of the wrong size for " + name);
  // As driver.rs asks for.
  if (shape[4] > 72 * 1024) fail("more shared memory than a kernel may have, for " + name);
  static bool backwards = false;
  backwards = !backwards;
  running = kernel.call;
  params = bytes.data();
  threads = shape[3];
  gridDim = {shape[0], shape[1], shape[2]};
  for (blockIdx.z = 0; blockIdx.z < shape[2]; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < shape[1]; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < shape[0]; blockIdx.x++) run_block(shape[4], backwards);
}

float bf16_to_float(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }
uint16_t float_to_bf16(float x) {
  uint32_t bits = to_bits(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float f16_to_float(uint16_t x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
}
uint16_t float_to_f16(float x) {
  _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

constexpr size_t PAGE = 4096;
struct Allocation {
  void* mapped;
  size_t length;
};
static std::map<uint64_t, Allocation> allocations;

static uint64_t allocate(uint64_t bytes) {
  size_t rounded = (bytes + 15) / 16 * 16, pages = (rounded + PAGE - 1) / PAGE * PAGE;
  size_t length = pages + 2 * PAGE;
  void* mapped = mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) fail("out of memory");
  unsigned char* first = static_cast<unsigned char*>(mapped) + PAGE;
  if (pages > 0 && mprotect(first, pages, PROT_READ | PROT_WRITE) != 0) fail("out of memory");
  std::memset(first, 0xff, pages);
  uint64_t address = reinterpret_cast<uint64_t>(first + pages - rounded);
  allocations[address] = {mapped, length};
  return address;
}

static void release(uint64_t address) {
  auto found = allocations.find(address);
  if (found == allocations.end()) fail("memory given back that was never had");
  munmap(found->second.mapped, found->second.length);
  allocations.erase(found);
}

// out = x W^T + bias, or out += it: the definition, each sum from its first term to its last.
struct ProductParams {
  const u16* weights;  // [outputs, inputs]
  const u16* x;        // [rows, inputs]
  const u16* bias;     // [outputs], or null
  void* out;           // [rows, outputs]
  u32 rows, outputs, inputs;
  u32 single;  // 1: out is float32
  u32 add;
};

template <class T> static void product(const ProductParams& p) {
  std::vector<float> weights(p.inputs), x(static_cast<size_t>(p.rows) * p.inputs);
  for (size_t i = 0; i < x.size(); i++) x[i] = T::load(p.x[i]);
  for (u32 output = 0; output < p.outputs; output++) {
    for (u32 i = 0; i < p.inputs; i++) weights[i] = T::load(p.weights[static_cast<size_t>(output) * p.inputs + i]);
    for (u32 row = 0; row < p.rows; row++) {
      float sum = 0;
      for (u32 i = 0; i < p.inputs; i++) sum = fmaf(weights[i], x[static_cast<size_t>(row) * p.inputs + i], sum);
      if (p.bias) sum += T::load(p.bias[output]);
      size_t at = static_cast<size_t>(row) * p.outputs + output;
      float* single = static_cast<float*>(p.out) + at;
      u16* half = static_cast<u16*>(p.out) + at;
      if (p.single) *single = p.add ? *single + sum : sum;
      else *half = T::store(p.add ? T::load(*half) + sum : sum);
    }
  }
}

template <class V> static V take() {
  V value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) std::exit(0);
  return value;
}
static std::vector<unsigned char> take_bytes(size_t count) {
  std::vector<unsigned char> bytes(count);
  if (count > 0 && std::fread(bytes.data(), 1, count, stdin) != count) std::exit(0);
  return bytes;
}
static void give(const void* bytes, size_t count) {
  std::fwrite(bytes, 1, count, stdout);
  std::fflush(stdout);
}

static void serve() {
  for (;;) {
    switch (take<uint32_t>()) {
      case 0: {
        uint64_t address = allocate(take<uint64_t>());
        give(&address, sizeof address);
        break;
      }
      case 1: release(take<uint64_t>()); break;
      case 2: {
        uint64_t to = take<uint64_t>(), count = take<uint64_t>();
        auto bytes = take_bytes(count);
        std::memcpy(reinterpret_cast<void*>(to), bytes.data(), count);
        break;
      }
      case 3: {
        uint64_t from = take<uint64_t>(), count = take<uint64_t>();
        give(reinterpret_cast<void*>(from), count);
        break;
      }
      case 4: {
        auto name = take_bytes(take<uint32_t>());
        uint32_t shape[5];
        for (uint32_t& value : shape) value = take<uint32_t>();
        auto bytes = take_bytes(take<uint32_t>());
        launch(std::string(name.begin(), name.end()), shape, bytes);
        break;
      }
      case 5: {
        auto bytes = take_bytes(sizeof(ProductParams));
        auto p = reinterpret_cast<const ProductParams*>(bytes.data());
        take<uint32_t>() == 0 ? product<Bf16>(*p) : product<F16>(*p);
        break;
      }
      default: fail("an unknown request");
    }
  }
}
}  // namespace emulator

void __syncthreads() { emulator::wait_in(emulator::block_meeting, emulator::threads); }

int main() { emulator::serve(); }
