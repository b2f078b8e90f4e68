// What the kernels that stream rows of logits share: 16-byte loads of a row at any address, the online sum of its
// exponentials, and the log-probabilities that come of it.
//
// A thread keeps a pair (m, s), with s = sum exp((z - m) t) over the columns it has seen, and pairs are merged:
//   (m, s) + (m', s') = (M, s exp((m - M) t) + s' exp((m' - M) t)),  M = max(m, m'),   lse = m t + log(s).
// Any m near the maximum will do. It is moved only when a logit passes it by kSlack bits, so nearly every vector is
// added without a rescale, and s and the rounding of a later rescale stay small.
//
// Special values need no branches: exponentials are measured from origin(m), which is 0 while m is infinite. So an
// all -inf row has s = 0 and lse -inf, a +inf row s = inf and lse +inf, and a NaN reaches s and stays there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace asyncopd {

constexpr float kInf = __builtin_huge_valf();
constexpr float kSlack = 8.0f;      // bits: s is at most 2^8 times the number of columns
constexpr int kMaxVocab = 1 << 30;  // columns are counted in 32 bits, and a little beyond the end of a row
constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLargest = 3.4028234663852886e38;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7fc00000); }

// A row in slots of 16 bytes, of which slot 0 begins at or before the row: so slots are aligned, and the first and the
// last one may be there in part.
template <typename T>
struct Row {
  static constexpr int kColumns = 16 / sizeof(T);  // of a slot

  const T* start;
  int vocab;
  int lead;  // columns of slot 0 that lie before the row

  __device__ __forceinline__ Row(const T* row, int64_t columns)
      : start(row),
        vocab(static_cast<int>(columns)),
        lead(static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T))) {}

  __device__ __forceinline__ int slots() const { return (lead + vocab + kColumns - 1) / kColumns; }
  __device__ __forceinline__ int first_column(int slot) const { return slot * kColumns - lead; }

  // The bits of a slot, -inf where it lies outside of the row or is not below `end`.
  __device__ __forceinline__ uint4 load(int slot, int end) const {
    const int first = first_column(slot);
    if (slot < end && first >= 0 && first + kColumns <= vocab) {
      return __ldg(reinterpret_cast<const uint4*>(start + first));
    }
    return load_partial(first, slot < end);
  }

  __device__ __forceinline__ uint4 load_partial(int first, bool there) const {
    constexpr uint32_t kBits = sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, __half> ? 0xfc00fc00u : 0xff80ff80u;
    uint32_t words[4] = {kBits, kBits, kBits, kBits};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (!there || static_cast<unsigned>(first + j) >= static_cast<unsigned>(vocab)) continue;
      if constexpr (sizeof(T) == 4) {
        words[j] = reinterpret_cast<const uint32_t*>(start)[first + j];
      } else {
        const uint32_t bits = reinterpret_cast<const uint16_t*>(start)[first + j];
        const int shift = j % 2 * 16;
        words[j / 2] = (words[j / 2] & ~(0xffffu << shift)) | bits << shift;
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  static __device__ __forceinline__ void unpack(const uint4& raw, float (&z)[kColumns]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      // The top halves of fp32; written so, one instruction each.
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        z[j] = __uint_as_float(j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u);
      }
    } else {
      T values[kColumns];
      memcpy(values, &raw, sizeof raw);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) z[j] = to_float(values[j]);
    }
  }
};

// exp2 of what is added to a sum that is no smaller than 2^-kSlack: a result below 2^-126 may as well be 0, which is
// one instruction where exp2f takes four.
__device__ __forceinline__ float exp2_term(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float origin(float max) { return isinf(max) ? 0.0f : max; }

// Factor that takes a sum measured from `from` to one measured from the larger `to`; 0 from -inf, where the sum is 0 or
// NaN and stays so.
__device__ __forceinline__ float rescale(float from, float to, float scale) {
  return from == to ? 1.0f : exp2f((from - origin(to)) * scale);
}

// scale = log2(e) / temperature throughout.
struct Pair {
  float max, sum;
};

__device__ __forceinline__ Pair merge(Pair a, Pair b, float scale) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * rescale(a.max, max, scale) + b.sum * rescale(b.max, max, scale)};
}

__device__ __forceinline__ Pair shuffle_xor(Pair pair, int mask) {
  return {__shfl_xor_sync(~0u, pair.max, mask), __shfl_xor_sync(~0u, pair.sum, mask)};
}

// The pair of a block's threads, the same in all of them. partial: shared; free to be used again after a barrier.
template <int kThreads>
__device__ __forceinline__ Pair merge_block(Pair pair, Pair (&partial)[kThreads / 32], float scale) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32 && (kWarps & (kWarps - 1)) == 0, "one warp merges the warps' pairs");
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) pair = merge(pair, shuffle_xor(pair, mask), scale);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = pair;
  __syncthreads();
  // Every warp merges the same pairs in the same order, so that every thread ends with the same result.
  pair = partial[threadIdx.x % kWarps];
#pragma unroll
  for (int mask = kWarps / 2; mask > 0; mask >>= 1) pair = merge(pair, shuffle_xor(pair, mask), scale);
  return pair;
}

// NaN only if all are.
template <int kCount>
__device__ __forceinline__ float largest(const float (&z)[kCount]) {
  float top = z[0];
#pragma unroll
  for (int j = 1; j < kCount; ++j) top = fmaxf(top, z[j]);
  return top;
}

// A thread's pair while it streams.
struct Accumulator {
  float max = -kInf, start = 0.0f, sum = 0.0f;  // start = origin(max)

  // What a vector of logits was like: its largest, and whether one is NaN.
  struct Seen {
    float top;
    bool nan;
  };

  template <int kCount>
  __device__ __forceinline__ Seen add(const float (&z)[kCount], float scale, float slack) {
    const float top = largest(z);
    if (top > max + slack) {
      sum *= rescale(max, top, scale);
      max = top;
      start = origin(top);
    }
    // As a tree: shorter chains of additions, and fewer roundings on the way of each term.
    float terms[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) terms[j] = exp2_term((z[j] - start) * scale);
#pragma unroll
    for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
      for (int j = 0; j + step < kCount; j += 2 * step) terms[j] += terms[j + step];
    }
    sum += terms[0];
    return {top, isnan(terms[0])};
  }

  __device__ __forceinline__ Pair pair() const { return {max, sum}; }
};

// The temperature as kernels take it: finite, however small it is.
struct Scale {
  float inv_temperature, inv_temperature_low;  // their sum is 1 / temperature to 48 bits
  float scale;                                 // log2(e) / temperature
  float slack;                                 // kSlack in units of the logits
};

inline Scale make_scale(double inv_temperature) {
  const auto bounded = [](double value) { return static_cast<float>(value < kLargest ? value : kLargest); };
  const double scale = inv_temperature * kLog2E;
  const float high = bounded(inv_temperature);
  const float low = inv_temperature < kLargest ? static_cast<float>(inv_temperature - high) : 0.0f;
  return {high, low, bounded(scale), bounded(kSlack / scale)};
}

// A number as the sum of two floats. The intrinsics are never fused into other operations.
struct Twofold {
  float high, low;
};

__device__ __forceinline__ Twofold sum_of(float a, float b) {
  const float sum = __fadd_rn(a, b), of_b = __fsub_rn(sum, a);
  return {sum, __fadd_rn(__fsub_rn(a, __fsub_rn(sum, of_b)), __fsub_rn(b, of_b))};
}

// Of a whole row; both results are rounded about once. z t - lse = (z - M) t - log(s): both terms are small, while z t
// and lse may share leading digits.
struct RowLogSumExp {
  float start, log_sum, lse;
  Scale scale;

  __device__ __forceinline__ RowLogSumExp(Pair pair, Scale s)
      : start(origin(pair.max)), log_sum(logf(pair.sum)), scale(s) {
    lse = times_temperature_plus({start, 0.0f}, log_sum);
  }

  __device__ __forceinline__ float logprob(float z) const {
    // -inf - lse is -inf, except that lse may be -inf as well.
    if (z == -kInf && !isnan(lse)) return -kInf;
    return times_temperature_plus(sum_of(z, -start), -log_sum);
  }

 private:
  // x / temperature + b. Infinities and NaN have no rounding errors to be kept.
  __device__ __forceinline__ float times_temperature_plus(Twofold x, float b) const {
    const float t = scale.inv_temperature, product = __fmul_rn(x.high, t);
    const float rough = __fadd_rn(product, b);
    if (isinf(rough) || isnan(rough)) return rough;
    const float error = fmaf(x.high, t, -product) + fmaf(x.high, scale.inv_temperature_low, x.low * t);
    const Twofold sum = sum_of(product, b);
    return sum.high + (sum.low + error);
  }
};

// <<< >>> as a call, which a host compiler understands too (tests/cuda_on_host).
template <typename... Expected, typename... Actual>
cudaError_t launch(void (*kernel)(Expected...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   Actual... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace asyncopd
