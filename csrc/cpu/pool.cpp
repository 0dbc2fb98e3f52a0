// Pooling of chunks: their first row, last row, mean or maximum, and the gradient.
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

inline int64_t chunk_end(const Pool& a, int64_t m) { return m + 1 < a.num_chunks ? a.chunk_start[m + 1] : a.num_valid; }

// A NaN in the chunk wins, as in torch.amax.
template <class E>
inline bool above(E x, E best) {
  float f = to_float(x), g = to_float(best);
  return f > g || (f != f && g == g);
}

template <class E, bool Stream>
inline void write_row(E* dst, const E* src, float scale, int64_t D) {
  vf s = set1(scale);
  for_each_vector(D, [&](int64_t i, int64_t n) {
    vf v = src ? get(src + i, n) * s : zero();
    if (Stream) {
      put<Stream>(dst + i, v);
    } else {
      set(dst + i, v, n);
    }
  });
}

template <class E>
void fwd_chunk(const Pool& a, int64_t m) {
  E* z = row<E>(a.z, m);
  if (m >= a.num_chunks) {  // padding of a budget
    std::memset(static_cast<void*>(z), 0, a.D * sizeof(E));
    return;
  }
  int64_t s = a.chunk_start[m], e = chunk_end(a, m);
  switch (a.mode) {
    case PoolMode::boundary: std::memcpy(static_cast<void*>(z), row<E>(a.x, s), a.D * sizeof(E)); break;
    case PoolMode::last: std::memcpy(static_cast<void*>(z), row<E>(a.x, e - 1), a.D * sizeof(E)); break;
    case PoolMode::mean: {
      vf inv = set1(1.f / float(e - s));
      for_each_vector(a.D, [&](int64_t i, int64_t n) {
        vf acc = zero();
        for (int64_t t = s; t < e; ++t) acc = acc + get(row<E>(a.x, t) + i, n);
        set(z + i, acc * inv, n);
      });
      break;
    }
    case PoolMode::max:
      std::memcpy(static_cast<void*>(z), row<E>(a.x, s), a.D * sizeof(E));
      for (int64_t t = s + 1; t < e; ++t) {
        const E* x = row<E>(a.x, t);
        for (int64_t i = 0; i < a.D; ++i) z[i] = above(x[i], z[i]) ? x[i] : z[i];
      }
      break;
  }
}

// Maximum: the gradient goes to the first row that attains it.
template <class E>
void bwd_max_chunk(const Pool& a, int64_t s, int64_t e, const E* dz) {
  constexpr int64_t kCols = 128;
  for (int64_t c = 0; c < a.D; c += kCols) {
    int64_t w = std::min(kCols, a.D - c);
    E best[kCols];
    int64_t arg[kCols];
    std::memcpy(static_cast<void*>(best), row<E>(a.x, s) + c, w * sizeof(E));
    std::fill(arg, arg + w, s);
    for (int64_t t = s + 1; t < e; ++t) {
      const E* x = row<E>(a.x, t) + c;
      for (int64_t i = 0; i < w; ++i) {
        if (above(x[i], best[i])) best[i] = x[i], arg[i] = t;
      }
    }
    for (int64_t t = s; t < e; ++t) {
      E* dx = row<E>(a.dx, t) + c;
      for (int64_t i = 0; i < w; ++i) {
        if (arg[i] == t) {
          dx[i] = dz[c + i];
        } else {
          from_float(dx + i, 0.f);
        }
      }
    }
  }
}

template <class E, bool Stream>
void bwd_chunk(const Pool& a, int64_t m) {
  const E* dz = row<E>(a.z, m);
  int64_t s = a.chunk_start[m], e = chunk_end(a, m);
  if (a.mode == PoolMode::max) return bwd_max_chunk(a, s, e, dz);
  float inv = 1.f / float(e - s);
  for (int64_t t = s; t < e; ++t) {
    bool hit = a.mode == PoolMode::mean || t == (a.mode == PoolMode::boundary ? s : e - 1);
    write_row<E, Stream>(row<E>(a.dx, t), hit ? dz : nullptr, a.mode == PoolMode::mean ? inv : 1.f, a.D);
  }
}

template <class E, bool Stream>
void bwd(const Pool& a, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < a.num_chunks; ++m) bwd_chunk<E, Stream>(a, m);
#pragma omp for schedule(static)
    for (int64_t t = a.num_valid; t < a.T; ++t) write_row<E, Stream>(row<E>(a.dx, t), nullptr, 0.f, a.D);
    if (Stream) stream_fence();
  }
}

}  // namespace

void pool_fwd(Dtype d, const Pool& a, int threads) {
  with_dtype(d, [&](auto e) {
    using E = decltype(e);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < a.M; ++m) fwd_chunk<E>(a, m);
  });
}

void pool_bwd(Dtype d, const Pool& a, int threads) {
  with_dtype(d, [&](auto e) {
    using E = decltype(e);
    bool stream = can_stream(row<E>(a.dx, 0), a.dx.stride, a.T, a.D);
    stream ? bwd<E, true>(a, threads) : bwd<E, false>(a, threads);
  });
}

}  // namespace HNET_ISA
}  // namespace hnet
