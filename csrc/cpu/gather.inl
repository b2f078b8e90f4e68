// One row of LSE + gather. Included once per instruction set by gather.cpp; see isa.h for the rules.
//
// Mathematics. One streaming pass in blocks of kBlock columns, online over blocks: with m the largest logit so far,
//   sum <- sum * exp((m_old - m) t) + sum over the block of exp((z - m) t),     lse = m t + log(sum).
// A block is read from memory once (its maximum) and then again from L1 (its exponentials), so the limit is one read
// of the logits: V * 4 bytes a row for fp32, V * 2 for bf16 and fp16.
//
// Accuracy. A block is summed in fp32, as kLanes separate sums and then a tree, so with few roundings; blocks are
// added in fp64, so the number of columns does not matter.
//
// The lanes are spelled out because a compiler may not reorder a sum or a maximum of floats by itself, and the flag
// that lets it (-ffast-math) also takes NaN and inf away. So written, GCC and clang vectorise both loops.

#include "numeric.inl"

// Combines all lanes into lanes[0], halving their number each time.
template <typename Op>
ASYNCOPD_INLINE void fold(float* lanes, Op op) {
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = op(lanes[l], lanes[l + half]);
  }
}

template <typename Type>
double logsumexp_row(const typename Type::Storage* row, int64_t vocab, const Scale& scale) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  float running_max = -kInf;
  double sum = 0.0;
  alignas(64) float block[kBlock];
  alignas(64) float lanes[kLanes];
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const auto* source = row + start;
    const int width = static_cast<int>(vocab - start < kBlock ? vocab - start : kBlock);
    const int padded = (width + kLanes - 1) / kLanes * kLanes;
    for (int v = 0; v < width; ++v) block[v] = Type::load(source[v]);
    for (int v = width; v < padded; ++v) block[v] = -kInf;

    for (int l = 0; l < kLanes; ++l) lanes[l] = -kInf;
    for (int v = 0; v < padded; v += kLanes) {
      // A NaN never wins; it shows up in the sum.
      for (int l = 0; l < kLanes; ++l) lanes[l] = block[v + l] > lanes[l] ? block[v + l] : lanes[l];
    }
    fold(lanes, [](float a, float b) { return a > b ? a : b; });
    const float block_max = lanes[0];

    if (block_max > running_max) {
      if (block_max == kInf) {
        return has_nan<Type>(row, vocab) ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(kInf);
      }
      // While everything so far was -inf the sum is 0, or NaN, and there is nothing to rescale.
      if (running_max != -kInf) {
        sum *= std::exp((static_cast<double>(running_max) - block_max) * scale.inv_temperature);
      }
      running_max = block_max;
    }
    // -inf minus -inf would be NaN: a row that is -inf so far measures from 0.
    const float origin = running_max == -kInf ? 0.0f : running_max;
    for (int l = 0; l < kLanes; ++l) lanes[l] = 0.0f;
    for (int v = 0; v < padded; v += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += exp_scaled(block[v + l] - origin, scale);
    }
    fold(lanes, [](float a, float b) { return a + b; });
    sum += lanes[0];
  }
  if (std::isnan(sum) || running_max == -kInf) return std::isnan(sum) ? sum : -static_cast<double>(kInf);
  return running_max * scale.inv_temperature + std::log(sum);
}

// Returns false when an id lies outside [-1, vocab).
template <typename Type, typename Id>
bool gather_row(const typename Type::Storage* row, const Id* ids, int64_t vocab, int64_t num_ids, const Scale& scale,
                float* logprobs, float* lse_out) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const double lse = logsumexp_row<Type>(row, vocab, scale);
  *lse_out = static_cast<float>(lse);
  bool valid = true;
  for (int64_t k = 0; k < num_ids; ++k) {
    const int64_t id = ids[k];
    if (id >= 0 && id < vocab) {
      logprobs[k] = normalized(Type::load(row[id]), lse, scale);
    } else if (id == -1) {
      logprobs[k] = -kInf;
    } else {
      logprobs[k] = std::numeric_limits<float>::quiet_NaN();
      valid = false;
    }
  }
  return valid;
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

inline RowsFunction select(int dtype, int id_type) {
  const bool wide = id_type == kInt64;
  switch (dtype) {
    case kFloat32: return wide ? gather_rows<Float32, int64_t> : gather_rows<Float32, int32_t>;
    case kBFloat16: return wide ? gather_rows<BFloat16, int64_t> : gather_rows<BFloat16, int32_t>;
    case kFloat16: return wide ? gather_rows<Float16, int64_t> : gather_rows<Float16, int32_t>;
    default: return nullptr;
  }
}
