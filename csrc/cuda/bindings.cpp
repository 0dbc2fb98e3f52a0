// The CUDA part of `hnet_kernels._C`: device pointers and sizes in, nothing out. Called by `hnet_kernels/cuda/` only.
#include "cuda/bindings.h"

#include "cuda/kernels.h"

namespace py = pybind11;

namespace hnet::cuda {
namespace {

using ptr = uintptr_t;
using i64 = int64_t;

template <class T>
T* at(ptr p) {
  return reinterpret_cast<T*>(p);
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("cuda_scratch") = kScratch;
  m.def(
      "cuda_route_fwd",
      [](int dtype, ptr q, i64 q_stride, ptr k, i64 k_stride, ptr cu, i64 N, i64 T, i64 D, ptr bias, ptr candidates, i64 budget,
         ptr prob, ptr selected, ptr mask, ptr cos, ptr inv_q, ptr inv_k, ptr chunk_index, ptr chunk_start, ptr cu_chunks,
         ptr prob_sum, ptr entropy_sum, ptr num_dropped, ptr scratch, int device, ptr stream) {
        RouteFwd a{};
        a.q = {at<void>(q), q_stride}, a.k = {at<void>(k), k_stride};
        a.cu_seqlens = at<int32_t>(cu), a.N = N, a.T = T, a.D = D;
        a.bias = at<float>(bias), a.candidates = at<uint8_t>(candidates), a.budget = budget;
        a.prob = at<float>(prob), a.selected = at<float>(selected), a.mask = at<uint8_t>(mask);
        a.cos = at<float>(cos), a.inv_q = at<float>(inv_q), a.inv_k = at<float>(inv_k);
        a.chunk_index = at<int32_t>(chunk_index), a.chunk_start = at<int32_t>(chunk_start), a.cu_chunks = at<int32_t>(cu_chunks);
        a.prob_sum = at<float>(prob_sum), a.entropy_sum = at<float>(entropy_sum);
        a.num_dropped = at<int32_t>(num_dropped), a.scratch = at<int32_t>(scratch);
        route_fwd(Dtype(dtype), a, {device, stream});
      },
      release());
  m.def(
      "cuda_route_step",
      [](int dtype, ptr q, i64 q_stride, ptr k, i64 k_stride, i64 B, i64 D, ptr bias, ptr is_first, ptr candidates, ptr prob,
         ptr selected, ptr mask, int device, ptr stream) {
        RouteStep a{};
        a.q = {at<void>(q), q_stride}, a.k = {at<void>(k), k_stride}, a.B = B, a.D = D, a.bias = at<float>(bias);
        a.is_first = at<uint8_t>(is_first), a.candidates = at<uint8_t>(candidates);
        a.prob = at<float>(prob), a.selected = at<float>(selected), a.mask = at<uint8_t>(mask);
        route_step(Dtype(dtype), a, {device, stream});
      },
      release());
  m.def(
      "cuda_dechunk_step",
      [](int dtype, int residual_dtype, ptr z, i64 z_stride, ptr residual, i64 residual_stride, ptr prob, ptr mask, ptr state, i64 B,
         i64 D, ptr out, ptr new_state, int device, ptr stream) {
        DechunkStep a{};
        a.z = {at<void>(z), z_stride}, a.residual = {at<void>(residual), residual_stride}, a.residual_dtype = Dtype(residual_dtype);
        a.prob = at<float>(prob), a.mask = at<uint8_t>(mask), a.state = at<float>(state), a.B = B, a.D = D;
        a.out = at<void>(out), a.new_state = at<float>(new_state);
        dechunk_step(Dtype(dtype), a, {device, stream});
      },
      release());
}

}  // namespace hnet::cuda
