// One row of LSE + gather. Included once per instruction set by gather.cpp; see isa.h for the rules.
//
// Mathematics. One streaming pass in blocks of kBlock columns, online over blocks: with m the largest logit so far,
//   sum <- sum * exp((m_old - m) t) + sum over the block of exp((z - m) t),     lse = m t + log(sum).
// A block is read from memory once (its maximum) and then again from L1 (its exponentials), so the limit is one read
// of the logits: V * 4 bytes a row for fp32, V * 2 for bf16 and fp16.
//
// Accuracy. kRun columns are summed in fp32, as trees of four, kLanes separate sums of eight of those, and a tree again:
// few roundings, which matters because equal logits are all rounded alike. Runs are added in fp64, so the number of
// columns does not matter.
//
// The lanes are spelled out because a compiler may not reorder a sum or a maximum of floats by itself, and the flag
// that lets it (-ffast-math) also takes NaN and inf away. So written, GCC and clang vectorise both loops.

#include "numeric.inl"

// Combines all lanes into lanes[0], halving their number each time.
template <int count, typename Op>
ASYNCOPD_INLINE void fold(float* lanes, Op op) {
#pragma GCC unroll 8
  for (int half = count / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = op(lanes[l], lanes[l + half]);
  }
}

// LSE of the columns so far: largest logit, and sum of exponentials measured from it. A sum that is NaN stays so. Where
// `peak` is +inf the sum counts for nothing else.
struct Running {
  float peak = -std::numeric_limits<float>::infinity();
  double sum = 0.0;

  double logsumexp(const Scale& scale) const {
    if (std::isnan(sum)) return sum;
    return std::isinf(peak) ? peak : peak * scale.inv_temperature + std::log(sum);
  }
};

// Takes in `width` more columns of a row.
template <typename Type>
void accumulate(const typename Type::Storage* row, int64_t columns, const Scale& scale, Running& running) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr bool kIsFloat = sizeof(typename Type::Storage) == sizeof(float);
  alignas(64) float buffer[kBlock];
  alignas(64) float lanes[kStep];
  for (int64_t start = 0; start < columns; start += kBlock) {
    const auto* source = row + start;
    const int width = static_cast<int>(columns - start < kBlock ? columns - start : kBlock);
    const int padded = (width + kStep - 1) / kStep * kStep;
    const float* block = buffer;
    if constexpr (kIsFloat) block = width == padded ? source : buffer;
    if (block == buffer) {
      for (int v = 0; v < width; ++v) buffer[v] = Type::load(source[v]);
      for (int v = width; v < padded; ++v) buffer[v] = -kInf;
    }

    for (int l = 0; l < kStep; ++l) lanes[l] = -kInf;
    for (int v = 0; v < padded; v += kStep) {
      // A NaN never wins; it shows up in the sum.
      for (int l = 0; l < kStep; ++l) lanes[l] = block[v + l] > lanes[l] ? block[v + l] : lanes[l];
    }
    fold<kStep>(lanes, [](float a, float b) { return a > b ? a : b; });
    const float block_max = lanes[0];

    if (block_max > running.peak) {
      // While everything so far was -inf the sum is next to 0, or NaN, and there is nothing to rescale.
      if (running.peak != -kInf && block_max != kInf) {
        running.sum *= std::exp((static_cast<double>(running.peak) - block_max) * scale.inv_temperature);
      }
      running.peak = block_max;
    }
    if (running.peak == kInf) {
      if (has_nan<Float32>(block, width)) running.sum = std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    // -inf minus -inf would be NaN: a row that is -inf so far measures from 0.
    const float origin = running.peak == -kInf ? 0.0f : running.peak;
    for (int run = 0; run < padded; run += kRun) {
      const int end = run + kRun < padded ? run + kRun : padded;
      for (int l = 0; l < kLanes; ++l) lanes[l] = 0.0f;
      for (int v = run; v < end; v += kStep) {
        // The next block comes from memory meanwhile, or what follows the row's last one.
        const char* next = reinterpret_cast<const char*>(source + width + v);
        for (size_t line = 0; line < kStep * sizeof(*source); line += 64) __builtin_prefetch(next + line);
        for (int l = 0; l < kLanes; ++l) lanes[l] += sum_of_exp<true, kLanes>(block + v + l, origin, scale);
      }
      fold<kLanes>(lanes, [](float a, float b) { return a + b; });
      running.sum += lanes[0];
    }
  }
}

// Returns false when an id lies outside [-1, vocab).
template <typename Type, typename Id>
bool gather_row(const typename Type::Storage* row, const Id* ids, int64_t vocab, int64_t num_ids, const Scale& scale,
                float* logprobs, float* lse_out) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  Running running;
  accumulate<Type>(row, vocab, scale, running);
  const double lse = running.logsumexp(scale);
  *lse_out = static_cast<float>(lse);
  // Without branches on the ids: first the logits, then what follows from them.
  const typename Type::Storage impossible = Type::store(-kInf);
  int outside = 0;
  for (int64_t k = 0; k < num_ids; ++k) {
    const int64_t id = ids[k];
    const bool is_column = static_cast<uint64_t>(id) < static_cast<uint64_t>(vocab);
    outside |= !is_column && id != -1;
    logprobs[k] = Type::load(*(is_column ? row + id : &impossible));
  }
  for (int64_t k = 0; k < num_ids; ++k) logprobs[k] = normalized(logprobs[k], lse, scale);
  if (outside == 0 && !std::isnan(lse)) return true;
  for (int64_t k = 0; k < num_ids; ++k) {
    if (ids[k] == -1) logprobs[k] = -kInf;
    if (ids[k] < -1 || ids[k] >= vocab) logprobs[k] = std::numeric_limits<float>::quiet_NaN();
  }
  return outside == 0;
}

template <typename Type, typename Id>
bool gather_rows(const Problem& problem, int64_t begin, int64_t end) {
  const auto* logits = static_cast<const typename Type::Storage*>(problem.logits);
  const auto* ids = static_cast<const Id*>(problem.ids);
  const Scale scale = make_scale(problem.inv_temperature);
  bool valid = true;
  for (int64_t n = begin; n < end; ++n) {
    valid &= gather_row<Type>(logits + n * problem.row_stride, ids + n * problem.num_ids, problem.vocab,
                              problem.num_ids, scale, problem.logprobs + n * problem.num_ids, problem.lse + n);
  }
  return valid;
}

// Rows [begin, end) of one tile of logits; false when the last tile's ids show one outside [-1, vocab).
inline bool gather_tile_rows(const Tile& tile, int64_t begin, int64_t end) {
  const Scale scale = make_scale(tile.inv_temperature);
  const int64_t vocab = tile.first + tile.columns;
  int outside = 0;
  for (int64_t n = begin; n < end; ++n) {
    const float* row = tile.logits + n * tile.row_stride;
    float* logprobs = tile.logprobs + n * tile.num_ids;
    Running running;
    if (tile.first > 0) running = Running{tile.peaks[n], tile.sums[n]};
    accumulate<Float32>(row, tile.columns, scale, running);
    tile.peaks[n] = running.peak;
    tile.sums[n] = running.sum;
    const int64_t* ids = tile.ids + n * tile.num_ids;
    for (int64_t k = 0; k < tile.num_ids; ++k) {
      const uint64_t column = static_cast<uint64_t>(ids[k] - tile.first);
      if (column < static_cast<uint64_t>(tile.columns)) logprobs[k] = row[column];
    }
    if (tile.lse == nullptr) continue;
    const double lse = running.logsumexp(scale);
    tile.lse[n] = static_cast<float>(lse);
    for (int64_t k = 0; k < tile.num_ids; ++k) outside |= ids[k] < -1 || ids[k] >= vocab;
    for (int64_t k = 0; k < tile.num_ids; ++k) {
      logprobs[k] = ids[k] < 0 ? -std::numeric_limits<float>::infinity() : normalized(logprobs[k], lse, scale);
    }
  }
  return outside == 0;
}

inline RowsFunction select_rows(int dtype, int id_type) {
  const bool wide = id_type == kInt64;
  switch (dtype) {
    case kFloat32: return wide ? gather_rows<Float32, int64_t> : gather_rows<Float32, int32_t>;
    case kBFloat16: return wide ? gather_rows<BFloat16, int64_t> : gather_rows<BFloat16, int32_t>;
    case kFloat16: return wide ? gather_rows<Float16, int64_t> : gather_rows<Float16, int32_t>;
    default: return nullptr;
  }
}

inline Functions select(int dtype, int id_type) { return {select_rows(dtype, id_type), gather_tile_rows}; }
