// Interface of the CPU row-gather kernel and its gradient. C ABI on raw pointers: nothing here knows about torch.
#pragma once

#include <cstdint>

#include "codes.h"

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

// The same from a row that comes a tile of columns at a time, [first, first + columns), ascending and without a gap.
// Between tiles a row's state is peaks [rows], sums [rows] and logprobs [rows, num_ids], which holds the logits met so
// far; with the last tile, the one whose `lse` is not null, logprobs and lse become what they are above, and kBadId is
// returned if an id lies outside [-1, V).
int asyncopd_cpu_gather_tile(const float* logits, int64_t row_stride, const int64_t* ids, int64_t rows, int64_t first,
                             int64_t columns, int64_t num_ids, double inv_temperature, float* peaks, double* sums,
                             float* logprobs, float* lse, int threads, int isa);

// The gradient of those log-probabilities in columns [first, first + columns), which the logits and dlogits point to;
// for every row n, with g[n, k] = grad[n, k], or 0 at pads:
//   dlogits[n, v] = (sum over k with ids[n, k] = v of g[n, k]  -  (sum_k g[n, k]) exp(logits[n, v] t - lse[n])) t
//
// grad      [rows, num_ids] float32, contiguous
// ids       as above, or -2: held by another shard of the vocabulary, which counts in sum_k and is no column; lse is
//           then that of the whole vocabulary
// dlogits   [rows, columns] dtype, row stride `out_stride`; may be the logits themselves
//
// A row whose gradients sum to exactly 0 does not look at its logits; where lse is -inf, exp(..) is 0. Sums are fp64,
// so that their order does not matter; the rest is fp32, rounded once to dtype. Returns as above; a row with an id out
// of range is left alone.
int asyncopd_cpu_gather_logprobs_backward(const float* grad, const void* logits, int dtype, int64_t row_stride,
                                          const float* lse, const void* ids, int id_type, int64_t rows, int64_t first,
                                          int64_t columns, int64_t vocab, int64_t num_ids, double inv_temperature,
                                          void* dlogits, int64_t out_stride,
                                          int threads, int isa);
}
