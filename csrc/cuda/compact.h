// From boundary codes to chunks, inside the launch that made them.
//
// Block b of the grid owns the positions [begin, end) of its segment. It counts its boundaries, a grid barrier publishes
// the counts, and the sum over the blocks before it says where its chunks begin. With more boundaries than the budget
// two histograms of 12 bits find the probability below which they are dropped (three more barriers; every block comes to
// the same threshold by itself). Counts are integers and float sums have a fixed order: the same bits every time.
//
// Not a decoupled look-back: its status words would have to be reset before every launch, and a budget needs barriers
// anyway. The launch is cooperative, so all blocks are on the device and the barrier is the driver's.
#pragma once

#include "cuda/device.h"

namespace hnet::cuda {

constexpr int kOrdinary = 1, kFirst = 2;  // codes; 0 is no boundary
constexpr int kHalf = 0x3F000000;         // bits of 0.5: boundaries have 1 .. 2^23 above it

struct Segment {
  int64_t size, begin, end;
};

struct Totals {  // over positions
  float prob, entropy;
};

// -p ln p - (1 - p) ln(1 - p). The smaller of p and 1 - p is exact, and the larger follows from it.
__device__ inline float entropy(float p) {
  float m = p < 0.5f ? p : 1.0f - p;
  return m <= 0.0f ? 0.0f : -fmaf(m, logf(m), (1.0f - m) * log1pf(-m));  // keeps NaN
}

__device__ inline void add(Totals& sum, Totals x) { sum.prob += x.prob, sum.entropy += x.entropy; }
__device__ inline void add(Totals& sum, float p) { add(sum, Totals{p, entropy(p)}); }

struct Shared {
  int part[kWarps];
  int first[kWarps], ordinary[kWarps];
  Totals head[kWarps], tail[kWarps];
  int histogram[kBins];
  int bin, above;
};

// What blocks tell each other, one number of each kind per block, and the two histograms of all.
struct Board {
  int32_t *first, *ordinary;  // boundaries of the segment
  int32_t *kept, *tied;       // of those: above the threshold, equal to it (written only if some are dropped)
  Totals* head;               // over positions of a sequence begun before the segment
  Totals* tail;               // ... of one begun in it that goes on after it
  int32_t *high, *low;        // (kBins,) each
};

struct Threshold {
  int key;   // boundaries with a larger key stay
  int ties;  // as do the first so many that have this key
};

__device__ inline Segment my_segment(int64_t T) {
  int64_t size = (T + gridDim.x - 1) / gridDim.x, begin = size * blockIdx.x;
  return {size, begin < T ? begin : T, begin + size < T ? begin + size : T};
}

__device__ inline Board board(int32_t* scratch) {
  auto row = [&](int i) { return scratch + i * kMaxBlocks; };
  auto totals = [&](int i) { return reinterpret_cast<Totals*>(row(i)); };
  return {row(0), row(1), row(2), row(3), totals(4), totals(6), row(8), row(8) + kBins};
}

__device__ inline int64_t grid_thread() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t grid_threads() { return int64_t(gridDim.x) * kThreads; }

__device__ inline int key_of(float p) { return __float_as_int(p) - kHalf; }

// The largest bin b with at least `wanted` >= 1 entries in bins >= b -> sh.bin, and how many lie above it -> sh.above.
__device__ inline void rank_from_the_top(const int32_t* histogram, int wanted, Shared& sh) {
  constexpr int kMine = kBins / kThreads;  // bins of a thread, from the top down
  const int top = kBins - 1 - int(threadIdx.x) * kMine;
  int mine = 0, all;
  for (int i = 0; i < kMine; ++i) mine += histogram[top - i];
  int above = block_inclusive_scan(mine, sh.part, &all) - mine;
  if (above < wanted && wanted <= above + mine) {
    int b = top;
    for (; above + histogram[b] < wanted; --b) above += histogram[b];
    sh.bin = b;
    sh.above = above;
  }
  __syncthreads();
}

// Adds the block's ordinary boundaries to a histogram of all blocks. bin(key) < 0: not counted.
template <class Bin>
__device__ void add_to_histogram(const RouteFwd& a, Segment seg, int32_t* histogram, Shared& sh, Bin bin) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) sh.histogram[i] = 0;
  __syncthreads();
  for (int64_t t = seg.begin + threadIdx.x; t < seg.end; t += kThreads) {
    int b = a.mask[t] == kOrdinary ? bin(key_of(a.prob[t])) : -1;
    if (b >= 0) atomicAdd(&sh.histogram[b], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (sh.histogram[i] != 0) atomicAdd(&histogram[i], sh.histogram[i]);
  }
}

// The threshold that leaves `keep` ordinary boundaries, of which there are more. Two grid barriers.
__device__ inline Threshold threshold_for(const RouteFwd& a, Segment seg, Board all, int keep, Shared& sh) {
  add_to_histogram(a, seg, all.high, sh, [](int key) { return key >> 12; });
  grid_barrier();
  int high = 0, above = 0;
  if (keep > 0) {
    rank_from_the_top(all.high, keep, sh);
    high = sh.bin, above = sh.above;
  }
  add_to_histogram(a, seg, all.low, sh, [=](int key) { return (key >> 12) == high ? key & (kBins - 1) : -1; });
  grid_barrier();
  if (keep <= 0) return {0x7FFFFFFF, 0};  // first positions fill the budget
  rank_from_the_top(all.low, keep - above, sh);
  return {high * kBins + sh.bin, keep - above - sh.above};
}

// Mask, selected probability, chunk_index and chunk_start of the segment, given the chunks and equals before it.
__device__ inline void write_segment(const RouteFwd& a, Segment seg, Threshold limit, int kept, int tied, Shared& sh) {
  for (int64_t t0 = seg.begin; t0 < seg.end; t0 += kThreads) {
    const int64_t t = t0 + threadIdx.x;
    const bool on = t < seg.end;
    const int code = on ? a.mask[t] : 0;
    const float p = on ? a.prob[t] : 0.0f;
    const bool sure = code == kFirst || (code == kOrdinary && key_of(p) > limit.key);
    const bool equal = code == kOrdinary && key_of(p) == limit.key;
    int total;  // both counts in one scan: a tile has fewer than 2^16 positions
    const int scan = block_inclusive_scan((sure ? 1 : 0) + (equal ? 1 << 16 : 0), sh.part, &total);
    const int equals = tied + (scan >> 16);  // up to and with t
    const bool keep = sure || (equal && equals <= limit.ties);
    const int index = kept + (scan & 0xFFFF) + (equals < limit.ties ? equals : limit.ties) - 1;
    if (on) {
      a.mask[t] = keep;
      a.selected[t] = keep ? p : 1.0f - p;
      a.chunk_index[t] = index;
      if (keep) a.chunk_start[index] = int32_t(t);
    }
    kept += total & 0xFFFF;
    tied += total >> 16;
  }
}

// cu_chunks of the edges in the segment: a sequence begins with a chunk, whose index is the number of chunks before it.
__device__ inline void write_edges(const RouteFwd& a, Segment seg, int64_t valid, int chunks) {
  __syncthreads();  // chunk_index of this segment is written
  int64_t n = 0, last = a.N + 1;
  if (a.N > 4 * kThreads) {
    n = lower_bound(a.cu_seqlens, last, seg.begin);
    last = lower_bound(a.cu_seqlens, last, seg.end);
  }
  for (n += threadIdx.x; n < last; n += kThreads) {
    int64_t edge = a.cu_seqlens[n];
    if (edge >= seg.begin && edge < seg.end && edge < valid) a.cu_chunks[n] = a.chunk_index[edge];
  }
  for (n = grid_thread(); n <= a.N; n += grid_threads()) {  // the end, and empty sequences there
    if (a.cu_seqlens[n] >= valid) a.cu_chunks[n] = chunks;
  }
}

// Totals of each sequence, one warp each: of what it reads if it lies in one segment, else of the blocks' parts.
__device__ inline void write_sums(const RouteFwd& a, Segment seg, Board all) {
  for (int64_t n = grid_thread() / 32; n < a.N; n += grid_threads() / 32) {
    const int64_t begin = a.cu_seqlens[n], end = a.cu_seqlens[n + 1];
    Totals sum{0.0f, 0.0f};
    if (begin >= 0 && begin < end && end <= a.T) {
      const int64_t b = begin / seg.size;
      if (end <= (b + 1) * seg.size) {
        for (int64_t t = begin + lane(); t < end; t += 32) add(sum, a.prob[t]);
      } else {
        if (lane() == 0) sum = all.tail[b];
        for (int64_t i = b + 1 + lane(); i <= (end - 1) / seg.size; i += 32) add(sum, all.head[i]);
      }
    }
    sum = {warp_sum(sum.prob), warp_sum(sum.entropy)};
    if (lane() == 0) a.prob_sum[n] = sum.prob, a.entropy_sum[n] = sum.entropy;
  }
}

// After every block has written its codes (in mask), probabilities and its numbers on the board, and set both
// histograms to zero if there is a budget.
__device__ inline void compact(const RouteFwd& a, Segment seg, Board all, Shared& sh) {
  grid_barrier();
  const int blocks = gridDim.x, me = blockIdx.x;
  int before = 0, firsts = 0, total = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) {
    int both = all.first[i] + all.ordinary[i];
    before += i < me ? both : 0;
    firsts += all.first[i];
    total += both;
  }
  before = block_sum(before, sh.part);
  firsts = block_sum(firsts, sh.part);
  total = block_sum(total, sh.part);

  Threshold limit{0, 0};  // keeps all
  int tied = 0;
  const bool overflow = a.budget >= 0 && total > a.budget;  // the same in every block
  if (overflow) {
    limit = threshold_for(a, seg, all, int(a.budget) - firsts, sh);
    int kept = 0, equal = 0;
    for (int64_t t = seg.begin + threadIdx.x; t < seg.end; t += kThreads) {
      int code = a.mask[t], key = key_of(a.prob[t]);
      kept += code == kFirst || (code == kOrdinary && key > limit.key);
      equal += code == kOrdinary && key == limit.key;
    }
    kept = block_sum(kept, sh.part);
    equal = block_sum(equal, sh.part);
    if (threadIdx.x == 0) all.kept[me] = kept, all.tied[me] = equal;
    grid_barrier();
    before = 0;
    for (int i = threadIdx.x; i < me; i += kThreads) before += all.kept[i], tied += all.tied[i];
    before = block_sum(before, sh.part);
    tied = block_sum(tied, sh.part);
  }
  write_segment(a, seg, limit, before, tied, sh);

  const int64_t valid = a.cu_seqlens[a.N];
  const int chunks = overflow ? int(a.budget) : total;
  write_edges(a, seg, valid, chunks);
  write_sums(a, seg, all);
  for (int64_t i = chunks + grid_thread(); i < a.budget; i += grid_threads()) a.chunk_start[i] = int32_t(valid);  // rows no chunk fills
  if (grid_thread() == 0) *a.num_dropped = total - chunks;
}

}  // namespace hnet::cuda
