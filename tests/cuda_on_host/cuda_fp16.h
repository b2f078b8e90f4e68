// The storage type of fp16 and its conversion, as csrc/cuda needs them.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t{value.bits} >> 15 << 31, exponent = value.bits >> 10 & 31u, mantissa = value.bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  // Subnormal halves are normal floats; 2^-24 is the unit of both.
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                        : std::ldexp(static_cast<float>(mantissa | 1024u), static_cast<int>(exponent) - 25);
  return sign ? -magnitude : magnitude;
}
