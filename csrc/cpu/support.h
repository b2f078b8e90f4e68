// Interface of the CPU extraction kernels: top-K log-probabilities and sampled supports. C ABI on raw pointers.
#pragma once

#include <cstdint>

#include "codes.h"

extern "C" {

// For every row n < rows of logits, with t = 1 / temperature:
//   lse[n]          = log(sum_v exp(logits[n, v] t))
//   ids[n, 0..k-1]  = columns of the k largest logits: NaN first, value descending, id ascending among equals
//   logprobs[n, i]  = logits[n, ids[n, i]] t - lse[n]
//
// logits    [rows, vocab] dtype, row stride `row_stride` elements (any sign), unit stride inside a row
// ids       [rows, k]     int64, contiguous; k <= vocab
// logprobs  [rows, k]     float32, contiguous
// lse       [rows]        float32
// threads   rows are split over at most this many threads; the result does not depend on it
// isa       an instruction-set level of asyncopd_cpu_isa_name, or -1 for the best one of this machine
//
// Returns kOk, or kBadArgument (unknown dtype, k outside [0, vocab], vocab of 2^32 or more, or an instruction set that
// this machine lacks).
int asyncopd_cpu_topk_logprobs(const void* logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab,
                               int64_t k, double inv_temperature, int64_t* ids, float* logprobs, float* lse,
                               int threads, int isa);

// For every row: its `head` most probable ids, in the order above, with log-weight 0; then num_samples independent
// draws from the rest of its distribution, by inverse CDF in the order of the columns, with
//   log_weights = lse over the rest - log(num_samples) - logits t,   the smallest normal float where that is 0.
// Uniform numbers are those of asyncopd/backends/reference/philox.py, with the key streams[n] and row number 0, or, if
// streams is null, the key `seed` and row number n. Rows with nothing but -inf outside of the head are padded with
// id -1, log-weight and log-probability -inf. Rows with NaN or +inf outside of it draw uniformly.
//
// streams      [rows] int64, or null
// sampled_ids  [rows] int64, or null: takes the place of the first draw, unless it is in the head
// ids, log_weights, logprobs  [rows, head + num_samples], contiguous; lse [rows]
//
// Returns as above, or kBadId: a sampled id outside [0, vocab) or with logit -inf.
int asyncopd_cpu_sample_support(const void* logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab,
                                int64_t num_samples, int64_t head, int64_t seed, const int64_t* streams,
                                const int64_t* sampled_ids, double inv_temperature, int64_t* ids, float* log_weights,
                                float* logprobs, float* lse, int threads, int isa);
}
