// LSE + gather of rows on CUDA. NOT YET RUN ON A GPU: compiled and inspected only.
//
// One block per row. A thread keeps an online pair (m, s), with s = sum exp((z - m) t) over the columns it has seen,
// and the pairs are merged at the end:
//   (m, s) + (m', s') = (M, s exp((m - M) t) + s' exp((m' - M) t)),  M = max(m, m'),   lse = M t + log(s).
// The limit is one read of the logits: V * 2 bytes a row for bf16 and fp16, V * 4 for fp32 (0.743 ms for 8192 rows of
// 151,936 in bf16 on an H100 SXM). Loads are 16 bytes wide wherever the row allows.
//
// Special values need no branches: exponentials are measured from origin(m), which is 0 while m is infinite. So an
// all -inf row has s = 0 and lse -inf, a +inf row s = inf and lse +inf, and a NaN reaches s and stays there.

#include "gather.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../cpu/gather.h"  // dtype and id codes, status values

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr float kInf = __builtin_huge_valf();

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

struct Pair {
  float max, sum;
};

__device__ __forceinline__ float origin(float max) { return isinf(max) ? 0.0f : max; }

// Factor that takes a sum measured from `from` to one measured from the larger maximum `to`. At from == -inf the sum
// is 0 or NaN: leave it alone, as 0 * exp2(-to) could be 0 * inf.
__device__ __forceinline__ float rescale(float from, float to, float scale) {
  return from == to || from == -kInf ? 1.0f : exp2f((from - origin(to)) * scale);
}

__device__ __forceinline__ Pair merge(Pair a, Pair b, float scale) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * rescale(a.max, max, scale) + b.sum * rescale(b.max, max, scale)};
}

__device__ __forceinline__ Pair shuffle_xor(Pair pair, int mask) {
  return {__shfl_xor_sync(~0u, pair.max, mask), __shfl_xor_sync(~0u, pair.sum, mask)};
}

// Adds Count columns, with one rescale for all of them; fmaxf ignores NaN, which then shows up in the sum.
template <int Count>
__device__ __forceinline__ void accumulate(Pair& pair, const float (&z)[Count], float scale) {
  float max = pair.max;
#pragma unroll
  for (int i = 0; i < Count; ++i) max = fmaxf(max, z[i]);
  const float start = origin(max);
  float sum = pair.sum * rescale(pair.max, max, scale);
#pragma unroll
  for (int i = 0; i < Count; ++i) sum += exp2f((z[i] - start) * scale);
  pair = {max, sum};
}

// 32 registers let 4 blocks of 512 threads share a multiprocessor, which are all the warps that it takes.
// max-registers: gather_kernel 32
template <typename T, typename Id>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* __restrict__ logits,  // [N, V], row stride `row_stride`
                  int64_t row_stride,
                  const Id* __restrict__ ids,  // [N, K]
                  int64_t vocab, int64_t num_ids, float inv_temperature, float scale,
                  float* __restrict__ logprobs,  // [N, K]
                  float* __restrict__ lse) {     // [N]
  constexpr int kVector = 16 / sizeof(T);
  const int64_t n = blockIdx.x;  // int64: n * row_stride passes 2^31 from row 14,135 on at V = 151,936
  const T* row = logits + n * row_stride;

  Pair pair{-kInf, 0.0f};
  // Columns before the first 16-byte boundary, then whole vectors, then the rest.
  const int64_t misaligned = (reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T);
  const int64_t head = min(vocab, misaligned == 0 ? int64_t{0} : kVector - misaligned);
  const int64_t vectors = (vocab - head) / kVector;
  const auto* body = reinterpret_cast<const uint4*>(row + head);
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 raw = __ldg(body + i);
    const T* values = reinterpret_cast<const T*>(&raw);
    float z[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[j] = to_float(values[j]);
    accumulate(pair, z, scale);
  }
  const int64_t tail = head + vectors * kVector;
  // Fewer than kVector columns on either side: one thread each.
  if (threadIdx.x < head) {
    const float z[1] = {to_float(row[threadIdx.x])};
    accumulate(pair, z, scale);
  }
  if (threadIdx.x < vocab - tail) {
    const float z[1] = {to_float(row[tail + threadIdx.x])};
    accumulate(pair, z, scale);
  }

  __shared__ Pair partial[kWarps];
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) pair = merge(pair, shuffle_xor(pair, mask), scale);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = pair;
  __syncthreads();
  // Every warp merges the same pairs in the same order, so that every thread ends with the same result.
  pair = partial[threadIdx.x % kWarps];
#pragma unroll
  for (int mask = kWarps / 2; mask > 0; mask >>= 1) pair = merge(pair, shuffle_xor(pair, mask), scale);

  // z t - lse = (z - M) t - log(s): both terms are small, while z t and lse may share leading digits.
  const float log_sum = logf(pair.sum);
  const float start = origin(pair.max);
  const float row_lse = fmaf(start, inv_temperature, log_sum);
  if (threadIdx.x == 0) lse[n] = row_lse;
  for (int64_t k = threadIdx.x; k < num_ids; k += kThreads) {
    const int64_t id = ids[n * num_ids + k];
    float value = -kInf;  // a pad
    if (id >= 0 && id < vocab) {
      const float z = to_float(row[id]);
      // -inf - lse is -inf, except that lse may be -inf as well.
      if (z != -kInf || isnan(row_lse)) value = (z - start) * inv_temperature - log_sum;
    } else if (id != -1) {
      value = __int_as_float(0x7fc00000);  // NaN: not an id
    }
    logprobs[n * num_ids + k] = value;
  }
}

struct Problem {
  const void* logits;
  const void* ids;
  int64_t row_stride, rows, vocab, num_ids;
  double inv_temperature;
  float* logprobs;
  float* lse;
  cudaStream_t stream;
};

template <typename T, typename Id>
void launch(const Problem& p) {
  const float scale = static_cast<float>(p.inv_temperature * 1.4426950408889634074);  // log2(e) / temperature
  gather_kernel<T, Id><<<static_cast<unsigned>(p.rows), kThreads, 0, p.stream>>>(
      static_cast<const T*>(p.logits), p.row_stride, static_cast<const Id*>(p.ids), p.vocab, p.num_ids,
      static_cast<float>(p.inv_temperature), scale, p.logprobs, p.lse);
}

template <typename T>
void launch(const Problem& p, int id_type) {
  id_type == asyncopd::kInt64 ? launch<T, int64_t>(p) : launch<T, int32_t>(p);
}

}  // namespace

int asyncopd_cuda_gather_logprobs(const void* logits, int dtype, int64_t row_stride, const void* ids, int id_type,
                                  int64_t rows, int64_t vocab, int64_t num_ids, double inv_temperature,
                                  float* logprobs, float* lse, int device, void* stream) {
  using namespace asyncopd;
  const bool known = (dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16) &&
                     (id_type == kInt32 || id_type == kInt64) && rows <= INT32_MAX;
  if (!known) return kBadArgument;
  if (rows == 0) return kOk;  // an empty grid is a launch error
  // This library has a CUDA runtime of its own (linked statically), whose current device is set here, not by torch.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return -static_cast<int>(error);
  const Problem problem{logits, ids,      row_stride, rows, vocab,
                        num_ids, inv_temperature, logprobs,   lse,  static_cast<cudaStream_t>(stream)};
  switch (dtype) {
    case kFloat32: launch<float>(problem, id_type); break;
    case kBFloat16: launch<__nv_bfloat16>(problem, id_type); break;
    default: launch<__half>(problem, id_type); break;
  }
  error = cudaGetLastError();
  return error == cudaSuccess ? kOk : -static_cast<int>(error);
}
