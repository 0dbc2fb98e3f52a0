// Arguments and entry points of the CPU kernels.
//
// One source is compiled once per instruction set (see CMakeLists.txt); every copy fills one `Kernels` table and
// `dispatch.cpp` picks a table at run time. Every pointer is to dense memory except that (T, D) inputs may have
// any row stride (in elements); rows themselves are contiguous. Row counts, strides and offsets are 64-bit.
#pragma once
#include <cstdint>

namespace hnet {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class PoolMode : int { boundary = 0, mean = 1, max = 2, last = 3 };

struct Rows {  // (rows, D) matrix
  void* data;
  int64_t stride;
};

struct RouteFwd {
  Rows q, k;
  const int32_t* cu_seqlens;
  int64_t N, T, D;
  float bias_scale;            // exp(logit bias)
  const uint8_t* candidates;   // (T,) or null
  float *prob, *selected;      // (T,)
  uint8_t* mask;               // (T,)
  float *cos, *inv_q, *inv_k;  // (T,), kept for the backward: cos(q_{t-1}, k_t), 1/|q_{t-1}|, 1/|k_t|
  float* entropy;              // (T,), of prob in nats, for `compact` to sum
};

struct RouteBwd {
  Rows q, k;
  const int32_t* cu_seqlens;
  int64_t N, T, D;
  float bias_scale;
  const uint8_t* mask;
  const float *cos, *inv_q, *inv_k;
  const float *dprob, *dselected, *dprob_sum, *dentropy_sum;  // (T,) (T,) (N,) (N,), each may be null
  Rows dq, dk;
  float* dbias;  // (T,) contribution of each position to d(logit bias), or null
};

struct Pool {
  PoolMode mode;
  Rows x;                      // forward: input; backward of max: the same input
  const int32_t* chunk_start;  // (M,)
  int64_t M, num_chunks, num_valid, T, D;
  Rows z;                      // forward: output (M, D); backward: dz
  Rows dx;                     // backward: output (T, D)
};

struct Dechunk {
  Rows z;              // (M, D)
  Rows residual;       // (T, D), data may be null
  Dtype residual_dtype;
  const float* prob;   // (T,)
  const int32_t *cu_seqlens, *cu_chunks, *chunk_start;
  int64_t N, T, M, D;
  Rows out;            // forward: (T, D)
  Rows dout;           // backward input (T, D)
  Rows dz;             // (M, D)
  float *dprob, *dselected;  // (T,)
};

struct Ema {
  Rows z;                      // (T, D)
  const float* p;              // (T,)
  const int32_t* cu_seqlens;
  int64_t N, T, D;
  const float* initial_state;  // (N, D) or null
  Rows y;                      // forward output; backward input
  float* final_state;          // (N, D) forward output
  Rows dy;
  const float* dfinal;         // (N, D) or null
  Rows dz;
  float* dp;                   // (T,)
  float* dinitial;             // (N, D) or null
};

struct RmsNorm {
  Rows x;                   // (T, D)
  Rows residual;            // (T, D) fp32, data may be null
  const float* weight;      // (D,)
  int64_t T, D;
  float eps;
  Rows h, sum;              // forward: (T, D) as x; the new residual, fp32. Backward reads `sum`
  float* inv_rms;           // (T,) forward output, backward input
  Rows dh, dsum;            // backward input: as x; fp32, data may be null
  Rows dx, dresidual;       // backward output: as x; fp32, data may be null
  float* dweight;           // (D,)
};

struct GatedConv {
  Rows x;                      // (T, 2 D): u, then the gate
  const float *taps, *bias;    // (K, D), oldest first; (D,)
  const int32_t* cu_seqlens;
  int64_t N, T, D, K;
  Rows out;                    // forward: (T, D)
  Rows dout, dx;               // backward: (T, D) in, (T, 2 D) out
  float* dtaps;                // (K + 1, D), the last row of the bias
};

struct Attention {
  Rows qkv;                    // (T, 3 heads width)
  const float *cos, *sin;      // (T, half), or null
  int64_t half;                // the first 2 half channels of q and k are rotated
  const int32_t* cu_seqlens;
  int64_t N, T, heads, width, window;  // window < 0: all before
  float scale;
  Rows out;                    // forward: (T, heads width)
  float* lse;                  // (T, heads), forward output and backward input
  Rows dout, dqkv;             // backward
};

struct SwiGLU {
  Rows x;         // (T, 2 D): y, then the gate
  int64_t T, D;
  Rows out;       // forward: (T, D)
  Rows dout, dx;  // backward: (T, D) in, (T, 2 D) out
};

struct CrossEntropy {
  Rows logits;                   // (T, V)
  const int64_t* targets;        // (T,) in [0, V), or negative: no loss
  int64_t T, V;
  float *loss, *entropy;         // (T,) forward output
  float* norm;                   // (T, 2) forward output, backward input: largest logit, log sum e^(logit - it)
  const float* dloss;            // (T,) backward
  Rows dlogits;                  // (T, V)
};

struct RowsSum {                 // out_t = sum_j scale_tj table[index_tj]
  const float* table;            // (., D)
  const int64_t* index;          // (T, count)
  const float* scale;            // (T, count), may be null: 1. Rows with scale 0 are not read
  int64_t T, count, D;
  float* out;                    // (T, D)
};

struct RowsGradient {            // of a RowsSum, for its U distinct rows
  const float* dout;             // (T, D)
  const float* scale;            // (T, count), may be null
  const int64_t *order, *begin;  // entries of index (T count,) by row; where each row's begin, (U + 1,)
  int64_t U, count, D;
  float* out;                    // (U, D)
};

struct RowsAdamW {
  float *weight, *exp_avg, *exp_avg_sq;  // (R, D)
  int32_t* steps;                // (R, 2): of which step the moments are, 0 none; and of which the weight
  const int64_t* rows;           // (U,), distinct
  const float* gradient;         // (U, D) of step done + 1, or null: only catch up with step `done`
  int64_t U, D, done;
  double beta1, beta2, eps;
  const float* recent;           // of step s at s % ring: learning rate sqrt(1 - beta2^s) / (1 - beta1^s)
  int64_t ring, tail;            // steps that momentum is felt for
};

struct RouteStep {
  Rows q, k;  // (B, D): projection of the previous position, projection of this one
  int64_t B, D;
  float bias_scale;
  const uint8_t *is_first, *candidates;  // (B,), may be null
  float *prob, *selected;
  uint8_t* mask;
};

struct DechunkStep {
  Rows z;         // (B, D)
  Rows residual;  // (B, D), data may be null
  Dtype residual_dtype;
  const float* prob;
  const uint8_t* mask;
  const float* state;  // (B, D) fp32
  int64_t B, D;
  Rows out;
  float* new_state;
};

struct Sample {
  const float* logits;           // (n, V)
  int64_t n, V;
  const uint8_t* allowed;        // (situations, V)
  const int64_t* situation;      // (n,) of `allowed`
  const uint8_t *seen, *banned;  // (n, V), may be null
  const float *penalty, *adjust;  // (n,) read with `seen`; (n, V), may be null
  const float* temperature;      // (n,) 0: the most probable
  const int64_t* top_k;
  const float *top_p, *min_p;
  const double* noise;           // (n, V) > 0, read where temperature is not 0
  int64_t* chosen;               // (n,) -1: there is no number to choose by
};

struct Linear;     // step.h
struct StepModel;
struct StepCall;

struct Kernels {
  const char* isa;
  void (*route_fwd)(Dtype, const RouteFwd&, int threads);
  void (*route_bwd)(Dtype, const RouteBwd&, int threads);
  void (*pool_fwd)(Dtype, const Pool&, int threads);
  void (*pool_bwd)(Dtype, const Pool&, int threads);
  void (*dechunk_fwd)(Dtype, const Dechunk&, int threads);
  void (*dechunk_bwd)(Dtype, const Dechunk&, int threads);
  void (*ema_fwd)(Dtype, const Ema&, int threads);
  void (*ema_bwd)(Dtype, const Ema&, int threads);
  void (*route_step)(Dtype, const RouteStep&, int threads);
  void (*dechunk_step)(Dtype, const DechunkStep&, int threads);
  void (*rms_norm_fwd)(Dtype, const RmsNorm&, int threads);
  void (*rms_norm_bwd)(Dtype, const RmsNorm&, int threads);
  void (*gated_conv_fwd)(Dtype, const GatedConv&, int threads);
  void (*gated_conv_bwd)(Dtype, const GatedConv&, int threads);
  void (*attention_fwd)(Dtype, const Attention&, int threads);
  void (*attention_bwd)(Dtype, const Attention&, int threads);
  void (*swiglu_fwd)(Dtype, const SwiGLU&, int threads);
  void (*swiglu_bwd)(Dtype, const SwiGLU&, int threads);
  void (*cross_entropy_fwd)(Dtype, const CrossEntropy&, int threads);
  void (*cross_entropy_bwd)(Dtype, const CrossEntropy&, int threads);
  void (*rows_sum)(const RowsSum&, int threads);
  void (*rows_gradient)(const RowsGradient&, int threads);
  void (*rows_adamw)(const RowsAdamW&, int threads);
  void (*linear)(const Linear&, const float* x, int64_t n, float* y, int threads);
  void (*step)(StepModel&, const StepCall&, int threads);
  void (*sample)(const Sample&);
};

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();

// The table for this machine: the widest one compiled in and supported, or the one named by HNET_CPU_ISA.
const Kernels& kernels();

// Boundary compaction (no vector code in it). `budget` < 0 means no budget. Drops the least probable boundaries
// past the budget (never the first position of a sequence), then fills chunk_index (T,), cu_chunks (N+1,),
// prob_sum and entropy_sum (N,). Returns the number of chunks.
struct Compact {
  const int32_t* cu_seqlens;
  int64_t N, T, budget;
  const float* prob;
  uint8_t* mask;
  float* selected;
  int32_t *chunk_index, *cu_chunks;
  const float* entropy;
  float *prob_sum, *entropy_sum;
  int32_t* num_dropped;
};
int64_t compact(const Compact&);
void fill_chunk_start(const uint8_t* mask, int64_t T, int64_t num_valid, int32_t* chunk_start, int64_t M);


// Entries of index (n,) in [0, R) by row, within a row in their order, but for those whose scale (n,), if not null, is 0:
// fills order (n,), rows (U,) rising, begin (U + 1,), of which there must be room for n and n + 1. Returns U.
int64_t group_rows(const int64_t* index, const float* scale, int64_t n, int64_t R, int64_t* order, int64_t* rows, int64_t* begin);

}  // namespace hnet
