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

constexpr int kBlock = 2048;       // columns; 8 KiB of fp32 stay in L1 between the two passes
constexpr int kRun = 512;          // columns that are summed in fp32
constexpr int kLanes = 16;         // independent partial sums: one AVX-512 register, or four of SSE
constexpr int kStep = 4 * kLanes;  // columns at a time, and independent partial maxima
constexpr int64_t kElementsPerId = 8;  // the work of an id, in logits that are read once

struct Problem {
  const void* logits;
  const void* ids;
  int64_t row_stride, vocab, num_ids;
  double inv_temperature;
  float* logprobs;
  float* lse;
};

// Columns [first, first + columns) of every row.
struct Tile {
  const float* logits;
  const int64_t* ids;
  int64_t row_stride, first, columns, num_ids;
  double inv_temperature;
  float* peaks;
  double* sums;
  float* logprobs;
  float* lse;
};

// Rows [begin, end); false when an id is out of range.
using RowsFunction = bool (*)(const Problem&, int64_t begin, int64_t end);

struct Functions {
  RowsFunction rows;
  bool (*tile_rows)(const Tile&, int64_t begin, int64_t end);
};

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
  const RowsFunction function = kSelect[isa](dtype, id_type).rows;
  if (function == nullptr) return kBadArgument;
  const Problem problem{logits, ids, row_stride, vocab, num_ids, inv_temperature, logprobs, lse};
  std::atomic<bool> valid{true};
  parallel_rows(rows, vocab + kElementsPerId * num_ids, threads, [&](int64_t begin, int64_t end) {
    if (!function(problem, begin, end)) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load() ? kOk : kBadId;
}

int asyncopd_cpu_gather_tile(const float* logits, int64_t row_stride, const int64_t* ids, int64_t rows, int64_t first,
                             int64_t columns, int64_t num_ids, double inv_temperature, float* peaks, double* sums,
                             float* logprobs, float* lse, int threads, int isa) {
  isa = resolve_isa(isa);
  if (isa < 0) return kBadArgument;
  const auto function = kSelect[isa](kFloat32, kInt64).tile_rows;
  const Tile tile{logits, ids, row_stride, first, columns, num_ids, inv_temperature, peaks, sums, logprobs, lse};
  std::atomic<bool> valid{true};
  parallel_rows(rows, columns + kElementsPerId * num_ids, threads, [&](int64_t begin, int64_t end) {
    if (!function(tile, begin, end)) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load() ? kOk : kBadId;
}
