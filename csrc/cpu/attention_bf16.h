// Attention of one head in bf16, for AVX512-BF16: its five kinds of products multiply bf16 and add up in fp32.
//
// As in attention.cpp, but probabilities and the gradients of scores are rounded to bf16 before they are multiplied, as
// rotated queries and keys are; and a tile of kRows queries goes only over the 16s of keys that one of them sees. The
// forward needs no more than one tile; the backward collects kBlock queries for the gradients of keys and values.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_rows.h"
#include "bf16_product.h"

#ifdef __AVX512BF16__

namespace hnet {
namespace HNET_ISA {

constexpr int64_t kRows = 8, kBlock = 32;
constexpr float kLog2e = 1.44269504f;

// 2^x for x <= 0 to 3e-6, which is nothing beside the rounding to bf16; 0 where `seen` is not
inline vf exp2_seen(vf x, __mmask16 seen) {
  __m512 n = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vf f = x - vf{n}, p = set1(1.33335581e-3f);
  for (float c : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f}) p = fma(p, f, set1(c));
  return {_mm512_maskz_scalef_ps(seen, p.v, n)};
}

struct Bf16Scratch {
  int64_t half, width, ld, rows;  // pairs in a row; N of products; of a row, in bf16; of a column, more than any sequence
  std::vector<bf16> keys, values, query, grad, p;
  std::vector<pair> keys_t, values_t, keys_i, values_i, query_i, grad_i, p_i, ds_i;  // columns as pairs; pairs of rows
  std::vector<float> score, dscore, out, dk, dv;

  Bf16Scratch(const Attention& a, int64_t longest, bool backward)
      : half((a.width + 1) / 2), width(round_up(a.width, W)), ld(round_up(a.width, 2 * W)),
        rows(round_up(longest, kBlock) + W), keys(rows * ld), values(rows * ld), query(kBlock * ld), p(kBlock * rows), keys_t(rows * ld / 2),
        score(kRows * rows), out(kRows * ld) {
    if (!backward) {
      values_i.resize(rows * ld / 2);
      return;
    }
    grad.resize(kBlock * ld);
    for (auto* x : {&values_t, &keys_i}) x->resize(rows * ld / 2);
    for (auto* x : {&query_i, &grad_i}) x->resize(kBlock * ld / 2);
    for (auto* x : {&p_i, &ds_i}) x->resize(kBlock * rows / 2);
    dscore.resize(kRows * rows);
    for (auto* x : {&dk, &dv}) x->resize(rows * width);
  }

  static const pair* pairs(const std::vector<bf16>& x) { return reinterpret_cast<const pair*>(x.data()); }

  // Rows of x from `first`, rotated (turn 1) or not, and zeros up to `padded`
  void fill(const Attention& a, const Rows& x, int64_t column, int64_t first, int64_t count, int64_t padded, int turn,
            std::vector<bf16>& dst) const {
    for (int64_t i = 0; i < count; ++i) turned(a, row<bf16>(x, first + i) + column, first + i, turn, 1.f, dst.data() + i * ld);
    std::fill(dst.data() + count * ld, dst.data() + padded * ld, bf16{0});
  }
  void columns(const std::vector<bf16>& x, int64_t count, std::vector<pair>& out) const {
    for (int64_t i = 0; i < count; i += W) {
      for (int64_t c = 0; c < ld / 2; c += W) transpose16(pairs(x) + i * ld / 2 + c, ld / 2, out.data() + c * rows + i, rows);
    }
  }
  void begin(const Attention& a, int64_t first, int64_t length, int64_t head) {
    int64_t padded = round_up(length, kBlock), column = head * a.width, all = a.heads * a.width;
    fill(a, a.qkv, column + all, first, length, padded, 1, keys);
    fill(a, a.qkv, column + 2 * all, first, length, padded, 0, values);
    columns(keys, padded, keys_t);
    if (dk.empty()) return interleave_rows(values.data(), padded, ld, values_i.data());
    columns(values, padded, values_t);
    interleave_rows(keys.data(), padded, ld, keys_i.data());
    for (auto* x : {&dk, &dv}) std::fill(x->begin(), x->begin() + padded * width, 0.f);
  }
};

// Keys that one of the kRows queries from i on sees, in whole vectors
struct Range {
  int64_t begin, end;
  Range(const Attention& a, int64_t i)
      : begin(a.window < 0 ? 0 : std::max<int64_t>(0, i - a.window) / W * W), end(round_up(i + kRows, W)) {}
};

// Which of the keys from `begin` on query i sees, as masks of vectors
struct Seen {
  __m512i lane;
  int64_t count;
  Seen(const Attention& a, int64_t begin, int64_t i) {
    int64_t first = a.window < 0 ? 0 : std::max<int64_t>(0, i - a.window);
    count = i + 1 - first;
    lane = _mm512_sub_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(int(first - begin)));
  }
  __mmask16 at(int64_t j) const {
    return _mm512_cmplt_epu32_mask(_mm512_add_epi32(lane, _mm512_set1_epi32(int(j))), _mm512_set1_epi32(int(count)));
  }
};

// n scores become probabilities but for a factor, which is returned
inline float softmax(const Attention& a, const float* s, int64_t n, const Seen& seen, bf16* p, float* lse) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < n; j += W) most = _mm512_mask_max_ps(most, seen.at(j), _mm512_loadu_ps(s + j), most);
  float factor = a.scale * kLog2e, m = _mm512_reduce_max_ps(most) * factor;
  vf total = zero();
  for (int64_t j = 0; j < n; j += W) {
    vf e = exp2_seen(fma(load(s + j), set1(factor), set1(-m)), seen.at(j));
    store(p + j, e);
    total = total + e;
  }
  float all = sum(total);
  *lse = m / kLog2e + std::log(all);
  return 1.f / all;
}

template <class E>
void fwd_head(const Attention& a, Bf16Scratch& x, int64_t first, int64_t length, int64_t head) {
  x.begin(a, first, length, head);
  for (int64_t i = 0; i < length; i += kRows) {
    int64_t count = std::min(kRows, length - i);
    Range keys(a, i);
    const int64_t n = keys.end - keys.begin;
    float factor[kRows];
    x.fill(a, a.qkv, head * a.width, first + i, count, kRows, 1, x.query);
    bf16_product<kRows>(n, x.pairs(x.query), x.ld / 2, 1, x.keys_t.data() + keys.begin, x.rows, x.score.data(), x.rows, x.half, false);
    for (int64_t r = 0; r < count; ++r) {
      factor[r] = softmax(a, x.score.data() + r * x.rows, n, Seen(a, keys.begin, i + r), x.p.data() + r * x.rows,
                          a.lse + (first + i + r) * a.heads + head);
    }
    const pair* values = x.values_i.data() + keys.begin / 2 * x.ld;
    bf16_product<kRows>(x.width, x.pairs(x.p), x.rows / 2, 1, values, x.ld, x.out.data(), x.ld, n / 2, false);
    for (int64_t r = 0; r < count; ++r) {
      E* out = row<E>(a.out, first + i + r) + head * a.width;
      const float* y = x.out.data() + r * x.ld;
      for_each_vector(a.width, [&](int64_t c, int64_t m) { set(out + c, get(y + c, m) * set1(factor[r]), m); });
    }
  }
}

// Two rows of scores s and of d loss / d probabilities d, in fp32, become rows of d loss / d scores; and both, as pairs
inline void score_gradients(const Attention& a, float* s, float* d, int64_t ld, int64_t n, const Seen* seen, const float* lse, bf16* ds,
                            pair* p_i, pair* ds_i) {
  vf mean[2];
  for (int r = 0; r < 2; ++r, s += ld, d += ld) {
    vf factor = set1(a.scale * kLog2e), less = set1(-lse[r] * kLog2e), dot = zero();
    for (int64_t j = 0; j < n; j += W) {
      vf p = exp2_seen(fma(load(s + j), factor, less), seen[r].at(j));
      store(s + j, p);
      dot = fma(p, load(d + j), dot);
    }
    mean[r] = set1(sum(dot));
  }
  s -= 2 * ld, d -= 2 * ld;
  for (int64_t j = 0; j < n; j += W) {
    vf p0 = load(s + j), p1 = load(s + ld + j);
    __m256i d0 = pack_bf16(p0 * (load(d + j) - mean[0])), d1 = pack_bf16(p1 * (load(d + ld + j) - mean[1]));
    _mm256_storeu_si256((__m256i*)(ds + j), d0);
    _mm256_storeu_si256((__m256i*)(ds + ld + j), d1);
    _mm512_storeu_si512(ds_i + j, interleave(d0, d1));
    _mm512_storeu_si512(p_i + j, interleave(p0, p1));
  }
}

template <class E>
void bwd_head(const Attention& a, Bf16Scratch& x, int64_t first, int64_t length, int64_t head) {
  x.begin(a, first, length, head);
  for (int64_t i0 = 0; i0 < length; i0 += kBlock) {
    int64_t count = std::min(kBlock, length - i0), padded = round_up(count, kRows);
    int64_t begin = Range(a, i0).begin, end = Range(a, i0 + padded - kRows).end;
    x.fill(a, a.qkv, head * a.width, first + i0, count, kBlock, 1, x.query);
    x.fill(a, a.dout, head * a.width, first + i0, count, kBlock, 0, x.grad);
    interleave_rows(x.query.data(), padded, x.ld, x.query_i.data());
    interleave_rows(x.grad.data(), padded, x.ld, x.grad_i.data());
    for (int64_t i = 0; i < padded; i += kRows) {
      Range keys(a, i0 + i);
      const int64_t n = keys.end - keys.begin, at = keys.begin - begin;
      const pair *query = x.pairs(x.query) + i * x.ld / 2, *grad = x.pairs(x.grad) + i * x.ld / 2;
      bf16_product<kRows>(n, query, x.ld / 2, 1, x.keys_t.data() + keys.begin, x.rows, x.score.data(), x.rows, x.half, false);
      bf16_product<kRows>(n, grad, x.ld / 2, 1, x.values_t.data() + keys.begin, x.rows, x.dscore.data(), x.rows, x.half, false);
      for (int64_t r = 0; r < kRows; r += 2) {
        Seen seen[2] = {{a, keys.begin, i0 + i + r}, {a, keys.begin, i0 + i + r + 1}};
        float lse[2] = {0.f, 0.f};
        for (int64_t k = 0; k < 2; ++k) {
          if (i + r + k < count) {
            lse[k] = a.lse[(first + i0 + i + r + k) * a.heads + head];
          } else {
            seen[k].count = 0;
          }
        }
        int64_t to = (i + r) / 2 * x.rows + at;
        score_gradients(a, x.score.data() + r * x.rows, x.dscore.data() + r * x.rows, x.rows, n, seen, lse, x.p.data() + r * x.rows,
                        x.p_i.data() + to, x.ds_i.data() + to);
      }
      const pair* key_rows = x.keys_i.data() + keys.begin / 2 * x.ld;
      bf16_product<kRows>(x.width, x.pairs(x.p), x.rows / 2, 1, key_rows, x.ld, x.out.data(), x.ld, n / 2, false);
      for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
        int64_t t = first + i0 + i + r;
        store_gradient(a, x.out.data() + r * x.ld, t, true, a.scale, row<E>(a.dqkv, t) + head * a.width);
      }
    }
    for (int64_t j = begin; j < end; j += kRows) {  // the queries whose tile goes over these keys
      int64_t from = 0, to = padded;
      while (Range(a, i0 + from).end <= j) from += kRows;
      while (Range(a, i0 + to - kRows).begin > j) to -= kRows;
      int64_t skip = from / 2 * x.rows + j - begin, rows = from / 2 * x.ld, n = (to - from) / 2;
      float *dk = x.dk.data() + j * x.width, *dv = x.dv.data() + j * x.width;
      bf16_product<kRows>(x.width, x.ds_i.data() + skip, 1, x.rows, x.query_i.data() + rows, x.ld, dk, x.width, n, true);
      bf16_product<kRows>(x.width, x.p_i.data() + skip, 1, x.rows, x.grad_i.data() + rows, x.ld, dv, x.width, n, true);
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    E* d = row<E>(a.dqkv, first + i) + head * a.width;
    store_gradient(a, x.dk.data() + i * x.width, first + i, true, a.scale, d + a.heads * a.width);
    store_gradient(a, x.dv.data() + i * x.width, first + i, false, 1.f, d + 2 * a.heads * a.width);
  }
}

}  // namespace HNET_ISA
}  // namespace hnet

#endif
