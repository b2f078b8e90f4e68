// Interface of the CUDA row-gather kernel; the mathematics and the codes are those of cpu/gather.h.
#pragma once

#include <cstdint>

extern "C" {

// As asyncopd_cpu_gather_logprobs, on device pointers, queued on `stream` (a cudaStream_t) of CUDA device `device`.
// Nothing is synchronised, so a bad id cannot be reported: nothing outside the row is read and its output is NaN.
// Returns 0, 2 for an unknown dtype or id type or a shape beyond the limits (2^30 columns, 2^31 - 1 rows), or the
// negative of a cudaError_t from the launch.
int asyncopd_cuda_gather_logprobs(const void* logits, int dtype, int64_t row_stride, const void* ids, int id_type,
                                  int64_t rows, int64_t vocab, int64_t num_ids, double inv_temperature,
                                  float* logprobs, float* lse, int device, void* stream);
}
