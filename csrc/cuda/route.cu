// Routing: p_t = (1 - cos(q_{t-1}, k_t)) / 2, its boundaries and the chunks they make, in one launch for any budget; and
// one decoding step for a batch.
//
// A warp reads one pair of rows, 16 bytes a lane. Both kernels add in the same order, so a step has the bits of the full
// form. Compiled without contraction: fmaf is where it says so.
#include "cuda/compact.h"

namespace hnet::cuda {
namespace {

struct Sums {
  float qq, kk, qk;
};

template <class T>
__device__ void add(Sums& s, T x, T y) {
  float a = to_float(x), b = to_float(y);
  s.qq = fmaf(a, a, s.qq), s.kk = fmaf(b, b, s.kk), s.qk = fmaf(a, b, s.qk);
}

// A lane's share of the sums: groups of 16 bytes, 32 lanes apart, whichever way they are read.
template <class T>
__device__ Sums lane_sums(const T* q, const T* k, int64_t D, bool vector) {
  constexpr int V = 16 / sizeof(T), kAhead = 4;  // groups in flight
  Sums s{0.0f, 0.0f, 0.0f};
  if (!vector) {
    for (int64_t d = lane() * V; d < D; d += 32 * V) {
      for (int i = 0; i < V && d + i < D; ++i) add(s, q[d + i], k[d + i]);
    }
    return s;
  }
  for (int64_t d = lane() * V; d < D; d += 32 * V * kAhead) {
    uint4 x[kAhead], y[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      x[u] = y[u] = {0, 0, 0, 0};  // past the end: adds nothing
      if (d + u * 32 * V < D) x[u] = load16(q + d + u * 32 * V), y[u] = load16(k + d + u * 32 * V);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const T *a = reinterpret_cast<const T*>(&x[u]), *b = reinterpret_cast<const T*>(&y[u]);
#pragma unroll
      for (int i = 0; i < V; ++i) add(s, a[i], b[i]);
    }
  }
  return s;
}

struct Probability {
  float p, cos, inv_q, inv_k;
};

template <class T>
__device__ Probability probability(const T* q, const T* k, int64_t D, bool vector, const float* bias) {
  Sums s = lane_sums(q, k, D, vector);
  s = {warp_sum(s.qq), warp_sum(s.kk), warp_sum(s.qk)};
  Probability r;
  r.inv_q = 1.0f / fmaxf(sqrtf(s.qq), 1e-12f);
  r.inv_k = 1.0f / fmaxf(sqrtf(s.kk), 1e-12f);
  r.cos = s.qk * r.inv_q * r.inv_k;
  float p = (1.0f - r.cos) * 0.5f;
  p = p < 0.0f ? 0.0f : p > 1.0f ? 1.0f : p;  // keeps NaN
  if (bias != nullptr) {
    float e = expf(*bias);
    p = p * e / fmaf(p, e, 1.0f - p);
  }
  r.p = p;
  return r;
}

// Probability and code of every position of the segment, and the block's numbers for the others.
template <class T>
__device__ void route_segment(const RouteFwd& a, Segment seg, Board all, Shared& sh) {
  int first = 0, ordinary = 0;
  Totals &head = sh.head[warp()], &tail = sh.tail[warp()];  // of lane 0: there are no registers left for them
  if (lane() == 0) head = tail = {0.0f, 0.0f};
  int64_t n = 0, seq_begin = -1, seq_end = seg.begin;  // the sequence at hand; -1: padding after the last
  for (int64_t t = seg.begin + warp(); t < seg.end; t += kWarps) {
    if (t >= seq_end) {
      n = lower_bound(a.cu_seqlens, a.N + 1, t + 1) - 1;  // the last edge at or before t: empty sequences are skipped
      seq_begin = n >= 0 && n < a.N ? a.cu_seqlens[n] : -1;
      seq_end = n >= 0 && n < a.N ? a.cu_seqlens[n + 1] : a.T;
    }
    Probability r{0.0f, 0.0f, 0.0f, 0.0f};
    int code = 0;
    if (t == seq_begin) {
      r.p = 1.0f;
      code = kFirst;
    } else if (seq_begin >= 0) {
      r = probability(as<T>(a.q.data) + (t - 1) * a.q.stride, as<T>(a.k.data) + t * a.k.stride, a.D, a.vector, a.bias);
      code = r.p > 0.5f && (a.candidates == nullptr || a.candidates[t]) ? kOrdinary : 0;
    }
    first += code == kFirst;
    ordinary += code == kOrdinary;
    if (lane() == 0) {
      if (seq_begin < seg.begin) {
        add(head, r.p);
      } else if (seq_end > seg.end) {
        add(tail, r.p);
      }
      a.prob[t] = r.p;
      a.cos[t] = r.cos;
      a.inv_q[t] = r.inv_q;
      a.inv_k[t] = r.inv_k;
      a.mask[t] = uint8_t(code);
    }
  }
  if (lane() == 0) sh.first[warp()] = first, sh.ordinary[warp()] = ordinary;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      first += sh.first[w], ordinary += sh.ordinary[w];
      add(head, sh.head[w]), add(tail, sh.tail[w]);
    }
    const int me = blockIdx.x;
    all.first[me] = first, all.ordinary[me] = ordinary;
    all.head[me] = head, all.tail[me] = tail;
  }
  if (a.budget >= 0) {
    for (int64_t i = grid_thread(); i < 2 * kBins; i += grid_threads()) all.high[i] = 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) route_fwd_kernel(RouteFwd a) {
  HNET_SHARED(Shared, sh);
  const Segment seg = my_segment(a.T);
  const Board all = board(a.scratch);
  route_segment<T>(a, seg, all, sh);
  compact(a, seg, all, sh);
}

constexpr int kStepThreads = 128;

template <class T>
__global__ void __launch_bounds__(kStepThreads) route_step_kernel(RouteStep a) {
  const int64_t b = int64_t(blockIdx.x) * (kStepThreads / 32) + warp();
  if (b >= a.B) return;
  float p = 1.0f;
  bool boundary = a.is_first != nullptr && a.is_first[b];
  if (!boundary) {
    p = probability(as<T>(a.q.data) + b * a.q.stride, as<T>(a.k.data) + b * a.k.stride, a.D, a.vector, a.bias).p;
    boundary = p > 0.5f && (a.candidates == nullptr || a.candidates[b]);
  }
  if (lane() == 0) {
    a.prob[b] = p;
    a.mask[b] = boundary;
    a.selected[b] = boundary ? p : 1.0f - p;
  }
}

bool readable_by_16(Rows x, int64_t D, int64_t size) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride * size % 16 == 0 && D * size % 16 == 0;
}

int64_t blocks_for(int64_t rows, int per_block) { return (rows + per_block - 1) / per_block; }

template <class T>
void route_fwd_as(RouteFwd a, Where at) {
  a.vector = readable_by_16(a.q, a.D, sizeof(T)) && readable_by_16(a.k, a.D, sizeof(T));
  int64_t wanted = blocks_for(a.T > 0 ? a.T : 1, kWarps);
  launch_cooperative(route_fwd_kernel<T>, a, wanted < kMaxBlocks ? wanted : kMaxBlocks, kThreads, at);
}

template <class T>
void route_step_as(RouteStep a, Where at) {
  a.vector = readable_by_16(a.q, a.D, sizeof(T)) && readable_by_16(a.k, a.D, sizeof(T));
  if (a.B > 0) launch(route_step_kernel<T>, a, blocks_for(a.B, kStepThreads / 32), 1, kStepThreads, at);
}

}  // namespace

void route_fwd(Dtype dtype, RouteFwd a, Where at) {
  switch (dtype) {
    case Dtype::f32: return route_fwd_as<float>(a, at);
    case Dtype::bf16: return route_fwd_as<bf16>(a, at);
    case Dtype::f16: return route_fwd_as<f16>(a, at);
  }
}

void route_step(Dtype dtype, RouteStep a, Where at) {
  switch (dtype) {
    case Dtype::f32: return route_step_as<float>(a, at);
    case Dtype::bf16: return route_step_as<bf16>(a, at);
    case Dtype::f16: return route_step_as<f16>(a, at);
  }
}

}  // namespace hnet::cuda
