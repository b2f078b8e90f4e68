// Gradient of LSE + gather, one row at a time. Included once per instruction set by gather_backward.cpp; see isa.h for
// the rules.
//
// One pass writes -total softmax; then the few ids are written again, each from its softmax and all its gradients, so
// that nothing is rounded to 16 bits before it is whole. softmax = exp((z - L) t) with L = lse / t as two floats:
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
  const int width = static_cast<int>(vocab - start);
  for (int v = 0; v < width; ++v) block[v] = softmax_part(Type::load(logits[start + v]), row, scale);
  for (int v = 0; v < width; ++v) out[start + v] = Type::store(block[v]);
}

// Columns [first, first + columns) of a row. Returns false when an id lies outside [kElsewhere, vocab).
template <typename Type, typename Id>
bool backward_row(const float* grad, const typename Type::Storage* logits, double lse, const Id* ids, int64_t first,
                  int64_t columns, int64_t vocab, int64_t num_ids, const Scale& scale, const Workspace& work,
                  typename Type::Storage* out) {
  double total = 0.0;
  int64_t n = 0;
  for (int64_t k = 0; k < num_ids; ++k) {
    const int64_t id = ids[k];
    if (id < kElsewhere || id >= vocab) return false;
    if (id == kPad) continue;
    total += grad[k];
    // Below `first`, as kElsewhere always is, the difference wraps to a number beyond all columns.
    const uint64_t column = static_cast<uint64_t>(id - first);
    if (column >= static_cast<uint64_t>(columns)) continue;
    work.logits[k] = Type::load(logits[column]);  // now, because out may be the logits
    work.order[n++] = column << 32 | static_cast<uint64_t>(k);
  }
  sort_ascending(work.order, n);

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
  for (int64_t i = 0; i < n;) {
    const uint64_t column = work.order[i] >> 32;
    const float z = work.logits[work.order[i] & 0xffffffffu];
    double sum = is_flat ? flat : softmax_part(z, row, scale);
    for (; i < n && work.order[i] >> 32 == column; ++i) {
      sum += static_cast<double>(grad[work.order[i] & 0xffffffffu]) * scale.inv_temperature;
    }
    out[column] = Type::store(static_cast<float>(sum));
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
