// Sorting, compiled once for every instruction set, so that none of them can disagree about an order.
#pragma once

#include <cstdint>

namespace asyncopd {

void sort_descending(uint64_t* keys, int64_t n);
void sort_ascending(uint64_t* keys, int64_t n);

}  // namespace asyncopd
