// Gradient of LSE + gather, one row at a time. Included once per instruction set by gather_backward.cpp; see isa.h for
// the rules.
//
// One pass writes -total softmax; then the few ids are written again, each from its softmax and all its gradients, so
// that nothing is rounded before it is whole. Entries that name the same id find their common sum through a hash table:
// sorting them took 70 % of the time at V = 540 and K = 64. softmax = exp((z - L) t) with L = lse / t as two floats:
// z - L loses no digit where it matters, near 0, and no product is rounded before the subtraction.

#include "numeric.inl"

struct Row {
  float origin_hi, origin_lo;  // L
  float factor;                // -total t
  bool has_mass;               // lse is not -inf
};

ASYNCOPD_INLINE float softmax_part(float z, const Row& row, const Scale& scale) {
  return row.factor * exp_scaled((z - row.origin_hi) - row.origin_lo, scale);
}

template <typename Type>
void fill_row(const typename Type::Storage* logits, int64_t vocab, const Row& row, const Scale& scale,
              typename Type::Storage* out) {
  alignas(64) float block[kBlock];
  int64_t start = 0;
  for (; start + kBlock <= vocab; start += kBlock) {
    for (int v = 0; v < kBlock; ++v) block[v] = softmax_part(Type::load(logits[start + v]), row, scale);
    for (int v = 0; v < kBlock; ++v) out[start + v] = Type::store(block[v]);
  }
  // Whole vectors: a remainder would be computed element by element.
  const int width = static_cast<int>(vocab - start), padded = (width + kLanes - 1) / kLanes * kLanes;
  for (int v = 0; v < width; ++v) block[v] = Type::load(logits[start + v]);
  for (int v = width; v < padded; ++v) block[v] = row.origin_hi;
  for (int v = 0; v < padded; ++v) block[v] = softmax_part(block[v], row, scale);
  for (int v = 0; v < width; ++v) out[start + v] = Type::store(block[v]);
}

// Columns [first, first + columns) of a row. Returns false when an id lies outside [kElsewhere, vocab).
template <typename Type, typename Id>
bool backward_row(const float* grad, const typename Type::Storage* logits, double lse, const Id* ids, int64_t first,
                  int64_t columns, int64_t vocab, int64_t num_ids, const Scale& scale, const Workspace& work,
                  typename Type::Storage* out) {
  double total = 0.0;
  int64_t n = 0;
  std::memset(work.table, 0, sizeof *work.table * (work.mask + 1));
  for (int64_t k = 0; k < num_ids; ++k) {
    const int64_t id = ids[k];
    if (id < kElsewhere || id >= vocab) return false;
    if (id == kPad) continue;
    total += grad[k];
    // Below `first`, as kElsewhere always is, the difference wraps to a number beyond all columns.
    const uint64_t column = static_cast<uint64_t>(id - first);
    if (column >= static_cast<uint64_t>(columns)) continue;
    uint64_t slot = column * 0x9E3779B97F4A7C15u >> 32 & work.mask;
    while (work.table[slot] != 0 && work.columns[work.table[slot] - 1] != column) slot = (slot + 1) & work.mask;
    if (work.table[slot] == 0) {
      work.table[slot] = static_cast<uint32_t>(n + 1);
      work.columns[n] = static_cast<uint32_t>(column);
      work.parts[n] = Type::load(logits[column]);  // now, because out may be the logits
      work.sums[n++] = 0.0;
    }
    work.sums[work.table[slot] - 1] += grad[k];
  }

  const double origin = lse / scale.inv_temperature;
  const float origin_hi = static_cast<float>(origin);
  const float origin_lo = std::isinf(origin_hi) ? 0.0f : static_cast<float>(origin - origin_hi);
  const bool has_mass = lse != -std::numeric_limits<double>::infinity();
  const Row row{origin_hi, origin_lo, static_cast<float>(-total * scale.inv_temperature), has_mass};
  // A row that is not multiplied by its softmax, or has none; 0 times a total that is NaN or inf is NaN.
  const float flat = total == 0.0 ? 0.0f : row.factor * 0.0f;
  const bool is_flat = total == 0.0 || !has_mass;
  if (is_flat) {
    const typename Type::Storage value = Type::store(flat);
    for (int64_t v = 0; v < columns; ++v) out[v] = value;
  } else {
    fill_row<Type>(logits, columns, row, scale, out);
  }
  for (int64_t i = 0; i < n; ++i) work.parts[i] = is_flat ? flat : softmax_part(work.parts[i], row, scale);
  for (int64_t i = 0; i < n; ++i) {
    out[work.columns[i]] = Type::store(static_cast<float>(work.parts[i] + work.sums[i] * scale.inv_temperature));
  }
  return true;
}

template <typename Type, typename Id>
bool backward_rows(const Problem& problem, const Workspace& work, int64_t begin, int64_t end) {
  const auto* logits = static_cast<const typename Type::Storage*>(problem.logits);
  const auto* ids = static_cast<const Id*>(problem.ids);
  auto* out = static_cast<typename Type::Storage*>(problem.dlogits);
  const Scale scale = make_scale(problem.inv_temperature);
  bool valid = true;
  for (int64_t n = begin; n < end; ++n) {
    valid &= backward_row<Type>(problem.grad + n * problem.num_ids, logits + n * problem.row_stride, problem.lse[n],
                                ids + n * problem.num_ids, problem.first, problem.columns, problem.vocab,
                                problem.num_ids, scale, work,
                                out + n * problem.out_stride);
  }
  return valid;
}

inline RowsFunction select(int dtype, int id_type) {
  const bool wide = id_type == kInt64;
  switch (dtype) {
    case kFloat32: return wide ? backward_rows<Float32, int64_t> : backward_rows<Float32, int32_t>;
    case kBFloat16: return wide ? backward_rows<BFloat16, int64_t> : backward_rows<BFloat16, int32_t>;
    case kFloat16: return wide ? backward_rows<Float16, int64_t> : backward_rows<Float16, int32_t>;
    default: return nullptr;
  }
}
