// Interface of the sampled head: logits of a language-model head at K ids a row, and their gradient, without ever
// computing the other V - K. C ABI on raw pointers: nothing here knows about torch.
#pragma once

#include <cstdint>

#include "codes.h"

extern "C" {

// With s = logit_scale, T = temperature, and softcap(y) = c tanh(y / c), or y where softcap is 0:
//   logits[n, k] = softcap(s (sum_h hidden[n, h] weight[v, h] + bias[v])) / T,    v = ids[n, k]
//
// hidden   [rows, width]   hidden_dtype, which is dtype or float32; row stride `hidden_stride` elements (any sign),
//                          unit stride inside a row
// weight   [vocab, width]  dtype, row stride `weight_stride`, likewise
// bias     [vocab]         float32, or null
// ids      [rows, num_ids] id_type, contiguous; -1 is a pad (logit -inf)
// mask     [rows]          bytes, or null: 0 leaves a row out (logits -inf; its hidden state is not read)
// logits   [rows, num_ids] float32, contiguous
// threads  rows are split over at most this many threads; the result does not depend on it
// isa      an instruction-set level of asyncopd_cpu_isa_name, or -1 for the best one of this machine
//
// Products are summed in fp32 inside a block of columns and in fp64 across blocks; the rest is fp64, rounded once.
// Returns kOk, kBadId (an id outside [-1, vocab), in a masked row as well: nothing outside the weight was read) or
// kBadArgument (unknown dtype or id type, 2^32 rows or ids, or an instruction set that this machine lacks).
int asyncopd_cpu_linear_gather_logits(const void* hidden, int64_t hidden_stride, int hidden_dtype, const void* weight,
                                      int64_t weight_stride, int dtype, const float* bias, const void* ids, int id_type,
                                      const uint8_t* mask, int64_t rows, int64_t vocab, int64_t width, int64_t num_ids,
                                      double temperature, double logit_scale, double softcap, float* logits,
                                      int threads, int isa);

// The gradient of those logits. With dy = grad s / T (1 - tanh^2), where tanh = logits T / c and the last factor is
// left out if softcap is 0, and sums over the entries (n, k) that are no pads and whose row takes part:
//   dhidden[n] = sum_k dy[n, k] weight[ids[n, k]]
//   dweight[v] = sum over (n, k) with ids[n, k] = v of dy[n, k] hidden[n];     dbias[v] likewise, of dy[n, k]
// A row takes part if the mask lets it and any of its gradients is not 0; of any other nothing but its ids is read.
//
// grad, logits [rows, num_ids] float32, contiguous
// dhidden      [rows, width]   hidden_dtype, contiguous; every row is written
// dweight      [vocab, width]  dweight_dtype, row stride `dweight_stride`, or null. Every row is written, and is exactly
//                              0 where no id names it; with `add` the rows that ids name are added to, and no other is
//                              read or written
// dbias        [vocab]         float32, or null; every element is written
//
// Sums are taken in the order of the entries and rounded once: in fp32 inside a run of them and in fp64 across
// runs; dbias in fp64.
// Returns as above; after kBadId the outputs hold nothing of use.
int asyncopd_cpu_linear_gather_logits_backward(const float* grad, const float* logits, const void* hidden,
                                               int64_t hidden_stride, int hidden_dtype, const void* weight,
                                               int64_t weight_stride, int dtype, const void* ids, int id_type,
                                               const uint8_t* mask, int64_t rows, int64_t vocab, int64_t width,
                                               int64_t num_ids, double temperature, double logit_scale, double softcap,
                                               void* dhidden, void* dweight, int64_t dweight_stride, int dweight_dtype,
                                               bool add, float* dbias, int threads, int isa);
}
