// One decoding step of dechunk: state <- (1 - P) state + P z where a chunk begins, out = state + residual.
#include "cuda/device.h"

namespace hnet::cuda {
namespace {

constexpr int kStepThreads = 128;

__device__ inline float residual_at(const DechunkStep& a, int64_t i) {
  switch (a.residual_dtype) {
    case Dtype::bf16: return to_float(as<bf16>(a.residual.data)[i]);
    case Dtype::f16: return to_float(as<f16>(a.residual.data)[i]);
    default: return as<float>(a.residual.data)[i];
  }
}

template <class T>
__global__ void __launch_bounds__(kStepThreads) dechunk_step_kernel(DechunkStep a) {
  const int64_t b = blockIdx.x, d = int64_t(blockIdx.y) * kStepThreads + threadIdx.x;
  if (d >= a.D) return;
  float y = a.state[b * a.D + d];
  if (a.mask[b]) {
    float p = a.prob[b];
    p = p < 1e-4f ? 1e-4f : p > 0.9999f ? 0.9999f : p;  // keeps NaN
    y = (1.0f - p) * y + p * to_float(as<T>(a.z.data)[b * a.z.stride + d]);
  }
  a.new_state[b * a.D + d] = y;
  if (a.residual.data != nullptr) y += residual_at(a, b * a.residual.stride + d);
  store(as<T>(a.out) + b * a.D + d, y);
}

template <class T>
void dechunk_step_as(const DechunkStep& a, Where at) {
  if (a.B == 0 || a.D == 0) return;
  launch(dechunk_step_kernel<T>, a, a.B, (a.D + kStepThreads - 1) / kStepThreads, kStepThreads, at);
}

}  // namespace

void dechunk_step(Dtype dtype, const DechunkStep& a, Where at) {
  switch (dtype) {
    case Dtype::f32: return dechunk_step_as<float>(a, at);
    case Dtype::bf16: return dechunk_step_as<bf16>(a, at);
    case Dtype::f16: return dechunk_step_as<f16>(a, at);
  }
}

}  // namespace hnet::cuda
