// The Python module `hnet_kernels._C`: raw pointers and sizes in, nothing out. It knows no torch type, so it neither
// needs torch to build nor breaks when torch changes. `hnet_kernels/native.py` owns shapes, dtypes and allocation;
// this file checks what would make a kernel read outside its arrays.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "cpu/kernels.h"
#ifdef HNET_CUDA_ARCHS
#include "cuda/bindings.h"
#endif

namespace hnet {
void bind_step(pybind11::module_&);  // step_bindings.cpp
}

namespace py = pybind11;
using namespace hnet;
using ptr = uintptr_t;
using i64 = int64_t;

namespace {

template <class T>
T* as(ptr p) {
  return reinterpret_cast<T*>(p);
}
Rows rows(ptr p, i64 stride) { return {as<void>(p), stride}; }

void check_cu_seqlens(const int32_t* cu, i64 N, i64 T, bool padded) {
  auto fail = [](const std::string& what) { throw std::invalid_argument("cu_seqlens " + what); };
  if (cu[0] != 0) fail("must start at 0, got " + std::to_string(cu[0]));
  for (i64 n = 0; n < N; ++n) {
    if (cu[n + 1] < cu[n]) {
      fail("must not decrease, got " + std::to_string(cu[n]) + " before " + std::to_string(cu[n + 1]) + " at index " +
           std::to_string(n + 1));
    }
  }
  if (padded ? cu[N] > T : cu[N] != T) {
    fail("must end at T = " + std::to_string(T) + ", the number of positions, got " + std::to_string(cu[N]));
  }
}

// A Routing made by `route` always passes; one put together by hand may not.
void check_chunks(const int32_t* chunk_start, i64 M, const int32_t* cu_chunks, const int32_t* cu, i64 N, i64 T) {
  check_cu_seqlens(cu, N, T, true);
  bool ok = cu_chunks[0] == 0 && cu_chunks[N] <= M;
  for (i64 n = 0; n < N && ok; ++n) {
    i64 first = cu_chunks[n], last = cu_chunks[n + 1];
    ok = last >= first && last <= M && (last > first) == (cu[n + 1] > cu[n]) && (last == first || chunk_start[first] == cu[n]);
    for (i64 m = first; m < last && ok; ++m) {
      ok = chunk_start[m] < (m + 1 < last ? chunk_start[m + 1] : cu[n + 1]);
    }
  }
  if (!ok) {
    throw std::invalid_argument(
        "routing is inconsistent: chunk_start must rise within each sequence and begin at its first position, "
        "and cu_chunks must count its entries");
  }
}

void check_rows(const int64_t* index, i64 n, i64 R) {
  for (i64 i = 0; i < n; ++i) {
    if (index[i] < 0 || index[i] >= R) {
      throw std::invalid_argument("rows must be in [0, " + std::to_string(R) + "), got " + std::to_string(index[i]));
    }
  }
}

#define ARGS py::call_guard<py::gil_scoped_release>()

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of hnet_kernels; use hnet_kernels, not this module.";

  m.def("cpu_isa", [] { return kernels().isa; });
  m.def("has_openmp", [] {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
  });
#ifdef HNET_CUDA_ARCHS  // "sm_80, sm_90, ...", what the CUDA kernels are compiled for
  hnet::cuda::bind(m);
  m.def("has_cuda", [] { return true; });
  m.def("cuda_archs", [] { return HNET_CUDA_ARCHS; });
#else
  m.def("has_cuda", [] { return false; });
  m.def("cuda_archs", [] { return ""; });
#endif

  // Freed blocks up to `bytes` go back to the heap instead of the kernel: the next tensor of that size costs no page faults.
  m.def("keep_memory", [](i64 bytes) {
#ifdef __GLIBC__
    return mallopt(M_MMAP_THRESHOLD, int(bytes)) == 1 && mallopt(M_TRIM_THRESHOLD, int(bytes)) == 1;
#else
    (void)bytes;
    return false;
#endif
  });

  m.def("check_cu_seqlens", [](ptr cu, i64 N, i64 T, bool padded) { check_cu_seqlens(as<int32_t>(cu), N, T, padded); });

  m.def(
      "route_fwd",
      [](int dtype, ptr q, i64 q_stride, ptr k, i64 k_stride, ptr cu, i64 N, i64 T, i64 D, float bias_scale, ptr candidates,
         bool padded, i64 budget, ptr prob, ptr mask, ptr selected, ptr cos, ptr inv_q, ptr inv_k, ptr chunk_index, ptr cu_chunks,
         ptr prob_sum, ptr entropy_sum, ptr num_dropped, int threads) {
        check_cu_seqlens(as<int32_t>(cu), N, T, padded);
        std::unique_ptr<float[]> entropy(new float[T]);  // not kept: the backward has cos
        RouteFwd a{rows(q, q_stride), rows(k, k_stride), as<int32_t>(cu), N, T, D, bias_scale, as<uint8_t>(candidates),
                   as<float>(prob), as<float>(selected), as<uint8_t>(mask), as<float>(cos), as<float>(inv_q), as<float>(inv_k),
                   entropy.get()};
        kernels().route_fwd(Dtype(dtype), a, threads);
        return compact({as<int32_t>(cu), N, T, budget, as<float>(prob), as<uint8_t>(mask), as<float>(selected),
                        as<int32_t>(chunk_index), as<int32_t>(cu_chunks), entropy.get(), as<float>(prob_sum),
                        as<float>(entropy_sum), as<int32_t>(num_dropped)});
      },
      ARGS);
  m.def(
      "fill_chunk_start",
      [](ptr mask, i64 T, i64 num_valid, ptr chunk_start, i64 M, int) {
        fill_chunk_start(as<uint8_t>(mask), T, num_valid, as<int32_t>(chunk_start), M);
      },
      ARGS);
  m.def(
      "route_bwd",
      [](int dtype, ptr q, i64 q_stride, ptr k, i64 k_stride, ptr cu, i64 N, i64 T, i64 D, float bias_scale, ptr mask, ptr cos,
         ptr inv_q, ptr inv_k, ptr dprob, ptr dselected, ptr dprob_sum, ptr dentropy_sum, ptr dq, ptr dk, ptr dbias, int threads) {
        RouteBwd a{rows(q, q_stride), rows(k, k_stride), as<int32_t>(cu), N, T, D, bias_scale, as<uint8_t>(mask),
                   as<float>(cos), as<float>(inv_q), as<float>(inv_k), as<float>(dprob), as<float>(dselected),
                   as<float>(dprob_sum), as<float>(dentropy_sum), rows(dq, D), rows(dk, D), as<float>(dbias)};
        kernels().route_bwd(Dtype(dtype), a, threads);
      },
      ARGS);

  m.def(
      "pool_fwd",
      [](int dtype, int mode, ptr x, i64 x_stride, ptr chunk_start, ptr cu_chunks, ptr cu, i64 N, i64 T, i64 M, i64 D, ptr z,
         int threads) {
        const int32_t *cc = as<int32_t>(cu_chunks), *cs = as<int32_t>(cu);
        check_chunks(as<int32_t>(chunk_start), M, cc, cs, N, T);
        kernels().pool_fwd(Dtype(dtype), {PoolMode(mode), rows(x, x_stride), as<int32_t>(chunk_start), M, cc[N], cs[N], T, D,
                                          rows(z, D), {}}, threads);
      },
      ARGS);
  m.def(
      "pool_bwd",
      [](int dtype, int mode, ptr x, i64 x_stride, ptr dz, i64 dz_stride, ptr chunk_start, ptr cu_chunks, ptr cu, i64 N, i64 T,
         i64 M, i64 D, ptr dx, int threads) {
        kernels().pool_bwd(Dtype(dtype), {PoolMode(mode), rows(x, x_stride), as<int32_t>(chunk_start), M, as<int32_t>(cu_chunks)[N],
                                          as<int32_t>(cu)[N], T, D, rows(dz, dz_stride), rows(dx, D)}, threads);
      },
      ARGS);

  m.def(
      "dechunk_fwd",
      [](int dtype, int residual_dtype, ptr z, i64 z_stride, ptr residual, i64 residual_stride, ptr prob, ptr cu, ptr cu_chunks,
         ptr chunk_start, i64 N, i64 T, i64 M, i64 D, ptr out, int threads) {
        check_chunks(as<int32_t>(chunk_start), M, as<int32_t>(cu_chunks), as<int32_t>(cu), N, T);
        Dechunk a{};
        a.z = rows(z, z_stride), a.residual = rows(residual, residual_stride), a.residual_dtype = Dtype(residual_dtype);
        a.prob = as<float>(prob), a.cu_seqlens = as<int32_t>(cu), a.cu_chunks = as<int32_t>(cu_chunks);
        a.chunk_start = as<int32_t>(chunk_start), a.N = N, a.T = T, a.M = M, a.D = D, a.out = rows(out, D);
        kernels().dechunk_fwd(Dtype(dtype), a, threads);
      },
      ARGS);
  m.def(
      "dechunk_bwd",
      [](int dtype, ptr dout, i64 dout_stride, ptr z, i64 z_stride, ptr prob, ptr cu, ptr cu_chunks, ptr chunk_start, i64 N, i64 T,
         i64 M, i64 D, ptr dz, ptr dprob, ptr dselected, int threads) {
        Dechunk a{};
        a.z = rows(z, z_stride), a.dout = rows(dout, dout_stride), a.prob = as<float>(prob);
        a.cu_seqlens = as<int32_t>(cu), a.cu_chunks = as<int32_t>(cu_chunks), a.chunk_start = as<int32_t>(chunk_start);
        a.N = N, a.T = T, a.M = M, a.D = D, a.dz = rows(dz, D), a.dprob = as<float>(dprob), a.dselected = as<float>(dselected);
        kernels().dechunk_bwd(Dtype(dtype), a, threads);
      },
      ARGS);

  m.def(
      "ema_fwd",
      [](int dtype, ptr z, i64 z_stride, ptr p, ptr cu, i64 N, i64 T, i64 D, ptr initial, ptr y, ptr final_state, int threads) {
        check_cu_seqlens(as<int32_t>(cu), N, T, false);
        Ema a{};
        a.z = rows(z, z_stride), a.p = as<float>(p), a.cu_seqlens = as<int32_t>(cu), a.N = N, a.T = T, a.D = D;
        a.initial_state = as<float>(initial), a.y = rows(y, D), a.final_state = as<float>(final_state);
        kernels().ema_fwd(Dtype(dtype), a, threads);
      },
      ARGS);
  m.def(
      "ema_bwd",
      [](int dtype, ptr dy, i64 dy_stride, ptr dfinal, ptr z, i64 z_stride, ptr p, ptr cu, i64 N, i64 T, i64 D, ptr initial, ptr dz,
         ptr dp, ptr dinitial, int threads) {
        Ema a{};
        a.dy = rows(dy, dy_stride), a.dfinal = as<float>(dfinal), a.z = rows(z, z_stride), a.p = as<float>(p);
        a.cu_seqlens = as<int32_t>(cu), a.N = N, a.T = T, a.D = D, a.initial_state = as<float>(initial);
        a.dz = rows(dz, D), a.dp = as<float>(dp), a.dinitial = as<float>(dinitial);
        kernels().ema_bwd(Dtype(dtype), a, threads);
      },
      ARGS);

  m.def(
      "rms_norm_fwd",
      [](int dtype, ptr x, i64 x_stride, ptr residual, i64 residual_stride, ptr weight, i64 T, i64 D, float eps, ptr h, ptr sum,
         ptr inv_rms, int threads) {
        RmsNorm a{};
        a.x = rows(x, x_stride), a.residual = rows(residual, residual_stride), a.weight = as<float>(weight);
        a.T = T, a.D = D, a.eps = eps, a.h = rows(h, D), a.sum = rows(sum, D), a.inv_rms = as<float>(inv_rms);
        kernels().rms_norm_fwd(Dtype(dtype), a, threads);
      },
      ARGS);
  m.def(
      "rms_norm_bwd",
      [](int dtype, ptr dh, i64 dh_stride, ptr dsum, i64 dsum_stride, ptr sum, i64 sum_stride, ptr inv_rms, ptr weight, i64 T, i64 D,
         ptr dx, ptr dresidual, ptr dweight, int threads) {
        RmsNorm a{};
        a.dh = rows(dh, dh_stride), a.dsum = rows(dsum, dsum_stride), a.sum = rows(sum, sum_stride);
        a.inv_rms = as<float>(inv_rms), a.weight = as<float>(weight), a.T = T, a.D = D;
        a.dx = rows(dx, D), a.dresidual = rows(dresidual, D), a.dweight = as<float>(dweight);
        kernels().rms_norm_bwd(Dtype(dtype), a, threads);
      },
      ARGS);

  m.def(
      "gated_conv_fwd",
      [](int dtype, ptr x, i64 x_stride, ptr taps, ptr bias, ptr cu, i64 N, i64 T, i64 D, i64 K, ptr out, int threads) {
        check_cu_seqlens(as<int32_t>(cu), N, T, true);
        GatedConv a{};
        a.x = rows(x, x_stride), a.taps = as<float>(taps), a.bias = as<float>(bias), a.cu_seqlens = as<int32_t>(cu);
        a.N = N, a.T = T, a.D = D, a.K = K, a.out = rows(out, D);
        kernels().gated_conv_fwd(Dtype(dtype), a, threads);
      },
      ARGS);
  m.def(
      "gated_conv_bwd",
      [](int dtype, ptr dout, i64 dout_stride, ptr x, i64 x_stride, ptr taps, ptr bias, ptr cu, i64 N, i64 T, i64 D, i64 K, ptr dx,
         ptr dtaps, int threads) {
        check_cu_seqlens(as<int32_t>(cu), N, T, true);
        GatedConv a{};
        a.dout = rows(dout, dout_stride), a.x = rows(x, x_stride), a.taps = as<float>(taps), a.bias = as<float>(bias);
        a.cu_seqlens = as<int32_t>(cu), a.N = N, a.T = T, a.D = D, a.K = K, a.dx = rows(dx, 2 * D), a.dtaps = as<float>(dtaps);
        kernels().gated_conv_bwd(Dtype(dtype), a, threads);
      },
      ARGS);

  m.def(
      "attention_fwd",
      [](int dtype, ptr qkv, i64 stride, ptr cos, ptr sin, i64 half, ptr cu, i64 N, i64 T, i64 heads, i64 width,
         i64 window, float scale, ptr out, ptr lse, int threads) {
        check_cu_seqlens(as<int32_t>(cu), N, T, true);
        Attention a{rows(qkv, stride), as<float>(cos), as<float>(sin), half, as<int32_t>(cu), N, T, heads, width, window, scale};
        a.out = rows(out, heads * width), a.lse = as<float>(lse);
        kernels().attention_fwd(Dtype(dtype), a, threads);
      },
      ARGS);
  m.def(
      "attention_bwd",
      [](int dtype, ptr dout, i64 dout_stride, ptr qkv, i64 stride, ptr cos, ptr sin, i64 half, ptr cu, i64 N, i64 T,
         i64 heads, i64 width, i64 window, float scale, ptr lse, ptr dqkv, int threads) {
        check_cu_seqlens(as<int32_t>(cu), N, T, true);
        Attention a{rows(qkv, stride), as<float>(cos), as<float>(sin), half, as<int32_t>(cu), N, T, heads, width, window, scale};
        a.dout = rows(dout, dout_stride), a.lse = as<float>(lse), a.dqkv = rows(dqkv, 3 * heads * width);
        kernels().attention_bwd(Dtype(dtype), a, threads);
      },
      ARGS);

  m.def(
      "swiglu_fwd",
      [](int dtype, ptr x, i64 x_stride, i64 T, i64 D, ptr out, int threads) {
        kernels().swiglu_fwd(Dtype(dtype), {rows(x, x_stride), T, D, rows(out, D), {}, {}}, threads);
      },
      ARGS);
  m.def(
      "swiglu_bwd",
      [](int dtype, ptr dout, i64 dout_stride, ptr x, i64 x_stride, i64 T, i64 D, ptr dx, int threads) {
        kernels().swiglu_bwd(Dtype(dtype), {rows(x, x_stride), T, D, {}, rows(dout, dout_stride), rows(dx, 2 * D)}, threads);
      },
      ARGS);

  m.def(
      "cross_entropy_fwd",
      [](int dtype, ptr logits, i64 stride, ptr targets, i64 T, i64 V, ptr loss, ptr entropy, ptr norm, int threads) {
        const int64_t* wanted = as<int64_t>(targets);
        for (i64 t = 0; t < T; ++t) {
          if ((wanted[t] < 0 && wanted[t] != -100) || wanted[t] >= V) {
            throw std::invalid_argument("targets must be in [0, " + std::to_string(V) + ") or -100, got " + std::to_string(wanted[t]) +
                                        " at position " + std::to_string(t));
          }
        }
        kernels().cross_entropy_fwd(
            Dtype(dtype), {rows(logits, stride), wanted, T, V, as<float>(loss), as<float>(entropy), as<float>(norm), nullptr, {}},
            threads);
      },
      ARGS);
  m.def(
      "cross_entropy_bwd",
      [](int dtype, ptr dloss, ptr logits, i64 stride, ptr targets, i64 T, i64 V, ptr norm, ptr dlogits, int threads) {
        kernels().cross_entropy_bwd(
            Dtype(dtype),
            {rows(logits, stride), as<int64_t>(targets), T, V, nullptr, nullptr, as<float>(norm), as<float>(dloss), rows(dlogits, V)},
            threads);
      },
      ARGS);

  m.def(
      "group_rows",
      [](ptr index, ptr scale, i64 n, i64 R, ptr order, ptr rows_, ptr begin, int) {
        check_rows(as<int64_t>(index), n, R);
        return group_rows(as<int64_t>(index), as<float>(scale), n, R, as<int64_t>(order), as<int64_t>(rows_), as<int64_t>(begin));
      },
      ARGS);
  m.def(
      "rows_sum",
      [](ptr table, i64 R, ptr index, ptr scale, i64 T, i64 count, i64 D, ptr out, int threads) {
        check_rows(as<int64_t>(index), T * count, R);
        kernels().rows_sum({as<float>(table), as<int64_t>(index), as<float>(scale), T, count, D, as<float>(out)}, threads);
      },
      ARGS);
  m.def(
      "rows_gradient",
      [](ptr dout, ptr scale, ptr order, ptr begin, i64 U, i64 T, i64 count, i64 D, ptr out, int threads) {
        const int64_t* at = as<int64_t>(begin);
        bool ok = at[0] == 0 && at[U] <= T * count;
        for (i64 u = 0; u < U && ok; ++u) ok = at[u] <= at[u + 1];
        if (!ok) throw std::invalid_argument("groups must be what group_rows returned for T * count entries");
        check_rows(as<int64_t>(order), at[U], T * count);
        kernels().rows_gradient(
            {as<float>(dout), as<float>(scale), as<int64_t>(order), at, U, count, D, as<float>(out)}, threads);
      },
      ARGS);
  m.def(
      "rows_adamw",
      [](ptr weight, ptr exp_avg, ptr exp_avg_sq, ptr steps, i64 R, ptr rows_, ptr gradient, i64 U, i64 D, i64 done, double beta1,
         double beta2, double eps, ptr recent, i64 ring, i64 tail, int threads) {
        const int64_t* which = as<int64_t>(rows_);
        check_rows(which, U, R);
        for (i64 u = 1; u < U; ++u) {
          if (which[u] <= which[u - 1]) throw std::invalid_argument("rows must rise, got " + std::to_string(which[u]) + " after " + std::to_string(which[u - 1]));
        }
        RowsAdamW a{as<float>(weight), as<float>(exp_avg), as<float>(exp_avg_sq), as<int32_t>(steps), which, as<float>(gradient), U, D,
                    done, beta1, beta2, eps, as<float>(recent), ring, tail};
        kernels().rows_adamw(a, threads);
      },
      ARGS);

  m.def(
      "route_step",
      [](int dtype, ptr q, i64 q_stride, ptr k, i64 k_stride, i64 B, i64 D, float bias_scale, ptr is_first, ptr candidates, ptr prob,
         ptr selected, ptr mask, int threads) {
        kernels().route_step(Dtype(dtype), {rows(q, q_stride), rows(k, k_stride), B, D, bias_scale, as<uint8_t>(is_first),
                                            as<uint8_t>(candidates), as<float>(prob), as<float>(selected), as<uint8_t>(mask)}, threads);
      },
      ARGS);
  m.def(
      "dechunk_step",
      [](int dtype, int residual_dtype, ptr z, i64 z_stride, ptr residual, i64 residual_stride, ptr prob, ptr mask, ptr state, i64 B,
         i64 D, ptr out, ptr new_state, int threads) {
        kernels().dechunk_step(Dtype(dtype), {rows(z, z_stride), rows(residual, residual_stride), Dtype(residual_dtype),
                                              as<float>(prob), as<uint8_t>(mask), as<float>(state), B, D, rows(out, D),
                                              as<float>(new_state)}, threads);
      },
      ARGS);

  bind_step(m);
}
