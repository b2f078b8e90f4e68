// Interface of the [N, K] loss kernel: both divergences, every option. C ABI on raw pointers.
#pragma once

#include <cstdint>

#include "codes.h"

extern "C" {

enum KlDivergence : int { kReverse = 0, kForward = 1 };
enum KlTail : int { kDrop = 0, kBucket = 1, kRenormalize = 2 };
enum KlBaseline : int { kNoBaseline = 0, kMean = 1, kLeaveOneOut = 2 };

// The fields of LossSpec (asyncopd/backends/loss_spec.py); NaN stands for None.
struct KlOptions {
  int divergence, tail, baseline;
  bool sampled;          // normalize is "sampled"
  bool head_is_certain;  // entries of log-weight 0 were not drawn
  bool needs_policy;     // log mu = -log M - log w means something
  bool behaviour;        // the advantage is the behaviour policy's
  double ratio_cap, clip_eps, m2_budget, proximal_cap;
};

constexpr int kKlMetrics = 7;

// Row losses, coefficients (the gradient of a row is sum_i coef_i grad log p_i) and metrics of a support.
// asyncopd/backends/reference/kl.py is the specification; sums are fp32 over at most num_ids / 16 terms, then fp64.
//
// student, teacher, log_weights [rows, num_ids] float32, contiguous: log p, log q, log w
// ids       [rows, num_ids] id_type, contiguous; below 0 is a pad
// mask      [rows]          bytes, 0 for a row that does not count; or nullptr
// proximal  [rows, num_ids] float32 log p_prox, or nullptr
// denominator               what the coefficients and the loss are divided by, as a float; negative: the number of rows
//           that count, or 1
// losses    [rows]          float32, not divided; or nullptr
// loss      [1]             float32, the sum of the losses; or nullptr
// coef      [rows, num_ids] float32
// metrics   [kKlMetrics]    float32, the fields of LossMetrics; the percentile is a histogram's, to 0.4 %;
//           or null: half of the time of the plain loss goes into them
// threads   rows are split over at most this many threads; the result does not depend on it
// isa       index into the build's instruction-set levels, or -1 for the best one of this machine
//
// Returns kOk, kBadArgument, or, with outputs that mean nothing, kSampledSupport (a tail other than drop on entries
// that were sampled) or kNoPolicy (a correction on rows that all have certain entries).
int asyncopd_cpu_kl_rows(const float* student, const float* teacher, const float* log_weights, const void* ids,
                         int id_type, const uint8_t* mask, const float* proximal, int64_t rows, int64_t num_ids,
                         const KlOptions* options, double denominator, float* losses, float* loss, float* coef,
                         float* metrics, int threads, int isa);

// values [rows, columns] times factors[n * stride] in place; a factor of 0 gives 0, whatever the values are.
void asyncopd_cpu_scale_rows(float* values, int64_t rows, int64_t columns, const float* factors, int64_t stride,
                             int threads);
}
