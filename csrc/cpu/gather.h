// Interface of the CPU row-gather kernel. C ABI on raw pointers: nothing here knows about torch.
#pragma once

#include <cstdint>

namespace asyncopd {

// The codes are shared with asyncopd/backends/cpu.py and cuda.py, and with csrc/cuda.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum IdType : int { kInt32 = 0, kInt64 = 1 };

// What a launcher returns. CUDA launchers return the negative of a cudaError_t instead of the last two.
enum Status : int { kOk = 0, kBadId = 1, kBadArgument = 2 };

}  // namespace asyncopd

extern "C" {

// For every row n < rows of logits, with t = 1 / temperature:
//   lse[n]         = log(sum_v exp(logits[n, v] * t))
//   logprobs[n, k] = logits[n, ids[n, k]] * t - lse[n]
//
// logits    [rows, vocab]   dtype, row stride `row_stride` elements (any sign), unit stride inside a row
// ids       [rows, num_ids] id_type, contiguous; -1 is a pad (log-probability -inf)
// logprobs  [rows, num_ids] float32, contiguous
// lse       [rows]          float32
// threads   rows are split over at most this many threads; the result does not depend on it
// isa       index into the build's instruction-set levels, or -1 for the best one of this machine
//
// Returns kOk, kBadId (an id outside [-1, vocab): nothing outside the row was read, its output is NaN) or
// kBadArgument (unknown dtype or id type, or an instruction set that this machine lacks).
int asyncopd_cpu_gather_logprobs(const void* logits, int dtype, int64_t row_stride, const void* ids, int id_type,
                                 int64_t rows, int64_t vocab, int64_t num_ids, double inv_temperature,
                                 float* logprobs, float* lse, int threads, int isa);

// Name of an instruction-set level that this build contains and this machine can run, or nullptr.
// Levels are numbered from 0 (the baseline), each better than the one before.
const char* asyncopd_cpu_isa_name(int isa);
}
