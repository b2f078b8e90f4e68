// Large buffers that are about to be written for the first time.
#pragma once

#include <cstdint>

namespace asyncopd {

// Asks the kernel to back [begin, begin + bytes) with huge pages, where it hands them out on request only and has them:
// a first write costs a page fault, and with pages of 4 KiB those take longer than writing. The sampled head's backward
// with its 622 MB of dW takes 75 ms after this call and 340 ms without it (two busy cores of an EPYC). Where memory is
// in pieces the kernel would move others' pages about to make a huge one, which took 0.4 to 2 s for the same; then it
// is not asked. Advice only: nothing depends on it.
void advise_huge_pages(void* begin, int64_t bytes);

}  // namespace asyncopd
