#include "order.h"

#include <algorithm>
#include <functional>

namespace asyncopd {

void sort_descending(uint64_t* keys, int64_t n) { std::sort(keys, keys + n, std::greater<uint64_t>()); }

void sort_ascending(uint64_t* keys, int64_t n) { std::sort(keys, keys + n); }

}  // namespace asyncopd
