// Sorting and selecting, compiled once for every instruction set, so that none of them can disagree about an order.
#pragma once

#include <cstdint>
#include <cstring>

namespace asyncopd {

// The k-th largest (k >= 1) of n values without NaN. Reorders them.
float kth_largest(float* values, int64_t n, int64_t k);

// Moves the k largest of n keys to the front, in any order.
void keep_largest(uint64_t* keys, int64_t n, int64_t k);

void sort_descending(uint64_t* keys, int64_t n);
void sort_ascending(uint64_t* keys, int64_t n);

// Larger values first and, among equal ones, smaller ids first is the descending order of these keys. -0 equals +0.
inline uint64_t order_key(float value, int64_t id) {
  value += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

inline int64_t id_of_key(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

}  // namespace asyncopd
