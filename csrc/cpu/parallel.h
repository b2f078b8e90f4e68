// Rows over threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace asyncopd {

// Calls body(begin, end) on consecutive ranges that cover [0, rows), from at most `threads` threads. The ranges are
// small and handed out on demand, so that a core that is busy with something else does not hold the others up.
// Without OpenMP (see setup.py) everything runs on the caller's thread.
template <typename Body>
void parallel_rows(int64_t rows, int64_t row_elements, int threads, const Body& body) {
  // About 20 microseconds of streaming: well above what waking a thread costs.
  constexpr int64_t kRangeElements = 1 << 16;
  const int64_t range = std::max<int64_t>(1, kRangeElements / std::max<int64_t>(1, row_elements));
  const int64_t ranges = (rows + range - 1) / range;
  const int team = static_cast<int>(std::min<int64_t>(threads, ranges));
  if (team <= 1) {
    body(0, rows);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t i = 0; i < ranges; ++i) body(i * range, std::min(rows, (i + 1) * range));
#else
  body(0, rows);
#endif
}

}  // namespace asyncopd
