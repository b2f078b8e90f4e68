// Interface of the CUDA top-K kernels; the codes are those of cpu/codes.h.
#pragma once

#include <cstdint>

extern "C" {

// Into how many parts the rows are to be split so that they fill a device, 1 at least.
int64_t asyncopd_cuda_topk_parts(int dtype, int64_t rows, int64_t vocab, int64_t k, int64_t multiprocessors);

// Bytes of scratch that this many parts need; 0 for one part.
int64_t asyncopd_cuda_topk_scratch_bytes(int dtype, int64_t rows, int64_t vocab, int64_t k, int64_t parts);

// The k largest of each row of logits [rows, vocab], unit column stride: value descending, id ascending among equals,
// NaN first. logprobs [rows, k] and lse [rows] are those of logits times inv_temperature. scratch: aligned to 16 bytes,
// contents free before and undefined after. Queued on `stream` (a cudaStream_t) of CUDA device `device`.
// Results do not depend on rows or on parts. Returns 0, 2 for an unknown dtype, k outside of 1..min(vocab, 1024) or a
// shape beyond the limits (2^30 columns, 2^31 - 1 rows, 65535 parts), or the negative of a cudaError_t from a launch.
int asyncopd_cuda_topk_logprobs(const void* logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab,
                                int64_t k, double inv_temperature, int64_t parts, void* scratch, int64_t* ids,
                                float* logprobs, float* lse, int device, void* stream);
}
