// y = W x + b for few rows x: what a decoding step is made of. Weights are read once for all rows.
//
// Each dot product is added up in the same order however many rows and threads there are: a text's bytes do not depend
// on its neighbours.
#include <algorithm>

#include "kernels.h"
#include "simd.h"
#include "step.h"

namespace hnet {
namespace HNET_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kOut = 4, kRows = 6;          // of a tile, whose sums stay in registers
#else
constexpr int64_t kOut = 4, kRows = 4;
#endif
constexpr int64_t kWorth = int64_t(1) << 17;    // multiplications that pay for a second thread

inline void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

// y[r][o] of N rows x, `ld` apart, and the kOut rows of weights w
template <class E, int N, bool First>
inline void tile(const E* const* w, int64_t next, const float* x, int64_t ld, int64_t in, float (*y)[kOut]) {
  vf acc[N][kOut];
  for (int r = 0; r < N; ++r) {
    for (int o = 0; o < kOut; ++o) acc[r][o] = zero();
  }
  auto add = [&](int64_t i, auto get_w, auto get_x) {
    vf weights[kOut];
    for (int o = 0; o < kOut; ++o) weights[o] = get_w(w[o] + i);
    for (int r = 0; r < N; ++r) {
      vf v = get_x(x + r * ld + i);
      for (int o = 0; o < kOut; ++o) acc[r][o] = fma(weights[o], v, acc[r][o]);
    }
  };
  int64_t i = 0;
  for (; i + W <= in; i += W) {
    if (First) {  // for the others the next block is on its way
      for (int o = 0; o < kOut; ++o) prefetch(w[o] + i + next);
    }
    add(i, [](const E* p) { return load(p); }, [](const float* p) { return load(p); });
  }
  if (i < in) {
    add(i, [&](const E* p) { return load_tail(p, in - i); }, [&](const float* p) { return load_tail(p, in - i); });
  }
  for (int r = 0; r < N; ++r) sum4(acc[r], y[r]);
}

// Of `rows` rows, 1 to N
template <class E, int N, bool First>
inline void tile_of(int64_t rows, const E* const* w, int64_t next, const float* x, int64_t in, float (*y)[kOut]) {
  if constexpr (N > 1) {
    if (rows < N) return tile_of<E, N - 1, First>(rows, w, next, x, in, y);
  }
  tile<E, N, First>(w, next, x, in, in, y);
}

template <class E>
void run(const Linear& a, const float* x, int64_t n, float* y, int threads) {
  const E* weight = static_cast<const E*>(a.weight);
  int64_t blocks = (a.out + kOut - 1) / kOut;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && a.out * a.in * n > kWorth)
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t first = block * kOut, count = std::min(kOut, a.out - first), next = kOut * a.in;
    const E* w[kOut];
    for (int64_t o = 0; o < kOut; ++o) w[o] = weight + (first + std::min(o, count - 1)) * a.in;
    if (block + 1 == blocks) next = 0;
    for (int64_t r = 0; r < n; r += kRows) {
      int64_t rows = std::min(kRows, n - r);
      float sums[kRows][kOut];
      const float* at = x + r * a.in;
      r ? tile_of<E, kRows, false>(rows, w, next, at, a.in, sums) : tile_of<E, kRows, true>(rows, w, next, at, a.in, sums);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t o = 0; o < count; ++o) {
          float v = a.scale ? sums[i][o] * a.scale[first + o] : sums[i][o];
          y[(r + i) * a.out + first + o] = v;
        }
      }
    }
  }
  if (a.bias.data) {
    with_dtype(a.bias.dtype, [&](auto e) {
      auto bias = static_cast<const decltype(e)*>(a.bias.data);
      for (int64_t r = 0; r < n; ++r) {
        for_each_vector(a.out, [&](int64_t i, int64_t m) {
          set(y + r * a.out + i, get(y + r * a.out + i, m) + get(bias + i, m), m);
        });
      }
    });
  }
}

}  // namespace

void linear(const Linear& a, const float* x, int64_t n, float* y, int threads) {
  if (a.dtype == kInt8) {
    run<int8_t>(a, x, n, y, threads);
  } else {
    with_dtype(Dtype(a.dtype), [&](auto e) { run<decltype(e)>(a, x, n, y, threads); });
  }
}

}  // namespace HNET_ISA
}  // namespace hnet
