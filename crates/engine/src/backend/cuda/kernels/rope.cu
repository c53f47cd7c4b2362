// Norms of queries and keys, rotation, and the write of keys and values to their blocks, in one pass over a fused row.
//
// A warp for each head of each row. Each of the three parts is left out where its pointer is null. The rotation is that
// of GPT-NeoX and Hugging Face (halves of a head, not neighbours; Su et al. 2021, "RoFormer"), in float32 from the
// table that rope.rs makes.
//
// The cache of a layer: keys [block][key head][16 tokens][width], values [block][key head][width][16 tokens]. Values
// are transposed so that what a thread needs for a product on tensor cores lies side by side, see attention.cuh.
#include "device.cuh"

constexpr int ROPE_THREADS = 128;

struct RopeParams {
  u16* qkv;                 // [rows, (queries + 2 * keys) * width]
  const float* query_norm;  // [width], or null
  const float* key_norm;    // [width]
  const float* angles;      // [positions, rotated]: cosines, then sines; twice where there is a switch. Or null
  const u32* positions;     // [rows]
  const u32* lengths;       // [rows], known tokens of the row's sequence
  const u32* slots;         // [rows], block * 16 + place
  u16* key_cache;           // or null
  u16* value_cache;
  int rows;
  int queries;
  int keys;
  int width;
  int rotated;
  u32 switch_positions;  // rows of a table of angles
  u32 switch_longest;    // the longest sequence with the first of two tables; 0xffffffff: there is one
  float epsilon;
};

// Where a value of a key or value head goes in the cache.
__device__ inline u64 cache_start(const RopeParams& p, int row, int head) {
  u32 block = p.slots[row] / BLOCK_TOKENS;
  return (static_cast<u64>(block) * p.keys + head) * BLOCK_TOKENS * p.width;
}

template <class T> __device__ void store_value(const RopeParams& p, const u16* x, int row, int head) {
  u16* to = p.value_cache + cache_start(p, row, head) + p.slots[row] % BLOCK_TOKENS;
  for (int i = lane_of(); i < p.width; i += WARP) to[i * BLOCK_TOKENS] = x[i];
}

template <class T> __device__ void rope_store(const RopeParams& p) {
  int heads = p.queries + 2 * p.keys;
  u64 index = static_cast<u64>(blockIdx.x) * (ROPE_THREADS / WARP) + warp_of();
  if (index >= static_cast<u64>(p.rows) * heads) return;
  int row = static_cast<int>(index / heads), head = static_cast<int>(index % heads);
  u16* x = p.qkv + index * p.width;
  if (head >= p.queries + p.keys) {
    if (p.value_cache) store_value<T>(p, x, row, head - p.queries - p.keys);
    return;
  }
  bool is_key = head >= p.queries;
  const float* weight = is_key ? p.key_norm : p.query_norm;
  float scale = 1.0f;
  if (weight) {
    float sum = 0.0f;
    for (int i = lane_of(); i < p.width; i += WARP) sum = fmaf(T::load(x[i]), T::load(x[i]), sum);
    scale = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(p.width) + p.epsilon);
  }
  u16* to = x;
  if (is_key && p.key_cache) {
    to = p.key_cache + cache_start(p, row, head - p.queries) + p.slots[row] % BLOCK_TOKENS * p.width;
  }
  int rotated = p.angles ? p.rotated : 0, half = rotated / 2;
  u64 table = 0;
  if (p.angles) table = (p.lengths[row] > p.switch_longest ? p.switch_positions : 0) + p.positions[row];
  const float* cosines = p.angles + table * rotated;
  for (int i = lane_of(); i < half; i += WARP) {
    float a = T::load(x[i]), b = T::load(x[i + half]);
    if (weight) {
      a = a * scale * weight[i];
      b = b * scale * weight[i + half];
    }
    float cosine = cosines[i], sine = cosines[half + i];
    to[i] = T::store(fmaf(a, cosine, -(b * sine)));
    to[i + half] = T::store(fmaf(b, cosine, a * sine));
  }
  for (int i = rotated + lane_of(); i < p.width; i += WARP) {
    to[i] = weight ? T::store(T::load(x[i]) * scale * weight[i]) : x[i];
  }
}

#define ROPES(name, T) KERNEL(rope_store_##name, ROPE_THREADS, RopeParams, rope_store<T>)
FOR_TYPES(ROPES)
