// Tables of rows of which a step reads few: sums of rows, their gradient row by row, and AdamW that visits only rows
// that are read. fp32.
//
// A row without a gradient still moves under AdamW, by its old momentum. Those steps are made up for when the row is next
// wanted, one after the other as they would have been taken: a catch-up may be cut in two anywhere without changing a bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {

void rows_sum(const RowsSum& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.T; ++t) {
    float* out = a.out + t * a.D;
    for_each_vector(a.D, [&](int64_t i, int64_t n) {
      vf acc = zero();
      for (int64_t j = 0; j < a.count; ++j) {
        float scale = a.scale ? a.scale[t * a.count + j] : 1.f;
        if (scale != 0.f) acc = fma(set1(scale), get(a.table + a.index[t * a.count + j] * a.D + i, n), acc);
      }
      set(out + i, acc, n);
    });
  }
}

void rows_gradient(const RowsGradient& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t u = 0; u < a.U; ++u) {
    float* out = a.out + u * a.D;
    for_each_vector(a.D, [&](int64_t i, int64_t n) {
      vf acc = zero();
      for (int64_t e = a.begin[u]; e < a.begin[u + 1]; ++e) {
        int64_t entry = a.order[e];
        acc = fma(set1(a.scale ? a.scale[entry] : 1.f), get(a.dout + entry / a.count * a.D + i, n), acc);
      }
      set(out + i, acc, n);
    });
  }
}

void rows_adamw(const RowsAdamW& a, int threads) {
  const int64_t next = a.done + 1, oldest = std::max<int64_t>(1, next - a.ring + 1);
  auto power = [](double x, int64_t k) { return float(std::pow(x, double(k))); };
  std::vector<float> keep1(a.tail + 1), keep2(a.tail + 1), eps(a.ring);  // moments after k steps without a gradient; of step s
  for (int64_t k = 0; k <= a.tail; ++k) keep1[k] = power(a.beta1, k), keep2[k] = power(std::sqrt(a.beta2), k);
  for (int64_t s = oldest; s <= next; ++s) eps[s % a.ring] = float(a.eps * std::sqrt(1. - std::pow(a.beta2, double(s))));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t u = 0; u < a.U; ++u) {
    const int64_t r = a.rows[u];
    float *p = a.weight + r * a.D, *m = a.exp_avg + r * a.D, *v = a.exp_avg_sq + r * a.D;
    int32_t& touched = a.steps[2 * r];
    int32_t& weight_at = a.steps[2 * r + 1];
    // --- steps without a gradient, as long as the momentum of step `touched` is felt ---
    const int64_t last = touched ? std::min<int64_t>(a.done, touched + a.tail) : 0;
    if (last > weight_at) {
      for_each_vector(a.D, [&](int64_t i, int64_t n) {
        vf x = get(p + i, n), first = get(m + i, n), root = square_root(get(v + i, n));
        for (int64_t s = weight_at + 1; s <= last; ++s) {
          vf direction = first / fma(root, set1(keep2[s - touched]), set1(eps[s % a.ring]));
          x = fma(set1(-a.recent[s % a.ring] * keep1[s - touched]), direction, x);
        }
        set(p + i, x, n);
      });
    }
    weight_at = int32_t(a.done);
    if (!a.gradient) continue;
    // --- step done + 1, with its gradient ---
    const float* g = a.gradient + u * a.D;
    const vf old1 = set1(power(a.beta1, next - touched)), old2 = set1(power(a.beta2, next - touched));
    const vf new1 = set1(float(1. - a.beta1)), new2 = set1(float(1. - a.beta2));
    const vf now = set1(eps[next % a.ring]), rate = set1(-a.recent[next % a.ring]);
    for_each_vector(a.D, [&](int64_t i, int64_t n) {
      vf d = get(g + i, n), first = fma(new1, d, old1 * get(m + i, n)), second = fma(new2 * d, d, old2 * get(v + i, n));
      set(m + i, first, n);
      set(v + i, second, n);
      set(p + i, fma(rate, first / (square_root(second) + now), get(p + i, n)), n);
    });
    touched = weight_at = int32_t(next);
  }
}

}  // namespace HNET_ISA
}  // namespace hnet
