// `_C.StepModel`: a model described in tuples by hnet/model/native_step.py, one decoding step of it in one call. Who makes
// one keeps what it points to. Sizes that do not fit one another are refused here.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/step.h"

namespace py = pybind11;

namespace hnet {
namespace {

void need(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("a step needs ") + what);
}

// The items of a tuple in order
class Items {
 public:
  explicit Items(py::handle h) : t(py::reinterpret_borrow<py::tuple>(h)) {}
  ~Items() noexcept(false) {
    if (at != t.size() && !std::uncaught_exceptions()) throw std::invalid_argument("a step needs tuples without more items");
  }
  py::handle next() {
    need(at < t.size(), "tuples with all items");
    return t[at++];
  }
  int64_t number() { return next().cast<int64_t>(); }
  float real() { return next().cast<float>(); }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(next().cast<uintptr_t>());
  }
  Dtype dtype() {
    int64_t d = number();
    need(d >= 0 && d <= 2, "fp32, bf16 or fp16");
    return Dtype(d);
  }

 private:
  py::tuple t;
  size_t at = 0;
};

Vec vec(py::handle h) {
  if (h.is_none()) return {nullptr, Dtype::f32};
  Items i(h);
  const void* data = i.pointer<void>();
  return {data, i.dtype()};
}

Linear linear(py::handle h, int64_t in, int64_t out = -1) {
  Items i(h);
  Linear a{};
  a.weight = i.pointer<void>();
  a.dtype = int(i.number());
  a.scale = i.pointer<float>();
  a.bias = vec(i.next());
  a.out = i.number(), a.in = i.number();
  need(a.dtype >= 0 && a.dtype <= kInt8 && (a.dtype == kInt8) == (a.scale != nullptr), "scales for int8 and for nothing else");
  need(a.in > 0 && a.out > 0 && (in < 0 || a.in == in) && (out < 0 || a.out == out), "projections whose widths meet");
  return a;
}

Norm norm(py::handle h) {
  Items i(h);
  Vec weight = vec(i.next());
  return {weight, i.real()};
}

Conv conv(py::handle h) {
  Items i(h);
  Conv c{};
  c.taps = vec(i.next()), c.bias = vec(i.next());
  c.D = i.number(), c.K = i.number();
  c.tail = i.pointer<void>(), c.dtype = i.dtype();
  need(c.K >= 1, "a convolution of at least one tap");
  return c;
}

Layer layer(py::handle h, int64_t D) {
  Items i(h);
  Layer a{};
  a.norm1 = norm(i.next());
  a.kind = i.next().cast<std::string>().at(0);
  Items m(i.next());
  if (a.kind == 'c') {
    a.conv.in_proj = linear(m.next(), D, 2 * D), a.conv.out_proj = linear(m.next(), D, D), a.conv.conv = conv(m.next());
    need(a.conv.conv.D == D, "a convolution as wide as its block");
  } else if (a.kind == 't') {
    AttentionMixer& t = a.attention;
    t.Wqkv = linear(m.next(), D, 3 * D), t.out_proj = linear(m.next(), D, D);
    t.heads = m.number(), t.width = m.number(), t.half = m.number(), t.inv_freq = m.pointer<float>();
    t.k = m.pointer<void>(), t.v = m.pointer<void>(), t.dtype = m.dtype(), t.capacity = m.number();
    need(t.heads > 0 && t.heads * t.width == D && t.capacity > 0, "heads that make up the width, and room for keys");
    need(t.half >= 0 && 2 * t.half <= t.width, "no more rotated channels than a head has");
  } else {
    need(a.kind == 'm', "mixers c, t or m");
    MambaMixer& t = a.mamba;
    t.heads = m.number(), t.headdim = m.number(), t.d_state = m.number();
    int64_t inner = t.heads * t.headdim;
    t.in_proj = linear(m.next(), D, 2 * inner + 2 * t.d_state + t.heads), t.out_proj = linear(m.next(), inner, D);
    t.conv = conv(m.next());
    t.dt_bias = vec(m.next()), t.A_log = vec(m.next()), t.D = vec(m.next()), t.norm = vec(m.next()), t.eps = m.real();
    t.ssm = m.pointer<float>();
    need(t.conv.D == inner + 2 * t.d_state, "a convolution of x, B and C");
  }
  py::handle mlp = i.next();
  if ((a.has_mlp = !mlp.is_none())) {
    Items p(mlp);
    a.norm2 = norm(p.next());
    a.fc2 = linear(p.next(), -1, D), a.fc1 = linear(p.next(), D, 2 * a.fc2.in);
  }
  return a;
}

Stack stack(py::handle h, int64_t D) {
  Items i(h);
  Stack s;
  for (py::handle one : py::reinterpret_borrow<py::tuple>(i.next())) s.layers.push_back(layer(one, D));
  s.norm = norm(i.next());
  return s;
}

void read_stage(py::handle h, Stage& s, int64_t outside, int64_t& stages) {
  Items i(h);
  s = Stage{};
  ++stages;
  s.outside = outside, s.D = i.number();
  s.pad = vec(i.next());
  need(s.D >= outside && (s.D == outside) == (s.pad.data == nullptr), "a pad for what a stage is wider");
  s.length = i.pointer<int64_t>();
  s.encoder = stack(i.next(), s.D);
  py::handle rest = i.next();
  if (rest.is_none()) return;
  Items r(rest);
  s.decoder = stack(r.next(), s.D);
  s.q_proj = linear(r.next(), s.D, s.D), s.k_proj = linear(r.next(), s.D, s.D), s.residual = linear(r.next(), s.D, s.D);
  s.logit_bias = r.pointer<float>();
  int64_t boundaries = r.number();
  need(boundaries >= 0 && boundaries <= 2, "boundaries 0, 1 or 2");
  s.boundaries = Boundaries(boundaries);
  s.q_last = r.pointer<void>(), s.dtype = r.dtype(), s.ema = r.pointer<float>(), s.tail = r.pointer<uint8_t>();
  s.inner = std::make_unique<Stage>();
  read_stage(r.next(), *s.inner, s.D, stages);
}

std::unique_ptr<StepModel> model(py::tuple described) {
  auto m = std::make_unique<StepModel>();
  Items i(described);
  m->embeddings = vec(i.next());
  m->vocab = i.number(), m->D = i.number(), m->slots = i.number();
  py::handle ngrams = i.next();
  if ((m->has_ngrams = !ngrams.is_none())) {
    Items g(ngrams);
    Ngrams& n = m->ngrams;
    n.table = vec(g.next()), n.powers = g.pointer<int64_t>(), n.first = g.pointer<int64_t>();
    n.sizes = g.number(), n.longest = g.number(), n.rows = g.number(), n.recent = g.pointer<int64_t>();
    int64_t all = g.number();
    need(n.longest >= 1 && n.rows >= 1, "n-grams of at least a byte");
    for (int64_t s = 0; s < n.sizes; ++s) need(n.first[s] >= 0 && n.first[s] + n.rows <= all, "rows of n-grams in their table");
  }
  m->head = linear(i.next(), m->D);
  m->out = i.dtype();
  m->stages = 0;
  read_stage(i.next(), m->root, m->D, m->stages);
  return m;
}

void check_call(const StepModel& m, const StepCall& c) {
  for (int64_t b = 0; b < c.n; ++b) {
    if (c.ids[b] < 0 || c.ids[b] >= m.vocab) {
      throw py::index_error("input_ids must be in [0, " + std::to_string(m.vocab) + "), got " + std::to_string(c.ids[b]));
    }
    need(c.slots[b] >= 0 && c.slots[b] < m.slots, "slots of its cache");
  }
}

}  // namespace

void bind_step(py::module_& m) {
  py::class_<StepModel>(m, "StepModel")
      .def(py::init(&model))
      .def("step", [](StepModel& s, uintptr_t ids, uintptr_t slots, int64_t n, uintptr_t logits, uintptr_t masks, int threads) {
        StepCall c{reinterpret_cast<int64_t*>(ids), reinterpret_cast<int64_t*>(slots), n, reinterpret_cast<void*>(logits),
                   reinterpret_cast<uint8_t*>(masks)};
        check_call(s, c);
        py::gil_scoped_release release;
        kernels().step(s, c, threads);
      });
  m.def("sample", [](uintptr_t logits, int64_t n, int64_t V, uintptr_t allowed, int64_t situations, uintptr_t situation, uintptr_t seen,
                     uintptr_t banned, uintptr_t penalty, uintptr_t adjust, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p,
                     uintptr_t min_p, uintptr_t noise, uintptr_t chosen, int) {
    auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };
    auto flags = [](uintptr_t p) { return reinterpret_cast<uint8_t*>(p); };
    auto numbers = [](uintptr_t p) { return reinterpret_cast<int64_t*>(p); };
    for (int64_t b = 0; b < n; ++b) {
      int64_t s = numbers(situation)[b];
      if (s < 0 || s >= situations) throw std::invalid_argument("situation must be a row of allowed, got " + std::to_string(s));
    }
    kernels().sample({floats(logits), n, V, flags(allowed), numbers(situation), flags(seen), flags(banned), floats(penalty),
                      floats(adjust), floats(temperature), numbers(top_k), floats(top_p), floats(min_p),
                      reinterpret_cast<double*>(noise), numbers(chosen)});
  }, py::call_guard<py::gil_scoped_release>());
  m.def("linear", [](py::tuple described, uintptr_t x, int64_t n, uintptr_t y, int threads) {
    Linear a = linear(described, -1);
    py::gil_scoped_release release;
    kernels().linear(a, reinterpret_cast<float*>(x), n, reinterpret_cast<float*>(y), threads);
  });
}

}  // namespace hnet
