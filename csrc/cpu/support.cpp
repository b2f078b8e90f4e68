// Top-K log-probabilities and sampled supports on the CPU: dispatch over instruction sets, rows over threads, working
// memory. The kernels are summary.inl, topk.inl and support.inl.

#include "support.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "isa.h"
#include "order.h"
#include "parallel.h"

namespace asyncopd {
namespace {

struct Problem {
  const void* logits;
  int64_t row_stride, vocab, head, num_samples;  // top-K is a head without samples
  int64_t seed;
  const int64_t* streams;
  const int64_t* sampled_ids;
  double inv_temperature;
  int64_t* ids;
  float* log_weights;
  float* logprobs;
  float* lse;
};

constexpr int64_t kElementsPerId = 64;  // the work of choosing an id, in logits that are read once
constexpr int kCacheSlots = 16;
constexpr int kCacheWidth = 64;  // columns of a group

// What select_top works in: logits that may be among the k largest, in ascending order of their ids.
struct Selection {
  float* classes;   // top_threshold
  int32_t* values;  // [top_capacity(k) + kSelectPad]: order_bits
  uint32_t* ids;    // [top_capacity(k)]
  uint64_t* keys;   // [k]
};

// What one thread works in, one row at a time. Uninitialised.
struct Workspace {
  float* peaks;          // [groups]
  float* sums;           // [groups]
  double* cdf;           // [groups]
  Selection selection;
  uint64_t* taken;       // [head]: ids of the head, ascending
  int64_t* touched;      // [head]: groups that hold some of them
  double* touched_sums;  // [head]
  double* uniforms;      // [num_samples, rounded up to 16]
  double* cache;         // [kCacheSlots, kCacheWidth]: cumulative sums of the groups last drawn from
  int64_t cached[kCacheSlots];  // which
};

// Rows [begin, end); false when a sampled id is impossible.
using RowsFunction = bool (*)(const Problem&, const Workspace&, int64_t begin, int64_t end);

#define ASYNCOPD_KERNEL "support.inl"
#include "each_isa.h"

// Hands out aligned pieces of one allocation; the first pass, without memory, measures.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

Workspace lay_out(const Problem& problem, Arena& arena) {
  const int64_t groups = (problem.vocab + kCacheWidth - 1) / kCacheWidth;
  const int64_t head = problem.head;
  Workspace work;
  work.peaks = arena.take<float>(groups);
  work.sums = arena.take<float>(groups);
  work.cdf = arena.take<double>(groups);
  work.selection.classes = arena.take<float>(4 * head + kCacheWidth);
  work.selection.values = arena.take<int32_t>(baseline::top_capacity(head) + baseline::kSelectPad);
  work.selection.ids = arena.take<uint32_t>(baseline::top_capacity(head));
  work.selection.keys = arena.take<uint64_t>(head);
  work.taken = arena.take<uint64_t>(head);
  work.touched = arena.take<int64_t>(head);
  work.touched_sums = arena.take<double>(head);
  work.uniforms = arena.take<double>(problem.num_samples + 16);
  work.cache = arena.take<double>(kCacheSlots * kCacheWidth);
  return work;
}

int run(const Problem& problem, int dtype, int64_t rows, int threads, int isa) {
  isa = resolve_isa(isa);
  const RowsFunction function = isa < 0 ? nullptr : kSelect[isa](dtype);
  // Ids share a 64-bit key with the value that they are sorted by.
  if (function == nullptr || problem.head < 0 || problem.head > problem.vocab || problem.num_samples < 0 ||
      problem.vocab >= int64_t{1} << 32) {
    return kBadArgument;
  }
  Arena measure(nullptr);
  lay_out(problem, measure);
  std::atomic<bool> valid{true};
  const int64_t row_elements = problem.vocab + kElementsPerId * (problem.head + problem.num_samples);
  parallel_rows(rows, row_elements, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> memory(new char[measure.used() + 64]);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    Arena arena(memory.get() + (64 - address % 64));
    const Workspace work = lay_out(problem, arena);
    if (!function(problem, work, begin, end)) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load() ? kOk : kBadId;
}

}  // namespace
}  // namespace asyncopd

using namespace asyncopd;

int asyncopd_cpu_topk_logprobs(const void* logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab,
                               int64_t k, double inv_temperature, int64_t* ids, float* logprobs, float* lse,
                               int threads, int isa) {
  Problem problem{};
  problem.logits = logits;
  problem.row_stride = row_stride;
  problem.vocab = vocab;
  problem.head = k;
  problem.inv_temperature = inv_temperature;
  problem.ids = ids;
  problem.logprobs = logprobs;
  problem.lse = lse;
  return run(problem, dtype, rows, threads, isa);
}

int asyncopd_cpu_sample_support(const void* logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab,
                                int64_t num_samples, int64_t head, int64_t seed, const int64_t* streams,
                                const int64_t* sampled_ids, double inv_temperature, int64_t* ids, float* log_weights,
                                float* logprobs, float* lse, int threads, int isa) {
  const Problem problem{logits,      row_stride,      vocab, head,        num_samples, seed, streams,
                        sampled_ids, inv_temperature, ids,   log_weights, logprobs,    lse};
  return run(problem, dtype, rows, threads, isa);
}
