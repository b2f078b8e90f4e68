// The row summary: per group of kGroup columns the largest logit and the sum of exponentials measured from it, in one
// streaming pass. Included once per instruction set; see isa.h for the rules.
//
// From it come LSE, the exact top K and exact samples, each by re-reading the few groups that matter. A group is
// measured from its own maximum, so no group underflows because another one is large: what is left of a row after its
// head is taken away keeps its full precision.
//
// Accuracy. fp32 inside a group (64 terms, added as a tree, the largest of them exactly 1, each off by 1.1e-7 and its
// rounding), fp64 across groups. One
// float for t log2(e) is enough: off by a share of 6e-8 at most, it moves log S of a group's sum S by 6e-8 E, where E,
// the mean of |x t| under the group's own softmax, is at most log(kGroup): log S + E is the entropy of 64 terms.
//
// Speed. Arithmetic binds, not memory: 11.4 cycles per 16 logits on AVX-512 with 512-bit operations at half rate, of
// which 9 are the multiplications and maxima of the exponentials. Prefetching the next block meanwhile hides memory.

#include "numeric.inl"

constexpr int kGroup = 64;        // columns; 256 bytes of fp32
constexpr int kLanes = 16;        // independent partial results of a group: one AVX-512 register, or four of SSE
constexpr int kBlockGroups = 32;  // 8 KiB of fp32 stay in L1 between the maxima and the exponentials
constexpr int kBlock = kGroup * kBlockGroups;
static_assert(kGroup == 4 * kLanes, "sum_of_exp");
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Element [g][l] of `lanes` for all l into out[g]. Overwrites lanes.
template <typename Op>
ASYNCOPD_INLINE void fold_lanes(float* lanes, int groups, float* out, Op op) {
  static_assert(kLanes == 16, "four halvings");
  alignas(64) float half[kBlockGroups * kLanes / 2];
  // Halves first, as long as they are whole vectors of their own: that takes no permutation.
  for (int g = 0; g < groups; ++g) {
    for (int l = 0; l < 8; ++l) half[g * 8 + l] = op(lanes[g * 16 + l], lanes[g * 16 + 8 + l]);
  }
  for (int g = 0; g < groups; ++g) {
    for (int l = 0; l < 4; ++l) lanes[g * 4 + l] = op(half[g * 8 + l], half[g * 8 + 4 + l]);
  }
  for (int i = 0; i < groups * 2; ++i) half[i] = op(lanes[2 * i], lanes[2 * i + 1]);
  for (int i = 0; i < groups; ++i) out[i] = op(half[2 * i], half[2 * i + 1]);
}

// `width` logits as fp32, padded with `pad` to whole groups: the row itself where that will do.
template <typename Type>
ASYNCOPD_INLINE const float* load_block(const typename Type::Storage* source, int width, float pad, float* buffer) {
  const int padded = (width + kGroup - 1) / kGroup * kGroup;
  if constexpr (sizeof(typename Type::Storage) == sizeof(float)) {
    if (width == padded) return source;
  }
  for (int v = 0; v < width; ++v) buffer[v] = Type::load(source[v]);
  for (int v = width; v < padded; ++v) buffer[v] = pad;
  return buffer;
}

// `groups` groups of a block, whose columns take `bytes` in memory; the next block's begin at `next`.
ASYNCOPD_INLINE void summarize_block(const float* block, int groups, const Scale& scale, const char* next, int bytes,
                                     float* peaks, float* sums) {
  alignas(64) float lanes[kBlockGroups * kLanes];
  alignas(64) float origins[kBlockGroups];
  for (int g = 0; g < groups; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      float peak = -kInf;
      for (int j = 0; j < kGroup; j += kLanes) {
        const float z = block[g * kGroup + j + l];
        peak = z > peak ? z : peak;  // a NaN never wins; it shows up in the sum
      }
      lanes[g * kLanes + l] = peak;
    }
  }
  fold_lanes(lanes, groups, peaks, [](float a, float b) { return a > b ? a : b; });
  for (int g = 0; g < groups; ++g) origins[g] = peaks[g] == -kInf ? 0.0f : peaks[g];
  for (int g = 0; g < groups; ++g) {
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(next + g * bytes + line);
    const float* z = block + g * kGroup;
    for (int l = 0; l < kLanes; ++l) lanes[g * kLanes + l] = sum_of_exp<false, kLanes>(z + l, origins[g], scale);
  }
  fold_lanes(lanes, groups, sums, [](float a, float b) { return a + b; });
}

// peaks[g] is the largest logit of group g that is not NaN (-inf if there is none). sums[g] is NaN where the group
// holds a NaN or +inf, next to 0 where all is -inf, else 1..kGroup.
template <typename Type>
void summarize(const typename Type::Storage* row, int64_t vocab, const Scale& scale, float* peaks, float* sums) {
  constexpr int kBytes = kGroup * sizeof(typename Type::Storage);
  alignas(64) float buffer[kBlock];
  for (int64_t start = 0; start < vocab; start += kBlock, peaks += kBlockGroups, sums += kBlockGroups) {
    const int width = static_cast<int>(vocab - start < kBlock ? vocab - start : kBlock);
    const float* block = load_block<Type>(row + start, width, -kInf, buffer);
    // After the last block what follows the row is prefetched: the next row, as a rule.
    const char* next = reinterpret_cast<const char*>(row + start + width);
    if (width == kBlock) {  // a constant number of groups leaves no loop conditions
      summarize_block(block, kBlockGroups, scale, next, kBytes, peaks, sums);
    } else {
      summarize_block(block, (width + kGroup - 1) / kGroup, scale, next, kBytes, peaks, sums);
    }
  }
}

ASYNCOPD_INLINE float largest(const float* values, int64_t n) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -kInf;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = values[i + l] > lanes[l] ? values[i + l] : lanes[l];
  }
  for (int l = 0; l < static_cast<int>(n - i); ++l) lanes[l] = values[i + l] > lanes[l] ? values[i + l] : lanes[l];
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
  }
  return lanes[0];
}

// masses[g] = sums[g] exp((peaks[g] - origin) t); NaN where sums[g] is. origin: at least every peak, finite. In fp32, as
// the sums are: off by 1e-7 and, from the subtraction, up to 6e-8 |x t|, which again is little where there is mass. What
// counts as 0, below 2^-125, is far below the rounding of the largest mass.
ASYNCOPD_INLINE void group_masses(const float* peaks, const float* sums, int64_t groups, float origin,
                                  const Scale& scale, double* masses) {
  for (int64_t g = 0; g < groups; ++g) masses[g] = static_cast<double>(sums[g]) * exp_scaled(peaks[g] - origin, scale);
}

ASYNCOPD_INLINE bool any_nan(const float* values, int64_t n) {
  int count = 0;
  for (int64_t i = 0; i < n; ++i) count += values[i] != values[i];
  return count > 0;
}

// Eight partial sums: one of them alone would be a chain of additions, each waiting for the one before.
ASYNCOPD_INLINE double sum_of(const double* values, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += values[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += values[i];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// How many logits of a row are NaN or +inf; looked for only where a sum says that there are some.
struct Irregular {
  int64_t nan = 0, inf = 0;
};

template <typename Type>
Irregular count_irregular(const typename Type::Storage* row, int64_t vocab, const float* sums, int64_t groups) {
  Irregular count;
  for (int64_t g = 0; g < groups; ++g) {
    if (!std::isnan(sums[g])) continue;
    const int64_t end = (g + 1) * kGroup < vocab ? (g + 1) * kGroup : vocab;
    for (int64_t v = g * kGroup; v < end; ++v) {
      const float z = Type::load(row[v]);
      count.nan += std::isnan(z);
      count.inf += z == kInf;
    }
  }
  return count;
}
