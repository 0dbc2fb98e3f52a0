// Rows of queries, keys and values of one head, rotated, and their gradients.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// `scale` times a row; its first 2 * half entries turned by the angles of position t as well (turn 1), back (-1), or not (0)
template <class From, class To>
void turned(const Attention& a, const From* src, int64_t t, int turn, float scale, To* dst) {
  int64_t from = 0;
  if (turn && a.cos) {
    const float *cos = a.cos + t * a.half, *sin = a.sin + t * a.half;
    for_each_vector(a.half, [&](int64_t i, int64_t n) {
      vf x = get(src + i, n), y = get(src + a.half + i, n), c = get(cos + i, n) * set1(scale), s = get(sin + i, n) * set1(turn * scale);
      set(dst + i, x * c - y * s, n);
      set(dst + a.half + i, x * s + y * c, n);
    });
    from = 2 * a.half;
  }
  for_each_vector(a.width - from, [&](int64_t i, int64_t n) { set(dst + from + i, get(src + from + i, n) * set1(scale), n); });
}

template <class E>
void load_row(const Attention& a, const E* src, int64_t t, bool rotate, float scale, float* dst) {
  turned(a, src, t, rotate ? 1 : 0, scale, dst);
}

// The gradient of load_row
template <class E>
void store_gradient(const Attention& a, const float* src, int64_t t, bool rotate, float scale, E* dst) {
  turned(a, src, t, rotate ? -1 : 0, scale, dst);
}

}  // namespace HNET_ISA
}  // namespace hnet
