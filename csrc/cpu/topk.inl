// The exact K largest logits of a row from its summary. Included once per instruction set; see isa.h.
//
// A partition of the columns into classes gives a lower bound on the K-th largest logit: the K-th largest of the
// classes' maxima, each of which is a logit of its own. With 4 K classes or more it is a tight one: little more than K
// logits reach it, and only groups whose maximum reaches it are read again.
//
// The candidates go into a buffer of a few K. When it is full the K best stay, and from then on only larger logits
// count (ids come in ascending order, so an equal one would lose). So a row of equal logits costs no more than one
// pass, and a rising one no more than linear time.

#include "summary.inl"
#include "select.inl"

// A value that at least k of n values reach, none of which is NaN. bits: room for them and kSelectPad.
ASYNCOPD_INLINE float bound_of_largest(const float* values, int64_t n, int64_t k, int32_t* bits) {
  for (int64_t i = 0; i < n; ++i) bits[i] = order_bits(values[i]);
  return value_of_bits(split_largest(bits, n, k));
}

// A value that at least k logits reach, if the row holds k that are not NaN. classes: 4 k + kGroup floats. bits: as many
// and kSelectPad.
template <typename Type>
float top_threshold(const typename Type::Storage* row, int64_t vocab, const float* peaks, int64_t groups, int64_t k,
                    float* classes, int32_t* bits) {
  if (groups >= 2 * k) {
    // Group g is in class g modulo their number.
    const int64_t n = groups < 4 * k ? groups : 4 * k;
    for (int64_t c = 0; c < n; ++c) classes[c] = peaks[c];
    for (int64_t start = n; start < groups; start += n) {
      const int64_t count = groups - start < n ? groups - start : n;
      for (int64_t c = 0; c < count; ++c) {
        classes[c] = peaks[start + c] > classes[c] ? peaks[start + c] : classes[c];
      }
    }
    return bound_of_largest(classes, n, k, bits);
  }
  // Short rows: column v is in class v modulo their number.
  const int64_t n = (2 * k + kGroup - 1) / kGroup * kGroup;
  if (n > groups * (kGroup / 2)) return -kInf;
  for (int64_t c = 0; c < n; ++c) classes[c] = -kInf;
  alignas(64) float buffer[kGroup];
  float* lanes = classes;
  for (int64_t start = 0; start < vocab; start += kGroup) {
    const int width = static_cast<int>(vocab - start < kGroup ? vocab - start : kGroup);
    const float* z = load_block<Type>(row + start, width, -kInf, buffer);
    for (int l = 0; l < kGroup; ++l) lanes[l] = z[l] > lanes[l] ? z[l] : lanes[l];
    lanes = lanes + kGroup == classes + n ? classes : lanes + kGroup;
  }
  return bound_of_largest(classes, n, k, bits);
}

ASYNCOPD_INLINE int64_t top_capacity(int64_t k) { return 4 * k + 1024 + kGroup; }

// Positions of the hits among kGroup values, ascending; returns how many. Most have none, one or two.
template <typename Test>
ASYNCOPD_INLINE int find_hits(const float* z, uint8_t* hits, Test is_hit) {
  alignas(64) uint8_t flags[kGroup];
  for (int i = 0; i < kGroup; ++i) flags[i] = is_hit(z[i]);
  int found = 0;
  for (int i = 0; i < kGroup; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + i, sizeof eight);
    if (eight == 0) continue;
    for (int j = i; j < i + 8; ++j) {
      hits[found] = static_cast<uint8_t>(j);
      found += flags[j];
    }
  }
  return found;
}

// Ids of the k <= vocab largest logits: NaN first, then value descending, id ascending among equals. nan_count: how many
// logits are NaN.
template <typename Type>
void select_top(const typename Type::Storage* row, int64_t vocab, const float* peaks, int64_t groups, int64_t k,
                int64_t nan_count, const Selection& work, int64_t* ids) {
  if (nan_count > 0) {
    for (int64_t v = 0; v < vocab && k > 0 && nan_count > 0; ++v) {
      if (!std::isnan(Type::load(row[v]))) continue;
      *ids++ = v;
      --k;
      --nan_count;
    }
  }
  if (k == 0) return;
  const int64_t capacity = top_capacity(k);
  float bound = top_threshold<Type>(row, vocab, peaks, groups, k, work.classes, work.values);
  bool strict = false;
  int64_t n = 0;
  alignas(64) float buffer[kGroup];
  uint8_t near[kGroup], hits[kGroup];
  for (int64_t first = 0; first < groups; first += kGroup) {
    const int count = static_cast<int>(groups - first < kGroup ? groups - first : kGroup);
    const float* some = load_block<Float32>(peaks + first, count, kNan, buffer);
    const int reach = find_hits(some, near, [=](float peak) { return peak >= bound; });
    for (int r = 0; r < reach; ++r) {
      const int64_t g = first + near[r], start = g * kGroup;
      // The bound may have risen since.
      if (strict ? !(peaks[g] > bound) : !(peaks[g] >= bound)) continue;
      const int width = static_cast<int>(vocab - start < kGroup ? vocab - start : kGroup);
      const float* z = load_block<Type>(row + start, width, kNan, buffer);
      const int found = strict ? find_hits(z, hits, [=](float value) { return value > bound; })
                               : find_hits(z, hits, [=](float value) { return value >= bound; });
      for (int i = 0; i < found; ++i) {
        work.values[n + i] = order_bits(z[hits[i]]);
        work.ids[n + i] = static_cast<uint32_t>(start + hits[i]);
      }
      n += found;
      if (n > capacity - kGroup) {
        // What those that stay reach is now to be beaten.
        bound = value_of_bits(keep_largest(work.values, work.ids, n, k));
        n = k;
        strict = true;
      }
    }
  }
  keep_largest(work.values, work.ids, n, k);
  write_by_value(work.values, work.ids, k, work.keys, ids);
}
