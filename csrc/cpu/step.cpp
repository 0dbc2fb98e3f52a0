// A byte for each of n sequences through a whole model: what HNetForCausalLM.step does, in one call.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "simd.h"
#include "step.h"

namespace hnet {
namespace HNET_ISA {

void linear(const Linear&, const float* x, int64_t n, float* y, int threads);
void route_step(Dtype, const RouteStep&, int threads);
void run_stack(const Stack&, const Active&, int64_t D, float* x);

namespace {

constexpr float kMinP = 1e-4f, kMaxP = 1.f - 1e-4f;
constexpr float kMaxLogitBias = 80.f;  // MAX_LOGIT_BIAS of routing.py

// --- boundaries between characters: `starts_character` and `ends_character` of hnet/model/hnet.py -------------------

inline bool inside(int byte) { return (byte & 0xC0) == 0x80; }

inline bool ends_character(const uint8_t* before, int a) {  // the three bytes before byte a, oldest first
  int b = before[2], c = before[1], d = before[0];
  return a < 0x80 || a >= 0xF8 || (inside(a) && (b & 0xE0) == 0xC0) || (inside(a) && inside(b) && (c & 0xF0) == 0xE0) ||
         (inside(a) && inside(b) && inside(c) && (d & 0xF8) == 0xF0);
}

// candidates (n,); the bytes join the tails
void characters(const Stage& s, const Active& a, const int64_t* ids, uint8_t* candidates) {
  for (int64_t b = 0; b < a.n; ++b) {
    uint8_t *tail = s.tail + a.slots[b] * 3, byte = uint8_t(ids[b]);
    candidates[b] = s.boundaries == Boundaries::char_start ? !inside(byte) : ends_character(tail, byte);
    tail[0] = tail[1], tail[1] = tail[2], tail[2] = byte;
  }
}

// --- one stage -----------------------------------------------------------------------------------------------------

template <class E>
void read_row(const E* p, int64_t D, float* out) {
  for_each_vector(D, [&](int64_t i, int64_t n) { set(out + i, get(p + i, n), n); });
}
template <class E>
void write_row(E* p, int64_t D, const float* x) {
  for_each_vector(D, [&](int64_t i, int64_t n) { set(p + i, get(x + i, n), n); });
}

// prob and mask (n,) of the new positions x (n, D)
void decide(Stage& s, const Active& a, const float* x, const int64_t* ids, float* prob, uint8_t* mask) {
  Scratch::Scope scope(a.scratch);
  int64_t n = a.n, D = s.D;
  float *q = a.scratch.take(n * D), *k = a.scratch.take(n * D), *before = a.scratch.take(n * D);
  float* selected = a.scratch.take(n);
  uint8_t* flags = reinterpret_cast<uint8_t*>(a.scratch.take(n));  // room for four a row
  linear(s.q_proj, x, n, q, a.threads);
  linear(s.k_proj, x, n, k, a.threads);
  with_dtype(s.dtype, [&](auto e) {
    for (int64_t b = 0; b < n; ++b) {
      auto* last = static_cast<decltype(e)*>(s.q_last) + a.slots[b] * D;
      read_row(last, D, before + b * D);
      write_row(last, D, q + b * D);
    }
  });
  for (int64_t b = 0; b < n; ++b) flags[b] = a.position[b] == 0;
  uint8_t* candidates = nullptr;
  if (s.boundaries != Boundaries::any) characters(s, a, ids, candidates = flags + n);
  float bias = s.logit_bias ? *s.logit_bias : 0.f;
  bias = bias < -kMaxLogitBias ? -kMaxLogitBias : bias > kMaxLogitBias ? kMaxLogitBias : bias;
  RouteStep r{{before, D}, {k, D}, n, D, s.logit_bias ? std::exp(bias) : 1.f, flags, candidates, prob, selected, mask};
  route_step(Dtype::f32, r, a.threads);
}

// x (n, D): EMA of the chunks, z (fired, D) where one begins, plus residual
void dechunk(Stage& s, const Active& a, const float* z, const float* prob, const uint8_t* mask, const float* residual, float* x) {
  int64_t D = s.D;
  for (int64_t b = 0; b < a.n; ++b) {
    float* y = s.ema + a.slots[b] * D;
    if (mask[b]) {
      float p = prob[b] < kMinP ? kMinP : prob[b] > kMaxP ? kMaxP : prob[b];
      vf take = set1(p), keep = set1(1.f - p);
      for_each_vector(D, [&](int64_t i, int64_t n) { set(y + i, fma(take, get(z + i, n), keep * get(y + i, n)), n); });
      z += D;
    }
    const float* r = residual + b * D;
    float* out = x + b * D;
    for_each_vector(D, [&](int64_t i, int64_t n) { set(out + i, get(y + i, n) + get(r + i, n), n); });
  }
}

// x (n, s.outside), in place; masks: of this stage and, after `stride` each, of those inside it
void run_stage(Stage& s, const int64_t* slots, int64_t n, const int64_t* ids, float* x, uint8_t* masks, int64_t stride,
               Scratch& scratch, int threads) {
  Scratch::Scope scope(scratch);
  int64_t D = s.D, outside = s.outside;
  int64_t* position = reinterpret_cast<int64_t*>(scratch.take(2 * n));
  for (int64_t b = 0; b < n; ++b) position[b] = s.length[slots[b]];
  Active a{slots, position, n, scratch, threads};
  float* wide = x;
  if (D > outside) {
    wide = scratch.take(n * D);
    with_dtype(s.pad.dtype, [&](auto e) {
      for (int64_t b = 0; b < n; ++b) {
        std::copy(x + b * outside, x + (b + 1) * outside, wide + b * D);
        read_row(static_cast<const decltype(e)*>(s.pad.data), D - outside, wide + b * D + outside);
      }
    });
  }
  run_stack(s.encoder, a, D, wide);
  if (s.inner) {
    float *residual = scratch.take(n * D), *prob = scratch.take(n), *z = scratch.take(n * D);
    int64_t *fired = reinterpret_cast<int64_t*>(scratch.take(2 * n)), count = 0;
    linear(s.residual, wide, n, residual, threads);
    decide(s, a, wide, ids, prob, masks);
    for (int64_t b = 0; b < n; ++b) {
      if (!masks[b]) continue;
      fired[count] = slots[b];
      std::copy(wide + b * D, wide + (b + 1) * D, z + count++ * D);
    }
    if (count) run_stage(*s.inner, fired, count, nullptr, z, masks + stride, stride, scratch, threads);
    dechunk(s, a, z, prob, masks, residual, wide);
    run_stack(s.decoder, a, D, wide);
  }
  if (D > outside) {
    for (int64_t b = 0; b < n; ++b) std::copy(wide + b * D, wide + b * D + outside, x + b * outside);
  }
  for (int64_t b = 0; b < n; ++b) s.length[slots[b]] += 1;
}

// --- bytes in, logits out ------------------------------------------------------------------------------------------

constexpr int64_t kPrime = 2147483647, kFactor = 1640531527, kShift = 16;  // of hnet/model/ngrams.py

// x (n, D) += the embeddings of the last bytes together; the new ones join `recent`
void add_ngrams(const StepModel& m, const StepCall& c, float* x) {
  const Ngrams& g = m.ngrams;
  int64_t before = g.longest - 1;
  with_dtype(g.table.dtype, [&](auto e) {
    auto table = static_cast<const decltype(e)*>(g.table.data);
    for (int64_t b = 0; b < c.n; ++b) {
      int64_t* recent = g.recent + c.slots[b] * before;
      for (int64_t s = 0; s < g.sizes; ++s) {
        const int64_t* powers = g.powers + s * g.longest;
        int64_t code = c.ids[b] * powers[before];
        for (int64_t j = 0; j < before; ++j) code += recent[j] * powers[j];
        int64_t row = (((code % kPrime) * kFactor) >> kShift) % g.rows + g.first[s];
        float* out = x + b * m.D;
        for_each_vector(m.D, [&](int64_t i, int64_t n) { set(out + i, get(out + i, n) + get(table + row * m.D + i, n), n); });
      }
      if (before) {
        std::copy(recent + 1, recent + before, recent);
        recent[before - 1] = c.ids[b];
      }
    }
  });
}

}  // namespace

void step(StepModel& m, const StepCall& c, int threads) {
  Scratch::Scope scope(m.scratch);
  float *x = m.scratch.take(c.n * m.D), *logits = m.scratch.take(c.n * m.head.out);
  with_dtype(m.embeddings.dtype, [&](auto e) {
    for (int64_t b = 0; b < c.n; ++b) {
      read_row(static_cast<const decltype(e)*>(m.embeddings.data) + c.ids[b] * m.D, m.D, x + b * m.D);
    }
  });
  if (m.has_ngrams) add_ngrams(m, c, x);
  run_stage(m.root, c.slots, c.n, c.ids, x, c.masks, c.n, m.scratch, threads);
  linear(m.head, x, c.n, logits, threads);
  with_dtype(m.out, [&](auto e) { write_row(static_cast<decltype(e)*>(c.logits), c.n * m.head.out, logits); });
}

}  // namespace HNET_ISA
}  // namespace hnet
