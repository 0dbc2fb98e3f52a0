// From logits to bytes: hnet/generate/sampling.py's `Sampler.sample` for rows with settings of their own.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

// Zeroes what top_k, top_p and min_p cut; the most probable byte stays. order (V,) is room to sort.
void truncate(float* p, int64_t V, int64_t top_k, float top_p, float min_p, std::vector<int>& order) {
  order.resize(V);
  for (int64_t i = 0; i < V; ++i) order[i] = int(i);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return p[a] > p[b] || (p[a] == p[b] && a < b); });
  double kept = 0, before = 0;
  for (int64_t i = 0; i < std::min(top_k, V); ++i) kept += p[order[i]];
  float highest = p[order[0]];
  for (int64_t i = 0; i < V; ++i) {
    float& one = p[order[i]];
    bool keep = i == 0 || (i < top_k && (top_p >= 1.f || before < top_p * kept));
    before += one;
    if (!keep || !(one >= min_p * highest)) one = 0.f;
  }
}

int64_t choose(const Sample& a, int64_t b, std::vector<float>& x, std::vector<int>& order) {
  const float* logits = a.logits + b * a.V;
  const uint8_t* allowed = a.allowed + a.situation[b] * a.V;
  const uint8_t *seen = a.seen ? a.seen + b * a.V : nullptr, *banned = a.banned ? a.banned + b * a.V : nullptr;
  bool numbers = true, free = false;
  if (banned) {
    for (int64_t i = 0; i < a.V; ++i) free |= allowed[i] && !banned[i];
  }
  int64_t chosen = -1;
  float best = -INFINITY;
  for (int64_t i = 0; i < a.V; ++i) {
    float v = logits[i];
    numbers &= v < INFINITY;  // of a NaN too
    if (seen && seen[i]) v = v > 0 ? v / a.penalty[b] : v * a.penalty[b];
    if (a.adjust) v += a.adjust[b * a.V + i];
    if (!allowed[i] || (free && banned[i])) v = -INFINITY;
    x[i] = v;
    if (v > best) best = v, chosen = i;
  }
  if (!numbers || chosen < 0 || !std::isfinite(best)) return -1;
  if (a.temperature[b] == 0.f) return chosen;
  vf total = zero(), t = set1(a.temperature[b]), top = set1(best);
  for_each_vector(a.V, [&](int64_t i, int64_t n) {
    set(x.data() + i, exp((get(x.data() + i, n) - top) / t), n);
    total = total + get(x.data() + i, n);
  });
  float sum_of = sum(total);
  // `exp` stops at e^-86: what was cut must have no probability at all
  for (int64_t i = 0; i < a.V; ++i) x[i] = allowed[i] && !(free && banned[i]) ? x[i] / sum_of : 0.f;
  if (a.top_k[b] < a.V || a.top_p[b] < 1.f || a.min_p[b] > 0.f) {
    truncate(x.data(), a.V, a.top_k[b], a.top_p[b], a.min_p[b], order);
  }
  const double* noise = a.noise + b * a.V;
  double most = -1;
  for (int64_t i = 0; i < a.V; ++i) {
    double score = double(x[i]) / noise[i];
    if (score > most) most = score, chosen = i;
  }
  return chosen;
}

}  // namespace

void sample(const Sample& a) {
  std::vector<float> x(a.V);
  std::vector<int> order;
  for (int64_t b = 0; b < a.n; ++b) a.chosen[b] = choose(a, b, x, order);
}

}  // namespace HNET_ISA
}  // namespace hnet
