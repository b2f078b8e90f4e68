// Gradient of LSE + gather, one row at a time. Included once per instruction set by gather_backward.cpp; see isa.h for
// the rules.
//
// One pass writes -total softmax; then the few ids are written again, each from its softmax and all its gradients, so
// that nothing is rounded before it is whole. Entries that name the same column find each other through marks, which
// the last of them leaves there: sorting them took 70 % of the time at V = 540 and K = 64. softmax = exp((z - L) t) with L = lse / t as two floats:
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

// Columns a whole block at a time: each is read before it is written, because out may be the logits.
template <typename Type>
ASYNCOPD_INLINE void fill_block(const typename Type::Storage* logits, int width, const Row& row, const Scale& scale,
                                typename Type::Storage* out) {
  alignas(64) float block[kBlock];
  for (int v = 0; v < width; ++v) block[v] = Type::load(logits[v]);
  for (int v = width; v < kBlock; ++v) block[v] = row.origin_hi;
  for (int v = 0; v < kBlock; ++v) block[v] = softmax_part(block[v], row, scale);
  for (int v = 0; v < width; ++v) out[v] = Type::store(block[v]);
}

template <typename Type>
void fill_row(const typename Type::Storage* logits, int64_t vocab, const Row& row, const Scale& scale,
              typename Type::Storage* out) {
  int64_t start = 0;
  for (; start + kBlock <= vocab; start += kBlock) fill_block<Type>(logits + start, kBlock, row, scale, out + start);
  if (start < vocab) fill_block<Type>(logits + start, static_cast<int>(vocab - start), row, scale, out + start);
}

// Gathers the entries whose columns are among [first, first + columns), without branches on the ids: their columns,
// gradients and logits. Returns how many there are, or -1 if an id lies outside [kElsewhere, vocab).
template <typename Type, typename Id>
int64_t collect_entries(const float* grad, const typename Type::Storage* logits, const Id* ids, int64_t first,
                        int64_t columns, int64_t vocab, int64_t num_ids, const Workspace& work, double* total) {
  int outside = 0;
  for (int64_t k = 0; k < num_ids; ++k) outside |= ids[k] < kElsewhere || ids[k] >= vocab;
  if (outside) return -1;
  double lanes[8] = {};
  int64_t k = 0;
  for (; k + 8 <= num_ids; k += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += ids[k + l] == kPad ? 0.0f : grad[k + l];
  }
  for (int l = 0; k < num_ids; ++k, ++l) lanes[l] += ids[k] == kPad ? 0.0f : grad[k];
  *total = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  int64_t n = 0;
  for (k = 0; k < num_ids; ++k) {
    // Below `first`, as kPad and kElsewhere always are, the difference wraps to a number beyond all columns.
    const uint64_t column = static_cast<uint64_t>(ids[k] - first);
    work.columns[n] = static_cast<uint32_t>(column);
    work.grad[n] = grad[k];
    n += column < static_cast<uint64_t>(columns) ? 1 : 0;
  }
  for (int64_t i = 0; i < n; ++i) work.parts[i] = Type::load(logits[work.columns[i]]);
  return n;
}

// The index of an entry, in place of a result that is written later.
struct FloatMarks {
  float* marks;
  ASYNCOPD_INLINE void set(uint32_t column, int64_t i) const { marks[column] = from_bits(static_cast<uint32_t>(i)); }
  ASYNCOPD_INLINE uint32_t get(uint32_t column) const { return to_bits(marks[column]); }
};

template <typename Integer>
struct IntegerMarks {
  Integer* marks;
  ASYNCOPD_INLINE void set(uint32_t column, int64_t i) const { marks[column] = static_cast<Integer>(i); }
  ASYNCOPD_INLINE uint32_t get(uint32_t column) const { return marks[column]; }
};

// owners[i] = the last entry that names the same column as entry i; `repeated` lists those that are not that one, and how
// many they are is returned. Overwrites the marks of the columns.
template <typename Marks>
ASYNCOPD_INLINE int64_t find_owners(const Workspace& work, int64_t n, const Marks& marks) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) marks.set(work.columns[i], i);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t owner = marks.get(work.columns[i]);
    work.owners[i] = owner;
    work.repeated[count] = static_cast<uint32_t>(i);
    count += owner != static_cast<uint32_t>(i) ? 1 : 0;
  }
  return count;
}

// Columns [first, first + columns) of a row. Returns false when an id lies outside [kElsewhere, vocab).
template <typename Type, typename Id>
bool backward_row(const float* grad, const typename Type::Storage* logits, double lse, const Id* ids, int64_t first,
                  int64_t columns, int64_t vocab, int64_t num_ids, const Scale& scale, const Workspace& work,
                  typename Type::Storage* out) {
  double total = 0.0;
  // Before anything is written, because out may be the logits.
  const int64_t n = collect_entries<Type>(grad, logits, ids, first, columns, vocab, num_ids, work, &total);
  if (n < 0) return false;

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
  // The marks lie where the results will, if those are wide enough.
  int64_t repeated = 0;
  if (work.marks != nullptr) {
    repeated = find_owners(work, n, IntegerMarks<uint32_t>{work.marks});
  } else if constexpr (sizeof *out == sizeof(float)) {
    repeated = find_owners(work, n, FloatMarks{out});
  } else {
    repeated = find_owners(work, n, IntegerMarks<uint16_t>{out});
  }
  for (int64_t i = 0; i < n; ++i) work.sums[i] = work.grad[i];
  for (int64_t j = 0; j < repeated; ++j) {
    const uint32_t i = work.repeated[j];
    work.sums[work.owners[i]] += work.grad[i];
  }
  const double t = scale.inv_temperature;
  if (is_flat) {
    for (int64_t i = 0; i < n; ++i) work.parts[i] = static_cast<float>(flat + work.sums[i] * t);
  } else {
    for (int64_t i = 0; i < n; ++i) work.parts[i] = softmax_part(work.parts[i], row, scale);
    for (int64_t i = 0; i < n; ++i) work.parts[i] = static_cast<float>(work.parts[i] + work.sums[i] * t);
  }
  // In this order: the last entry of a column is the one that has its sum.
  for (int64_t i = 0; i < n; ++i) out[work.columns[i]] = Type::store(work.parts[i]);
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
