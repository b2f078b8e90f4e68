// The storage type of fp16 and its conversion, as csrc/cuda needs them.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t bits = value.bits, sign = bits >> 15 << 31, exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  // Subnormal halves are normal floats; 2^-24 is the unit of both.
  const float digits = static_cast<float>(exponent == 0 ? mantissa : mantissa | 1024u);
  const float magnitude = std::ldexp(digits, exponent == 0 ? -24 : static_cast<int>(exponent) - 25);
  return sign ? -magnitude : magnitude;
}
