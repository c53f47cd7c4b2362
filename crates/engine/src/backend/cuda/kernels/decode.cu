// Paged attention of rows that are the only ones of their sequence in a step.
//
// A block for each row, 16 query heads of a key head, and chunks by turns: its four warps compute a tile each, then the
// block folds the tiles. A row of one chunk is done then; the partial results of others are folded by the second kernel,
// a block for each row and head. How many blocks take turns changes no bit.
#include "attention.cuh"

constexpr int DECODE_THREADS = WARP * CHUNK_TILES;

// Rows g and g + 8 of a tile's results, to shared memory.
template <class T, int D>
__device__ void put_tile(const Tile<T, D>& tile, const Rows<T, D>& rows, float* sums, Softmax* softmax) {
  int g = lane_of() / 4, q = lane_of() % 4;
#pragma unroll 2
  for (int part = 0; part < D / 8; part++) {
    float found[4];
    tile.weigh(rows, part, found);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (rows.valid[e / 2]) sums[(g + 8 * (e / 2)) * D + 8 * part + 2 * q + e % 2] = found[e];
    }
  }
  if (q == 0) {
    softmax[g] = tile.softmax[0];
    softmax[g + 8] = tile.softmax[1];
  }
}

// grid: rows of work, key heads * ceil(group / 16), turns. Shared memory: CHUNK_TILES * min(group, 16) * D floats.
template <class T, int D> __device__ void decode(const AttentionParams& p) {
  SHARED(float, sums);
  __shared__ Softmax softmax[CHUNK_TILES][16];
  __shared__ Fold factors[CHUNK_TILES][16];
  __shared__ Softmax whole[16];
  u32 group = p.queries / p.keys, parts = (group + 15) / 16;
  u32 row = p.work[2 * blockIdx.x], first_partial = p.work[2 * blockIdx.x + 1];
  u32 key_head = blockIdx.y / parts, pair = blockIdx.y % parts * 16;
  u32 count = group - pair < 16 ? group - pair : 16, stride = group < 16 ? group : 16;
  Rows<T, D> rows;
  rows.load(p, row, 1, key_head, pair);
  u32 first = rows.from / CHUNK_TOKENS, chunks = (rows.to - 1) / CHUNK_TOKENS - first + 1;
  u32 head = key_head * group + pair;
  for (u32 chunk = blockIdx.z; chunk < chunks; chunk += gridDim.z) {
    u32 begin = (first + chunk) * CHUNK_TOKENS + warp_of() * TILE_TOKENS;
    if (begin < rows.to && begin + TILE_TOKENS > rows.from) {
      Tile<T, D> tile;
      tile.compute(p, rows, begin);
      put_tile(tile, rows, sums + warp_of() * stride * D, softmax[warp_of()]);
    } else if (lane_of() < 16) {
      softmax[warp_of()][lane_of()].largest = NEGATIVE_INFINITY;
      softmax[warp_of()][lane_of()].sum = 0.0f;
    }
    __syncthreads();
    if (threadIdx.x < count) {
      Softmax done = {NEGATIVE_INFINITY, 0.0f};
      for (int tile = 0; tile < CHUNK_TILES; tile++) factors[tile][threadIdx.x] = fold(done, softmax[tile][threadIdx.x]);
      whole[threadIdx.x] = done;
    }
    __syncthreads();
    u64 partial = static_cast<u64>(first_partial + chunk) * p.queries + head;
    for (u32 i = threadIdx.x; i < count * D; i += DECODE_THREADS) {
      float sum = 0.0f;
      for (int tile = 0; tile < CHUNK_TILES; tile++) sum = folded(sum, sums[tile * stride * D + i], factors[tile][i / D]);
      if (chunks == 1) {
        p.out[(static_cast<u64>(row) * p.queries + head) * D + i] = T::store(sum / whole[i / D].sum);
      } else {
        p.partials[partial * D + i] = sum;
      }
    }
    if (chunks > 1 && threadIdx.x < count) {
      p.stats[2 * (partial + threadIdx.x)] = whole[threadIdx.x].largest;
      p.stats[2 * (partial + threadIdx.x) + 1] = whole[threadIdx.x].sum;
    }
    // The next chunk writes where this one is read.
    __syncthreads();
  }
}

// grid: rows of work, heads
template <class T, int D> __device__ void combine(const AttentionParams& p) {
  u32 row = p.work[2 * blockIdx.x], first_partial = p.work[2 * blockIdx.x + 1], head = blockIdx.y;
  u32 position = p.positions[row];
  u32 first = first_seen(position, p.window) / CHUNK_TOKENS, chunks = position / CHUNK_TOKENS - first + 1;
  if (chunks == 1) return;
  for (int i = threadIdx.x; i < D; i += DECODE_THREADS) {
    Softmax done = {NEGATIVE_INFINITY, 0.0f};
    float sum = 0.0f;
    for (u32 chunk = 0; chunk < chunks; chunk++) {
      u64 partial = static_cast<u64>(first_partial + chunk) * p.queries + head;
      Softmax next = {p.stats[2 * partial], p.stats[2 * partial + 1]};
      Fold factors = fold(done, next);
      sum = folded(sum, p.partials[partial * D + i], factors);
    }
    p.out[(static_cast<u64>(row) * p.queries + head) * D + i] = T::store(sum / done.sum);
  }
}

#define DECODE(name, T, D)                                                                                             \
  KERNEL(decode_##name##_##D, DECODE_THREADS, AttentionParams, decode<T, D>)                                           \
  KERNEL(combine_##name##_##D, DECODE_THREADS, AttentionParams, combine<T, D>)
FOR_HEADS(DECODE, bf16, Bf16)
FOR_HEADS(DECODE, f16, F16)
