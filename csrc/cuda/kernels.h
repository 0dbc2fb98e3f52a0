// Arguments and entry points of the CUDA kernels: device pointers, and where to launch. Inputs (rows, D) may have any
// row stride (in elements); everything else is dense. Every function is one launch, waits for nothing, allocates
// nothing and may be captured in a CUDA graph. They throw std::runtime_error with CUDA's words if a launch fails.
#pragma once
#include <cstdint>

#include "cpu/kernels.h"  // Dtype, Rows

namespace hnet::cuda {

struct Where {
  int device;
  uintptr_t stream;
};

struct RouteFwd {
  Rows q, k;
  const int32_t* cu_seqlens;
  int64_t N, T, D;
  const float* bias;          // logit bias, or null
  const uint8_t* candidates;  // (T,) or null
  int64_t budget;             // max_chunks, or -1
  float *prob, *selected;     // (T,)
  uint8_t* mask;              // (T,)
  float *cos, *inv_q, *inv_k;  // (T,), kept for the backward
  int32_t *chunk_index, *chunk_start, *cu_chunks;  // (T,), (budget or T,), (N+1,)
  float *prob_sum, *entropy_sum;                   // (N,)
  int32_t* num_dropped;                            // ()
  int32_t* scratch;                                // kScratch numbers, contents irrelevant
  bool vector;                                     // rows can be read 16 bytes at a time; set by route_fwd
};

struct RouteStep {
  Rows q, k;  // (B, D)
  int64_t B, D;
  const float* bias;
  const uint8_t *is_first, *candidates;  // (B,), may be null
  float *prob, *selected;
  uint8_t* mask;
  bool vector;  // set by route_step
};

struct DechunkStep {
  Rows z;         // (B, D)
  Rows residual;  // (B, D), data may be null
  Dtype residual_dtype;
  const float* prob;
  const uint8_t* mask;
  const float* state;  // (B, D)
  int64_t B, D;
  void* out;  // (B, D)
  float* new_state;
};

constexpr int kMaxBlocks = 1024;  // of route_fwd
constexpr int kBins = 4096;       // of one of the two histograms that find the budget's threshold
constexpr int kScratch = 8 * kMaxBlocks + 2 * kBins;

void route_fwd(Dtype, RouteFwd, Where);
void route_step(Dtype, RouteStep, Where);
void dechunk_step(Dtype, const DechunkStep&, Where);

}  // namespace hnet::cuda
