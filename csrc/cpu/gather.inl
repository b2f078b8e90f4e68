// One row of LSE + gather. Included once per instruction set by gather.cpp; see isa.h for the rules.
//
// Mathematics. One streaming pass in blocks of kBlock columns, online over blocks: with m the largest logit so far,
//   sum <- sum * exp((m_old - m) t) + sum over the block of exp((z - m) t),     lse = m t + log(sum).
// A block is read from memory once (its maximum) and then again from L1 (its exponentials), so the limit is one read
// of the logits: V * 4 bytes a row for fp32, V * 2 for bf16 and fp16.
//
// Accuracy. A block is summed in fp32, as kLanes separate sums and then a tree, so with few roundings; blocks are
// added in fp64, so the number of columns does not matter. exp((z - m) t) = 2^n 2^r with c = t log2(e) split into two
// floats: a one-float c would be off by the same relative amount everywhere, and that error would not average out.
//
// The lanes are spelled out because a compiler may not reorder a sum or a maximum of floats by itself, and the flag
// that lets it (-ffast-math) also takes NaN and inf away. So written, GCC and clang vectorise both loops.

struct Scale {
  float hi, lo;  // (1 / temperature) * log2(e), as a sum of two floats
  double inv_temperature;
};

ASYNCOPD_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ASYNCOPD_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Float32 {
  using Storage = float;
  static ASYNCOPD_INLINE float load(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static ASYNCOPD_INLINE float load(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }
};

struct Float16 {
  using Storage = uint16_t;
  // Integer arithmetic only, apart from one subtraction of normal numbers: exact for subnormals even when the
  // process flushes them to zero (torch.set_flush_denormal), and the same on a baseline machine without F16C.
  static ASYNCOPD_INLINE float load(uint16_t value) {
    const uint32_t magnitude = static_cast<uint32_t>(value & 0x7fffu) << 13;  // exponent and mantissa in place
    const float subnormal = from_bits(magnitude + (113u << 23)) - from_bits(113u << 23);
    const uint32_t normal = magnitude + (112u << 23);  // exponent bias 15 -> 127
    const uint32_t special = magnitude | 0x7f800000u;  // inf and NaN
    const uint32_t finite = magnitude < (1u << 23) ? to_bits(subnormal) : normal;
    const uint32_t bits = magnitude >= (31u << 23) ? special : finite;
    return from_bits(bits | (static_cast<uint32_t>(value & 0x8000u) << 16));
  }
};

// exp(x * t) for x <= 0; exactly 0 for -inf and below 2^-125, NaN for NaN. Relative error about 1e-7.
ASYNCOPD_INLINE float exp_scaled(float x, float scale_hi, float scale_lo) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low mantissa bits
  const float t = x * scale_hi;
  const float shifted = t + kRound;
  const float n = shifted - kRound;
  float r = x * scale_hi - n;  // contracted to one fused multiply-add, without rounding of t, where there is FMA
  r = x * scale_lo + r;
  // Minimax polynomial of 2^r on [-1/2, 1/2], relative error 2e-9 before rounding.
  float p = 0.0001534581242594868f;
  p = p * r + 0.0013399930903688073f;
  p = p * r + 0.009618489071726799f;
  p = p * r + 0.05550328642129898f;
  p = p * r + 0.24022646248340607f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.0f;
  // Multiplying by 2^n, rather than adding n to the exponent bits of p, keeps a NaN a NaN.
  const float result = p * from_bits((to_bits(shifted) << 23) + (127u << 23));
  return t < -125.0f ? 0.0f : result;
}

// Combines all lanes into lanes[0], halving their number each time.
template <typename Op>
ASYNCOPD_INLINE void fold(float* lanes, Op op) {
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = op(lanes[l], lanes[l + half]);
  }
}

template <typename Type>
bool has_nan(const typename Type::Storage* row, int64_t vocab) {
  for (int64_t v = 0; v < vocab; ++v) {
    if (std::isnan(Type::load(row[v]))) return true;
  }
  return false;
}

template <typename Type>
double logsumexp_row(const typename Type::Storage* row, int64_t vocab, const Scale& scale) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float hi = scale.hi, lo = scale.lo;
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
      for (int l = 0; l < kLanes; ++l) lanes[l] += exp_scaled(block[v + l] - origin, hi, lo);
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
      const float z = Type::load(row[id]);
      // -inf - lse is -inf, except that lse may be -inf as well.
      const bool impossible = z == -kInf && !std::isnan(lse);
      logprobs[k] = impossible ? -kInf : static_cast<float>(z * scale.inv_temperature - lse);
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
  const double c = problem.inv_temperature * 1.4426950408889634074;  // log2(e)
  const float hi = static_cast<float>(c);
  const Scale scale{hi, static_cast<float>(c - hi), problem.inv_temperature};
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
