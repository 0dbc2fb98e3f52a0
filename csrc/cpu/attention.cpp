// Causal attention over packed sequences, in a window or without one, rotary positions included.
//
// A thread takes one head of one sequence: it lays out rotated keys and values in fp32 once, then walks over blocks of
// kQueries queries, each against only the keys it may see. Scores of a block stand whole in the cache, so softmax needs
// no running maximum, and the gradients of keys and values add up in one thread, in one order. The backward computes
// the scores again, from `lse`, the logarithm of each query's sum. bf16 on a CPU that multiplies it: attention_bf16.h.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_bf16.h"
#include "attention_rows.h"
#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

constexpr int64_t kQueries = 32;
constexpr int kTile = W == 16 ? 8 : 4;  // rows of a register tile, which is two vectors wide

// --- small matrix products: C (M, N) = or += A (M, n) B (n, N). M is a multiple of kTile, N of W; A has any strides ---

template <int V>
inline void tile(const float* A, int64_t rs, int64_t cs, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t n, bool add) {
  vf acc[kTile][V];
  for (int r = 0; r < kTile; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = add ? load(C + r * ldc + v * W) : zero();
  }
  for (int64_t k = 0; k < n; ++k) {
    vf b[V];
    for (int v = 0; v < V; ++v) b[v] = load(B + k * ldb + v * W);
    for (int r = 0; r < kTile; ++r) {
      vf a = set1(A[r * rs + k * cs]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kTile; ++r) {
    for (int v = 0; v < V; ++v) store(C + r * ldc + v * W, acc[r][v]);
  }
}

inline void product(int64_t M, int64_t N, int64_t n, const float* A, int64_t rs, int64_t cs, const float* B, int64_t ldb, float* C,
                    int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 2 * W <= N; j += 2 * W) {
    for (int64_t i = 0; i < M; i += kTile) tile<2>(A + i * rs, rs, cs, B + j, ldb, C + i * ldc + j, ldc, n, add);
  }
  for (; j < N; j += W) {
    for (int64_t i = 0; i < M; i += kTile) tile<1>(A + i * rs, rs, cs, B + j, ldb, C + i * ldc + j, ldc, n, add);
  }
}

// --- rows of one head, in fp32 ---------------------------------------------------------------------------------------

void transpose(const float* rows, int64_t count, int64_t width, float* columns, int64_t ld) {
  for (int64_t j = 0; j < count; j += W) {
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t i = j; i < std::min(j + W, count); ++i) columns[c * ld + i] = rows[i * width + c];
    }
  }
}

// Everything a thread needs, for sequences of up to `longest`; what lies past a sequence's end is zero.
struct Scratch {
  int64_t width, rows;  // both rounded up
  std::vector<float> k, v, kt, vt, dk, dv, q, out, score, dscore;
  Scratch(const Attention& a, int64_t longest, bool backward)
      : width(round_up(a.width, W)), rows(round_up(longest, kQueries) + W),
        k(rows * width), v(rows * width), kt(rows * width), vt(backward ? rows * width : 0), dk(vt.size()), dv(vt.size()),
        q(kQueries * width), out(kQueries * width), score(kQueries * rows), dscore(backward ? kQueries * rows : 0) {}

  template <class E>
  void begin(const Attention& a, int64_t first, int64_t length, int64_t head) {
    int64_t used = std::min(rows, round_up(length, kQueries) + W) * width;
    for (auto* x : {&k, &v, &dk, &dv}) {
      if (!x->empty()) std::fill(x->begin(), x->begin() + used, 0.f);
    }
    for (auto* x : {&kt, &vt}) std::fill(x->begin(), x->end(), 0.f);
    for (int64_t i = 0; i < length; ++i) {
      const E* x = row<E>(a.qkv, first + i) + head * a.width;
      load_row(a, x + a.heads * a.width, first + i, true, 1.f, k.data() + i * width);
      load_row(a, x + 2 * a.heads * a.width, first + i, false, 1.f, v.data() + i * width);
    }
    transpose(k.data(), length, width, kt.data(), rows);
    if (!vt.empty()) transpose(v.data(), length, width, vt.data(), rows);
  }

  // Rows of a block of queries: part 0 of qkv, rotated and scaled; or rows of `x` as they are
  template <class E>
  void block(const Attention& a, const Rows& x, int64_t first, int64_t i0, int64_t count, int64_t head, bool queries, float* dst) {
    std::fill(dst, dst + kQueries * width, 0.f);
    for (int64_t i = 0; i < count; ++i) {
      const E* src = row<E>(x, first + i0 + i) + head * a.width;
      load_row(a, src, first + i0 + i, queries, queries ? a.scale : 1.f, dst + i * width);
    }
  }
};

struct Keys {
  int64_t begin, count;  // count is a multiple of W
};

inline Keys keys_of(const Attention& a, int64_t i0, int64_t count) {
  int64_t begin = a.window < 0 ? 0 : std::max<int64_t>(0, i0 - a.window);
  return {begin, round_up(i0 + count - begin, W)};
}

// What query i of the sequence may see of those keys
inline Keys seen(const Attention& a, const Keys& keys, int64_t i) {
  int64_t first = a.window < 0 ? 0 : std::max<int64_t>(0, i - a.window);
  return {first - keys.begin, i + 1 - first};
}

// A row of scores becomes probabilities, zero where nothing is seen; returns the logarithm of the sum
float softmax(float* s, int64_t n, const Keys& seen) {
  int64_t end = seen.begin + seen.count;
  std::fill(s, s + seen.begin, -1e30f);
  std::fill(s + end, s + n, -1e30f);
  vf most = set1(-1e30f);
  for (int64_t j = 0; j < n; j += W) most = larger(load(s + j), most);
  float lanes[W];
  store(lanes, most);
  float m = *std::max_element(lanes, lanes + W);
  vf total = zero();
  for (int64_t j = 0; j < n; j += W) {
    vf e = exp(load(s + j) - set1(m));
    store(s + j, e);
    total = total + e;
  }
  float all = sum(total);
  vf inverse = set1(1.f / all);
  for (int64_t j = 0; j < n; j += W) store(s + j, load(s + j) * inverse);
  std::fill(s, s + seen.begin, 0.f);
  std::fill(s + end, s + n, 0.f);
  return m + std::log(all);
}

template <class E>
void fwd_head(const Attention& a, Scratch& x, int64_t first, int64_t length, int64_t head) {
  x.begin<E>(a, first, length, head);
  for (int64_t i0 = 0; i0 < length; i0 += kQueries) {
    int64_t count = std::min(kQueries, length - i0), padded = round_up(count, kTile);
    Keys keys = keys_of(a, i0, count);
    x.block<E>(a, a.qkv, first, i0, count, head, true, x.q.data());
    product(padded, keys.count, x.width, x.q.data(), x.width, 1, x.kt.data() + keys.begin, x.rows, x.score.data(), x.rows, false);
    for (int64_t i = 0; i < count; ++i) {
      a.lse[(first + i0 + i) * a.heads + head] = softmax(x.score.data() + i * x.rows, keys.count, seen(a, keys, i0 + i));
    }
    product(padded, x.width, keys.count, x.score.data(), x.rows, 1, x.v.data() + keys.begin * x.width, x.width, x.out.data(), x.width,
            false);
    for (int64_t i = 0; i < count; ++i) {
      E* out = row<E>(a.out, first + i0 + i) + head * a.width;
      const float* y = x.out.data() + i * x.width;
      for_each_vector(a.width, [&](int64_t c, int64_t n) { set(out + c, get(y + c, n), n); });
    }
  }
}

template <class E>
void bwd_head(const Attention& a, Scratch& x, int64_t first, int64_t length, int64_t head) {
  x.begin<E>(a, first, length, head);
  for (int64_t i0 = 0; i0 < length; i0 += kQueries) {
    int64_t count = std::min(kQueries, length - i0), padded = round_up(count, kTile);
    Keys keys = keys_of(a, i0, count);
    float *p = x.score.data(), *ds = x.dscore.data(), *dout = x.out.data();
    x.block<E>(a, a.qkv, first, i0, count, head, true, x.q.data());
    x.block<E>(a, a.dout, first, i0, count, head, false, dout);
    product(padded, keys.count, x.width, x.q.data(), x.width, 1, x.kt.data() + keys.begin, x.rows, p, x.rows, false);
    product(padded, keys.count, x.width, dout, x.width, 1, x.vt.data() + keys.begin, x.rows, ds, x.rows, false);
    for (int64_t i = 0; i < padded; ++i) {
      float *pi = p + i * x.rows, *di = ds + i * x.rows;
      Keys see = i < count ? seen(a, keys, i0 + i) : Keys{0, 0};
      vf lse = set1(i < count ? a.lse[(first + i0 + i) * a.heads + head] : 0.f), dot = zero();
      for (int64_t j = 0; j < keys.count; j += W) store(pi + j, exp(load(pi + j) - lse));
      std::fill(pi, pi + see.begin, 0.f);
      std::fill(pi + see.begin + see.count, pi + keys.count, 0.f);
      for (int64_t j = 0; j < keys.count; j += W) dot = fma(load(pi + j), load(di + j), dot);
      vf mean = set1(sum(dot));
      for (int64_t j = 0; j < keys.count; j += W) store(di + j, load(pi + j) * (load(di + j) - mean));
    }
    product(keys.count, x.width, padded, ds, 1, x.rows, x.q.data(), x.width, x.dk.data() + keys.begin * x.width, x.width, true);
    product(keys.count, x.width, padded, p, 1, x.rows, dout, x.width, x.dv.data() + keys.begin * x.width, x.width, true);
    product(padded, x.width, keys.count, ds, x.rows, 1, x.k.data() + keys.begin * x.width, x.width, x.q.data(), x.width, false);
    for (int64_t i = 0; i < count; ++i) {
      store_gradient(a, x.q.data() + i * x.width, first + i0 + i, true, a.scale, row<E>(a.dqkv, first + i0 + i) + head * a.width);
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    E* d = row<E>(a.dqkv, first + i) + head * a.width;
    store_gradient(a, x.dk.data() + i * x.width, first + i, true, 1.f, d + a.heads * a.width);
    store_gradient(a, x.dv.data() + i * x.width, first + i, false, 1.f, d + 2 * a.heads * a.width);
  }
}

template <class E, class Scratch>
void run(const Attention& a, bool backward, int threads) {
  int64_t longest = 0, end = a.cu_seqlens[a.N];
  for (int64_t n = 0; n < a.N; ++n) longest = std::max<int64_t>(longest, a.cu_seqlens[n + 1] - a.cu_seqlens[n]);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(a, longest, backward);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t n = 0; n < a.N; ++n) {
      for (int64_t head = 0; head < a.heads; ++head) {
        int64_t first = a.cu_seqlens[n], length = a.cu_seqlens[n + 1] - first;
        backward ? bwd_head<E>(a, scratch, first, length, head) : fwd_head<E>(a, scratch, first, length, head);
      }
    }
#pragma omp for schedule(static)
    for (int64_t t = end; t < a.T; ++t) {  // padding
      if (backward) {
        std::memset(static_cast<void*>(row<E>(a.dqkv, t)), 0, 3 * a.heads * a.width * sizeof(E));
      } else {
        std::memset(static_cast<void*>(row<E>(a.out, t)), 0, a.heads * a.width * sizeof(E));
        std::fill(a.lse + t * a.heads, a.lse + (t + 1) * a.heads, 0.f);
      }
    }
  }
}

void run(Dtype d, const Attention& a, bool backward, int threads) {
#ifdef __AVX512BF16__
  if (d == Dtype::bf16) return run<bf16, Bf16Scratch>(a, backward, threads);
#endif
  with_dtype(d, [&](auto e) { run<decltype(e), Scratch>(a, backward, threads); });
}

}  // namespace

void attention_fwd(Dtype d, const Attention& a, int threads) { run(d, a, false, threads); }
void attention_bwd(Dtype d, const Attention& a, int threads) { run(d, a, true, threads); }

}  // namespace HNET_ISA
}  // namespace hnet
