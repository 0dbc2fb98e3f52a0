// Routing: p_t = (1 - cos(q_{t-1}, k_t)) / 2, its boundary mask, selected probability and entropy, and their gradient.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

constexpr float kNormFloor = 1e-12f;
constexpr int64_t kBlock = 64;  // positions handed out at a time

struct Sums {
  float qq, kk, qk;
};

template <class E>
inline Sums row_sums(const E* q, const E* k, int64_t D) {
  vf qq[2] = {zero(), zero()}, kk[2] = {zero(), zero()}, qk[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * W <= D; i += 2 * W) {
    for (int u = 0; u < 2; ++u) {
      vf a = load(q + i + u * W), b = load(k + i + u * W);
      qq[u] = fma(a, a, qq[u]);
      kk[u] = fma(b, b, kk[u]);
      qk[u] = fma(a, b, qk[u]);
    }
  }
  for (; i < D; i += W) {
    vf a = get(q + i, std::min<int64_t>(W, D - i)), b = get(k + i, std::min<int64_t>(W, D - i));
    qq[0] = fma(a, a, qq[0]);
    kk[0] = fma(b, b, kk[0]);
    qk[0] = fma(a, b, qk[0]);
  }
  return {sum(qq[0] + qq[1]), sum(kk[0] + kk[1]), sum(qk[0] + qk[1])};
}

struct Cosine {
  float cos, inv_q, inv_k;
};

template <class E>
inline Cosine cosine(const E* q, const E* k, int64_t D) {
  Sums s = row_sums(q, k, D);
  float iq = 1.f / std::max(std::sqrt(s.qq), kNormFloor), ik = 1.f / std::max(std::sqrt(s.kk), kNormFloor);
  return {s.qk * iq * ik, iq, ik};
}

// std::max / std::min would turn a NaN into a number; a NaN input must stay visible.
inline float clamp01(float x) { return x < 0.f ? 0.f : x > 1.f ? 1.f : x; }

inline float biased(float p, float scale) { return scale == 1.f ? p : p * scale / (1.f - p + p * scale); }

constexpr float kTiny = 1e-37f;  // of which a logarithm can be taken

// -p ln p - (1 - p) ln(1 - p). The smaller of p and 1 - p is exact, the larger is not: ln(1 - m) = -2 atanh(m / (2 - m)).
inline vf entropy(vf p) {
  vf one = set1(1.f), m = zero() - larger(zero() - p, p - one);
  return (one - m) * twice_atanh(m / (set1(2.f) - m)) - m * log(larger(set1(kTiny), m));
}

// out[t - begin] = d entropy / d p = ln((1 - p) / p) of the p that came of cos[t]; 0 where p is 0 or 1
void log_odds(const float* cos, float scale, int64_t begin, int64_t end, float* out) {
  const vf one = set1(1.f), tiny = set1(kTiny);
  float p[kBlock];
  for (int64_t t = begin; t < end; ++t) p[t - begin] = biased(clamp01((1.f - cos[t]) * 0.5f), scale);
  for_each_vector(end - begin, [&](int64_t i, int64_t n) {
    vf x = get(p + i, n);
    set(out + i, log(larger(tiny, (one - x) / larger(tiny, x))), n);
  });
  for (int64_t i = 0; i < end - begin; ++i) out[i] = p[i] > 0.f && p[i] < 1.f ? out[i] : 0.f;
}

inline void emit(float p, bool candidate, float* prob, uint8_t* mask, float* selected) {
  bool b = p > 0.5f && candidate;
  *prob = p;
  *mask = b;
  *selected = b ? p : 1.f - p;
}

// First positions of sequences are few: the row loops treat every position alike, then these are put right.
template <class F>
inline void for_each_first(const int32_t* cu, int64_t N, F&& f) {
  for (int64_t n = 0; n < N; ++n) {
    if (cu[n] < cu[n + 1]) f(cu[n]);
  }
}

template <class E>
void fwd(const RouteFwd& a, int threads) {
  int64_t valid = a.N ? a.cu_seqlens[a.N] : 0;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < (a.T + kBlock - 1) / kBlock; ++b) {
    for (int64_t t = b * kBlock; t < std::min(a.T, (b + 1) * kBlock); ++t) {
      if (t == 0 || t >= valid) {
        a.cos[t] = 0.f, a.inv_q[t] = 0.f, a.inv_k[t] = 0.f;
        emit(0.f, false, a.prob + t, a.mask + t, a.selected + t);
        continue;
      }
      Cosine c = cosine(row<E>(a.q, t - 1), row<E>(a.k, t), a.D);
      a.cos[t] = c.cos, a.inv_q[t] = c.inv_q, a.inv_k[t] = c.inv_k;
      float p = biased(clamp01((1.f - c.cos) * 0.5f), a.bias_scale);
      emit(p, !a.candidates || a.candidates[t], a.prob + t, a.mask + t, a.selected + t);
    }
    for_each_vector(std::min(kBlock, a.T - b * kBlock), [&](int64_t i, int64_t n) {
      i += b * kBlock;
      set(a.entropy + i, entropy(get(a.prob + i, n)), n);
    });
  }
  for_each_first(a.cu_seqlens, a.N, [&](int64_t t) {
    emit(1.f, true, a.prob + t, a.mask + t, a.selected + t);
    a.entropy[t] = 0.f;
  });
}

// d loss / d cos at t (0 where the clamp acts), with what the sums over the sequence give p
float dcos(const RouteBwd& a, int64_t t, float dsums) {
  float dp = dsums;
  if (a.dprob) dp += a.dprob[t];
  if (a.dselected) dp += a.mask[t] ? a.dselected[t] : -a.dselected[t];
  float raw = (1.f - a.cos[t]) * 0.5f, p = clamp01(raw);
  float den = 1.f - p + p * a.bias_scale;
  if (a.dbias) a.dbias[t] = dp * p * (1.f - p) * a.bias_scale / (den * den);
  return raw < 0.f || raw > 1.f ? 0.f : -0.5f * dp * a.bias_scale / (den * den);
}

// dq_{t-1} = g/(|q||k|) k_t - g cos/|q|^2 q_{t-1};  dk_t = g/(|q||k|) q_{t-1} - g cos/|k|^2 k_t
template <class E, bool Stream>
inline void write_pair(const RouteBwd& a, int64_t t, float g) {
  const E *q = row<E>(a.q, t - 1), *k = row<E>(a.k, t);
  E *dq = row<E>(a.dq, t - 1), *dk = row<E>(a.dk, t);
  float iq = a.inv_q[t], ik = a.inv_k[t];
  // a norm at the floor is a constant, so its projection term vanishes
  float cq = iq < 1.f / kNormFloor ? -g * a.cos[t] * iq * iq : 0.f;
  float ck = ik < 1.f / kNormFloor ? -g * a.cos[t] * ik * ik : 0.f;
  vf cross = set1(g * iq * ik), vcq = set1(cq), vck = set1(ck);
  for_each_vector(a.D, [&](int64_t i, int64_t n) {
    vf x = get(q + i, n), y = get(k + i, n);
    vf u = fma(cross, y, vcq * x), v = fma(cross, x, vck * y);
    if (Stream) {
      put<Stream>(dq + i, u);
      put<Stream>(dk + i, v);
    } else {
      set(dq + i, u, n);
      set(dk + i, v, n);
    }
  });
}

template <class E>
void zero_row(const Rows& m, int64_t t, int64_t D) {
  std::memset(static_cast<void*>(row<E>(m, t)), 0, D * sizeof(E));
}

template <class E, bool Stream>
void bwd_rows(const RouteBwd& a, int threads) {
  int64_t valid = a.N ? a.cu_seqlens[a.N] : 0;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < (a.T + kBlock - 1) / kBlock; ++b) {
    int64_t begin = b * kBlock, end = std::min(a.T, begin + kBlock);
    int64_t n = std::upper_bound(a.cu_seqlens, a.cu_seqlens + a.N + 1, int32_t(begin)) - a.cu_seqlens - 1;
    float odds[kBlock];
    if (a.dentropy_sum) log_odds(a.cos, a.bias_scale, begin, end, odds);
    for (int64_t t = begin; t < end; ++t) {
      while (n < a.N && t >= a.cu_seqlens[n + 1]) ++n;
      bool first = t >= valid || t == a.cu_seqlens[n];
      if (first) {
        if (t > 0) zero_row<E>(a.dq, t - 1, a.D);
        zero_row<E>(a.dk, t, a.D);
        if (a.dbias) a.dbias[t] = 0.f;
      } else {
        float dsums = a.dprob_sum ? a.dprob_sum[n] : 0.f;
        if (a.dentropy_sum) dsums += a.dentropy_sum[n] * odds[t - begin];
        write_pair<E, Stream>(a, t, dcos(a, t, dsums));
      }
      if (t == a.T - 1) zero_row<E>(a.dq, t, a.D);
    }
    if (Stream) stream_fence();
  }
}

template <class E>
void bwd(const RouteBwd& a, int threads) {
  bool stream = can_stream(row<E>(a.dq, 0), a.dq.stride, a.T, a.D) && can_stream(row<E>(a.dk, 0), a.dk.stride, a.T, a.D);
  stream ? bwd_rows<E, true>(a, threads) : bwd_rows<E, false>(a, threads);
}

}  // namespace

void route_fwd(Dtype d, const RouteFwd& a, int threads) {
  with_dtype(d, [&](auto e) { fwd<decltype(e)>(a, threads); });
}
void route_bwd(Dtype d, const RouteBwd& a, int threads) {
  with_dtype(d, [&](auto e) { bwd<decltype(e)>(a, threads); });
}

void route_step(Dtype d, const RouteStep& a, int threads) {
  with_dtype(d, [&](auto e) {
    using E = decltype(e);
#pragma omp parallel for schedule(static) num_threads(threads) if (a.B * a.D > 65536)
    for (int64_t b = 0; b < a.B; ++b) {
      float p = 1.f;
      bool candidate = true;
      if (!a.is_first || !a.is_first[b]) {
        p = biased(clamp01((1.f - cosine(row<E>(a.q, b), row<E>(a.k, b), a.D).cos) * 0.5f), a.bias_scale);
        candidate = !a.candidates || a.candidates[b];
      }
      emit(p, candidate, a.prob + b, a.mask + b, a.selected + b);
    }
  });
}

}  // namespace HNET_ISA
}  // namespace hnet
