// Kernels with one fault each, and one without: what tests/backends/test_cuda_on_host.py holds the machine to.
// Each writes one float a thread.

#include <cuda_runtime.h>

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

constexpr int kThreads = 64;

// 2080, the sum of 1..64, in four ways that have to agree; else -1.
__global__ void __launch_bounds__(kThreads) correct(float* out) {
  __shared__ float sums[kThreads / 32];
  __shared__ int values[kThreads];
  __shared__ int counter;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  // By shuffles within warps, then through shared memory.
  float sum = static_cast<float>(thread + 1);
  for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
  if (lane == 0) sums[warp] = sum;
  if (thread == 0) counter = 0;
  __syncthreads();
  const int total = static_cast<int>(sums[0] + sums[1]);
  // By atomics.
  atomicAdd(&counter, thread + 1);
  // By a scan of each warp, whose last lane tells the others; and by votes: a lane's value is its bits'.
  int prefix = thread + 1, voted = 0;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(~0u, prefix, delta);
    if (lane >= delta) prefix += other;
  }
  for (int bit = 0; bit < 7; ++bit) voted += __popc(__ballot_sync(~0u, (thread + 1) >> bit & 1)) << bit;
  // The neighbour's through shared memory, which half a warp waits for alone.
  values[thread] = __shfl_sync(~0u, prefix, 31);
  if (lane < 16) {
    __syncwarp(0xffffu);
    voted += values[32 * warp + (lane + 1) % 16] - prefix;
    voted += prefix - values[thread];
  }
  const bool agree = __syncthreads_or(voted != values[thread]) == 0 && values[0] + values[32] == total;
  out[blockIdx.x * kThreads + thread] = agree && counter == total ? static_cast<float>(total) : -1.0f;
}

__global__ void __launch_bounds__(kThreads) missing_barrier(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1.0f;
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

// The counter may be one further before everybody has read it: the second barrier is not there.
__global__ void __launch_bounds__(kThreads) racing_ahead(float* out) {
  __shared__ int counter;
  if (threadIdx.x == 0) counter = 0;
  __syncthreads();
  for (int i = 0; i < 3; ++i) {
    const int seen = counter;
    __syncthreads();
    if (threadIdx.x == 0) counter = seen + 1;
    out[threadIdx.x] = static_cast<float>(seen);
  }
}

__global__ void __launch_bounds__(kThreads) divergent_barrier(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0.0f;
}

__global__ void __launch_bounds__(kThreads) barriers_of_two_lines(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0.0f;
}

__global__ void __launch_bounds__(kThreads) divergent_vote(float* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = static_cast<float>(__ballot_sync(~0u, 1));
}

__global__ void __launch_bounds__(kThreads) shuffle_from_nobody(float* out) {
  float value = 1.0f;
  if (threadIdx.x % 32 < 16) value = __shfl_sync(0xffffu, value, 20);
  out[threadIdx.x] = value;
}

__global__ void __launch_bounds__(kThreads) unwritten_shared(float* out) {
  __shared__ float values[kThreads];
  float* dynamic = reinterpret_cast<float*>(dynamic_shared);
  if (threadIdx.x < 32) values[threadIdx.x] = 1.0f;
  if (threadIdx.x >= 48) dynamic[threadIdx.x] = values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = values[threadIdx.x] + dynamic[threadIdx.x];
}

__global__ void __launch_bounds__(kThreads) beyond_shared(float* out) {
  reinterpret_cast<float*>(dynamic_shared)[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = 0.0f;
}

__global__ void __launch_bounds__(kThreads) misaligned(float* out) {
  const uint4 value = __ldg(reinterpret_cast<const uint4*>(out + threadIdx.x));
  out[threadIdx.x] = static_cast<float>(value.x);
}

}  // namespace

#define LAUNCHER(kernel)                                          \
  int run_##kernel(float* out, int64_t blocks, int64_t shared) {  \
    cudaLaunchConfig_t config{};                                  \
    config.gridDim = dim3(static_cast<unsigned>(blocks));         \
    config.blockDim = dim3(kThreads);                             \
    config.dynamicSmemBytes = static_cast<size_t>(shared);        \
    return cudaLaunchKernelEx(&config, kernel, out);              \
  }

extern "C" {
LAUNCHER(correct)
LAUNCHER(missing_barrier)
LAUNCHER(racing_ahead)
LAUNCHER(divergent_barrier)
LAUNCHER(barriers_of_two_lines)
LAUNCHER(divergent_vote)
LAUNCHER(shuffle_from_nobody)
LAUNCHER(unwritten_shared)
LAUNCHER(beyond_shared)
LAUNCHER(misaligned)
}
