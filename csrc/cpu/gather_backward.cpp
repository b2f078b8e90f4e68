// Gradient of LSE + gather on the CPU: dispatch over instruction sets, rows over threads. The kernel is
// gather_backward.inl.

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "gather.h"
#include "isa.h"
#include "order.h"
#include "parallel.h"

namespace asyncopd {
namespace {

constexpr int kBlock = 512;  // columns

struct Problem {
  const float* grad;
  const void* logits;
  const float* lse;
  const void* ids;
  int64_t row_stride, first, columns, vocab, num_ids;
  double inv_temperature;
  void* dlogits;
  int64_t out_stride;
};

// What one thread works in, one row at a time.
struct Workspace {
  uint64_t* order;  // [num_ids]: id and position, sorted
  float* logits;    // [num_ids]: at the ids
};

// Rows [begin, end); false when an id is out of range.
using RowsFunction = bool (*)(const Problem&, const Workspace&, int64_t begin, int64_t end);

#define ASYNCOPD_KERNEL "gather_backward.inl"
#include "each_isa.h"

}  // namespace
}  // namespace asyncopd

using namespace asyncopd;

int asyncopd_cpu_gather_logprobs_backward(const float* grad, const void* logits, int dtype, int64_t row_stride,
                                          const float* lse, const void* ids, int id_type, int64_t rows, int64_t first,
                                          int64_t columns, int64_t vocab, int64_t num_ids, double inv_temperature,
                                          void* dlogits, int64_t out_stride,
                                          int threads, int isa) {
  isa = resolve_isa(isa);
  if (isa < 0 || (id_type != kInt32 && id_type != kInt64)) return kBadArgument;
  const RowsFunction function = kSelect[isa](dtype, id_type);
  // An id and its position share a 64-bit key.
  if (function == nullptr || vocab >= int64_t{1} << 32 || num_ids >= int64_t{1} << 32) return kBadArgument;
  const Problem problem{grad,  logits, lse,     ids,             row_stride, first, columns,
                        vocab, num_ids, inv_temperature, dlogits,    out_stride};
  std::atomic<bool> valid{true};
  parallel_rows(rows, columns, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint64_t[]> order(new uint64_t[num_ids]);
    const std::unique_ptr<float[]> at_ids(new float[num_ids]);
    const Workspace work{order.get(), at_ids.get()};
    if (!function(problem, work, begin, end)) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load() ? kOk : kBadId;
}
