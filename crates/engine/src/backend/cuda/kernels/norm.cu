// RMS norm and layer norm, where wanted after an addition to the residual stream.
//
// A block for each row. With a residual, `residual += x` is rounded to the element type and the norm is that of the
// rounded sum: bit for bit what an addition and then a norm give. A row's sums have one order, see block_sum.
#include "device.cuh"

constexpr int NORM_THREADS = 256;

struct NormParams {
  const u16* x;         // [rows, width]
  u16* residual;        // [rows, width], or null
  const float* weight;  // [width]
  const float* bias;    // [width], of a layer norm
  u16* out;             // [rows, width]
  int width;
  float epsilon;
  int add;  // 1: out += norm, 0: out = norm
};

template <class T> __device__ float norm_input(const NormParams& p, int row, int i) {
  u64 at = static_cast<u64>(row) * p.width + i;
  return T::load(p.residual ? p.residual[at] : p.x[at]);
}

template <class T> __device__ void add_residual(const NormParams& p, int row) {
  if (!p.residual) return;
  for (int i = threadIdx.x; i < p.width; i += NORM_THREADS) {
    u64 at = static_cast<u64>(row) * p.width + i;
    // Whoever writes a value here is who reads it below.
    p.residual[at] = T::store(T::load(p.residual[at]) + T::load(p.x[at]));
  }
}

template <class T> __device__ void put_norm(const NormParams& p, int row, int i, float value) {
  u64 at = static_cast<u64>(row) * p.width + i;
  p.out[at] = T::store(p.add ? T::load(p.out[at]) + value : value);
}

// x / sqrt(mean(x^2) + epsilon) * weight
template <class T> __device__ void rms_norm(const NormParams& p) {
  __shared__ float room[NORM_THREADS / WARP];
  int row = blockIdx.x;
  add_residual<T>(p, row);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < p.width; i += NORM_THREADS) {
    float x = norm_input<T>(p, row, i);
    sum = fmaf(x, x, sum);
  }
  float scale = 1.0f / sqrtf(block_sum<NORM_THREADS>(sum, room) / static_cast<float>(p.width) + p.epsilon);
  for (int i = threadIdx.x; i < p.width; i += NORM_THREADS) {
    put_norm<T>(p, row, i, norm_input<T>(p, row, i) * scale * p.weight[i]);
  }
}

// (x - mean) / sqrt(variance + epsilon) * weight + bias
template <class T> __device__ void layer_norm(const NormParams& p) {
  __shared__ float room[NORM_THREADS / WARP];
  int row = blockIdx.x;
  add_residual<T>(p, row);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < p.width; i += NORM_THREADS) sum += norm_input<T>(p, row, i);
  float mean = block_sum<NORM_THREADS>(sum, room) / static_cast<float>(p.width);
  sum = 0.0f;
  for (int i = threadIdx.x; i < p.width; i += NORM_THREADS) {
    float apart = norm_input<T>(p, row, i) - mean;
    sum = fmaf(apart, apart, sum);
  }
  float scale = 1.0f / sqrtf(block_sum<NORM_THREADS>(sum, room) / static_cast<float>(p.width) + p.epsilon);
  for (int i = threadIdx.x; i < p.width; i += NORM_THREADS) {
    put_norm<T>(p, row, i, fmaf((norm_input<T>(p, row, i) - mean) * scale, p.weight[i], p.bias[i]));
  }
}

#define NORMS(name, T)                                                                                                 \
  KERNEL(rms_norm_##name, NORM_THREADS, NormParams, rms_norm<T>)                                                       \
  KERNEL(layer_norm_##name, NORM_THREADS, NormParams, layer_norm<T>)
FOR_TYPES(NORMS)
