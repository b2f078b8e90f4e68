// Dtypes, exponentials and log-probabilities. Included by every kernel, once per instruction set; see isa.h for the
// rules.
//
// exp(x t) = 2^n 2^r with c = t log2(e) split into two floats: a one-float c would be off by the same relative amount
// everywhere, and that error would not average out.

struct Scale {
  float hi, lo;    // (1 / temperature) * log2(e), as a sum of two floats
  float smallest;  // below it an exponential counts as 0; finite
  double inv_temperature;
};

ASYNCOPD_INLINE Scale make_scale(double inv_temperature) {
  const double c = inv_temperature * 1.4426950408889634074;
  const float hi = static_cast<float>(c);
  const float smallest = static_cast<float>(-125.0 / c);
  const float lowest = std::numeric_limits<float>::lowest();
  return Scale{hi, static_cast<float>(c - hi), smallest > lowest ? smallest : lowest, inv_temperature};
}

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
  static ASYNCOPD_INLINE float store(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static ASYNCOPD_INLINE float load(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }
  static ASYNCOPD_INLINE uint16_t store(float value) {  // to nearest, ties to even
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
  }
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
  static ASYNCOPD_INLINE uint16_t store(float value) {  // to nearest, ties to even
    const uint32_t sign = (to_bits(value) >> 16) & 0x8000u;
    const uint32_t magnitude = to_bits(value) & 0x7fffffffu;
    // Adding 1/2 leaves a subnormal's 10 bits, rounded, at the end of the mantissa.
    const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - (126u << 23);
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN; inf and what overflows
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? special : finite));
  }
};

// Adding 1.5 * 2^23 rounds to an integer, left in the low mantissa bits; with the exponent bias, 127, added as well,
// those bits are the exponent field of 2^n.
constexpr float kRoundAndBias = 12582912.0f + 127.0f;

// exp(x t) for x <= 0; exactly 0 for -inf and below about 2^-125, NaN for NaN. Relative error 1e-7; on the baseline,
// without fused multiply-add, up to 6e-8 |x t|.
ASYNCOPD_INLINE float exp_scaled(float x, const Scale& scale) {
  const float shifted = x * scale.hi + kRoundAndBias;
  const float n = shifted - kRoundAndBias;
  float r = x * scale.hi - n;  // contracted to one fused multiply-add where there is FMA
  r = x * scale.lo + r;
  // Minimax polynomial of 2^r on [-1/2, 1/2], relative error 2e-9 before rounding.
  float p = 0.0001534581242594868f;
  p = p * r + 0.0013399930903688073f;
  p = p * r + 0.009618489071726799f;
  p = p * r + 0.05550328642129898f;
  p = p * r + 0.24022646248340607f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.0f;
  // Multiplying by 2^n, rather than adding n to the exponent bits of p, keeps a NaN a NaN.
  const float result = p * from_bits(to_bits(shifted) << 23);
  return x < scale.smallest ? 0.0f : result;
}

// exp((z[0] - origin) t) + .. + exp((z[3 stride] - origin) t), for an origin that no z exceeds: four side by side, since
// one exponential alone is a chain of operations that each wait for the one before. 2^-125 stands in for what is less,
// so this is for sums of which that is nothing. Relative error as exp_scaled; where not `exact` 2e-7 and up to 6e-8 |x t|
// more, for two operations less.
template <bool exact, int stride>
ASYNCOPD_INLINE float sum_of_exp(const float* z, float origin, const Scale& scale) {
  float x[4], shifted[4], n[4], r[4], p[4], power[4];
  for (int i = 0; i < 4; ++i) x[i] = z[i * stride] - origin;
  for (int i = 0; i < 4; ++i) x[i] = x[i] < scale.smallest ? scale.smallest : x[i];  // a NaN stays one
  for (int i = 0; i < 4; ++i) shifted[i] = x[i] * scale.hi + kRoundAndBias;
  for (int i = 0; i < 4; ++i) n[i] = shifted[i] - kRoundAndBias;
  for (int i = 0; i < 4; ++i) r[i] = x[i] * scale.hi - n[i];
  for (int i = 0; i < 4; ++i) power[i] = from_bits(to_bits(shifted[i]) << 23);
  if constexpr (exact) {  // as exp_scaled
    for (int i = 0; i < 4; ++i) r[i] = x[i] * scale.lo + r[i];
    for (int i = 0; i < 4; ++i) p[i] = 0.0001534581242594868f * r[i] + 0.0013399930903688073f;
    for (int i = 0; i < 4; ++i) p[i] = p[i] * r[i] + 0.009618489071726799f;
    for (int i = 0; i < 4; ++i) p[i] = p[i] * r[i] + 0.05550328642129898f;
    for (int i = 0; i < 4; ++i) p[i] = p[i] * r[i] + 0.24022646248340607f;
    for (int i = 0; i < 4; ++i) p[i] = p[i] * r[i] + 0.6931471824645996f;
  } else {  // the best polynomial of one degree less, relative error 1.1e-7
    for (int i = 0; i < 4; ++i) p[i] = 0.0013264727f * r[i] + 0.009671513f;
    for (int i = 0; i < 4; ++i) p[i] = p[i] * r[i] + 0.055507336f;
    for (int i = 0; i < 4; ++i) p[i] = p[i] * r[i] + 0.24022242f;
    for (int i = 0; i < 4; ++i) p[i] = p[i] * r[i] + 0.693147f;
  }
  for (int i = 0; i < 4; ++i) p[i] = p[i] * r[i] + 1.0f;
  return (p[0] * power[0] + p[1] * power[1]) + (p[2] * power[2] + p[3] * power[3]);
}

// exp(x) for any x: relative error below 2e-7, exactly 0 below about 2^-125, inf above the largest float, NaN for NaN.
ASYNCOPD_INLINE float exp_float(float x) {
  // As above with the exponent bias less one: 2^(n - 1) is a float up to n = 128.
  constexpr float kRound = 12582912.0f + 126.0f;
  const float shifted = x * 1.442695041f + kRound;
  const float n = shifted - kRound;
  // log(2) in two parts, the first of 9 bits, so that its product with n is exact with and without FMA.
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  // 2 e^r on |r| <= log(2) / 2: 2 + 2 r + r^2 q(r), q minimax; relative error 3e-9 before rounding.
  float p = 2.0f * 0.0013814539415761828f;
  p = p * r + 2.0f * 0.00836874544620514f;
  p = p * r + 2.0f * 0.04166838899254799f;
  p = p * r + 2.0f * 0.1666652113199234f;
  p = p * r + 2.0f * 0.4999999403953552f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  const float result = p * from_bits(to_bits(shifted) << 23);
  const float within = x < -86.5f ? 0.0f : result;
  return x > 88.8f ? std::numeric_limits<float>::infinity() : within;
}

// exp(x) for x <= 0 in fp64, relative error about 1e-15; exactly 0 for -inf and below -700, NaN for NaN.
ASYNCOPD_INLINE double exp_double(double x) {
  constexpr double kRound = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52 and the exponent bias, as above
  const double shifted = x * 1.4426950408889634074 + kRound;
  const double n = shifted - kRound;
  double r = x - n * 0.69314718036912382;  // the first 32 bits of log(2): the product is exact
  r = r - n * 1.9082149292705877e-10;
  // Minimax polynomial of e^r on |r| <= log(2) / 2, exactly 1 at 0; relative error 3e-16.
  double p = 2.777936716452852e-07;
  p = p * r + 2.764509769833405e-06;
  p = p * r + 2.480111596665722e-05;
  p = p * r + 0.00019841157897245611;
  p = p * r + 0.001388888925625238;
  p = p * r + 0.008333333395864088;
  p = p * r + 0.04166666666559336;
  p = p * r + 0.16666666666524038;
  p = p * r + 0.5000000000000083;
  p = p * r + 1.000000000000009;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -700.0 ? 0.0 : p * power;
}

template <typename Type>
bool has_nan(const typename Type::Storage* row, int64_t vocab) {
  for (int64_t v = 0; v < vocab; ++v) {
    if (std::isnan(Type::load(row[v]))) return true;
  }
  return false;
}

// log p of a logit: -inf - lse is -inf, except that lse may be -inf as well; a NaN lse makes it NaN.
ASYNCOPD_INLINE float normalized(float z, double lse, const Scale& scale) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  if (z == -kInf && !std::isnan(lse)) return -kInf;
  return static_cast<float>(z * scale.inv_temperature - lse);
}
