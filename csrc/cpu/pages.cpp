#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>

#include <cstdio>
#endif

namespace asyncopd {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Bytes of free memory that huge pages can be made of as it lies. /proc/buddyinfo has a line for every zone, with the
// number of free blocks of 2^0, 2^1, .. pages of 4 KiB; a huge page is 2^9 of them.
int64_t free_as_huge_pages() {
  std::FILE* file = std::fopen("/proc/buddyinfo", "r");
  if (file == nullptr) return 0;
  int64_t bytes = 0;
  int node = 0;
  char zone[32];
  while (std::fscanf(file, " Node %d, zone %31s", &node, zone) == 2) {
    long long blocks = 0;
    for (int order = 0; std::fscanf(file, "%lld", &blocks) == 1; ++order) {
      if (order >= 9) bytes += static_cast<int64_t>(blocks) * (kHugePage << (order - 9));
    }
  }
  std::fclose(file);
  return bytes;
}

}  // namespace
#endif

void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // From this size on malloc takes memory from the system and gives it back when it is freed, so that the advice does
  // not outlive the buffer.
  constexpr int64_t kSmallest = int64_t{32} << 20;
  // Others take memory meanwhile.
  constexpr int64_t kSpare = 2;
  if (bytes < kSmallest || free_as_huge_pages() < kSpare * bytes) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace asyncopd
