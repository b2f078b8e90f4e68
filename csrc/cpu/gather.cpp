// LSE + gather of rows on the CPU: dispatch over instruction sets, rows over threads. The kernel is gather.inl.

#include "gather.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "parallel.h"

namespace asyncopd {
namespace {

constexpr int kBlock = 512;  // columns; 2 KiB of fp32 stay in L1 between the two passes
constexpr int kLanes = 64;   // independent partial results: four AVX-512 registers, or sixteen of SSE

struct Problem {
  const void* logits;
  const void* ids;
  int64_t row_stride, vocab, num_ids;
  double inv_temperature;
  float* logprobs;
  float* lse;
};

// Rows [begin, end); false when an id is out of range.
using RowsFunction = bool (*)(const Problem&, int64_t begin, int64_t end);

#define ASYNCOPD_KERNEL "gather.inl"
#include "each_isa.h"

}  // namespace
}  // namespace asyncopd

using namespace asyncopd;

int asyncopd_cpu_gather_logprobs(const void* logits, int dtype, int64_t row_stride, const void* ids, int id_type,
                                 int64_t rows, int64_t vocab, int64_t num_ids, double inv_temperature,
                                 float* logprobs, float* lse, int threads, int isa) {
  isa = resolve_isa(isa);
  if (isa < 0 || (id_type != kInt32 && id_type != kInt64)) return kBadArgument;
  const RowsFunction function = kSelect[isa](dtype, id_type);
  if (function == nullptr) return kBadArgument;
  const Problem problem{logits, ids, row_stride, vocab, num_ids, inv_temperature, logprobs, lse};
  std::atomic<bool> valid{true};
  parallel_rows(rows, vocab, threads, [&](int64_t begin, int64_t end) {
    if (!function(problem, begin, end)) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load() ? kOk : kBadId;
}
