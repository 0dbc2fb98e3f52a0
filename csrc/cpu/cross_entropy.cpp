// Cross entropy of every row of logits with its target, the entropy of what the row predicts, and the gradient of the
// first, without a second copy of the logits: a row is read twice while it is in the cache.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

// f(vector) for whole vectors of a row, g(number) for what is left: padding would be a logit too.
template <class E, class F, class G>
inline void for_each_logit(const E* x, int64_t V, F&& f, G&& g) {
  int64_t i = 0;
  for (; i + W <= V; i += W) f(load(x + i));
  for (; i < V; ++i) g(to_float(x[i]));
}

inline float largest(const vf& a) {
  alignas(64) float lanes[W];
  store(lanes, a);
  return *std::max_element(lanes, lanes + W);
}

template <class E>
void fwd(const CrossEntropy& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.T; ++t) {
    const E* x = row<E>(a.logits, t);
    constexpr float lowest = std::numeric_limits<float>::lowest();
    vf most = set1(lowest);
    float top = lowest;
    for_each_logit(x, a.V, [&](vf v) { most = larger(v, most); }, [&](float v) { top = std::max(top, v); });
    top = std::max(top, largest(most));
    vf shift = set1(top), total = zero(), weighted = zero();
    float rest = 0.f, rest_weighted = 0.f;
    for_each_logit(
        x, a.V,
        [&](vf v) {  // below e^-86 of the largest nothing counts: -inf times 0 would
          vf d = clamp(v - shift, -86.f, 86.f), e = exp(d);
          total = total + e;
          weighted = fma(e, d, weighted);
        },
        [&](float v) {
          float d = v - top < -86.f ? -86.f : v - top, e = std::exp(d);
          rest += e;
          rest_weighted += e * d;
        });
    float z = sum(total) + rest, log_z = std::log(z);
    a.norm[2 * t] = top, a.norm[2 * t + 1] = log_z;
    a.loss[t] = a.targets[t] < 0 ? 0.f : top - to_float(x[a.targets[t]]) + log_z;
    a.entropy[t] = log_z - (sum(weighted) + rest_weighted) / z;
  }
}

template <class E>
void bwd(const CrossEntropy& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.T; ++t) {
    const E* x = row<E>(a.logits, t);
    E* dx = row<E>(a.dlogits, t);
    int64_t target = a.targets[t];
    if (target < 0) {
      for_each_vector(a.V, [&](int64_t i, int64_t n) { set(dx + i, zero(), n); });
      continue;
    }
    float top = a.norm[2 * t], log_z = a.norm[2 * t + 1];  // apart: their sum may round the second away
    vf shift = set1(top), less = set1(log_z), dloss = set1(a.dloss[t]);
    for_each_vector(a.V, [&](int64_t i, int64_t n) { set(dx + i, exp(get(x + i, n) - shift - less) * dloss, n); });
    from_float(dx + target, (std::exp(to_float(x[target]) - top - log_z) - 1.f) * a.dloss[t]);
  }
}

}  // namespace

void cross_entropy_fwd(Dtype d, const CrossEntropy& a, int threads) {
  with_dtype(d, [&](auto e) { fwd<decltype(e)>(a, threads); });
}
void cross_entropy_bwd(Dtype d, const CrossEntropy& a, int threads) {
  with_dtype(d, [&](auto e) { bwd<decltype(e)>(a, threads); });
}

}  // namespace HNET_ISA
}  // namespace hnet
