// Boundary compaction: mask -> chunk_index, chunk_start, cu_chunks, with an optional budget.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace hnet {

// Keeps the `budget` boundaries with the highest probability (ties: the earlier one); first positions always stay.
static void drop_past_budget(const Compact& a) {
  std::vector<int32_t> optional;
  int64_t total = 0;
  for (int64_t n = 0; n < a.N; ++n) {
    for (int64_t t = a.cu_seqlens[n]; t < a.cu_seqlens[n + 1]; ++t) {
      if (!a.mask[t]) continue;
      ++total;
      if (t > a.cu_seqlens[n]) optional.push_back(int32_t(t));
    }
  }
  int64_t drop = std::max<int64_t>(0, total - a.budget);
  *a.num_dropped = int32_t(drop);
  if (drop == 0) return;
  int64_t keep = int64_t(optional.size()) - drop;
  std::nth_element(optional.begin(), optional.begin() + keep, optional.end(), [&](int32_t x, int32_t y) {
    return a.prob[x] != a.prob[y] ? a.prob[x] > a.prob[y] : x < y;
  });
  for (auto it = optional.begin() + keep; it != optional.end(); ++it) {
    a.mask[*it] = 0;
    a.selected[*it] = 1.f - a.prob[*it];
  }
}

int64_t compact(const Compact& a) {
  *a.num_dropped = 0;
  if (a.budget >= 0) drop_past_budget(a);
  int32_t count = 0;
  int64_t t = 0;
  a.cu_chunks[0] = 0;
  for (int64_t n = 0; n < a.N; ++n) {
    double sum = 0., entropy = 0.;
    for (; t < a.cu_seqlens[n + 1]; ++t) {
      count += a.mask[t];
      a.chunk_index[t] = count - 1;
      sum += a.prob[t];
      entropy += a.entropy[t];
    }
    a.cu_chunks[n + 1] = count;
    a.prob_sum[n] = float(sum);
    a.entropy_sum[n] = float(entropy);
  }
  for (; t < a.T; ++t) a.chunk_index[t] = count - 1;
  return count;
}

void fill_chunk_start(const uint8_t* mask, int64_t T, int64_t num_valid, int32_t* chunk_start, int64_t M) {
  int64_t m = 0;
  for (int64_t t = 0; t < T && m < M; ++t) {
    if (mask[t]) chunk_start[m++] = int32_t(t);
  }
  for (; m < M; ++m) chunk_start[m] = int32_t(num_valid);
}

}  // namespace hnet
