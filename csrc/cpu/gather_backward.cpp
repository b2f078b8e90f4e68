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

constexpr int kBlock = 64;  // columns: four AVX-512 registers
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

// What one thread works in, one row at a time: the entries whose columns are there, [num_ids] each.
struct Workspace {
  uint32_t* columns;
  uint32_t* owners;    // the last entry of the same column
  uint32_t* repeated;  // entries that are not the last one of their column
  float* grad;
  float* parts;        // the logit, then what its softmax contributes, then the gradient
  double* sums;        // of the gradients of a column, at its owner
  uint32_t* marks;     // [columns], or null where the results have room for the index of an entry
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
  // The workspace holds columns and entries as 32-bit numbers.
  if (function == nullptr || vocab >= int64_t{1} << 32 || num_ids >= int64_t{1} << 32) return kBadArgument;
  const Problem problem{grad,  logits, lse,     ids,             row_stride, first, columns,
                        vocab, num_ids, inv_temperature, dlogits,    out_stride};
  std::atomic<bool> valid{true};
  const bool narrow = dtype != kFloat32 && num_ids > int64_t{1} << 16;
  parallel_rows(rows, kElementsPerColumn * columns + kElementsPerId * num_ids, threads, [&](int64_t begin, int64_t end) {
    const int64_t room = num_ids + 1;  // an entry that is none may lie behind the others
    const std::unique_ptr<uint32_t[]> indices(new uint32_t[3 * room]);
    const std::unique_ptr<float[]> values(new float[2 * room]);
    const std::unique_ptr<double[]> sums(new double[num_ids]);
    const std::unique_ptr<uint32_t[]> marks(narrow ? new uint32_t[columns] : nullptr);
    const Workspace work{indices.get(), indices.get() + room, indices.get() + 2 * room,
                         values.get(),  values.get() + room,  sums.get(),
                         marks.get()};
    if (!function(problem, work, begin, end)) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load() ? kOk : kBadId;
}
