// Small matrix products of bf16 numbers with sums in fp32, for AVX512-BF16.
//
// Its instruction multiplies pairs: a 32-bit lane holds two neighbours along the dimension that is summed over. So A is
// given as pairs, B as rows of pairs of neighbouring rows, n counts pairs, and C is fp32.
#pragma once
#include "simd.h"

#ifdef __AVX512BF16__

namespace hnet {
namespace HNET_ISA {

using pair = uint32_t;

// C (M, 16 V) = or += A (M, n) B (n, 16 V); A has any strides
template <int M, int V>
inline void bf16_tile(const pair* A, int64_t rs, int64_t cs, const pair* B, int64_t ldb, float* C, int64_t ldc, int64_t n, bool add) {
  __m512 acc[M][V];
  for (int r = 0; r < M; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = add ? _mm512_loadu_ps(C + r * ldc + v * W) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < n; ++k) {
    __m512bh b[V];
    for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(B + k * ldb + v * W);
    for (int r = 0; r < M; ++r) {
      __m512bh a = (__m512bh)_mm512_set1_epi32(int(A[r * rs + k * cs]));
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], a, b[v]);
    }
  }
  for (int r = 0; r < M; ++r) {
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(C + r * ldc + v * W, acc[r][v]);
  }
}

// M rows of it, N a multiple of 16
template <int M>
inline void bf16_product(int64_t N, const pair* A, int64_t rs, int64_t cs, const pair* B, int64_t ldb, float* C, int64_t ldc, int64_t n,
                         bool add) {
  int64_t j = 0;
  for (; N - j >= 5 * W || N - j == 3 * W; j += 3 * W) bf16_tile<M, 3>(A, rs, cs, B + j, ldb, C + j, ldc, n, add);
  for (; N - j >= 2 * W; j += 2 * W) bf16_tile<M, 2>(A, rs, cs, B + j, ldb, C + j, ldc, n, add);
  if (N - j == W) bf16_tile<M, 1>(A, rs, cs, B + j, ldb, C + j, ldc, n, add);
}

// (a_0, b_0, a_1, b_1, ...), a in the lower half of each pair
inline __m512i interleave(__m256i a, __m256i b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
inline __m512i interleave(vf a, vf b) { return interleave(pack_bf16(a), pack_bf16(b)); }

// Rows i and i + 1 of x (rows, width) become row i / 2 of `out` (rows / 2, width); both even, width a multiple of 16
inline void interleave_rows(const bf16* x, int64_t rows, int64_t width, pair* out) {
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t c = 0; c < width; c += W) {
      auto* at = (const __m256i*)(x + i * width + c);
      auto* below = (const __m256i*)(x + (i + 1) * width + c);
      _mm512_storeu_si512(out + i / 2 * width + c, interleave(_mm256_loadu_si256(at), _mm256_loadu_si256(below)));
    }
  }
}

// 16 x 16 numbers of 32 bits
inline void transpose16(const pair* x, int64_t ldx, pair* out, int64_t ldo) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(x + i * ldx);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }  // a[4 g + c] has columns c, 4 + c, 8 + c, 12 + c of rows 4 g to 4 g + 3
  for (int c = 0; c < 4; ++c) {
    __m512i lo01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), hi01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    __m512i lo23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44), hi23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_storeu_si512(out + c * ldo, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
    _mm512_storeu_si512(out + (4 + c) * ldo, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
    _mm512_storeu_si512(out + (8 + c) * ldo, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
    _mm512_storeu_si512(out + (12 + c) * ldo, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
  }
}

}  // namespace HNET_ISA
}  // namespace hnet

#endif
