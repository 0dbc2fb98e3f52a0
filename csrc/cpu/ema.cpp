// General EMA y_t = (1 - p_t) y_{t-1} + p_t z_t for any p, and its gradient.
//
// Without a bound on p nothing can be forgotten early, so time stays serial and the work is shared by sequences and
// blocks of kCols channels. Channel blocks do not depend on the number of threads, nor does the order of any sum.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

constexpr int64_t kCols = 256;

template <class E>
void fwd(const Ema& a, int threads) {
  int64_t blocks = (a.D + kCols - 1) / kCols;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int64_t n = 0; n < a.N; ++n) {
    for (int64_t c = 0; c < blocks; ++c) {
      int64_t col = c * kCols, D = std::min(kCols, a.D - col);
      float y[kCols] = {};
      if (a.initial_state) std::memcpy(y, a.initial_state + n * a.D + col, D * sizeof(float));
      for (int64_t t = a.cu_seqlens[n]; t < a.cu_seqlens[n + 1]; ++t) {
        const E* z = row<E>(a.z, t) + col;
        E* out = row<E>(a.y, t) + col;
        vf take = set1(a.p[t]), keep = set1(1.f - a.p[t]);
        for_each_vector(D, [&](int64_t i, int64_t w) {
          vf v = fma(take, get(z + i, w), keep * get(y + i, w));
          set(y + i, v, w);
          set(out + i, v, w);
        });
      }
      std::memcpy(a.final_state + n * a.D + col, y, D * sizeof(float));
    }
  }
}

// y is recomputed from z rather than read back, so that low-precision outputs cost the gradient nothing. The forward
// values of a stretch of kStretch positions are kept while the backward recurrence runs over it; the values entering
// each stretch come from one first pass.
template <class E>
void bwd_block(const Ema& a, int64_t n, int64_t col, int64_t D, float* dp) {
  constexpr int64_t kStretch = 64;
  int64_t begin = a.cu_seqlens[n], end = a.cu_seqlens[n + 1], stretches = (end - begin + kStretch - 1) / kStretch;
  std::vector<float> enter((stretches + 1) * kCols, 0.f), y((kStretch + 1) * kCols);
  if (a.initial_state) std::memcpy(enter.data(), a.initial_state + n * a.D + col, D * sizeof(float));
  auto step = [&](float* dst, const float* src, int64_t t) {
    const E* z = row<E>(a.z, t) + col;
    vf take = set1(a.p[t]), keep = set1(1.f - a.p[t]);
    for_each_vector(D, [&](int64_t i, int64_t w) { set(dst + i, fma(take, get(z + i, w), keep * get(src + i, w)), w); });
  };
  for (int64_t s = 0; s < stretches; ++s) {
    float* next = enter.data() + (s + 1) * kCols;
    std::memcpy(next, next - kCols, D * sizeof(float));
    for (int64_t t = begin + s * kStretch; t < std::min(end, begin + (s + 1) * kStretch); ++t) step(next, next, t);
  }
  float g[kCols] = {};
  if (a.dfinal) std::memcpy(g, a.dfinal + n * a.D + col, D * sizeof(float));
  for (int64_t s = stretches - 1; s >= 0; --s) {
    int64_t t0 = begin + s * kStretch, t1 = std::min(end, t0 + kStretch);
    std::memcpy(y.data(), enter.data() + s * kCols, D * sizeof(float));
    for (int64_t t = t0; t < t1; ++t) step(y.data() + (t - t0 + 1) * kCols, y.data() + (t - t0) * kCols, t);
    for (int64_t t = t1 - 1; t >= t0; --t) {
      const E *z = row<E>(a.z, t) + col, *dy = row<E>(a.dy, t) + col;
      const float* before = y.data() + (t - t0) * kCols;
      E* dz = row<E>(a.dz, t) + col;
      vf take = set1(a.p[t]), keep = set1(1.f - a.p[t]), acc = zero();
      for_each_vector(D, [&](int64_t i, int64_t w) {
        vf grad = get(g + i, w) + get(dy + i, w);
        acc = fma(grad, get(z + i, w) - get(before + i, w), acc);
        set(dz + i, take * grad, w);
        set(g + i, keep * grad, w);
      });
      dp[t] = sum(acc);
    }
  }
  if (a.dinitial) std::memcpy(a.dinitial + n * a.D + col, g, D * sizeof(float));
}

template <class E>
void bwd(const Ema& a, int threads) {
  int64_t blocks = (a.D + kCols - 1) / kCols;
  std::vector<float> partial(blocks * a.T);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t n = 0; n < a.N; ++n) {
      for (int64_t c = 0; c < blocks; ++c) {
        bwd_block<E>(a, n, c * kCols, std::min(kCols, a.D - c * kCols), partial.data() + c * a.T);
      }
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.T; ++t) {
      float acc = 0.f;
      for (int64_t c = 0; c < blocks; ++c) acc += partial[c * a.T + t];
      a.dp[t] = acc;
    }
  }
}

}  // namespace

void ema_fwd(Dtype d, const Ema& a, int threads) {
  with_dtype(d, [&](auto e) { fwd<decltype(e)>(a, threads); });
}
void ema_bwd(Dtype d, const Ema& a, int threads) {
  with_dtype(d, [&](auto e) { bwd<decltype(e)>(a, threads); });
}

}  // namespace HNET_ISA
}  // namespace hnet
