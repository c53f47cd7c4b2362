// Products with quantised weights, and rows of a quantised table: weights stay as small in memory as they came, and become
// values of the element type in registers, those that they would have been unpacked to.
//
// A block makes 16 outputs of 64 rows with m16n8k16: weights are factor A, rows factor B. Its four warps take every fourth
// step of 32 inputs, and their sums are added from the first warp to the last: so a row's result does not depend on how many
// rows there are. Thread q of four takes inputs 8q .. 8q + 7 of each 32, for weights and rows alike (the order of the terms
// within a product is free, see attention.cuh): a load of 8 bytes, or of 4 where two quants share a byte.
#include "device.cuh"

constexpr int QUANTIZED_WARPS = 4;
constexpr int QUANTIZED_THREADS = WARP * QUANTIZED_WARPS;
constexpr int QUANTIZED_OUTPUTS = 16;
constexpr int QUANTIZED_ROWS = 64;
constexpr int QUANTIZED_TILES = QUANTIZED_ROWS / 8;
constexpr int QUANTIZED_STEP = 32;

struct QuantizedParams {
  const unsigned char* quants;  // [outputs, inputs], or half as many bytes: the lower four bits first. Less `lowest`
  const float* scales;          // [outputs, inputs / block]
  const float* minimums;        // the same, or null
  const u16* x;                 // [rows, inputs]
  const u16* bias;              // [outputs], or null
  void* out;                    // [rows, outputs]
  u32 rows;
  u32 outputs;
  u32 inputs;  // a multiple of 32
  u32 block;   // a multiple of 8
  int lowest;
  u32 packed;  // 1: two quants to a byte
  u32 single;  // 1: out is float32
  u32 add;
};

// Value i of eight in a row of weights whose first is number `at`; as `Quantized::values` in quantized.rs.
__device__ inline float value_of(const uint2& quants, u32 packed, int lowest, float scale, float minimum, int i) {
  u32 quant = packed ? quants.x >> (4 * i) & 15u : (i < 4 ? quants.x : quants.y) >> (8 * (i % 4)) & 255u;
  return scale * static_cast<float>(static_cast<int>(quant) + lowest) - minimum + 0.0f;
}

// Eight weights of an output, as factors A of two products.
template <class T> __device__ void load_weights(const QuantizedParams& p, u32 output, u32 input, u32 (&weights)[2][4], int side) {
  u64 at = static_cast<u64>(output) * p.inputs + input;
  uint2 quants;
  if (p.packed) {
    quants.x = *reinterpret_cast<const u32*>(p.quants + at / 2);
    quants.y = 0;
  } else {
    quants = *reinterpret_cast<const uint2*>(p.quants + at);
  }
  float scale = p.scales[at / p.block], minimum = p.minimums ? p.minimums[at / p.block] : 0.0f;
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {
    float low = value_of(quants, p.packed, p.lowest, scale, minimum, 2 * pair);
    float high = value_of(quants, p.packed, p.lowest, scale, minimum, 2 * pair + 1);
    weights[pair / 2][side + 2 * (pair % 2)] = pack<T>(low, high);
  }
}

// grid: outputs / 16, rows / 64, both rounded up
template <class T> __device__ void quantized(const QuantizedParams& p) {
  __shared__ float room[QUANTIZED_WARPS][QUANTIZED_ROWS][QUANTIZED_OUTPUTS];
  u32 first_output = blockIdx.x * QUANTIZED_OUTPUTS, first_row = blockIdx.y * QUANTIZED_ROWS;
  int g = lane_of() / 4, q = lane_of() % 4;
  float sums[QUANTIZED_TILES][4];
#pragma unroll
  for (int tile = 0; tile < QUANTIZED_TILES; tile++) sums[tile][0] = sums[tile][1] = sums[tile][2] = sums[tile][3] = 0.0f;
  for (u32 step = warp_of() * QUANTIZED_STEP; step < p.inputs; step += QUANTIZED_WARPS * QUANTIZED_STEP) {
    u32 input = step + 8 * q, weights[2][4];
#pragma unroll
    for (int side = 0; side < 2; side++) {
      u32 output = first_output + g + 8 * side;
      load_weights<T>(p, output < p.outputs ? output : p.outputs - 1, input, weights, side);
    }
#pragma unroll
    for (int tile = 0; tile < QUANTIZED_TILES; tile++) {
      // The same for the whole block.
      if (first_row + 8 * tile >= p.rows) continue;
      u32 row = first_row + 8 * tile + g;
      uint4 x = make_uint4(0, 0, 0, 0);
      if (row < p.rows) x = *reinterpret_cast<const uint4*>(p.x + static_cast<u64>(row) * p.inputs + input);
      T::mma(sums[tile], weights[0], x.x, x.y);
      T::mma(sums[tile], weights[1], x.z, x.w);
    }
  }
#pragma unroll
  for (int tile = 0; tile < QUANTIZED_TILES; tile++) {
#pragma unroll
    for (int e = 0; e < 4; e++) room[warp_of()][8 * tile + 2 * q + e % 2][g + 8 * (e / 2)] = sums[tile][e];
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < QUANTIZED_ROWS * QUANTIZED_OUTPUTS; i += QUANTIZED_THREADS) {
    u32 row = first_row + i / QUANTIZED_OUTPUTS, output = first_output + i % QUANTIZED_OUTPUTS;
    if (row >= p.rows || output >= p.outputs) continue;
    float sum = 0.0f;
    for (int warp = 0; warp < QUANTIZED_WARPS; warp++) sum += room[warp][i / QUANTIZED_OUTPUTS][i % QUANTIZED_OUTPUTS];
    if (p.bias) sum += T::load(p.bias[output]);
    u64 at = static_cast<u64>(row) * p.outputs + output;
    float* single = static_cast<float*>(p.out) + at;
    u16* half = static_cast<u16*>(p.out) + at;
    if (p.single) {
      *single = p.add ? *single + sum : sum;
    } else {
      *half = T::store(p.add ? T::load(*half) + sum : sum);
    }
  }
}

struct QuantizedRowsParams {
  const unsigned char* quants;  // as above
  const float* scales;
  const float* minimums;
  const u32* rows;  // [count / inputs], rows of the table
  u16* out;         // [count / inputs, inputs]
  u32 count;
  u32 inputs;
  u32 block;
  int lowest;
  u32 packed;
  u32 add;  // 1: out += row, 0: out = row
};

// A thread for each eight values of a row.
template <class T> __device__ void quantized_rows(const QuantizedRowsParams& p) {
  u64 i = 8 * (static_cast<u64>(blockIdx.x) * QUANTIZED_THREADS + threadIdx.x);
  if (i >= p.count) return;
  u64 at = static_cast<u64>(p.rows[i / p.inputs]) * p.inputs + i % p.inputs;
  uint2 quants;
  quants.x = *reinterpret_cast<const u32*>(p.quants + (p.packed ? at / 2 : at));
  quants.y = p.packed ? 0 : *reinterpret_cast<const u32*>(p.quants + at + 4);
  float scale = p.scales[at / p.block], minimum = p.minimums ? p.minimums[at / p.block] : 0.0f;
  for (int e = 0; e < 8; e++) {
    u16 value = T::store(value_of(quants, p.packed, p.lowest, scale, minimum, e));
    p.out[i + e] = p.add ? T::store(T::load(p.out[i + e]) + T::load(value)) : value;
  }
}

#define QUANTIZED(name, T)                                                                                             \
  KERNEL(quantized_##name, QUANTIZED_THREADS, QuantizedParams, quantized<T>)                                           \
  KERNEL(quantized_rows_##name, QUANTIZED_THREADS, QuantizedRowsParams, quantized_rows<T>)
FOR_TYPES(QUANTIZED)
