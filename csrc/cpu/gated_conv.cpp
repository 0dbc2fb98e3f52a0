// Depthwise causal convolution of u over packed sequences times silu(gate), and its gradient.
//
// Work is shared by blocks of kRows positions, which do not depend on the number of threads: nor does any sum.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

constexpr int64_t kRows = 64, kCols = 128;

struct Span {
  int64_t begin, end;
};

// The sequence that holds position t; padding rows are one more sequence.
inline Span sequence(const GatedConv& a, int64_t t) {
  int64_t n = std::upper_bound(a.cu_seqlens, a.cu_seqlens + a.N + 1, int32_t(t)) - a.cu_seqlens - 1;
  return {a.cu_seqlens[n], n < a.N ? a.cu_seqlens[n + 1] : a.T};
}

// f(t, its sequence) for positions t0 to t1
template <class F>
inline void for_each_position(const GatedConv& a, int64_t t0, int64_t t1, F&& f) {
  for (int64_t t = t0; t < t1;) {
    Span s = sequence(a, t);
    for (int64_t end = std::min(s.end, t1); t < end; ++t) f(t, s);
  }
}

template <class E>
inline vf convolve(const GatedConv& a, int64_t t, int64_t begin, int64_t i, int64_t n) {
  vf acc = get(a.bias + i, n);
  for (int64_t j = 0; j < std::min(a.K, t - begin + 1); ++j) {
    acc = fma(get(a.taps + (a.K - 1 - j) * a.D + i, n), get(row<E>(a.x, t - j) + i, n), acc);
  }
  return acc;
}

template <class E>
void fwd(const GatedConv& a, int threads) {
  int64_t blocks = (a.T + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b) {
    for_each_position(a, b * kRows, std::min(a.T, (b + 1) * kRows), [&](int64_t t, Span s) {
      const E* gate = row<E>(a.x, t) + a.D;
      E* out = row<E>(a.out, t);
      for_each_vector(a.D, [&](int64_t i, int64_t n) {
        vf g = get(gate + i, n);
        set(out + i, convolve<E>(a, t, s.begin, i, n) * silu(g, sigmoid(g)), n);
      });
    });
  }
}

// Columns col to col + D of positions t0 to t1. dconv (kRows + K - 1, kCols) has the gradient of the convolution's
// output there and of the K - 1 positions after, which this block makes once more.
template <class E>
void bwd_block(const GatedConv& a, int64_t t0, int64_t t1, int64_t col, int64_t D, float* dconv, float* dtaps) {
  for_each_position(a, t0, std::min(a.T, t1 + a.K - 1), [&](int64_t t, Span s) {
    const E *gate = row<E>(a.x, t) + a.D + col, *dout = row<E>(a.dout, t) + col;
    float* dc = dconv + (t - t0) * kCols;
    E* dgate = row<E>(a.dx, t) + a.D + col;
    for_each_vector(D, [&](int64_t i, int64_t n) {
      vf g = get(gate + i, n), sg = sigmoid(g), silu_g = silu(g, sg), d = get(dout + i, n);
      set(dc + i, d * silu_g, n);
      if (t < t1) set(dgate + i, d * convolve<E>(a, t, s.begin, col + i, n) * (sg + silu_g - silu_g * sg), n);
    });
  });
  for_each_position(a, t0, t1, [&](int64_t t, Span s) {
    const float* dc = dconv + (t - t0) * kCols;
    E* du = row<E>(a.dx, t) + col;
    int64_t after = std::min(a.K, s.end - t), before = std::min(a.K, t - s.begin + 1);
    for_each_vector(D, [&](int64_t i, int64_t n) {
      vf acc = zero();
      for (int64_t j = 0; j < after; ++j) {
        acc = fma(get(a.taps + (a.K - 1 - j) * a.D + col + i, n), get(dc + j * kCols + i, n), acc);
      }
      set(du + i, acc, n);
      vf d = get(dc + i, n);
      for (int64_t j = 0; j < before; ++j) {
        float* tap = dtaps + (a.K - 1 - j) * a.D + col + i;
        set(tap, fma(d, get(row<E>(a.x, t - j) + col + i, n), get(tap, n)), n);
      }
      float* bias = dtaps + a.K * a.D + col + i;
      set(bias, d + get(bias, n), n);
    });
  });
}

template <class E>
void bwd(const GatedConv& a, int threads) {
  int64_t blocks = (a.T + kRows - 1) / kRows, size = (a.K + 1) * a.D;
  std::vector<float> partial(blocks * size, 0.f);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> dconv((kRows + a.K - 1) * kCols);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t col = 0; col < a.D; col += kCols) {
        bwd_block<E>(a, b * kRows, std::min(a.T, (b + 1) * kRows), col, std::min(kCols, a.D - col), dconv.data(),
                     partial.data() + b * size);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size; ++i) {
      float acc = 0.f;
      for (int64_t b = 0; b < blocks; ++b) acc += partial[b * size + i];
      a.dtaps[i] = acc;
    }
  }
}

}  // namespace

void gated_conv_fwd(Dtype d, const GatedConv& a, int threads) {
  with_dtype(d, [&](auto e) { fwd<decltype(e)>(a, threads); });
}
void gated_conv_bwd(Dtype d, const GatedConv& a, int threads) {
  with_dtype(d, [&](auto e) { bwd<decltype(e)>(a, threads); });
}

}  // namespace HNET_ISA
}  // namespace hnet
