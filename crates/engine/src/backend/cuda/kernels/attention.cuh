// The arithmetic of paged attention, once, for the kernels of decode.cu and prefill.cu.
//
// Tokens are taken in tiles of 64 and chunks of 256, counted from the sequence's first token. A tile is a softmax of its
// own (largest score, sum, weighted values); a chunk folds its tiles, and a row folds its chunks, from left to right
// (the rescaling of Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; the fixed splits are those
// of flash-decoding, Dao et al. 2023, made independent of the batch). Which tiles a row sees depends on its position
// alone, and a tile that it does not see leaves every bit as it was. So a row's result is the same whether its chunks
// are computed side by side or one after another, and whatever rows are computed with it: prefill and decode agree bit
// for bit.
//
// A warp computes 16 rows with m16n8k16: pairs of a token and one of the query heads that share a key head. The order
// of the terms within a product is free, so it is chosen for loads straight from the cache's layout (rope.cu) into
// registers, 16 bytes of a key or 8 of a value at a time, without shared memory:
//   width: thread q of four takes values 8q .. 8q + 7 of each 32, for queries and keys alike;
//   tokens: thread q of four holds the scores of tokens 4q .. 4q + 3 of each 16, which are the factors it needs next.
#pragma once
#include "device.cuh"

constexpr int TILE_TOKENS = 64;
constexpr int TILE_BLOCKS = TILE_TOKENS / BLOCK_TOKENS;
constexpr int CHUNK_TOKENS = 256;
constexpr int CHUNK_TILES = CHUNK_TOKENS / TILE_TOKENS;

struct AttentionParams {
  const u16* qkv;           // [rows, (queries + 2 * keys) * width], rotated
  const u16* key_cache;     // see rope.cu
  const u16* value_cache;
  u16* out;                 // [rows, queries * width]
  const u32* positions;     // [rows]
  const u32* table_starts;  // [rows], where the row's block table begins
  const u32* tables;        // block numbers
  const u32* work;          // decode: [rows of work][row, first of its partials]; prefill: [tiles][row, rows, first pair]
  float* partials;          // decode: [partials, queries, width]
  float* stats;             // decode: [partials, queries, 2]: largest score and sum
  u32 queries;
  u32 keys;
  u32 window;  // tokens that a row sees, itself included; 0xffffffff: all
  float scale;
  float cap;  // 0: none
};

// A softmax on its way: the largest score, and the sum of exponentials relative to it.
struct Softmax {
  float largest;
  float sum;
};

// What accumulators are multiplied with when `next` is folded into `done`.
struct Fold {
  float done;
  float next;
};

__device__ inline Fold fold(Softmax& done, Softmax next) {
  float largest = done.largest > next.largest ? done.largest : next.largest;
  Fold factors;
  factors.done = done.largest == NEGATIVE_INFINITY ? 0.0f : exp_of(done.largest - largest);
  factors.next = next.largest == NEGATIVE_INFINITY ? 0.0f : exp_of(next.largest - largest);
  done.sum = fmaf(next.sum, factors.next, done.sum * factors.done);
  done.largest = largest;
  return factors;
}

// A factor of 0 stands for what was not computed.
__device__ inline float folded(float done, float next, Fold factors) {
  return factors.next == 0.0f ? done * factors.done : fmaf(next, factors.next, done * factors.done);
}

__device__ inline u32 first_seen(u32 position, u32 window) { return position + 1 > window ? position + 1 - window : 0; }

// The 16 rows of a warp, as one of its threads sees them.
template <class T, int D> struct Rows {
  static constexpr int STEPS = (D + 31) / 32;
  u32 queries[STEPS][2][4];  // factors A of each product
  u32 position[2];           // of rows g and g + 8
  bool valid[2];
  u32 from, to;   // tokens that any of the warp's rows sees
  u32 table;      // where the block table begins
  u32 key_head;

  // Of 16 pairs of a token and a head of the group of `key_head`, the first is number `pair` of those of a run of
  // `count` rows of one sequence that begins at `row`. False when there is none.
  __device__ bool load(const AttentionParams& p, u32 row, u32 count, u32 head, u32 pair) {
    u32 group = p.queries / p.keys, pairs = count * group;
    if (pair >= pairs) return false;
    u32 last = pair + 15 < pairs ? pair + 15 : pairs - 1;
    key_head = head;
    table = p.table_starts[row];
    from = first_seen(p.positions[row + pair / group], p.window);
    to = p.positions[row + last / group] + 1;
    int g = lane_of() / 4, q = lane_of() % 4;
    for (int side = 0; side < 2; side++) {
      u32 mine = pair + g + 8 * side;
      valid[side] = mine < pairs;
      u32 its_row = row + (valid[side] ? mine : last) / group;
      position[side] = p.positions[its_row];
      const u16* x = p.qkv + static_cast<u64>(its_row) * (p.queries + 2 * p.keys) * D +
                     (head * group + (valid[side] ? mine : last) % group) * D;
      for (int step = 0; step < STEPS; step++) {
        int at = 32 * step + 8 * q;
        uint4 values = make_uint4(0, 0, 0, 0);
        if (at < D) values = *reinterpret_cast<const uint4*>(x + at);
        queries[step][0][side] = values.x;
        queries[step][0][side + 2] = values.y;
        queries[step][1][side] = values.z;
        queries[step][1][side + 2] = values.w;
      }
    }
    return true;
  }
};

// One tile: scores, weights, and on demand the weighted values.
template <class T, int D> struct Tile {
  u32 weights[TILE_BLOCKS][4];  // factors A of the products with values
  Softmax softmax[2];           // of rows g and g + 8
  const u16* values[TILE_BLOCKS];
  u32 begin;

  __device__ bool sees(const Rows<T, D>& rows, int block) const {
    u32 token = begin + BLOCK_TOKENS * block;
    return token < rows.to && token + BLOCK_TOKENS > rows.from;
  }

  __device__ void compute(const AttentionParams& p, const Rows<T, D>& rows, u32 tile_begin) {
    begin = tile_begin;
    int g = lane_of() / 4, q = lane_of() % 4;
    float scores[TILE_BLOCKS][2][4];
    float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
    for (int block = 0; block < TILE_BLOCKS; block++) {
      values[block] = p.value_cache;
#pragma unroll
      for (int side = 0; side < 2; side++) {
#pragma unroll
        for (int e = 0; e < 4; e++) scores[block][side][e] = 0.0f;
      }
      if (sees(rows, block)) {
        u32 number = p.tables[rows.table + begin / BLOCK_TOKENS + block];
        u64 start = (static_cast<u64>(number) * p.keys + rows.key_head) * (BLOCK_TOKENS * D);
        values[block] = p.value_cache + start;
#pragma unroll
        for (int side = 0; side < 2; side++) {
          const u16* key = p.key_cache + start + (4 * (g / 2) + 2 * side + g % 2) * D;
#pragma unroll
          for (int step = 0; step < Rows<T, D>::STEPS; step++) {
            int at = 32 * step + 8 * q;
            uint4 k = make_uint4(0, 0, 0, 0);
            if (at < D) k = *reinterpret_cast<const uint4*>(key + at);
            T::mma(scores[block][side], rows.queries[step][0], k.x, k.y);
            T::mma(scores[block][side], rows.queries[step][1], k.z, k.w);
          }
        }
      }
      // What a row does not see is left out here, whatever it holds.
#pragma unroll
      for (int side = 0; side < 2; side++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          u32 token = begin + BLOCK_TOKENS * block + 4 * q + 2 * side + e % 2;
          u32 position = rows.position[e / 2];
          float score = scores[block][side][e] * p.scale;
          if (p.cap > 0.0f) score = cap_of(score, p.cap);
          bool seen = token <= position && token >= first_seen(position, p.window);
          score = seen ? score : NEGATIVE_INFINITY;
          scores[block][side][e] = score;
          largest[e / 2] = score > largest[e / 2] ? score : largest[e / 2];
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      for (int mask = 1; mask <= 2; mask *= 2) {
        float other = shuffle_xor(largest[row], mask);
        largest[row] = other > largest[row] ? other : largest[row];
      }
    }
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int block = 0; block < TILE_BLOCKS; block++) {
#pragma unroll
      for (int side = 0; side < 2; side++) {
        float weight[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float score = scores[block][side][e];
          weight[e] = score == NEGATIVE_INFINITY ? 0.0f : exp_of(score - largest[e / 2]);
          sums[e / 2] += weight[e];
        }
        weights[block][2 * side] = pack<T>(weight[0], weight[1]);
        weights[block][2 * side + 1] = pack<T>(weight[2], weight[3]);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      for (int mask = 1; mask <= 2; mask *= 2) sums[row] += shuffle_xor(sums[row], mask);
      softmax[row].largest = largest[row];
      softmax[row].sum = sums[row];
    }
  }

  // The weighted values of columns 8 * part .. 8 * part + 7.
  __device__ void weigh(const Rows<T, D>& rows, int part, float (&sums)[4]) const {
    int g = lane_of() / 4, q = lane_of() % 4;
    sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
#pragma unroll
    for (int block = 0; block < TILE_BLOCKS; block++) {
      if (!sees(rows, block)) continue;
      uint2 v = *reinterpret_cast<const uint2*>(values[block] + (8 * part + g) * BLOCK_TOKENS + 4 * q);
      // Places behind the last token may hold anything, and nothing times infinity is no number.
      u32 token = begin + BLOCK_TOKENS * block + 4 * q;
      if (token + 3 >= rows.to) {
        v.x = token >= rows.to ? 0 : token + 1 >= rows.to ? v.x & 0xffffu : v.x;
        v.y = token + 2 >= rows.to ? 0 : v.y & 0xffffu;
      }
      T::mma(sums, weights[block], v.x, v.y);
    }
  }
};

// Head sizes; those below 64 are of tests' models. `HEAD_WIDTHS` in launch.rs has them too.
#define FOR_HEADS(X, name, T)                                                                                          \
  X(name, T, 8) X(name, T, 16) X(name, T, 24) X(name, T, 32) X(name, T, 64)                                            \
  X(name, T, 80) X(name, T, 96) X(name, T, 128) X(name, T, 256)
