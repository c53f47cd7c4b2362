// What CUDA would bring, for kernels compiled for the host: threads of a block are fibers, one runs at a time.
//
// Never here: arithmetic of a kernel. Products of tensor cores are the definition, in float32, term by term.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __shared__ static
#define KERNEL(name, threads, Params, ...)                                                                             \
  static void name##_call(const void* p) { __VA_ARGS__(*static_cast<const Params*>(p)); }                              \
  static emulator::Entry name##_entry(#name, name##_call, sizeof(Params), threads);
#define SHARED(Type, name) Type* name = reinterpret_cast<Type*>(emulator::shared)

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct uint3 { uint32_t x, y, z; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx, gridDim;
void __syncthreads();

namespace emulator {
struct Entry {
  Entry(const char* name, void (*call)(const void*), size_t size, uint32_t threads);
};
extern unsigned char* shared;

// Room for what the lanes of the running thread's warp tell each other, and a meeting of them.
uint64_t* warp_room();
void meet_warp();

float bf16_to_float(uint16_t x);
uint16_t float_to_bf16(float x);
float f16_to_float(uint16_t x);
uint16_t float_to_f16(float x);

// D = A B + C for 16 x 8 x 16, see device.cuh for who holds what.
template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Held { uint32_t a[4], b[2]; };
  Held* held = reinterpret_cast<Held*>(warp_room());
  uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  std::memcpy(held[lane].a, a, sizeof a);
  held[lane].b[0] = b0;
  held[lane].b[1] = b1;
  meet_warp();
  auto half = [](uint32_t pair, uint32_t which) { return T::load(static_cast<uint16_t>(pair >> 16 * which)); };
  for (uint32_t e = 0; e < 4; e++) {
    uint32_t row = g + 8 * (e / 2), column = 2 * q + e % 2;
    for (uint32_t k = 0; k < 16; k++) {
      uint32_t holder = k % 8 / 2, which = k % 2, far = k / 8;
      float x = half(held[row % 8 * 4 + holder].a[row / 8 + 2 * far], which);
      c[e] = fmaf(x, half(held[column * 4 + holder].b[far], which), c[e]);
    }
  }
  meet_warp();
}
}  // namespace emulator

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class V> V shuffle_xor(V x, int mask) {
  uint64_t* room = emulator::warp_room();
  uint32_t lane = threadIdx.x % 32;
  std::memcpy(&room[lane], &x, sizeof x);
  emulator::meet_warp();
  V theirs;
  std::memcpy(&theirs, &room[lane ^ static_cast<uint32_t>(mask)], sizeof theirs);
  emulator::meet_warp();
  return theirs;
}
inline uint32_t high_product(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
template <class V> V atomicAdd(V* to, V value) {
  V before = *to;
  *to = before + value;
  return before;
}
template <class V> V atomicMin(V* to, V value) {
  V before = *to;
  *to = value < before ? value : before;
  return before;
}
