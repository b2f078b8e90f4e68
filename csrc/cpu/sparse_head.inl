// The sampled head: K dot products a row (an SDDMM), and two weighted sums of rows for its gradient (SpMMs). Included
// once per instruction set by sparse_head.cpp; see isa.h for the rules.
//
// Limits. Forward and dH each read the K rows of the weight that a row names: N K H elements, less what the caches keep
// of ids that repeat. dW is one write of [V, H], nearly all of it zeros. The arithmetic is nothing beside that, so what
// counts is that memory never waits: a row of the weight is 4 KiB somewhere in hundreds of megabytes, which no hardware
// prefetcher foresees. Hence four rows at a time, and the next four are asked for meanwhile. Measured (EPYC 9004, two
// threads, N = 512, K = 64, H = 1024, V = 151,936, fp32, 16 head and 48 tail ids; reading the rows once at the speed of
// memory would take 3.5 ms): dH 3.6 ms, forward 4.4 ms, against 5.7 ms one row at a time and 8.7 ms without asking.
// Walking the entries by id, so that a row of the weight is read once, takes 5.0 ms; it wins by a tenth at N = 4096.
//
// Accuracy. A dot product sums kBlock columns in fp32, as kLanes separate sums and then a tree, and blocks in fp64. A
// weighted sum adds kRun rows in fp32 and such partial sums in fp64, so that an id that thousands of rows name loses no
// more digits than one that 64 name.

#include "numeric.inl"

// Asks for kLanes elements, which may lie behind the end of a row.
template <typename Storage>
ASYNCOPD_INLINE void prefetch(const Storage* elements) {
  const char* bytes = reinterpret_cast<const char*>(elements);
#pragma GCC unroll 4
  for (size_t offset = 0; offset < kLanes * sizeof(Storage); offset += 64) __builtin_prefetch(bytes + offset);
}

// sums[i] = a . rows[ids[i]] for four rows, while asking for those of the four ids `next`.
template <typename Type>
void dot_four(const float* a, const uint32_t* ids, const uint32_t* next, const typename Type::Storage* rows,
              int64_t stride, int64_t width, double* sums) {
  alignas(64) float lanes[4][kLanes];
  const typename Type::Storage* row[4];
  for (int i = 0; i < 4; ++i) {
    row[i] = rows + ids[i] * stride;
    sums[i] = 0.0;
  }
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t end = width - start < kBlock ? width : start + kBlock;
    for (int i = 0; i < 4; ++i) {
      for (int l = 0; l < kLanes; ++l) lanes[i][l] = 0.0f;
    }
    int64_t j = start;
    for (; j + kLanes <= end; j += kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        prefetch(rows + next[i] * stride + j);
        for (int l = 0; l < kLanes; ++l) lanes[i][l] += a[j + l] * Type::load(row[i][j + l]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int l = 0; l < static_cast<int>(end - j); ++l) lanes[i][l] += a[j + l] * Type::load(row[i][j + l]);
#pragma GCC unroll 8
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lanes[i][l] += lanes[i][l + half];
      }
      sums[i] += lanes[i][0];
    }
  }
}

// part += the four rows times their factors, while asking for the same columns of the rows `next`.
template <typename Type>
void add_four(const Term* terms, const Term* next, const typename Type::Storage* rows, int64_t stride, int64_t width,
              float* __restrict part) {
  const auto* a = rows + terms[0].row * stride;
  const auto* b = rows + terms[1].row * stride;
  const auto* c = rows + terms[2].row * stride;
  const auto* d = rows + terms[3].row * stride;
  const float fa = terms[0].factor, fb = terms[1].factor, fc = terms[2].factor, fd = terms[3].factor;
  const auto add = [&](int64_t j) __attribute__((always_inline)) {
    part[j] += (fa * Type::load(a[j]) + fb * Type::load(b[j])) + (fc * Type::load(c[j]) + fd * Type::load(d[j]));
  };
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    for (int i = 0; i < 4; ++i) prefetch(rows + next[i].row * stride + j);
    for (int l = 0; l < kLanes; ++l) add(j + l);
  }
  for (; j < width; ++j) add(j);
}

// out = sum over terms of factor * rows[row], in their order; or out += that.
template <typename Type, typename Out, bool add = false>
void weighted_sum(const Term* terms, int64_t count, const typename Type::Storage* rows, int64_t stride, int64_t width,
                  typename Out::Storage* out) {
  alignas(64) double sum[kBlock];
  alignas(64) float part[kBlock];
  for (int64_t start = 0; start < width; start += kBlock) {
    const int columns = static_cast<int>(width - start < kBlock ? width - start : kBlock);
    const auto* block = rows + start;
    for (int j = 0; j < columns; ++j) sum[j] = add ? Out::load(out[start + j]) : 0.0f;
    for (int64_t first = 0; first < count; first += kRun) {
      const int64_t last = count - first < kRun ? count : first + kRun;
      for (int j = 0; j < columns; ++j) part[j] = 0.0f;
      int64_t i = first;
      for (; i + 4 <= last; i += 4) {
        add_four<Type>(terms + i, terms + (i + 8 <= count ? i + 4 : i), block, stride, columns, part);
      }
      for (; i < last; ++i) {
        const auto* row = block + terms[i].row * stride;
        const float factor = terms[i].factor;
        for (int j = 0; j < columns; ++j) part[j] += factor * Type::load(row[j]);
      }
      for (int j = 0; j < columns; ++j) sum[j] += part[j];
    }
    for (int j = 0; j < columns; ++j) out[start + j] = Out::store(static_cast<float>(sum[j]));
  }
}

template <typename Id>
bool ids_in_range(const Id* ids, int64_t count, int64_t vocab) {
  bool valid = true;
  for (int64_t k = 0; k < count; ++k) valid &= ids[k] >= -1 && ids[k] < vocab;
  return valid;
}

ASYNCOPD_INLINE float epilogue(const Problem& p, double y) {
  y *= p.logit_scale;
  if (p.softcap != 0.0) y = p.softcap * std::tanh(y / p.softcap);
  return static_cast<float>(y / p.temperature);
}

template <typename Type, typename Hidden, typename Id>
bool forward_rows(const Problem& p, const float* bias, float* logits, const Workspace& work, int64_t begin,
                  int64_t end) {
  using Storage = typename Type::Storage;
  const auto* weight = static_cast<const Storage*>(p.weight);
  for (int64_t n = begin; n < end; ++n) {
    const Id* ids = static_cast<const Id*>(p.ids) + n * p.num_ids;
    float* out = logits + n * p.num_ids;
    if (!ids_in_range(ids, p.num_ids, p.vocab)) return false;
    int64_t count = 0;
    for (int64_t k = 0; k < p.num_ids && (p.mask == nullptr || p.mask[n]); ++k) {
      if (ids[k] >= 0) work.ids[count++] = static_cast<uint32_t>(ids[k]);
    }
    const bool used = count > 0;
    if (used) {
      const auto* hidden = static_cast<const typename Hidden::Storage*>(p.hidden) + n * p.hidden_stride;
      for (int64_t h = 0; h < p.width; ++h) work.hidden[h] = Hidden::load(hidden[h]);
      for (int64_t i = count; i % 4 != 0; ++i) work.ids[i] = work.ids[count - 1];
    }
    // From the left as if there were no pads, then moved to where they belong.
    for (int64_t first = 0; first < count; first += 4) {
      const uint32_t* four = work.ids + first;
      double sums[4];
      dot_four<Type>(work.hidden, four, first + 4 < count ? four + 4 : four, weight, p.weight_stride, p.width, sums);
      for (int64_t i = first; i < count && i < first + 4; ++i) {
        const double added = bias == nullptr ? 0.0 : bias[work.ids[i]];
        out[i] = epilogue(p, sums[i - first] + added);
      }
    }
    for (int64_t k = p.num_ids - 1; k >= 0; --k) {
      out[k] = used && ids[k] >= 0 ? out[--count] : -std::numeric_limits<float>::infinity();
    }
  }
  return true;
}

// Writes dhidden and, for dweight, the rows' entries: their ids and dy, and how many there are.
template <typename Type, typename Hidden, typename Id>
bool hidden_gradient(const Problem& p, const Gradient& g, int64_t begin, int64_t end) {
  using Storage = typename Type::Storage;
  for (int64_t n = begin; n < end; ++n) {
    const Id* ids = static_cast<const Id*>(p.ids) + n * p.num_ids;
    const float* grad = g.grad + n * p.num_ids;
    const float* logits = g.logits + n * p.num_ids;
    Term* terms = g.terms + n * p.num_ids;
    if (!ids_in_range(ids, p.num_ids, p.vocab)) return false;
    int64_t count = 0;
    bool takes_part = false;
    for (int64_t k = 0; k < p.num_ids && (p.mask == nullptr || p.mask[n]); ++k) {
      if (ids[k] < 0) continue;
      double dy = grad[k];
      if (p.softcap != 0.0) {
        // A -inf bias saturates the cap: tanh is -1 and the slope 0.
        const double tanh = logits[k] * (p.temperature / p.softcap);
        dy *= 1.0 - tanh * tanh;
      }
      takes_part |= grad[k] != 0.0f;
      terms[count++] = Term{static_cast<uint32_t>(ids[k]), static_cast<float>(dy * p.logit_scale / p.temperature)};
    }
    // Left out as a whole or not at all: 0 times an infinite hidden state is NaN in a row that takes part.
    g.counts[n] = takes_part ? count : 0;
    weighted_sum<Type, Hidden>(terms, g.counts[n], static_cast<const Storage*>(p.weight), p.weight_stride, p.width,
                               static_cast<typename Hidden::Storage*>(g.dhidden) + n * p.width);
  }
  return true;
}

template <typename Hidden, typename Out>
void weight_gradient(const Problem& p, const Entries& entries, const WeightGradient& out, int64_t begin, int64_t end) {
  const auto* hidden = static_cast<const typename Hidden::Storage*>(p.hidden);
  for (int64_t v = begin; v < end; ++v) {
    auto* row = static_cast<typename Out::Storage*>(out.rows) + v * out.stride;
    const Term* terms = entries.terms + entries.offsets[v];
    const int64_t count = entries.offsets[v + 1] - entries.offsets[v];
    if (out.add) {
      if (count > 0) weighted_sum<Hidden, Out, true>(terms, count, hidden, p.hidden_stride, p.width, row);
    } else if (count > 0) {
      weighted_sum<Hidden, Out>(terms, count, hidden, p.hidden_stride, p.width, row);
    } else {
      // An empty sum gives the same in three times as long (20 MB that are in the cache: 0.5 ms against 0.17 ms).
      std::memset(row, 0, static_cast<size_t>(p.width) * sizeof *row);
    }
  }
}

template <typename Hidden>
WeightGradientFunction weight_gradient_of(int dtype) {
  switch (dtype) {
    case kFloat32: return weight_gradient<Hidden, Float32>;
    case kBFloat16: return weight_gradient<Hidden, BFloat16>;
    case kFloat16: return weight_gradient<Hidden, Float16>;
    default: return nullptr;
  }
}

template <typename Type, typename Hidden>
Kernels kernels_of(const Types& types) {
  const auto weight_gradient = weight_gradient_of<Hidden>(types.gradient);
  return types.id == kInt64
             ? Kernels{forward_rows<Type, Hidden, int64_t>, hidden_gradient<Type, Hidden, int64_t>, weight_gradient}
             : Kernels{forward_rows<Type, Hidden, int32_t>, hidden_gradient<Type, Hidden, int32_t>, weight_gradient};
}

template <typename Type>
Kernels kernels_of(const Types& types) {
  if (types.hidden == types.weight) return kernels_of<Type, Type>(types);
  return types.hidden == kFloat32 ? kernels_of<Type, Float32>(types) : Kernels{};
}

inline Kernels select(const Types& types) {
  switch (types.weight) {
    case kFloat32: return kernels_of<Float32>(types);
    case kBFloat16: return kernels_of<BFloat16>(types);
    case kFloat16: return kernels_of<Float16>(types);
    default: return Kernels{};
  }
}
