// As much of CUDA C++ as csrc/cuda needs, for a host compiler; machine.h runs it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "machine.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
// One per host thread, so the same for all fibres, static or dynamic.
#define __shared__ thread_local

using dim3 = cuda_on_host::Dim3;
// Those of the thread that runs; set whenever another one takes over.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::isinf;
using std::isnan;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <typename To, typename From>
inline To cuda_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return cuda_bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_bit_cast<float>(x); }
inline float __int_as_float(int x) { return cuda_bit_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// A vector that is not aligned is an error on a device, and would go unnoticed here.
template <typename T>
inline T __ldg(const T* address, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) cuda_on_host::fail("a misaligned load", line);
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <typename T>
inline T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

// ------------------------------------------------------------------------------------------------------ collectives

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_on_host::meet(cuda_on_host::Collective::kSyncThreads, 0, 0, 0, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return static_cast<int>(
      cuda_on_host::meet(cuda_on_host::Collective::kSyncThreadsOr, 0, predicate != 0, 0, line));
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  cuda_on_host::meet(cuda_on_host::Collective::kSyncWarp, mask, 0, 0, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return cuda_on_host::meet(cuda_on_host::Collective::kBallot, mask, predicate != 0, 0, line);
}

template <typename T>
inline T cuda_shuffle(cuda_on_host::Collective kind, unsigned mask, T value, int operand, int line) {
  return cuda_bit_cast<T>(cuda_on_host::meet(kind, mask, cuda_bit_cast<uint32_t>(value), operand, line));
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  return cuda_shuffle(cuda_on_host::Collective::kShuffle, mask, value, lane, line);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, int delta, int line = __builtin_LINE()) {
  return cuda_shuffle(cuda_on_host::Collective::kShuffleUp, mask, value, delta, line);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int line = __builtin_LINE()) {
  return cuda_shuffle(cuda_on_host::Collective::kShuffleXor, mask, value, lane_mask, line);
}

// --------------------------------------------------------------------------------------------------------- host API

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  const void* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

// What each kernel was told that it may have; a device allows 48 KiB without.
size_t& cuda_dynamic_shared_limit(const void* kernel);

template <typename... Arguments>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Arguments...), cudaFuncAttribute, int bytes) {
  cuda_dynamic_shared_limit(reinterpret_cast<const void*>(kernel)) = static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  if (config->dynamicSmemBytes > cuda_dynamic_shared_limit(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  const auto body = [&] { kernel(static_cast<Expected>(arguments)...); };
  const int status = cuda_on_host::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, body);
  return status == 0 ? cudaSuccess : cudaErrorLaunchFailure;
}
