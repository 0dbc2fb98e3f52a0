// Which entries of an index name the same row: a counting sort.
#include <vector>

#include "kernels.h"

namespace hnet {

int64_t group_rows(const int64_t* index, const float* scale, int64_t n, int64_t R, int64_t* order, int64_t* rows, int64_t* begin) {
  std::vector<int64_t> place(R, 0);
  auto read = [&](int64_t i) { return !scale || scale[i] != 0.f; };
  for (int64_t i = 0; i < n; ++i) place[index[i]] += read(i);
  int64_t U = 0, used = 0;
  for (int64_t r = 0; r < R; ++r) {
    if (!place[r]) continue;
    rows[U] = r, begin[U++] = used;
    used += place[r], place[r] = used - place[r];
  }
  begin[U] = used;
  for (int64_t i = 0; i < n; ++i) {
    if (read(i)) order[place[index[i]]++] = i;
  }
  return U;
}

}  // namespace hnet
