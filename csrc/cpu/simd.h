// One float vector type per instruction set, and rows of fp32 / bf16 / fp16 read and written through it.
// Arithmetic is always fp32; only loads and stores know the element type.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef HNET_ISA
#error "compile with -DHNET_ISA=<name of the instruction set>"
#endif

namespace hnet {
namespace HNET_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return float(x); }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float to_float(f16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exp = (x.bits >> 10) & 31, man = x.bits & 1023, u;
  if (exp == 31) {
    u = sign | 0x7f800000 | (man << 13);
  } else if (exp) {
    u = sign | ((exp + 112) << 23) | (man << 13);
  } else {
    float f = float(man) * 5.9604644775390625e-8f;  // man * 2^-24
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void from_float(float* p, float x) { *p = x; }
inline void from_float(bf16* p, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) {
    p->bits = uint16_t((u >> 16) | 0x40);  // NaN stays NaN
  } else {
    p->bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
}
inline void from_float(f16* p, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) {
    p->bits = uint16_t(sign | 0x7e00);
  } else if (a >= 0x477ff000) {  // rounds to infinity
    p->bits = uint16_t(sign | 0x7c00);
  } else if (a < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded result in the low bits
    float f;
    std::memcpy(&f, &a, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    p->bits = uint16_t(sign | (u - 0x3f000000));
  } else {
    p->bits = uint16_t(sign | ((a + 0xfff + ((a >> 13) & 1) - 0x38000000) >> 13));
  }
}

// ---- vectors -------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

constexpr int W = 16;
struct vf {
  __m512 v;
};
inline vf set1(float x) { return {_mm512_set1_ps(x)}; }
inline vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
inline vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline vf larger(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline vf clamp(vf x, float lo, float hi) {  // NaN stays NaN: of a NaN and a number, these return the second
  return {_mm512_min_ps(_mm512_set1_ps(hi), _mm512_max_ps(_mm512_set1_ps(lo), x.v))};
}
inline vf square_root(vf x) { return {_mm512_sqrt_ps(x.v)}; }
inline vf add_exponent(vf x, vf n) {  // x * 2^k, k in the low bits of n
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_slli_epi32(_mm512_castps_si512(n.v), 23)))};
}
inline vf exponent(vf x) {  // n in x = 2^n f, sqrt(1/2) <= f < sqrt(2)
  __m512i above = _mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x3f3504f3));
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(above, 23))};
}
inline float sum(vf a) { return _mm512_reduce_add_ps(a.v); }
inline vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline vf load(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline vf load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline vf load(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
#ifdef __AVX512BF16__
inline __m256i pack_bf16(vf a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }  // below 2^-126 it gives 0
#else
inline __m256i pack_bf16(vf a) {
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40)));
  return _mm512_cvtepi32_epi16(r);
}
#endif
inline __m256i pack_f16(vf a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, vf a) { _mm256_storeu_si256((__m256i*)p, pack_bf16(a)); }
inline void store(f16* p, vf a) { _mm256_storeu_si256((__m256i*)p, pack_f16(a)); }
inline void stream(float* p, vf a) { _mm512_stream_ps(p, a.v); }
inline void stream(bf16* p, vf a) { _mm256_stream_si256((__m256i*)p, pack_bf16(a)); }
inline void stream(f16* p, vf a) { _mm256_stream_si256((__m256i*)p, pack_f16(a)); }
inline void stream_fence() { _mm_sfence(); }

#elif defined(__AVX2__)

constexpr int W = 8;
struct vf {
  __m256 v;
};
inline vf set1(float x) { return {_mm256_set1_ps(x)}; }
inline vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
inline vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline vf larger(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
inline vf clamp(vf x, float lo, float hi) {
  return {_mm256_min_ps(_mm256_set1_ps(hi), _mm256_max_ps(_mm256_set1_ps(lo), x.v))};
}
inline vf square_root(vf x) { return {_mm256_sqrt_ps(x.v)}; }
inline vf add_exponent(vf x, vf n) {
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.v), _mm256_slli_epi32(_mm256_castps_si256(n.v), 23)))};
}
inline vf exponent(vf x) {
  __m256i above = _mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x3f3504f3));
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(above, 23))};
}
inline float sum(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline vf load(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
inline vf load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
inline vf load(const int8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))}; }
inline __m128i pack_bf16(vf a) {
  __m256i u = _mm256_castps_si256(a.v), hi = _mm256_srli_epi32(u, 16);
  __m256i odd = _mm256_and_si256(hi, _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(hi, _mm256_set1_epi32(0x40)), nan);
  r = _mm256_packus_epi32(r, r);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(r, 0x08));
}
inline __m128i pack_f16(vf a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
inline void store(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, vf a) { _mm_storeu_si128((__m128i*)p, pack_bf16(a)); }
inline void store(f16* p, vf a) { _mm_storeu_si128((__m128i*)p, pack_f16(a)); }
inline void stream(float* p, vf a) { _mm256_stream_ps(p, a.v); }
inline void stream(bf16* p, vf a) { _mm_stream_si128((__m128i*)p, pack_bf16(a)); }
inline void stream(f16* p, vf a) { _mm_stream_si128((__m128i*)p, pack_f16(a)); }
inline void stream_fence() { _mm_sfence(); }

#else  // any other machine: plain loops of 8, which compilers turn into what the machine has

constexpr int W = 8;
struct vf {
  float v[W];
};
#define HNET_LANES(expr)        \
  vf r;                         \
  for (int i = 0; i < W; ++i) { \
    r.v[i] = (expr);            \
  }                             \
  return r;
inline vf set1(float x) { HNET_LANES(x) }
inline vf operator+(const vf& a, const vf& b) { HNET_LANES(a.v[i] + b.v[i]) }
inline vf operator-(const vf& a, const vf& b) { HNET_LANES(a.v[i] - b.v[i]) }
inline vf operator*(const vf& a, const vf& b) { HNET_LANES(a.v[i] * b.v[i]) }
inline vf operator/(const vf& a, const vf& b) { HNET_LANES(a.v[i] / b.v[i]) }
inline vf fma(const vf& a, const vf& b, const vf& c) { HNET_LANES(a.v[i] * b.v[i] + c.v[i]) }
inline vf larger(const vf& a, const vf& b) { HNET_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
inline vf clamp(const vf& x, float lo, float hi) { HNET_LANES(x.v[i] < lo ? lo : x.v[i] > hi ? hi : x.v[i]) }
inline vf square_root(const vf& x) { HNET_LANES(std::sqrt(x.v[i])) }
inline float add_exponent(float x, float n) {
  uint32_t u, k;
  std::memcpy(&u, &x, 4);
  std::memcpy(&k, &n, 4);
  u += k << 23;
  std::memcpy(&x, &u, 4);
  return x;
}
inline vf add_exponent(const vf& x, const vf& n) { HNET_LANES(add_exponent(x.v[i], n.v[i])) }
inline float exponent(float x) {
  int32_t u;
  std::memcpy(&u, &x, 4);
  return float((u - 0x3f3504f3) >> 23);
}
inline vf exponent(const vf& x) { HNET_LANES(exponent(x.v[i])) }
template <class E>
inline vf load(const E* p) {
  HNET_LANES(to_float(p[i]))
}
#undef HNET_LANES
inline float sum(const vf& a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
template <class E>
inline void store(E* p, const vf& a) {
  for (int i = 0; i < W; ++i) from_float(p + i, a.v[i]);
}
template <class E>
inline void stream(E* p, const vf& a) {
  store(p, a);
}
inline void stream_fence() {}

#endif

inline vf zero() { return set1(0.f); }

// y[i] = sum(a[i]), each added up in the same order, four of them for little more than one.
inline void sum4(const vf* a, float* y) {
#if defined(__AVX512F__) || defined(__AVX2__)
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i].v), _mm512_extractf32x8_ps(a[i].v, 1));
#else
    half[i] = a[i].v;
#endif
  }
  __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int i = 0; i < 4; ++i) y[i] = sum(a[i]);
#endif
}

// e^x to 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r, n into the exponent. Past +-87 it stays where it is.
inline vf exp(vf x) {
  const vf magic = set1(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
  x = clamp(x, -86.f, 87.f);
  vf shifted = fma(x, set1(1.44269504f), magic), n = shifted - magic;
  vf r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  vf p = set1(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.f, 1.f}) {
    p = fma(p, r, set1(c));
  }
  return add_exponent(p, shifted);
}
// 2 atanh(s) = ln((1 + s) / (1 - s)) to 2 ulp for |s| <= 1/3: its series.
inline vf twice_atanh(vf s) {
  vf z = s * s, p = set1(1.f / 15);
  for (float c : {1.f / 13, 1.f / 11, 1.f / 9, 1.f / 7, 1.f / 5, 1.f / 3}) p = fma(p, z, set1(c));
  s = s + s;
  return fma(s * z, p, s);
}
// ln x to 3 ulp for x >= 2^-126: x = 2^n f, f = (1 + s) / (1 - s), |s| < 0.18. What is no number may come out as one.
inline vf log(vf x) {
  const vf one = set1(1.f), magic = set1(12582912.f);
  vf n = exponent(x), f = add_exponent(x, magic - n);
  return fma(n, set1(0.693359375f), fma(n, set1(-2.12194440e-4f), twice_atanh((f - one) / (f + one))));
}
inline vf sigmoid(vf x) { return set1(1.f) / (set1(1.f) + exp(zero() - x)); }
inline vf silu(vf x, vf sigmoid_x) { return larger(set1(-87.f), x) * sigmoid_x; }  // exp stops there, the product must not

// The last n < W elements of a row. Lanes past n read as zero and are not written.
template <class E>
inline vf load_tail(const E* p, int64_t n) {
  E buf[W] = {};
  std::memcpy(buf, p, n * sizeof(E));
  return load(buf);
}
template <class E>
inline void store_tail(E* p, const vf& a, int64_t n) {
  E buf[W];
  store(buf, a);
  std::memcpy(p, buf, n * sizeof(E));
}

// Non-temporal stores pay only for outputs that no cache will still hold when they are read again.
constexpr int64_t kStreamBytes = int64_t(8) << 20;

template <class E>
inline bool can_stream(const E* base, int64_t stride, int64_t rows, int64_t D) {
  constexpr int64_t align = W * sizeof(E);
  return rows * D * int64_t(sizeof(E)) >= kStreamBytes && D % W == 0 && uintptr_t(base) % align == 0 &&
         (stride * sizeof(E)) % align == 0;
}

template <bool Stream, class E>
inline void put(E* p, const vf& a) {
  if constexpr (Stream) {
    stream(p, a);
  } else {
    store(p, a);
  }
}

// f(load, i) for every vector of a row: `Full` says whether all W lanes are inside.
template <class F>
inline void for_each_vector(int64_t D, F&& f) {
  int64_t i = 0;
  for (; i + W <= D; i += W) f(i, int64_t(W));
  if (i < D) f(i, D - i);
}
template <class E>
inline vf get(const E* p, int64_t n) {
  return n == W ? load(p) : load_tail(p, n);
}
template <class E>
inline void set(E* p, const vf& a, int64_t n) {
  if (n == W) {
    store(p, a);
  } else {
    store_tail(p, a, n);
  }
}

template <class E>
inline E* row(const Rows& m, int64_t i) {
  return static_cast<E*>(m.data) + i * m.stride;
}

// Runs f<float>(), f<bf16>() or f<f16>().
template <class F>
inline void with_dtype(Dtype d, F&& f) {
  switch (d) {
    case Dtype::f32: f(float{}); break;
    case Dtype::bf16: f(bf16{}); break;
    case Dtype::f16: f(f16{}); break;
  }
}

}  // namespace HNET_ISA
}  // namespace hnet
