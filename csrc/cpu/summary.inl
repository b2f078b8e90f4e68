// The row summary: per group of kGroup columns the largest logit and the sum of exponentials measured from it, in one
// streaming pass. Included once per instruction set; see isa.h for the rules.
//
// From it come LSE, the exact top K and exact samples, each by re-reading the few groups that matter. A group is
// measured from its own maximum, so no group underflows because another one is large: what is left of a row after its
// head is taken away keeps its full precision.
//
// Accuracy. fp32 inside a group (64 terms, added as a tree, the largest of them exactly 1), fp64 across groups. One
// float for t log2(e) is enough: off by a share of 6e-8 at most, it moves log S of a group's sum S by 6e-8 E, where E,
// the mean of |x t| under the group's own softmax, is at most log(kGroup): log S + E is the entropy of 64 terms.

#include "numeric.inl"

constexpr int kGroup = 64;        // columns; 256 bytes of fp32
constexpr int kLanes = 16;        // independent partial results of a group: one AVX-512 register, or four of SSE
constexpr int kBlockGroups = 16;  // 4 KiB of fp32 stay in L1 between the maxima and the exponentials
constexpr int kBlock = kGroup * kBlockGroups;
constexpr float kInf = std::numeric_limits<float>::infinity();

// Element [g][l] of `lanes` for all l into out[g]: neighbours are combined until one is left. Overwrites lanes.
template <typename Op>
ASYNCOPD_INLINE void fold_lanes(float* lanes, int groups, float* out, Op op) {
  alignas(64) float half[kBlockGroups * kLanes / 2];
  static_assert(kLanes == 16, "four halvings");
  for (int i = 0; i < groups * 8; ++i) half[i] = op(lanes[2 * i], lanes[2 * i + 1]);
  for (int i = 0; i < groups * 4; ++i) lanes[i] = op(half[2 * i], half[2 * i + 1]);
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

// peaks[g] is the largest logit of group g that is not NaN (-inf if there is none). sums[g] is NaN where the group
// holds a NaN or +inf, 0 where all is -inf, else 1..kGroup.
template <typename Type>
void summarize(const typename Type::Storage* row, int64_t vocab, const Scale& scale, float* peaks, float* sums) {
  alignas(64) float buffer[kBlock];
  alignas(64) float lanes[kBlockGroups * kLanes];
  alignas(64) float origins[kBlockGroups];
  for (int64_t start = 0; start < vocab; start += kBlock, peaks += kBlockGroups, sums += kBlockGroups) {
    const int width = static_cast<int>(vocab - start < kBlock ? vocab - start : kBlock);
    const int groups = (width + kGroup - 1) / kGroup;
    const float* block = load_block<Type>(row + start, width, -kInf, buffer);
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
      const float origin = origins[g];
      for (int l = 0; l < kLanes; ++l) {
        float sum = 0.0f;
        for (int j = 0; j < kGroup; j += kLanes) sum += exp_scaled<true>(block[g * kGroup + j + l] - origin, scale);
        lanes[g * kLanes + l] = sum;
      }
    }
    fold_lanes(lanes, groups, sums, [](float a, float b) { return a + b; });
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
  for (int l = 1; l < kLanes; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
  return lanes[0];
}

// masses[g] = sums[g] exp((peaks[g] - origin) t); NaN where sums[g] is. origin: at least every peak, finite.
inline void group_masses(const float* peaks, const float* sums, int64_t groups, double origin, const Scale& scale,
                         double* masses) {
  const double t = scale.inv_temperature;
  for (int64_t g = 0; g < groups; ++g) masses[g] = sums[g] * exp_double((peaks[g] - origin) * t);
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
