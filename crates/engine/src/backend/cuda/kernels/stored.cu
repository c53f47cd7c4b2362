// Weights on their way from a file: what lies there comes in pieces and becomes what products read. The same values, bit for
// bit, as by way of the host (`quantized.rs`, `gguf/formats.rs`); types of values and blocks have the numbers of GGUF files.
#include "device.cuh"

constexpr int STORED_THREADS = 256;
constexpr u32 Q8_0_BLOCK = 32;

typedef unsigned char u8;

__device__ inline u64 stored_thread() { return static_cast<u64>(blockIdx.x) * STORED_THREADS + threadIdx.x; }

__device__ inline float float_at(const void* x, u64 i, u32 type) {
  if (type == 0) return static_cast<const float*>(x)[i];
  u16 half = static_cast<const u16*>(x)[i];
  return type == 1 ? F16::load(half) : Bf16::load(half);
}

// The row that is stored at `row`, see `Order` in raw.rs: in heads of so many rows pairs lie together, or all rows in order.
__device__ inline u32 row_of(u32 row, u32 pairs) {
  if (!pairs) return row;
  u32 place = row % pairs;
  return row - place + place / 2 + place % 2 * (pairs / 2);
}

struct ConvertParams {
  const void* x;  // [count] values of a type
  u16* out;       // [outputs, inputs]
  u32 first;      // the number of x's first value in the file
  u32 count;
  u32 outputs;
  u32 inputs;
  u32 type;
  u32 columns;  // 1: the file has [inputs, outputs]
  u32 pairs;
};

// A thread for each value.
template <class T> __device__ void convert(const ConvertParams& p) {
  u64 i = stored_thread();
  if (i >= p.count) return;
  u32 at = p.first + static_cast<u32>(i);
  u32 output = p.columns ? at % p.outputs : row_of(at / p.inputs, p.pairs);
  u32 input = p.columns ? at / p.outputs : at % p.inputs;
  p.out[static_cast<u64>(output) * p.inputs + input] = T::store(float_at(p.x, i, p.type));
}

struct UnpackParams {
  const u8* x;      // blocks
  u8* quants;       // [outputs, inputs], or half as many bytes: the lower four bits first. Less `lowest`
  float* scales;    // [outputs, inputs / block]
  float* minimums;  // the same, or null
  u32 first;        // the number of x's first value in the file
  u32 count;        // values in x
  u32 inputs;
  u32 type;
  u32 values;  // of a block in x
  u32 bytes;   // of a block in x
  u32 block;   // values with one scale in `scales`, at most as many as in x
  int lowest;
  u32 packed;  // 1: two quants to a byte
  u32 pairs;
};

__device__ inline float half_at(const u8* block, int at) {
  return F16::load(static_cast<u16>(block[at] | block[at + 1] << 8));
}

__device__ inline int four_bits(u8 byte, bool high) { return high ? byte >> 4 : byte & 15; }

// Of q4_k and q5_k: eight scales and minimums of six bits each, in twelve bytes after two factors.
__device__ inline void six_bits(const u8* block, int part, float& scale, float& minimum) {
  const u8* packed = block + 4;
  int of_scale, of_minimum;
  if (part < 4) {
    of_scale = packed[part] & 63;
    of_minimum = packed[part + 4] & 63;
  } else {
    of_scale = (packed[part + 4] & 15) | packed[part - 4] >> 6 << 4;
    of_minimum = packed[part + 4] >> 4 | packed[part] >> 6 << 4;
  }
  scale = half_at(block, 0) * static_cast<float>(of_scale);
  minimum = half_at(block, 2) * static_cast<float>(of_minimum);
}

// Value `i` of a block with its scale and minimum: scale * quant - minimum.
__device__ inline int quant_of(const u8* block, u32 type, int i, float& scale, float& minimum) {
  minimum = 0.0f;
  int part = i / 32, place = i % 32;
  switch (type) {
    case 2:  // q4_0
      scale = half_at(block, 0);
      return four_bits(block[2 + i % 16], i >= 16) - 8;
    case 3:  // q4_1
      scale = half_at(block, 0);
      minimum = -half_at(block, 2);
      return four_bits(block[4 + i % 16], i >= 16);
    case 6:  // q5_0
      scale = half_at(block, 0);
      return four_bits(block[6 + i % 16], i >= 16) + (block[2 + i / 8] >> i % 8 & 1) * 16 - 16;
    case 7:  // q5_1
      scale = half_at(block, 0);
      minimum = -half_at(block, 2);
      return four_bits(block[8 + i % 16], i >= 16) + (block[4 + i / 8] >> i % 8 & 1) * 16;
    case 8:  // q8_0
      scale = half_at(block, 0);
      return static_cast<signed char>(block[2 + i]);
    case 12:  // q4_k
      six_bits(block, part, scale, minimum);
      return four_bits(block[16 + part / 2 * 32 + place], part % 2);
    case 13:  // q5_k
      six_bits(block, part, scale, minimum);
      return four_bits(block[48 + part / 2 * 32 + place], part % 2) + (block[16 + place] >> part & 1) * 16;
    default:  // q6_k
      scale = half_at(block, 208) * static_cast<float>(static_cast<signed char>(block[192 + i / 16]));
      int lower = four_bits(block[part / 4 * 64 + part % 2 * 32 + place], part % 4 >= 2);
      return (lower | (block[128 + part / 4 * 32 + place] >> 2 * (part % 4) & 3) << 4) - 32;
  }
}

// A thread for each eight values; all of them have one scale.
__device__ inline void unpack(const UnpackParams& p) {
  u64 i = 8 * stored_thread();
  if (i >= p.count) return;
  const u8* block = p.x + i / p.values * p.bytes;
  u32 stored = p.first + static_cast<u32>(i);
  u64 at = static_cast<u64>(row_of(stored / p.inputs, p.pairs)) * p.inputs + stored % p.inputs;
  float scale, minimum;
  uint2 quants = {0, 0};
  for (int e = 0; e < 8; e++) {
    u32 quant = static_cast<u32>(quant_of(block, p.type, static_cast<int>(i % p.values) + e, scale, minimum) - p.lowest);
    if (p.packed) {
      quants.x |= quant << 4 * e;
    } else if (e < 4) {
      quants.x |= quant << 8 * e;
    } else {
      quants.y |= quant << 8 * (e - 4);
    }
  }
  if (p.packed) {
    *reinterpret_cast<u32*>(p.quants + at / 2) = quants.x;
  } else {
    *reinterpret_cast<uint2*>(p.quants + at) = quants;
  }
  if (at % p.block) return;
  p.scales[at / p.block] = scale;
  if (p.minimums) p.minimums[at / p.block] = minimum;
}

struct QuantizeParams {
  const void* x;  // [count] values of a type
  u8* quants;     // [outputs, inputs], plus 128
  float* scales;  // [outputs, inputs / 32]
  u32 first;      // the number of x's first value in the file
  u32 count;
  u32 inputs;
  u32 type;
  u32 pairs;
};

// The nearest whole number, halves away from zero, as `round() as i8` has it in quantized.rs.
__device__ inline int nearest(float x) {
  if (x != x) return 0;
  x = x < -128.0f ? -128.0f : x > 127.0f ? 127.0f : x;
  int whole = static_cast<int>(x);
  float rest = x - static_cast<float>(whole);
  return rest >= 0.5f ? whole + 1 : rest <= -0.5f ? whole - 1 : whole;
}

// Floats to q8_0: quantized.rs. A thread for each block.
__device__ inline void quantize(const QuantizeParams& p) {
  u64 i = Q8_0_BLOCK * stored_thread();
  if (i >= p.count) return;
  float largest = 0.0f;
  for (u32 e = 0; e < Q8_0_BLOCK; e++) {
    float size = fabsf(float_at(p.x, i + e, p.type));
    largest = size > largest ? size : largest;
  }
  float exact = largest / 127.0f, inverse = exact == 0.0f ? 0.0f : 1.0f / exact;
  u32 stored = p.first + static_cast<u32>(i);
  u64 at = static_cast<u64>(row_of(stored / p.inputs, p.pairs)) * p.inputs + stored % p.inputs;
  p.scales[at / Q8_0_BLOCK] = F16::load(F16::store(exact));
  for (u32 e = 0; e < Q8_0_BLOCK; e++) p.quants[at + e] = static_cast<u8>(nearest(float_at(p.x, i + e, p.type) * inverse) + 128);
}

KERNEL(unpack_u8, STORED_THREADS, UnpackParams, unpack)
KERNEL(quantize_u8, STORED_THREADS, QuantizeParams, quantize)
#define STORED(name, T) KERNEL(convert_##name, STORED_THREADS, ConvertParams, convert<T>)
FOR_TYPES(STORED)
