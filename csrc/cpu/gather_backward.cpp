// Gradient of LSE + gather on the CPU: dispatch over instruction sets, rows over threads. The kernel is
// gather_backward.inl.

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "gather.h"
#include "isa.h"
#include "parallel.h"

namespace asyncopd {
namespace {

constexpr int kBlock = 512;  // columns
constexpr int kLanes = 16;   // of a vector: one AVX-512 register, or four of SSE
// Work beside that of a logit that is read once: an exponential and a write a column, and what an id takes.
constexpr int64_t kElementsPerColumn = 2, kElementsPerId = 16;

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

// What one thread works in, one row at a time: the columns that the row's ids name, each once.
struct Workspace {
  uint32_t* table;    // [mask + 1]: a hash table of the columns; 1 + the index of the column, or 0
  uint64_t mask;      // a power of two, less 1
  uint32_t* columns;  // [num_ids]
  float* parts;       // [num_ids]: their logits, then what their softmax contributes
  double* sums;       // [num_ids]: of their gradients
};

// At most a quarter of the table is in use, so that a search rarely meets another column.
uint64_t table_size(int64_t num_ids) {
  uint64_t size = 16;
  while (size < 4 * static_cast<uint64_t>(num_ids)) size *= 2;
  return size;
}

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
  // Columns and indices of entries are 32 bits wide in the workspace.
  if (function == nullptr || vocab >= int64_t{1} << 32 || num_ids >= (int64_t{1} << 32) - 1) return kBadArgument;
  const Problem problem{grad,  logits, lse,     ids,             row_stride, first, columns,
                        vocab, num_ids, inv_temperature, dlogits,    out_stride};
  std::atomic<bool> valid{true};
  const uint64_t size = table_size(num_ids);
  parallel_rows(rows, kElementsPerColumn * columns + kElementsPerId * num_ids, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint32_t[]> indices(new uint32_t[size + num_ids]);
    const std::unique_ptr<float[]> parts(new float[num_ids]);
    const std::unique_ptr<double[]> sums(new double[num_ids]);
    const Workspace work{indices.get(), size - 1, indices.get() + size, parts.get(), sums.get()};
    if (!function(problem, work, begin, end)) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load() ? kOk : kBadId;
}
