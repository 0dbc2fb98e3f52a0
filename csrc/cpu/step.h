// What one decoding step of a whole model reads and writes: parameters and state where PyTorch keeps them, so that
// weights changed in place are seen. Made by `csrc/step_bindings.cpp` of what `hnet/model/native_step.py` describes.
#pragma once
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"

namespace hnet {

struct Vec {  // parameters, dense
  const void* data;
  Dtype dtype;
};

constexpr int kInt8 = 3;  // of a weight, beside Dtype's

struct Linear {         // y = W x + b
  const void* weight;   // (out, in)
  int dtype;            // a Dtype or kInt8
  const float* scale;   // (out,) of int8: W is weight x scale, else null
  Vec bias;             // (out,), data may be null
  int64_t out, in;
};

struct Conv {           // depthwise and causal
  Vec taps, bias;       // (D, K) newest last; (D,)
  int64_t D, K;
  void* tail;           // (slots, K - 1, D), oldest first
  Dtype dtype;          // of the tail
};

struct GatedConvMixer {
  Linear in_proj, out_proj;
  Conv conv;
};

struct AttentionMixer {
  Linear Wqkv, out_proj;
  int64_t heads, width, half;  // the first 2 half channels of a head are rotated
  const float* inv_freq;       // (half,)
  void *k, *v;                 // (slots, capacity, heads, width): a ring
  Dtype dtype;
  int64_t capacity;
};

struct MambaMixer {
  Linear in_proj, out_proj;  // into z | x | B | C | dt
  Conv conv;                 // of x | B | C
  Vec dt_bias, A_log, D, norm;
  float eps;
  int64_t heads, headdim, d_state;
  float* ssm;                // (slots, heads, headdim, d_state)
};

struct Norm {
  Vec weight;
  float eps;
};

struct Layer {
  char kind;  // 'c', 't' or 'm'
  Norm norm1, norm2;
  GatedConvMixer conv;
  AttentionMixer attention;
  MambaMixer mamba;
  bool has_mlp;
  Linear fc1, fc2;
};

struct Stack {
  std::vector<Layer> layers;
  Norm norm;
};

enum class Boundaries : int { any = 0, char_start = 1, char_end = 2 };

struct Stage {
  int64_t outside, D;    // widths: of what comes and goes, of this stage
  Vec pad;               // (D - outside,)
  int64_t* length;       // (slots,) positions seen
  Stack encoder, decoder;  // of the innermost only the first
  std::unique_ptr<Stage> inner;
  Linear q_proj, k_proj, residual;
  const float* logit_bias;  // one, or null
  Boundaries boundaries;
  void* q_last;          // (slots, D)
  Dtype dtype;           // of q_last
  float* ema;            // (slots, D)
  uint8_t* tail;         // (slots, 3) last bytes
};

struct Ngrams {
  Vec table;             // (rows in all, D)
  const int64_t *powers, *first;  // (sizes, longest), (sizes,)
  int64_t sizes, longest, rows;
  int64_t* recent;       // (slots, longest - 1)
};

// Buffers that are taken and given back in turns, like a stack; kept from step to step.
class Scratch {
 public:
  float* take(int64_t n) {
    if (used == blocks.size()) blocks.emplace_back();
    Block& b = blocks[used++];
    if (b.size < n) b = Block(n);
    return b.data.get();
  }
  struct Scope {
    Scratch& s;
    size_t before;
    explicit Scope(Scratch& s) : s(s), before(s.used) {}
    ~Scope() { s.used = before; }
  };

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  struct Block {
    std::unique_ptr<float[], Free> data;
    int64_t size = 0;
    Block() = default;
    explicit Block(int64_t n) : data(static_cast<float*>(::operator new[](n * sizeof(float), std::align_val_t(64)))), size(n) {}
  };
  std::vector<Block> blocks;
  size_t used = 0;
};

struct Active {          // rows of a stage in this step
  const int64_t *slots, *position;  // (n,) position: how many their slots have seen
  int64_t n;
  Scratch& scratch;
  int threads;
};

struct StepModel {
  Vec embeddings;        // (vocab, D)
  int64_t vocab, D, slots, stages;
  bool has_ngrams;
  Ngrams ngrams;
  Stage root;
  Linear head;
  Dtype out;             // of the logits
  Scratch scratch;
};

struct StepCall {
  const int64_t *ids, *slots;  // (n,)
  int64_t n;
  void* logits;          // (n, head.out)
  uint8_t* masks;        // (stages with routing, n): of the rows of each, where it ran
};

}  // namespace hnet
