// What the kernels share: 16-bit types, reductions over warps and blocks, launches.
//
// Nothing here or in the kernels uses CUDA syntax that a C++ compiler cannot read: tests/kernels/cuda_emulator.h takes the
// place of the CUDA half of this file and runs the kernels on a CPU.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/kernels.h"

#ifdef __CUDACC__

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define HNET_SHARED(type, name) __shared__ type name

namespace hnet::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }
__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(bf16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void store(f16* to, float x) { *to = __float2half_rn(x); }

__device__ inline uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// Every thread of the grid; what was written before is seen by all after. Cooperative launches only.
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

inline void check(cudaError_t e, const char* doing) {
  if (e != cudaSuccess) {
    (void)cudaGetLastError();  // or PyTorch's next check would report it again
    throw std::runtime_error(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(e));
  }
}

// This library has a CUDA runtime of its own, so it is told the device, which the caller has made PyTorch's current one.
inline void choose(int device) { check(cudaSetDevice(device), "choosing the device"); }

template <class Args>
using Kernel = void (*)(Args);

template <class Args>
void launch(Kernel<Args> kernel, Args args, int64_t blocks_x, int64_t blocks_y, int threads, Where at) {
  choose(at.device);
  void* params[] = {&args};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks_x), unsigned(blocks_y)), dim3(threads), params,
                         0, reinterpret_cast<cudaStream_t>(at.stream)),
        "launching a kernel");
}

// Blocks of `kernel` that the whole device can hold at once. Asked once per kernel and device.
inline int resident_blocks(const void* kernel, int threads, int device) {
  static std::mutex lock;
  static std::map<std::pair<const void*, int>, int> known;
  std::lock_guard<std::mutex> hold(lock);
  int& blocks = known[{kernel, device}];
  if (blocks == 0) {
    int per_sm = 0, sms = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, 0), "asking for the occupancy");
    check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
    blocks = per_sm * sms;
  }
  return blocks;
}

// A grid that may use grid_barrier: at most `wanted` blocks, all of them on the device at the same time.
template <class Args>
void launch_cooperative(Kernel<Args> kernel, Args args, int64_t wanted, int threads, Where at) {
  choose(at.device);
  auto* function = reinterpret_cast<const void*>(kernel);
  int64_t resident = resident_blocks(function, threads, at.device);
  void* params[] = {&args};
  check(cudaLaunchCooperativeKernel(function, dim3(unsigned(wanted < resident ? wanted : resident)), dim3(threads), params, 0,
                                    reinterpret_cast<cudaStream_t>(at.stream)),
        "launching a cooperative kernel");
}

}  // namespace hnet::cuda

#else
#include "cuda_emulator.h"
#endif

namespace hnet::cuda {

#ifndef HNET_CUDA_THREADS  // the emulator takes fewer, so that small packs span several blocks
#define HNET_CUDA_THREADS 512
#endif
constexpr int kThreads = HNET_CUDA_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <class T>
__device__ T* as(void* p) {
  return static_cast<T*>(p);
}

__device__ inline int lane() { return int(threadIdx.x) % 32; }
__device__ inline int warp() { return int(threadIdx.x) / 32; }

// The same sum in every lane, in the same order every time.
template <class T>
__device__ T warp_sum(T x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

__device__ inline int warp_inclusive_scan(int x) {
  for (int d = 1; d < 32; d *= 2) {
    int other = __shfl_up_sync(kAllLanes, x, d);
    if (lane() >= d) x += other;
  }
  return x;
}

// Inclusive prefix sum over the threads of a block and its total. `part` is the block's, (kWarps,).
__device__ inline int block_inclusive_scan(int x, int* part, int* total) {
  x = warp_inclusive_scan(x);
  __syncthreads();  // part may still be in use
  if (lane() == 31) part[warp()] = x;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp() ? part[w] : 0;
    all += part[w];
  }
  *total = all;
  return before + x;
}

__device__ inline int block_sum(int x, int* part) {
  int total;
  block_inclusive_scan(x, part, &total);
  return total;
}

// First n in [0, size) with values[n] >= x, else size.
__device__ inline int64_t lower_bound(const int32_t* values, int64_t size, int64_t x) {
  int64_t lo = 0, hi = size;
  while (lo < hi) {
    int64_t mid = (lo + hi) / 2;
    if (values[mid] < x) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

}  // namespace hnet::cuda
