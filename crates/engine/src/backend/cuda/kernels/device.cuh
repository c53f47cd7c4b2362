// What all kernels share: element types, products on tensor cores, sums in one fixed order, and the functions of
// `math.rs`, made of the same exactly rounded operations. All inline PTX is here and nowhere else.
//
// The same sources are compiled for the host (crates/engine/tests/emulator), where `__CUDACC__` is not defined and
// emulator.h has what CUDA would bring. So no kernel includes a header of CUDA's.
//
// A kernel takes one struct of parameters: pointers first, then 32-bit values, so that it has no gaps and
// `Params` on the Rust side is a row of bytes.
//
// Never here: a sum whose order depends on other rows. Everything is compiled with --fmad=false: where a multiply-add
// is fused it is written so, and the bits are those of the host.
#pragma once

#ifdef __CUDACC__
#define KERNEL(name, threads, Params, ...)                                                                             \
  extern "C" __global__ void __launch_bounds__(threads) name(const Params p) { __VA_ARGS__(p); }
#define SHARED(Type, name)                                                                                             \
  extern __shared__ __align__(16) unsigned char shared_bytes[];                                                        \
  Type* name = reinterpret_cast<Type*>(shared_bytes)
#else
#include "emulator.h"
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARP = 32;
constexpr int BLOCK_TOKENS = 16;  // as kv.rs has it

__device__ inline int lane_of() { return threadIdx.x % WARP; }
__device__ inline int warp_of() { return threadIdx.x / WARP; }

#ifdef __CUDACC__
__device__ inline float from_bits(u32 bits) { return __uint_as_float(bits); }
__device__ inline u32 to_bits(float x) { return __float_as_uint(x); }
template <class V> __device__ inline V shuffle_xor(V x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ inline u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }
#endif

// The element types of weights, activations, keys and values. `mma` is m16n8k16 with float32 sums: with g = lane / 4
// and q = lane % 4 a thread holds of A rows g and g + 8 (registers 0, 2 and 1, 3), columns 2q, 2q + 1 and 2q + 8,
// 2q + 9; of B the same rows of column g; of C rows g and g + 8, columns 2q and 2q + 1 (PTX ISA, 9.7.15.5.8).
struct Bf16 {
#ifdef __CUDACC__
  __device__ static float load(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
  __device__ static u16 store(float x) {
    u16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
    return out;
  }
  __device__ static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  static float load(u16 x) { return emulator::bf16_to_float(x); }
  static u16 store(float x) { return emulator::float_to_bf16(x); }
  static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator::mma<Bf16>(c, a, b0, b1); }
#endif
};

struct F16 {
#ifdef __CUDACC__
  __device__ static float load(u16 x) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x));
    return out;
  }
  __device__ static u16 store(float x) {
    u16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(x));
    return out;
  }
  __device__ static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  static float load(u16 x) { return emulator::f16_to_float(x); }
  static u16 store(float x) { return emulator::float_to_f16(x); }
  static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator::mma<F16>(c, a, b0, b1); }
#endif
};

#define FOR_TYPES(X) X(bf16, Bf16) X(f16, F16)

template <class T> __device__ inline u32 pack(float low, float high) {
  return T::store(low) | static_cast<u32>(T::store(high)) << 16;
}

constexpr float NEGATIVE_INFINITY = -__builtin_inff();

// math::exp: e^x, Cephes' expf.
__device__ inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float shifted = fmaf(x, 1.44269504f, 12582912.0f);
  float whole = shifted - 12582912.0f;
  float rest = fmaf(whole, 2.12194440e-4f, fmaf(whole, -0.693359375f, x));
  float sum = 1.9875691e-4f;
  sum = fmaf(sum, rest, 1.3981999e-3f);
  sum = fmaf(sum, rest, 8.333452e-3f);
  sum = fmaf(sum, rest, 4.1665796e-2f);
  sum = fmaf(sum, rest, 1.6666666e-1f);
  sum = fmaf(sum, rest, 5e-1f);
  float power = fmaf(sum, rest * rest, rest) + 1.0f;
  return power * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

// math::tanh
__device__ inline float tanh_of(float x) {
  float square = x * x;
  float sum = -5.7049887e-3f;
  sum = fmaf(sum, square, 2.063909e-2f);
  sum = fmaf(sum, square, -5.3739715e-2f);
  sum = fmaf(sum, square, 1.3331442e-1f);
  sum = fmaf(sum, square, -3.333328e-1f);
  float near = fmaf(sum * square, x, x);
  float far = copysignf(1.0f - 2.0f / (exp_of(2.0f * fabsf(x)) + 1.0f), x);
  return fabsf(x) < 0.625f ? near : far;
}

// math::cap
__device__ inline float cap_of(float x, float cap) { return tanh_of(x / cap) * cap; }

// The natural logarithm of 1 + x for x in (-0.293, 0.415), Cephes' logf.
__device__ inline float log_near_one(float x) {
  float sum = 7.0376836e-2f;
  sum = fmaf(sum, x, -1.151461e-1f);
  sum = fmaf(sum, x, 1.1676999e-1f);
  sum = fmaf(sum, x, -1.2420141e-1f);
  sum = fmaf(sum, x, 1.4249323e-1f);
  sum = fmaf(sum, x, -1.6668057e-1f);
  sum = fmaf(sum, x, 2.0000714e-1f);
  sum = fmaf(sum, x, -2.4999994e-1f);
  sum = fmaf(sum, x, 3.3333331e-1f);
  float square = x * x;
  return x + fmaf(sum * x, square, -0.5f * square);
}

// The natural logarithm of a normal positive number.
__device__ inline float log_of(float x) {
  // The exponent for which the rest lies in [sqrt(1/2), sqrt(2)).
  u32 bits = to_bits(x) - 0x3f3504f3u;
  float exponent = static_cast<float>(static_cast<int>(bits) >> 23);
  float rest = from_bits((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  return fmaf(exponent, 0.693359375f, fmaf(exponent, -2.12194440e-4f, log_near_one(rest)));
}

// Sums and maxima over a warp; every lane gets the same bits, since each step adds the same two numbers.
__device__ inline float warp_sum(float x) {
  for (int mask = WARP / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The sum over a block of THREADS, in one order. `room` is shared memory for a value of each warp.
template <int THREADS> __device__ inline float block_sum(float x, float* room) {
  x = warp_sum(x);
  __syncthreads();
  if (lane_of() == 0) room[warp_of()] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < THREADS / WARP; warp++) sum += room[warp];
  return sum;
}
