// The k largest of some values and their order. Included once per instruction set, after numeric.inl; see isa.h.
//
// A comparison sort of the 64 best of a row mispredicts a branch at every third comparison, which took 80 % of top-K at
// V = 540. Here nothing branches on the data: the bound between the k largest and the rest is found by bisection, each
// step of which counts values, and the place of a value is the number of those that are larger. All of it is integer
// arithmetic, so that every instruction set finds the same.

constexpr int kCountLanes = 16;  // counts side by side: one AVX-512 register, or four of SSE
constexpr int kRankLanes = 32;   // values whose places are counted together
constexpr int64_t kRanked = 256;  // the largest number of values for which counting is faster than a sort
constexpr int64_t kSelectPad = 64;  // elements behind the values that the functions below may overwrite
constexpr int32_t kNone = std::numeric_limits<int32_t>::min();  // below the order_bits of every float

// Integers in the order of the values, -0 like +0. The value is not NaN.
ASYNCOPD_INLINE int32_t order_bits(float value) {
  const auto bits = static_cast<int32_t>(to_bits(value + 0.0f));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

ASYNCOPD_INLINE float value_of_bits(int32_t bits) {
  return from_bits(static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff)));
}

// Fills up values [n] to a multiple of `lanes`.
ASYNCOPD_INLINE int64_t pad_values(int32_t* values, int64_t n, int lanes) {
  const int64_t padded = (n + lanes - 1) / lanes * lanes;
  for (int64_t i = n; i < padded; ++i) values[i] = kNone;
  return padded;
}

// How many of `padded` values are at least `bound`.
ASYNCOPD_INLINE int64_t count_at_least(const int32_t* values, int64_t padded, int32_t bound) {
  int32_t lanes[kCountLanes];
  for (int l = 0; l < kCountLanes; ++l) lanes[l] = 0;
  for (int64_t i = 0; i < padded; i += kCountLanes) {
    for (int l = 0; l < kCountLanes; ++l) lanes[l] += values[i + l] >= bound ? 1 : 0;
  }
#pragma GCC unroll 4
  for (int half = kCountLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// A bound that exactly k of the n values reach, or, if equal values allow none, the k-th largest. 1 <= k <= n.
inline int32_t split_largest(int32_t* values, int64_t n, int64_t k) {
  const int64_t padded = pad_values(values, n, kCountLanes);
  int32_t least[kCountLanes], most[kCountLanes];
  for (int l = 0; l < kCountLanes; ++l) least[l] = std::numeric_limits<int32_t>::max(), most[l] = kNone;
  for (int64_t i = 0; i < padded; i += kCountLanes) {
    for (int l = 0; l < kCountLanes; ++l) {
      const int32_t value = values[i + l];
      most[l] = value > most[l] ? value : most[l];
      const int32_t present = value == kNone ? std::numeric_limits<int32_t>::max() : value;
      least[l] = present < least[l] ? present : least[l];
    }
  }
  int64_t low = least[0], high = most[0];
  for (int l = 1; l < kCountLanes; ++l) {
    low = least[l] < low ? least[l] : low;
    high = most[l] > high ? most[l] : high;
  }
  if (k == n) return static_cast<int32_t>(low);
  // At least k values reach `low`, fewer reach `high`.
  for (++high; high - low > 1;) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t count = count_at_least(values, padded, static_cast<int32_t>(middle));
    if (count == k) return static_cast<int32_t>(middle);
    low = count > k ? middle : low;
    high = count > k ? high : middle;
  }
  return static_cast<int32_t>(low);
}

// Moves the k largest of n values, the first ones among equals, and their ids to the front, in the order they are in.
// Returns a bound that they all reach.
inline int32_t keep_largest(int32_t* values, uint32_t* ids, int64_t n, int64_t k) {
  const int32_t bound = split_largest(values, n, k);
  const int64_t padded = pad_values(values, n, kCountLanes);
  int64_t equal = k - count_at_least(values, padded, bound + 1);
  for (int64_t i = 0, kept = 0; i < n; ++i) {
    const bool is_equal = values[i] == bound;
    const bool keep = values[i] > bound || (is_equal && equal > 0);
    equal -= is_equal ? 1 : 0;
    values[kept] = values[i];
    ids[kept] = ids[i];
    kept += keep ? 1 : 0;
  }
  return bound;
}

// Writes the ids of n values, which come in ascending order, by value descending and among equals by id ascending.
// keys: room for n.
inline void write_by_value(int32_t* values, const uint32_t* ids, int64_t n, uint64_t* keys, int64_t* out) {
  if (n > kRanked) {
    for (int64_t i = 0; i < n; ++i) {
      keys[i] = static_cast<uint64_t>(static_cast<uint32_t>(values[i]) ^ 0x80000000u) << 32 | (0xffffffffu - ids[i]);
    }
    sort_descending(keys, n);
    for (int64_t i = 0; i < n; ++i) out[i] = 0xffffffffu - static_cast<uint32_t>(keys[i]);
    return;
  }
  pad_values(values, n, kRankLanes);
  int32_t larger[kRanked];
  int16_t taken[kRanked];
  for (int64_t first = 0; first < n; first += kRankLanes) {
    int32_t lanes[kRankLanes];
    for (int l = 0; l < kRankLanes; ++l) lanes[l] = 0;
    for (int64_t j = 0; j < n; ++j) {
      for (int l = 0; l < kRankLanes; ++l) lanes[l] += values[j] > values[first + l] ? 1 : 0;
    }
    for (int l = 0; l < kRankLanes; ++l) larger[first + l] = lanes[l];
  }
  for (int64_t i = 0; i < n; ++i) taken[i] = 0;
  for (int64_t i = 0; i < n; ++i) out[larger[i] + taken[larger[i]]++] = ids[i];
}
