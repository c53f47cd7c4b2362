// What works on each value by itself: activations, rows of tables, scales and caps. A thread for each value.
#include "device.cuh"

constexpr int ELEMENT_THREADS = 256;

__device__ inline u64 element() { return static_cast<u64>(blockIdx.x) * ELEMENT_THREADS + threadIdx.x; }

struct ActivateParams {
  const u16* x;  // [rows, width], or [rows, 2 * width]: gates, then ups
  u16* out;      // [rows, width]
  u32 count;     // rows * width
  u32 width;
  u32 kind;  // as `activation_code` in launch.rs has them
  u32 gated;
};

// math::silu, gelu_tanh, gelu_erf, relu
__device__ inline float activation(float x, u32 kind) {
  if (kind == 0) return x / (1.0f + exp_of(-x));
  if (kind == 1) return x / (1.0f + exp_of(-1.595769f * fmaf(0.044715f, x * x * x, x)));
  if (kind == 3) return x < 0.0f ? 0.0f : x;
  float z = fabsf(x * 0.70710678f);
  float t = 1.0f / fmaf(0.5f, z, 1.0f);
  float sum = 0.17087277f;
  sum = fmaf(sum, t, -0.82215223f);
  sum = fmaf(sum, t, 1.4885159f);
  sum = fmaf(sum, t, -1.135204f);
  sum = fmaf(sum, t, 0.27886807f);
  sum = fmaf(sum, t, -0.18628806f);
  sum = fmaf(sum, t, 0.09678418f);
  sum = fmaf(sum, t, 0.37409196f);
  sum = fmaf(sum, t, 1.0000237f);
  sum = fmaf(sum, t, -1.2655122f);
  float tail = t * exp_of(fmaf(z, -z, sum));
  return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}

// activation(x), or activation(gate) * up
template <class T> __device__ void activate(const ActivateParams& p) {
  u64 i = element();
  if (i >= p.count) return;
  if (!p.gated) {
    p.out[i] = T::store(activation(T::load(p.x[i]), p.kind));
    return;
  }
  const u16* row = p.x + i / p.width * 2 * p.width;
  float gate = T::load(row[i % p.width]), up = T::load(row[p.width + i % p.width]);
  p.out[i] = T::store(activation(gate, p.kind) * up);
}

struct RowsParams {
  const u16* x;          // [any, width]
  const u32* rows;       // [count / width], rows of x
  u16* out;              // [count / width, width]
  u32 count;
  u32 width;
  u32 add;  // 1: out += row, 0: out = row
};

// Rows of a table in any order: an embedding, or the rows whose logits are wanted.
template <class T> __device__ void gather_rows(const RowsParams& p) {
  u64 i = element();
  if (i >= p.count) return;
  u16 value = p.x[static_cast<u64>(p.rows[i / p.width]) * p.width + i % p.width];
  p.out[i] = p.add ? T::store(T::load(p.out[i]) + T::load(value)) : value;
}

struct ResolveParams {
  u32* ids;           // [count]
  const u32* chosen;  // what the step before chose, by the numbers of its outputs
  u32 count;
  u32 vocabulary;
};

// Puts tokens that the step before chose in place of ids with the highest bit (`CHOSEN_BEFORE` in ask.rs). A row that has
// failed chose none; what comes of it is not used, so any token will do.
__device__ inline void resolve(const ResolveParams& p) {
  u64 i = element();
  if (i >= p.count) return;
  u32 id = p.ids[i];
  if (id >> 31) id = p.chosen[id & 0x7fffffffu];
  p.ids[i] = id < p.vocabulary ? id : 0;
}

struct AddRowsParams {
  const u16* x;          // [count / width, width]
  const u32* rows;       // [count / width], distinct rows of out
  const float* factors;  // [count / width]
  u16* out;              // [any, width]
  u32 count;
  u32 width;
};

// Adds row i of x times factors[i] to row rows[i] of out.
template <class T> __device__ void add_rows(const AddRowsParams& p) {
  u64 i = element();
  if (i >= p.count) return;
  u64 at = static_cast<u64>(p.rows[i / p.width]) * p.width + i % p.width;
  p.out[at] = T::store(fmaf(T::load(p.x[i]), p.factors[i / p.width], T::load(p.out[at])));
}

struct ScaleParams {
  u16* x;  // [count]
  u32 count;
  float factor;
};

template <class T> __device__ void scale(const ScaleParams& p) {
  u64 i = element();
  if (i < p.count) p.x[i] = T::store(T::load(p.x[i]) * p.factor);
}

struct NarrowParams {
  const float* x;  // [count]
  u16* out;        // [count]
  u32 count;
};

// Rounds float32 values to the element type.
template <class T> __device__ void narrow(const NarrowParams& p) {
  u64 i = element();
  if (i < p.count) p.out[i] = T::store(p.x[i]);
}

struct CapParams {
  float* x;  // [count]
  u32 count;
  float cap;
};

// cap * tanh(x / cap) of logits
__device__ inline void cap_logits(const CapParams& p) {
  u64 i = element();
  if (i < p.count) p.x[i] = cap_of(p.x[i], p.cap);
}

KERNEL(resolve_u32, ELEMENT_THREADS, ResolveParams, resolve)
KERNEL(cap_logits_f32, ELEMENT_THREADS, CapParams, cap_logits)
#define ELEMENTWISE(name, T)                                                                                           \
  KERNEL(activate_##name, ELEMENT_THREADS, ActivateParams, activate<T>)                                                \
  KERNEL(gather_rows_##name, ELEMENT_THREADS, RowsParams, gather_rows<T>)                                              \
  KERNEL(add_rows_##name, ELEMENT_THREADS, AddRowsParams, add_rows<T>)                                                 \
  KERNEL(scale_##name, ELEMENT_THREADS, ScaleParams, scale<T>)                                                         \
  KERNEL(narrow_##name, ELEMENT_THREADS, NarrowParams, narrow<T>)
FOR_TYPES(ELEMENTWISE)
