// The sampled head on the CPU: dispatch over instruction sets, work over threads, and the entries of the support sorted
// by id. The kernels are sparse_head.inl.

#include "sparse_head.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "isa.h"
#include "parallel.h"

namespace asyncopd {
namespace {

constexpr int kLanes = 64;    // independent partial sums: four AVX-512 registers, or sixteen of SSE
constexpr int kBlock = 1024;  // columns that are summed in fp32 at a time; 4 KiB of partial sums stay in L1
constexpr int kRun = 64;      // rows that are added up before they join the others

struct Problem {
  const void* hidden;
  const void* weight;
  const void* ids;
  const uint8_t* mask;
  int64_t hidden_stride, weight_stride, vocab, width, num_ids;
  double temperature, logit_scale, softcap;
};

// One product of a weighted sum of rows.
struct Term {
  uint32_t row;
  float factor;
};

struct Gradient {
  const float* grad;
  const float* logits;
  void* dhidden;
  Term* terms;      // [rows, num_ids]: id and dy of the entries that are no pads, from the left
  int64_t* counts;  // [rows]: how many there are
};

// The entries of the support sorted by id and, among equal ids, by row and column: those of id v are
// terms[offsets[v] .. offsets[v + 1]), each the row that names it and its dy.
struct Entries {
  const int64_t* offsets;  // [vocab + 1]
  const Term* terms;
};

// [vocab, width]. add: only rows that entries name are touched, and added to; else every row is written.
struct WeightGradient {
  void* rows;
  int64_t stride;
  bool add;
};

struct Types {
  int weight, hidden, gradient, id;  // gradient: of the weight
};

// What one thread works in, one row of the forward at a time.
struct Workspace {
  float* hidden;  // [width]
  uint32_t* ids;  // [num_ids, rounded up to 4]: those that are no pads
};

using WeightGradientFunction = void (*)(const Problem&, const Entries&, const WeightGradient&, int64_t begin,
                                        int64_t end);

// What one instruction set runs for some types. Rows [begin, end), or ids [begin, end) for the last; false when an id is
// out of range.
struct Kernels {
  bool (*forward)(const Problem&, const float* bias, float* logits, const Workspace&, int64_t begin, int64_t end);
  bool (*hidden_gradient)(const Problem&, const Gradient&, int64_t begin, int64_t end);
  WeightGradientFunction weight_gradient;
};

#define ASYNCOPD_KERNEL "sparse_head.inl"
#include "each_isa.h"

// Kernels without functions if they cannot run.
Kernels find_kernels(const Types& types, int64_t rows, int64_t vocab, int isa) {
  isa = resolve_isa(isa);
  constexpr int64_t kTooMany = int64_t{1} << 32;  // a Term's row
  if (isa < 0 || (types.id != kInt32 && types.id != kInt64) || rows >= kTooMany || vocab >= kTooMany) return Kernels{};
  return kSelect[isa](types);
}

// A counting sort: it is stable, and its counts are the offsets that are needed anyway. One thread: with V = 151,936
// and the bias's gradient it takes 1 ms for 32,768 entries and 55 ms for 4 million, 3 to 6 % of what dW takes.
// offsets [vocab + 1] come as zeros; terms has room for all entries.
void sort_by_id(const Gradient& gradient, int64_t rows, int64_t vocab, int64_t num_ids, int64_t* offsets, Term* terms) {
  for (int64_t n = 0; n < rows; ++n) {
    const Term* row = gradient.terms + n * num_ids;
    for (int64_t i = 0; i < gradient.counts[n]; ++i) ++offsets[row[i].row + 1];
  }
  // From here on offsets[v + 1] is where the next entry of v goes; after the last one that is where they end.
  for (int64_t v = 0, start = 0; v < vocab; ++v) {
    const int64_t count = offsets[v + 1];
    offsets[v + 1] = start;
    start += count;
  }
  for (int64_t n = 0; n < rows; ++n) {
    const Term* row = gradient.terms + n * num_ids;
    for (int64_t i = 0; i < gradient.counts[n]; ++i) {
      terms[offsets[row[i].row + 1]++] = Term{static_cast<uint32_t>(n), row[i].factor};
    }
  }
}

void bias_gradient(const Entries& entries, int64_t vocab, float* dbias) {
  for (int64_t v = 0; v < vocab; ++v) {
    double sum = 0.0;
    for (int64_t i = entries.offsets[v]; i < entries.offsets[v + 1]; ++i) sum += entries.terms[i].factor;
    dbias[v] = static_cast<float>(sum);
  }
}

// Calls body(begin, end) on ranges of ids: 4 MiB of gradient each where there are enough of them, since where the
// system hands out huge pages by itself, threads whose first writes meet in one would both clear it.
template <typename Body>
void parallel_ids(int64_t vocab, int64_t row_bytes, int threads, const Body& body) {
  constexpr int64_t kRangeBytes = int64_t{4} << 20;
  const int64_t fair = vocab / (8 * static_cast<int64_t>(std::max(1, threads)));
  const int64_t ids = std::max<int64_t>(1, std::min(fair, kRangeBytes / std::max<int64_t>(1, row_bytes)));
  const int64_t ranges = (vocab + ids - 1) / ids;
  parallel_rows(ranges, std::numeric_limits<int64_t>::max(), threads, [&](int64_t begin, int64_t end) {
    body(begin * ids, std::min(vocab, end * ids));
  });
}

}  // namespace
}  // namespace asyncopd

using namespace asyncopd;

int asyncopd_cpu_linear_gather_logits(const void* hidden, int64_t hidden_stride, int hidden_dtype, const void* weight,
                                      int64_t weight_stride, int dtype, const float* bias, const void* ids, int id_type,
                                      const uint8_t* mask, int64_t rows, int64_t vocab, int64_t width, int64_t num_ids,
                                      double temperature, double logit_scale, double softcap, float* logits,
                                      int threads, int isa) {
  const Kernels kernels = find_kernels({dtype, hidden_dtype, dtype, id_type}, rows, vocab, isa);
  if (kernels.forward == nullptr) return kBadArgument;
  const Problem problem{hidden, weight, ids,     mask,        hidden_stride, weight_stride,
                        vocab,  width,  num_ids, temperature, logit_scale,   softcap};
  std::atomic<bool> valid{true};
  parallel_rows(rows, num_ids * width, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> hidden_row(new float[width]);
    const std::unique_ptr<uint32_t[]> row_ids(new uint32_t[num_ids + 3]);
    const Workspace work{hidden_row.get(), row_ids.get()};
    if (!kernels.forward(problem, bias, logits, work, begin, end)) {
      valid.store(false, std::memory_order_relaxed);
    }
  });
  return valid.load() ? kOk : kBadId;
}

int asyncopd_cpu_linear_gather_logits_backward(const float* grad, const float* logits, const void* hidden,
                                               int64_t hidden_stride, int hidden_dtype, const void* weight,
                                               int64_t weight_stride, int dtype, const void* ids, int id_type,
                                               const uint8_t* mask, int64_t rows, int64_t vocab, int64_t width,
                                               int64_t num_ids, double temperature, double logit_scale, double softcap,
                                               void* dhidden, void* dweight, int64_t dweight_stride, int dweight_dtype,
                                               bool add, float* dbias, int threads, int isa) {
  const Kernels kernels = find_kernels({dtype, hidden_dtype, dweight_dtype, id_type}, rows, vocab, isa);
  if (kernels.forward == nullptr || kernels.weight_gradient == nullptr) return kBadArgument;
  const Problem problem{hidden, weight, ids,     mask,        hidden_stride, weight_stride,
                        vocab,  width,  num_ids, temperature, logit_scale,   softcap};
  const std::unique_ptr<Term[]> terms(new Term[rows * num_ids]);
  const std::unique_ptr<int64_t[]> counts(new int64_t[rows]);
  const Gradient gradient{grad, logits, dhidden, terms.get(), counts.get()};
  std::atomic<bool> valid{true};
  parallel_rows(rows, num_ids * width, threads, [&](int64_t begin, int64_t end) {
    if (!kernels.hidden_gradient(problem, gradient, begin, end)) valid.store(false, std::memory_order_relaxed);
  });
  if (!valid.load()) return kBadId;
  if (dweight == nullptr && dbias == nullptr) return kOk;

  const std::unique_ptr<int64_t[]> offsets(new int64_t[vocab + 1]());
  const std::unique_ptr<Term[]> sorted(new Term[rows * num_ids]);
  sort_by_id(gradient, rows, vocab, num_ids, offsets.get(), sorted.get());
  const Entries entries{offsets.get(), sorted.get()};
  if (dbias != nullptr) bias_gradient(entries, vocab, dbias);
  if (dweight != nullptr) {
    const int64_t row_bytes = width * (dweight_dtype == kFloat32 ? 4 : 2);
    const WeightGradient out{dweight, dweight_stride, add};
    parallel_ids(vocab, row_bytes, threads, [&](int64_t begin, int64_t end) {
      kernels.weight_gradient(problem, entries, out, begin, end);
    });
  }
  return kOk;
}
