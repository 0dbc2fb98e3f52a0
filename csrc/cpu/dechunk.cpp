// Dechunk: out_t = y[chunk_index_t] + residual_t with y_m = (1 - P_m) y_{m-1} + P_m z_m, and its gradient.
//
// Every sequence is cut into tiles of kTile positions, counted from its own start, and tiles are independent:
// a tile walks back from its first chunk until the product of (1 - P) says that anything older cannot change an
// fp32 result (kNegligible), and starts the recurrence there from zero. Boundaries have P > 1/2, so that is at most
// 32 chunks and usually a dozen. The backward recurrence g_m = dy_m + (1 - P_{m+1}) g_{m+1} walks forward the same
// way. The result depends on neither the number of threads nor the other sequences of the pack.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

constexpr int64_t kTile = 1024;
constexpr float kNegligible = 2.3283064e-10f;  // 2^-32
constexpr float kMinP = 1e-4f, kMaxP = 1.f - 1e-4f;

struct Tile {
  int64_t n, begin, end;  // sequence, positions
};

std::vector<Tile> tiles(const Dechunk& a) {
  std::vector<Tile> out;
  for (int64_t n = 0; n < a.N; ++n) {
    for (int64_t t = a.cu_seqlens[n]; t < a.cu_seqlens[n + 1]; t += kTile) {
      out.push_back({n, t, std::min<int64_t>(t + kTile, a.cu_seqlens[n + 1])});
    }
  }
  return out;
}

// Chunk of sequence n that position t belongs to.
inline int64_t chunk_of(const Dechunk& a, int64_t n, int64_t t) {
  const int32_t *first = a.chunk_start + a.cu_chunks[n], *last = a.chunk_start + a.cu_chunks[n + 1];
  return std::upper_bound(first, last, int32_t(t)) - a.chunk_start - 1;
}

inline float clamped(const Dechunk& a, int64_t m) {
  float p = a.prob[a.chunk_start[m]];
  return p < kMinP ? kMinP : p > kMaxP ? kMaxP : p;
}

// First chunk of sequence n whose value can still be felt at chunk m.
inline int64_t walk_back(const Dechunk& a, int64_t n, int64_t m) {
  int64_t first = a.cu_chunks[n];
  float felt = 1.f - clamped(a, m);
  while (m > first && felt > kNegligible) felt *= 1.f - clamped(a, --m);
  return m;
}

// One past the last chunk of sequence n whose gradient can still be felt at chunk m.
inline int64_t walk_forward(const Dechunk& a, int64_t n, int64_t m) {
  int64_t last = a.cu_chunks[n + 1] - 1;
  float felt = 1.f;
  while (m < last && felt > kNegligible) felt *= 1.f - clamped(a, ++m);
  return m + 1;
}

inline int64_t chunk_end(const Dechunk& a, int64_t n, int64_t m) {
  return m + 1 < a.cu_chunks[n + 1] ? a.chunk_start[m + 1] : a.cu_seqlens[n + 1];
}

// dst = (1 - P) y + P z; dst may be y
template <class E>
inline void ema_row(float* dst, const float* y, const E* z, float p, int64_t D) {
  vf keep = set1(1.f - p), take = set1(p);
  for_each_vector(D, [&](int64_t i, int64_t n) { set(dst + i, fma(take, get(z + i, n), keep * get(y + i, n)), n); });
}

template <class E, class R, bool Stream>
void fwd_tile(const Dechunk& a, const Tile& tile, float* y) {
  int64_t m = chunk_of(a, tile.n, tile.begin), h = walk_back(a, tile.n, m);
  std::fill(y, y + a.D, 0.f);
  for (; h < m; ++h) ema_row(y, y, row<E>(a.z, h), clamped(a, h), a.D);
  for (int64_t t = tile.begin; t < tile.end; ++m) {
    ema_row(y, y, row<E>(a.z, m), clamped(a, m), a.D);
    for (int64_t end = std::min(tile.end, chunk_end(a, tile.n, m)); t < end; ++t) {
      E* out = row<E>(a.out, t);
      const R* res = a.residual.data ? row<R>(a.residual, t) : nullptr;
      for_each_vector(a.D, [&](int64_t i, int64_t n) {
        vf v = get(y + i, n);
        if (res) v = v + get(res + i, n);
        if (Stream) {
          put<Stream>(out + i, v);
        } else {
          set(out + i, v, n);
        }
      });
    }
  }
  if (Stream) stream_fence();
}

template <class E, class R>
void fwd(const Dechunk& a, int threads) {
  auto work = tiles(a);
  bool stream = can_stream(row<E>(a.out, 0), a.out.stride, a.T, a.D);
  int64_t valid = a.N ? a.cu_seqlens[a.N] : 0;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> y(a.D);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < int64_t(work.size()); ++i) {
      stream ? fwd_tile<E, R, true>(a, work[i], y.data()) : fwd_tile<E, R, false>(a, work[i], y.data());
    }
#pragma omp for schedule(static)
    for (int64_t t = valid; t < a.T; ++t) std::memset(static_cast<void*>(row<E>(a.out, t)), 0, a.D * sizeof(E));
  }
}

// dy = sum of dout over chunk m; Own: also dselected_t = <dout_t, y>. One row at a time: reading four rows side by
// side halves the traffic on dy but was 20 % slower, the prefetcher follows one row better.
template <class E, bool Own>
inline void chunk_sum(const Dechunk& a, int64_t n, int64_t m, const float* y, float* dy) {
  int64_t begin = a.chunk_start[m], end = chunk_end(a, n, m);
  for (int64_t t = begin; t < end; ++t) {
    const E* d = row<E>(a.dout, t);
    vf dot[2] = {zero(), zero()};
    int lane = 0;
    for_each_vector(a.D, [&](int64_t i, int64_t w) {
      vf v = get(d + i, w);
      if (Own) dot[lane] = fma(v, get(y + i, w), dot[lane]);
      lane ^= 1;
      set(dy + i, t == begin ? v : v + get(dy + i, w), w);
    });
    if (Own) a.dselected[t] = sum(dot[0] + dot[1]);
  }
}

// Gradient of the chunks that start in the tile. One pass reads dout in order and leaves y and dy of every chunk in
// `scratch`; the backward recurrence then runs over those, in cache.
template <class E>
void bwd_tile(const Dechunk& a, const Tile& tile, std::vector<float>& scratch) {
  int64_t D = a.D, n = tile.n, m0 = chunk_of(a, n, tile.begin);
  if (a.chunk_start[m0] < tile.begin) ++m0;
  int64_t m1 = chunk_of(a, n, tile.end - 1) + 1;
  if (m0 >= m1) return;
  int64_t m2 = walk_forward(a, n, m1 - 1);

  scratch.resize((1 + (m1 - m0 + 1) + (m2 - m0)) * D);
  float *g = scratch.data(), *y0 = g + D, *dy0 = y0 + (m1 - m0 + 1) * D;
  auto y = [&](int64_t m) { return y0 + (m - m0 + 1) * D; };  // from y_{m0-1} on
  auto dy = [&](int64_t m) { return dy0 + (m - m0) * D; };

  std::fill(g, y(m0), 0.f);
  if (m0 > a.cu_chunks[n]) {
    for (int64_t h = walk_back(a, n, m0 - 1); h < m0; ++h) ema_row(y0, y0, row<E>(a.z, h), clamped(a, h), D);
  }
  for (int64_t m = m0; m < m1; ++m) {
    ema_row(y(m), y(m - 1), row<E>(a.z, m), clamped(a, m), D);
    chunk_sum<E, true>(a, n, m, y(m), dy(m));
  }
  for (int64_t m = m1; m < m2; ++m) chunk_sum<E, false>(a, n, m, nullptr, dy(m));

  // g = (1 - P_{m+1}) g_{m+1}
  for (int64_t m = m2 - 1; m >= m1; --m) {
    vf keep = set1(1.f - clamped(a, m));
    const float* d = dy(m);
    for_each_vector(D, [&](int64_t i, int64_t w) { set(g + i, keep * (get(g + i, w) + get(d + i, w)), w); });
  }
  for (int64_t m = m1 - 1; m >= m0; --m) {
    float p = clamped(a, m), raw = a.prob[a.chunk_start[m]];
    vf take = set1(p), keep = set1(1.f - p), dp = zero();
    const float *d = dy(m), *before = y(m - 1);
    const E* z = row<E>(a.z, m);
    E* dz = row<E>(a.dz, m);
    for_each_vector(D, [&](int64_t i, int64_t w) {
      vf grad = get(g + i, w) + get(d + i, w);
      dp = fma(grad, get(z + i, w) - get(before + i, w), dp);
      set(dz + i, take * grad, w);
      set(g + i, keep * grad, w);
    });
    a.dprob[a.chunk_start[m]] = raw < kMinP || raw > kMaxP ? 0.f : sum(dp);
  }
}

template <class E>
void bwd(const Dechunk& a, int threads) {
  auto work = tiles(a);
  int64_t valid = a.N ? a.cu_seqlens[a.N] : 0, num_chunks = a.N ? a.cu_chunks[a.N] : 0;
  std::memset(a.dprob, 0, a.T * sizeof(float));
  for (int64_t t = valid; t < a.T; ++t) a.dselected[t] = 0.f;
  for (int64_t m = num_chunks; m < a.M; ++m) std::memset(static_cast<void*>(row<E>(a.dz, m)), 0, a.D * sizeof(E));
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(work.size()); ++i) bwd_tile<E>(a, work[i], scratch);
  }
}

}  // namespace

void dechunk_fwd(Dtype d, const Dechunk& a, int threads) {
  with_dtype(d, [&](auto e) {
    with_dtype(a.residual_dtype, [&](auto r) { fwd<decltype(e), decltype(r)>(a, threads); });
  });
}
void dechunk_bwd(Dtype d, const Dechunk& a, int threads) {
  with_dtype(d, [&](auto e) { bwd<decltype(e)>(a, threads); });
}

void dechunk_step(Dtype d, const DechunkStep& a, int threads) {
  with_dtype(d, [&](auto e) {
    with_dtype(a.residual_dtype, [&](auto r) {
      using E = decltype(e);
      using R = decltype(r);
#pragma omp parallel for schedule(static) num_threads(threads) if (a.B * a.D > 65536)
      for (int64_t b = 0; b < a.B; ++b) {
        const float* y = a.state + b * a.D;
        float *y_new = a.new_state + b * a.D, p = a.prob[b];
        p = p < kMinP ? kMinP : p > kMaxP ? kMaxP : p;
        if (a.mask[b]) {
          ema_row(y_new, y, row<E>(a.z, b), p, a.D);
        } else {
          std::memcpy(y_new, y, a.D * sizeof(float));
        }
        E* out = row<E>(a.out, b);
        const R* res = a.residual.data ? row<R>(a.residual, b) : nullptr;
        for_each_vector(a.D, [&](int64_t i, int64_t n) {
          vf v = get(y_new + i, n);
          set(out + i, res ? v + get(res + i, n) : v, n);
        });
      }
    });
  });
}

}  // namespace HNET_ISA
}  // namespace hnet
