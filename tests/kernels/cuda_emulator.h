// Runs the kernels of csrc/cuda on a CPU, to test what they compute and where they wait. Takes the place of the CUDA half
// of csrc/cuda/device.h.
//
// Every CUDA thread is a fiber. Barriers and shuffles switch fibers. Mostly the one that became runnable last goes next,
// so some run far ahead of others, and now and then any: results that depend on an order, and barriers that not everybody
// reaches, come to light. What it cannot show: races
// between two barriers that only true concurrency or the GPU's memory model make visible, and speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda/kernels.h"

#define __device__
#define __global__
#define __launch_bounds__(...)
#define HNET_SHARED(type, name) type& name = emulator::shared<type>()
#define threadIdx (emulator::self->thread)
#define blockIdx (emulator::self->block)
#define gridDim (emulator::grid->size)

struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

struct Dim {
  unsigned x, y;
};

struct Fiber {
  Dim thread, block;
  int group;  // its block among those that run together
  jmp_buf here;
  bool started = false;
  std::unique_ptr<char[]> stack;
};

struct Barrier {
  size_t expected = 0;
  std::vector<Fiber*> waiting;
};

struct Grid {
  Dim size;
  std::function<void()> body;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> runnable;
  std::vector<Barrier> warps, blocks;
  Barrier all;
  std::vector<uint32_t> slots;                // one per lane, for shuffles
  std::vector<std::vector<char>> shared;      // one per block
  size_t done = 0;
  ucontext_t entry;
  jmp_buf scheduler;
};

inline Grid* grid = nullptr;
inline Fiber* self = nullptr;
inline std::mt19937 order{0};
inline int64_t resident = 3;  // blocks that a cooperative launch can have
constexpr size_t kStack = 64 << 10;

inline void run_fiber() {
  grid->body();
  ++grid->done;
  _longjmp(grid->scheduler, 1);
}

inline void schedule() {
  _setjmp(grid->scheduler);
  if (grid->runnable.empty()) return;
  auto& ready = grid->runnable;
  if (order() % 8 == 0) std::swap(ready[order() % ready.size()], ready.back());
  self = ready.back();
  ready.pop_back();
  if (self->started) _longjmp(self->here, 1);
  self->started = true;
  self->stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = self->stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

inline void wait(Barrier& b) {
  b.waiting.push_back(self);
  if (b.waiting.size() == b.expected) {
    grid->runnable.insert(grid->runnable.end(), b.waiting.begin(), b.waiting.end());
    b.waiting.clear();
  }
  if (_setjmp(self->here) == 0) _longjmp(grid->scheduler, 1);
}

inline size_t lane_slot() { return self - grid->fibers.data(); }
inline Barrier& my_warp() { return grid->warps[lane_slot() / 32]; }

template <class T>
T& shared() {
  auto& memory = grid->shared[self->group];
  if (memory.empty()) memory.assign(sizeof(T), char(0xA5));
  return *reinterpret_cast<T*>(memory.data());
}

template <class T>
T shuffle(T x, size_t from) {
  static_assert(sizeof(T) == 4, "32-bit values");
  std::memcpy(&grid->slots[lane_slot()], &x, 4);
  wait(my_warp());
  std::memcpy(&x, &grid->slots[lane_slot() / 32 * 32 + from], 4);
  wait(my_warp());
  return x;
}

// Blocks first .. first + count - 1, at the same time.
inline void run(std::function<void()> body, Dim size, int64_t first, int64_t count, int threads) {
  Grid g;
  g.size = size, g.body = std::move(body);
  g.fibers = std::vector<Fiber>(count * threads);
  g.slots.resize(count * threads);
  g.warps.resize(count * threads / 32), g.blocks.resize(count), g.shared.resize(count);
  g.all.expected = count * threads;
  for (auto& w : g.warps) w.expected = 32;
  for (auto& b : g.blocks) b.expected = threads;
  for (int64_t i = 0; i < count * threads; ++i) {
    unsigned block = unsigned(first + i / threads);
    g.fibers[i].thread = {unsigned(i % threads), 0};
    g.fibers[i].block = {block % size.x, block / size.x};
    g.fibers[i].group = int(i / threads);
    g.runnable.push_back(&g.fibers[i]);
  }
  grid = &g;
  schedule();
  grid = nullptr;
  if (g.done != g.fibers.size()) throw std::runtime_error("deadlock: a barrier that not every thread reaches");
}

}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::shuffle(x, (emulator::lane_slot() % 32) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int by) {
  size_t lane = emulator::lane_slot() % 32;
  return emulator::shuffle(x, lane < size_t(by) ? lane : lane - by);
}
inline void __syncthreads() { emulator::wait(emulator::grid->blocks[emulator::self->group]); }
inline int atomicAdd(int* to, int x) { return std::exchange(*to, *to + x); }
inline int __float_as_int(float x) {
  int i;
  std::memcpy(&i, &x, 4);
  return i;
}

namespace hnet::cuda {

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return float(x); }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void store(float* to, float x) { *to = x; }
inline void store(f16* to, float x) { *to = f16(x); }
inline void store(bf16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = std::isnan(x) ? 0x7FC0 : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint4 load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) throw std::runtime_error("misaligned 16-byte read");
  return *static_cast<const uint4*>(p);
}

inline void grid_barrier() {
  if (emulator::grid->all.expected != size_t(emulator::grid->size.x) * emulator::grid->size.y * emulator::grid->blocks[0].expected) {
    throw std::runtime_error("grid_barrier outside a cooperative launch");
  }
  emulator::wait(emulator::grid->all);
}

template <class Args>
using Kernel = void (*)(Args);

template <class Args>
void launch(Kernel<Args> kernel, Args args, int64_t blocks_x, int64_t blocks_y, int threads, Where) {
  emulator::Dim size{unsigned(blocks_x), unsigned(blocks_y)};
  for (int64_t b = 0; b < blocks_x * blocks_y; ++b) emulator::run([=] { kernel(args); }, size, b, 1, threads);
}

template <class Args>
void launch_cooperative(Kernel<Args> kernel, Args args, int64_t wanted, int threads, Where) {
  int64_t blocks = std::min(wanted, emulator::resident);
  emulator::run([=] { kernel(args); }, {unsigned(blocks), 1}, 0, blocks, threads);
}

}  // namespace hnet::cuda
