// silu(gate) * y, and its gradient.
#include "kernels.h"
#include "simd.h"

namespace hnet {
namespace HNET_ISA {
namespace {

template <class E, bool Stream>
void fwd(const SwiGLU& a, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.T; ++t) {
      const E *y = row<E>(a.x, t), *gate = y + a.D;
      E* out = row<E>(a.out, t);
      for_each_vector(a.D, [&](int64_t i, int64_t n) {
        vf g = get(gate + i, n), v = silu(g, sigmoid(g)) * get(y + i, n);
        if (Stream) {
          put<Stream>(out + i, v);
        } else {
          set(out + i, v, n);
        }
      });
    }
    if (Stream) stream_fence();
  }
}

template <class E>
void bwd(const SwiGLU& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.T; ++t) {
    const E *y = row<E>(a.x, t), *gate = y + a.D, *dout = row<E>(a.dout, t);
    E *dy = row<E>(a.dx, t), *dgate = dy + a.D;
    for_each_vector(a.D, [&](int64_t i, int64_t n) {
      vf g = get(gate + i, n), s = sigmoid(g), d = get(dout + i, n), silu_g = silu(g, s);
      set(dy + i, d * silu_g, n);
      set(dgate + i, d * get(y + i, n) * (s + silu_g - silu_g * s), n);
    });
  }
}

}  // namespace

void swiglu_fwd(Dtype d, const SwiGLU& a, int threads) {
  with_dtype(d, [&](auto e) {
    using E = decltype(e);
    bool stream = can_stream(row<E>(a.out, 0), a.out.stride, a.T, a.D);
    stream ? fwd<E, true>(a, threads) : fwd<E, false>(a, threads);
  });
}
void swiglu_bwd(Dtype d, const SwiGLU& a, int threads) {
  with_dtype(d, [&](auto e) { bwd<decltype(e)>(a, threads); });
}

}  // namespace HNET_ISA
}  // namespace hnet
