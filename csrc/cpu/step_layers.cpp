// One new position of each of n sequences through a stack of blocks: x and all between are fp32, states are changed where
// they lie. Sums are added up in an order that depends neither on n nor on the number of threads.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"
#include "step.h"

namespace hnet {
namespace HNET_ISA {

void linear(const Linear&, const float* x, int64_t n, float* y, int threads);

namespace {

constexpr int64_t kWorth = int64_t(1) << 16;  // elements of state that pay for a second thread

// (D,) as fp32: where it lies, or copied
const float* widened(const Vec& v, int64_t D, Scratch& scratch) {
  if (v.dtype == Dtype::f32) return static_cast<const float*>(v.data);
  float* out = scratch.take(D);
  with_dtype(v.dtype, [&](auto e) {
    auto p = static_cast<const decltype(e)*>(v.data);
    for_each_vector(D, [&](int64_t i, int64_t n) { set(out + i, get(p + i, n), n); });
  });
  return out;
}

inline float inverse_rms(float squares, int64_t D, float eps) { return 1.f / std::sqrt(squares / float(D) + eps); }

// residual += x (the first time: = x), h = residual / rms * weight
void add_norm(const Active& a, const Norm& norm, const float* x, float* residual, bool first, int64_t D, float* h) {
  Scratch::Scope scope(a.scratch);
  const float* weight = widened(norm.weight, D, a.scratch);
  for (int64_t b = 0; b < a.n; ++b) {
    const float* in = x + b * D;
    float *r = residual + b * D, *out = h + b * D;
    vf squares = zero();
    for_each_vector(D, [&](int64_t i, int64_t n) {
      vf v = first ? get(in + i, n) : get(in + i, n) + get(r + i, n);
      squares = fma(v, v, squares);
      set(r + i, v, n);
    });
    vf inv = set1(inverse_rms(sum(squares), D, norm.eps));
    for_each_vector(D, [&](int64_t i, int64_t n) { set(out + i, get(r + i, n) * inv * get(weight + i, n), n); });
  }
}

// y (n, D): the convolution at the new positions x, rows `ld` apart, which join the tails
void convolve(const Active& a, const Conv& c, const float* x, int64_t ld, float* y) {
  Scratch::Scope scope(a.scratch);
  int64_t D = c.D, before = c.K - 1;
  float* taps = a.scratch.take(c.K * D);
  with_dtype(c.taps.dtype, [&](auto e) {
    auto p = static_cast<const decltype(e)*>(c.taps.data);
    for (int64_t i = 0; i < D; ++i) {
      for (int64_t j = 0; j < c.K; ++j) taps[j * D + i] = to_float(p[i * c.K + j]);
    }
  });
  const float* bias = widened(c.bias, D, a.scratch);
  with_dtype(c.dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t b = 0; b < a.n; ++b) {
      E* tail = static_cast<E*>(c.tail) + a.slots[b] * before * D;
      const float* in = x + b * ld;
      float* out = y + b * D;
      for_each_vector(D, [&](int64_t i, int64_t n) {
        vf v = get(in + i, n), acc = fma(get(taps + before * D + i, n), v, get(bias + i, n));
        for (int64_t j = 0; j < before; ++j) {
          vf old = get(tail + j * D + i, n);
          acc = fma(get(taps + j * D + i, n), old, acc);
          if (j) set(tail + (j - 1) * D + i, old, n);
        }
        if (before) set(tail + (before - 1) * D + i, v, n);
        set(out + i, acc, n);
      });
    }
  });
}

inline vf silu(vf x) { return silu(x, sigmoid(x)); }

void gated_conv(const Active& a, const GatedConvMixer& m, const float* h, float* x) {
  Scratch::Scope scope(a.scratch);
  int64_t D = m.conv.D;
  float *both = a.scratch.take(a.n * 2 * D), *y = a.scratch.take(a.n * D);
  linear(m.in_proj, h, a.n, both, a.threads);
  convolve(a, m.conv, both, 2 * D, y);
  for (int64_t b = 0; b < a.n; ++b) {
    const float* gate = both + b * 2 * D + D;
    float* out = y + b * D;
    for_each_vector(D, [&](int64_t i, int64_t n) { set(out + i, get(out + i, n) * silu(get(gate + i, n)), n); });
  }
  linear(m.out_proj, y, a.n, x, a.threads);
}

// --- attention -----------------------------------------------------------------------------------------------------

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for_each_vector(half, [&](int64_t i, int64_t n) {
    vf p = get(x + i, n), q = get(x + half + i, n), c = get(cos + i, n), s = get(sin + i, n);
    set(x + i, p * c - q * s, n);
    set(x + half + i, p * s + q * c, n);
  });
}

// scores[t] = <q, k_t> scale, then e^(score - the largest); returns the sum of these
template <class E>
float weights(const float* q, const E* k, int64_t stride, int64_t count, int64_t width, float scale, float* scores) {
  float highest = -INFINITY;
  for (int64_t t = 0; t < count; t += 4) {
    vf acc[4] = {zero(), zero(), zero(), zero()};
    float dots[4];
    const E* row[4];
    for (int64_t j = 0; j < 4; ++j) row[j] = k + std::min(t + j, count - 1) * stride;
    for_each_vector(width, [&](int64_t i, int64_t n) {
      vf v = get(q + i, n);
      for (int64_t j = 0; j < 4; ++j) acc[j] = fma(v, get(row[j] + i, n), acc[j]);
    });
    sum4(acc, dots);
    for (int64_t j = 0; j < std::min<int64_t>(4, count - t); ++j) {
      scores[t + j] = dots[j] * scale;
      highest = scores[t + j] > highest ? scores[t + j] : highest;
    }
  }
  vf total = zero(), top = set1(highest);
  for_each_vector(count, [&](int64_t i, int64_t n) {
    vf e = exp(get(scores + i, n) - top);
    set(scores + i, e, n);
    total = total + (n == W ? e : load_tail(scores + i, n));
  });
  return sum(total);
}

template <class E>
void average(const float* w, float total, const E* v, int64_t stride, int64_t count, int64_t width, float* out) {
  for_each_vector(width, [&](int64_t i, int64_t n) {
    vf acc[4] = {zero(), zero(), zero(), zero()};
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) {
      for (int64_t j = 0; j < 4; ++j) acc[j] = fma(set1(w[t + j]), get(v + (t + j) * stride + i, n), acc[j]);
    }
    for (; t < count; ++t) acc[0] = fma(set1(w[t]), get(v + t * stride + i, n), acc[0]);
    set(out + i, ((acc[0] + acc[1]) + (acc[2] + acc[3])) / set1(total), n);
  });
}

struct Angles {  // (n, half) of the new positions; the layers of a stack share them
  const float* inv_freq = nullptr;
  int64_t half = 0;
  float *cos = nullptr, *sin = nullptr;
};

void make_angles(const Active& a, const AttentionMixer& m, Angles& angles) {
  if (angles.inv_freq == m.inv_freq && angles.half == m.half) return;
  angles = {m.inv_freq, m.half, a.scratch.take(a.n * m.half), a.scratch.take(a.n * m.half)};
  for (int64_t b = 0; b < a.n; ++b) {
    for (int64_t i = 0; i < m.half; ++i) {
      float angle = float(a.position[b]) * m.inv_freq[i];
      angles.cos[b * m.half + i] = std::cos(angle);
      angles.sin[b * m.half + i] = std::sin(angle);
    }
  }
}

void attention(const Active& a, const AttentionMixer& m, const Angles& angles, const float* h, float* x) {
  Scratch::Scope scope(a.scratch);
  int64_t D = m.heads * m.width, longest = 0;
  float *qkv = a.scratch.take(a.n * 3 * D), *out = a.scratch.take(a.n * D);
  linear(m.Wqkv, h, a.n, qkv, a.threads);
  for (int64_t b = 0; b < a.n; ++b) longest = std::max(longest, std::min(a.position[b] + 1, m.capacity));
  float* scores = a.scratch.take(a.n * m.heads * longest);
  float scale = 1.f / std::sqrt(float(m.width));
  with_dtype(m.dtype, [&](auto e) {
    using E = decltype(e);
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && a.n * D * longest > kWorth)
    for (int64_t task = 0; task < a.n * m.heads; ++task) {
      int64_t b = task / m.heads, head = task % m.heads, slot = a.slots[b] * m.capacity * D + head * m.width;
      float *q = qkv + b * 3 * D + head * m.width, *k = q + D, *v = k + D;
      if (m.half) {
        rotate(q, angles.cos + b * m.half, angles.sin + b * m.half, m.half);
        rotate(k, angles.cos + b * m.half, angles.sin + b * m.half, m.half);
      }
      E *keys = static_cast<E*>(m.k) + slot, *values = static_cast<E*>(m.v) + slot;
      int64_t at = a.position[b] % m.capacity * D, count = std::min(a.position[b] + 1, m.capacity);
      for_each_vector(m.width, [&](int64_t i, int64_t n) {
        set(keys + at + i, get(k + i, n), n);
        set(values + at + i, get(v + i, n), n);
      });
      float* w = scores + task * longest;
      float total = weights(q, keys, D, count, m.width, scale, w);
      average(w, total, values, D, count, m.width, out + b * D + head * m.width);
    }
  });
  linear(m.out_proj, out, a.n, x, a.threads);
}

// --- Mamba-2 -------------------------------------------------------------------------------------------------------

inline float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

void mamba(const Active& a, const MambaMixer& m, const float* h, float* x) {
  Scratch::Scope scope(a.scratch);
  int64_t S = m.d_state, P = m.headdim, H = m.heads, inner = H * P, wide = m.in_proj.out, channels = m.conv.D;
  float *all = a.scratch.take(a.n * wide), *xBC = a.scratch.take(a.n * channels), *y = a.scratch.take(a.n * inner);
  linear(m.in_proj, h, a.n, all, a.threads);
  convolve(a, m.conv, all + inner, wide, xBC);
  for_each_vector(a.n * channels, [&](int64_t i, int64_t n) { set(xBC + i, silu(get(xBC + i, n)), n); });
  const float *dt_bias = widened(m.dt_bias, H, a.scratch), *A_log = widened(m.A_log, H, a.scratch);
  const float *D = widened(m.D, H, a.scratch), *norm = widened(m.norm, inner, a.scratch);
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && a.n * inner * S > kWorth)
  for (int64_t task = 0; task < a.n * H; ++task) {
    int64_t b = task / H, head = task % H;
    const float *in = xBC + b * channels + head * P, *B = xBC + b * channels + inner, *C = B + S;
    float dt = softplus(all[b * wide + wide - H + head] + dt_bias[head]);
    vf decay = set1(std::exp(-dt * std::exp(A_log[head])));
    float *state = m.ssm + (a.slots[b] * H + head) * P * S, *out = y + b * inner + head * P;
    for (int64_t p = 0; p < P; ++p) {
      vf take = set1(dt * in[p]), acc = zero();
      float* row = state + p * S;
      for_each_vector(S, [&](int64_t i, int64_t n) {
        vf s = fma(take, get(B + i, n), get(row + i, n) * decay);
        set(row + i, s, n);
        acc = fma(s, get(C + i, n), acc);
      });
      out[p] = sum(acc) + D[head] * in[p];
    }
  }
  for (int64_t b = 0; b < a.n; ++b) {
    float* out = y + b * inner;
    const float* z = all + b * wide;
    vf squares = zero();
    for_each_vector(inner, [&](int64_t i, int64_t n) {
      vf v = get(out + i, n) * silu(get(z + i, n));
      squares = fma(v, v, squares);
      set(out + i, v, n);
    });
    vf inv = set1(inverse_rms(sum(squares), inner, m.eps));
    for_each_vector(inner, [&](int64_t i, int64_t n) { set(out + i, get(out + i, n) * inv * get(norm + i, n), n); });
  }
  linear(m.out_proj, y, a.n, x, a.threads);
}

void swiglu(const Active& a, const Layer& m, const float* h, float* x) {
  Scratch::Scope scope(a.scratch);
  int64_t D = m.fc2.in;
  float *both = a.scratch.take(a.n * 2 * D), *act = a.scratch.take(a.n * D);
  linear(m.fc1, h, a.n, both, a.threads);
  for (int64_t b = 0; b < a.n; ++b) {
    const float *y = both + b * 2 * D, *gate = y + D;
    float* out = act + b * D;
    for_each_vector(D, [&](int64_t i, int64_t n) { set(out + i, silu(get(gate + i, n)) * get(y + i, n), n); });
  }
  linear(m.fc2, act, a.n, x, a.threads);
}

}  // namespace

// x (n, D), in place
void run_stack(const Stack& stack, const Active& a, int64_t D, float* x) {
  Scratch::Scope scope(a.scratch);
  float *residual = a.scratch.take(a.n * D), *h = a.scratch.take(a.n * D);
  Angles angles;
  bool first = true;
  for (const Layer& layer : stack.layers) {
    add_norm(a, layer.norm1, x, residual, first, D, h);
    first = false;
    if (layer.kind == 'c') {
      gated_conv(a, layer.conv, h, x);
    } else if (layer.kind == 'm') {
      mamba(a, layer.mamba, h, x);
    } else {
      if (layer.attention.half) make_angles(a, layer.attention, angles);
      attention(a, layer.attention, angles, h, x);
    }
    if (layer.has_mlp) {
      add_norm(a, layer.norm2, x, residual, false, D, h);
      swiglu(a, layer, h, x);
    }
  }
  add_norm(a, stack.norm, x, residual, first, D, h);
  std::copy(h, h + a.n * D, x);
}

}  // namespace HNET_ISA
}  // namespace hnet
