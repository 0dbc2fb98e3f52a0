// Residual add and RMSNorm in one pass over the rows, and its gradient.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

constexpr int64_t kBlock = 64;  // rows whose part of dweight is summed together, whatever the number of threads

template <class E>
void fwd(const RmsNorm& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.T; ++t) {
    const E* x = row<E>(a.x, t);
    const float* before = a.residual.data ? row<float>(a.residual, t) : nullptr;
    float* r = row<float>(a.sum, t);
    E* h = row<E>(a.h, t);
    vf squares = zero();
    for_each_vector(a.D, [&](int64_t i, int64_t n) {
      vf v = get(x + i, n);
      if (before) v = v + get(before + i, n);
      squares = fma(v, v, squares);
      set(r + i, v, n);
    });
    float inv = 1.f / std::sqrt(sum(squares) / float(a.D) + a.eps);
    a.inv_rms[t] = inv;
    for_each_vector(a.D, [&](int64_t i, int64_t n) { set(h + i, get(r + i, n) * set1(inv) * get(a.weight + i, n), n); });
  }
}

template <class E>
void bwd(const RmsNorm& a, int threads) {
  int64_t blocks = (a.T + kBlock - 1) / kBlock;
  std::vector<float> partial(blocks * a.D, 0.f);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      float* dweight = partial.data() + b * a.D;
      for (int64_t t = b * kBlock; t < std::min(a.T, (b + 1) * kBlock); ++t) {
        const E* dh = row<E>(a.dh, t);
        const float *r = row<float>(a.sum, t), *dsum = a.dsum.data ? row<float>(a.dsum, t) : nullptr;
        E* dx = row<E>(a.dx, t);
        float* dresidual = a.dresidual.data ? row<float>(a.dresidual, t) : nullptr;
        vf inv = set1(a.inv_rms[t]), dot = zero();
        for_each_vector(a.D, [&](int64_t i, int64_t n) {
          vf g = get(dh + i, n), normed = get(r + i, n) * inv;
          dot = fma(g * get(a.weight + i, n), normed, dot);
          set(dweight + i, fma(g, normed, get(dweight + i, n)), n);
        });
        vf mean = set1(sum(dot) / float(a.D));
        for_each_vector(a.D, [&](int64_t i, int64_t n) {
          vf d = (get(dh + i, n) * get(a.weight + i, n) - get(r + i, n) * inv * mean) * inv;
          if (dsum) d = d + get(dsum + i, n);
          set(dx + i, d, n);
          if (dresidual) set(dresidual + i, d, n);
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.D; ++i) {
      float acc = 0.f;
      for (int64_t b = 0; b < blocks; ++b) acc += partial[b * a.D + i];
      a.dweight[i] = acc;
    }
  }
}

}  // namespace

void rms_norm_fwd(Dtype d, const RmsNorm& a, int threads) {
  with_dtype(d, [&](auto e) { fwd<decltype(e)>(a, threads); });
}
void rms_norm_bwd(Dtype d, const RmsNorm& a, int threads) {
  with_dtype(d, [&](auto e) { bwd<decltype(e)>(a, threads); });
}

}  // namespace HNET_ISA
}  // namespace hnet
