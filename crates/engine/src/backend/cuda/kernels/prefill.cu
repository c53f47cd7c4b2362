// Paged attention of several consecutive rows of a sequence: causal with an offset, with a window where there is one.
//
// A warp for 16 pairs of a token and a query head of the group; the warps of a block take neighbouring pairs, so that
// they walk over the same tiles. The chunk on its way is in registers, those before it are folded in shared memory,
// each value by the thread that made it, so nothing needs to be waited for.
#include "attention.cuh"

// Warps of a block, so that several blocks find room in a multiprocessor's shared memory.
template <int D> constexpr int PREFILL_WARPS = D > 128 ? 2 : 4;

// grid: tiles of work, key heads. Shared memory: 16 * D floats for each warp.
template <class T, int D> __device__ void prefill(const AttentionParams& p) {
  constexpr int PARTS = D / 8;
  SHARED(float, room);
  float* total = room + warp_of() * 16 * D + lane_of();
  const u32* work = p.work + 3 * blockIdx.x;
  u32 group = p.queries / p.keys, row = work[0], pair = work[2] + 16 * warp_of();
  Rows<T, D> rows;
  if (!rows.load(p, row, work[1], blockIdx.y, pair)) return;
  Softmax totals[2] = {{NEGATIVE_INFINITY, 0.0f}, {NEGATIVE_INFINITY, 0.0f}};
  for (int i = 0; i < 4 * PARTS; i++) total[WARP * i] = 0.0f;
  for (u32 chunk = rows.from / CHUNK_TOKENS * CHUNK_TOKENS; chunk < rows.to; chunk += CHUNK_TOKENS) {
    float sums[PARTS][4];
    Softmax done[2] = {{NEGATIVE_INFINITY, 0.0f}, {NEGATIVE_INFINITY, 0.0f}};
#pragma unroll
    for (int part = 0; part < PARTS; part++) sums[part][0] = sums[part][1] = sums[part][2] = sums[part][3] = 0.0f;
#pragma unroll 1
    for (u32 begin = chunk; begin < chunk + CHUNK_TOKENS && begin < rows.to; begin += TILE_TOKENS) {
      if (begin + TILE_TOKENS <= rows.from) continue;
      Tile<T, D> tile;
      tile.compute(p, rows, begin);
      Fold factors[2] = {fold(done[0], tile.softmax[0]), fold(done[1], tile.softmax[1])};
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        float found[4];
        tile.weigh(rows, part, found);
#pragma unroll
        for (int e = 0; e < 4; e++) sums[part][e] = folded(sums[part][e], found[e], factors[e / 2]);
      }
    }
    Fold factors[2] = {fold(totals[0], done[0]), fold(totals[1], done[1])};
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float& sum = total[WARP * (4 * part + e)];
        sum = folded(sum, sums[part][e], factors[e / 2]);
      }
    }
  }
  int g = lane_of() / 4, q = lane_of() % 4;
  for (int part = 0; part < PARTS; part++) {
    for (int side = 0; side < 2; side++) {
      if (!rows.valid[side]) continue;
      u32 mine = pair + g + 8 * side;
      u32 head = blockIdx.y * group + mine % group;
      u16* out = p.out + (static_cast<u64>(row + mine / group) * p.queries + head) * D + 8 * part + 2 * q;
      float a = total[WARP * (4 * part + 2 * side)] / totals[side].sum;
      float b = total[WARP * (4 * part + 2 * side + 1)] / totals[side].sum;
      *reinterpret_cast<u32*>(out) = pack<T>(a, b);
    }
  }
}

#define PREFILL(name, T, D) KERNEL(prefill_##name##_##D, WARP * PREFILL_WARPS<D>, AttentionParams, prefill<T, D>)
FOR_HEADS(PREFILL, bf16, Bf16)
FOR_HEADS(PREFILL, f16, F16)
