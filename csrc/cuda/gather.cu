// LSE + gather of rows on CUDA. NOT YET RUN ON A GPU: compiled, inspected, and run thread by thread on a CPU.
//
// One block per row; row.cuh has the arithmetic. The limit is one read of the logits: V * 2 bytes a row for bf16 and
// fp16, V * 4 for fp32 (0.743 ms for 8192 rows of 151,936 in bf16 on an H100 SXM).

#include "gather.h"

#include "../cpu/codes.h"
#include "row.cuh"

namespace {

using namespace asyncopd;

constexpr int kThreads = 512;

// 32 registers let 4 blocks of 512 threads share a multiprocessor, which are all the warps that it takes.
// max-registers: gather_kernel 32
template <typename T, typename Id>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* __restrict__ logits,  // [N, V], row stride `row_stride`
                  int64_t row_stride,
                  const Id* __restrict__ ids,  // [N, K]
                  int64_t vocab, int64_t num_ids, Scale scale,
                  float* __restrict__ logprobs,  // [N, K]
                  float* __restrict__ lse) {     // [N]
  __shared__ Pair partial[kThreads / 32];
  const int64_t n = blockIdx.x;  // int64: n * row_stride passes 2^31 from row 14,135 on at V = 151,936
  const Row<T> row(logits + n * row_stride, vocab);

  Accumulator sum;
  const int slots = row.slots();
#pragma unroll 2
  for (int slot = threadIdx.x; slot < slots; slot += kThreads) {
    float z[Row<T>::kColumns];
    Row<T>::unpack(row.load(slot, slots), z);
    sum.add(z, scale.scale, scale.slack);
  }
  const RowLogSumExp result(merge_block<kThreads>(sum.pair(), partial, scale.scale), scale);
  if (threadIdx.x == 0) lse[n] = result.lse;
  for (int64_t k = threadIdx.x; k < num_ids; k += kThreads) {
    const int64_t id = ids[n * num_ids + k];
    float value = -kInf;  // a pad
    if (id >= 0 && id < vocab) {
      value = result.logprob(to_float(row.start[id]));
    } else if (id != -1) {
      value = quiet_nan();  // not an id
    }
    logprobs[n * num_ids + k] = value;
  }
}

struct Problem {
  const void* logits;
  const void* ids;
  int64_t row_stride, rows, vocab, num_ids;
  Scale scale;
  float* logprobs;
  float* lse;
  cudaStream_t stream;
};

template <typename T, typename Id>
cudaError_t launch_gather(const Problem& p) {
  return launch(gather_kernel<T, Id>, dim3(static_cast<unsigned>(p.rows)), kThreads, 0, p.stream,
                static_cast<const T*>(p.logits), p.row_stride, static_cast<const Id*>(p.ids), p.vocab, p.num_ids,
                p.scale, p.logprobs, p.lse);
}

template <typename T>
cudaError_t launch_gather(const Problem& p, int id_type) {
  return id_type == kInt64 ? launch_gather<T, int64_t>(p) : launch_gather<T, int32_t>(p);
}

}  // namespace

int asyncopd_cuda_gather_logprobs(const void* logits, int dtype, int64_t row_stride, const void* ids, int id_type,
                                  int64_t rows, int64_t vocab, int64_t num_ids, double inv_temperature,
                                  float* logprobs, float* lse, int device, void* stream) {
  const bool known = (dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16) &&
                     (id_type == kInt32 || id_type == kInt64) && rows <= INT32_MAX && vocab <= kMaxVocab;
  if (!known) return kBadArgument;
  if (rows == 0) return kOk;  // an empty grid is a launch error
  // This library has a CUDA runtime of its own (linked statically), whose current device is set here, not by torch.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return -static_cast<int>(error);
  const Problem problem{logits, ids,  row_stride, rows, vocab, num_ids, make_scale(inv_temperature), logprobs,
                        lse,    static_cast<cudaStream_t>(stream)};
  switch (dtype) {
    case kFloat32: error = launch_gather<float>(problem, id_type); break;
    case kBFloat16: error = launch_gather<__nv_bfloat16>(problem, id_type); break;
    default: error = launch_gather<__half>(problem, id_type); break;
  }
  return error == cudaSuccess ? kOk : -static_cast<int>(error);
}
