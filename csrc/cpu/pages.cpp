#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace asyncopd {

void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // From this size on malloc takes memory from the system and gives it back when it is freed, so that the advice does
  // not outlive the buffer.
  constexpr int64_t kSmallest = int64_t{32} << 20;
  constexpr uintptr_t kPage = 4096;  // the system's own may be larger; it then refuses, which is as good
  if (bytes < kSmallest) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace asyncopd
