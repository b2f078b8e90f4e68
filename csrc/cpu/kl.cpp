// The [N, K] loss kernel on the CPU: rows over threads, M2PO's threshold, metrics. The kernel itself is kl.inl.

#include "kl.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace asyncopd {
namespace {

constexpr int kLanes = 16;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kRestFloor = 8 * FLT_EPSILON, kTiny = FLT_MIN;

// Bins are the upper 16 bits of a float that is not negative: 128 to an octave, infinity and NaN at the end.
constexpr int64_t kBins = 1 << 15;

struct Problem {
  const float *student, *teacher, *log_w;
  const void* ids;
  const uint8_t* mask;
  const float* proximal;
  int64_t num_ids;
  KlOptions options;
  int32_t certain_mask;  // 1 where entries of log-weight 0 were not drawn
  bool has_cap, clips, seeks_threshold, measures;
  float log_cap, log_low, log_high, log_proximal_cap;
  float *losses, *coef;
};

// Some entries and all that is computed for them. Arrays of one struct cannot overlap, which lets the compiler
// vectorise without asking.
struct alignas(64) Group {
  float log_w[kLanes], log_p[kLanes], log_q[kLanes];  // -inf, -inf, 0 where not valid
  float proximal[kLanes], log_mu[kLanes];
  float weight[kLanes], teacher[kLanes];  // w p, w q
  float omega[kLanes], value[kLanes];     // what weighs an entry in the gradient, and in the loss
  float signal[kLanes], centred[kLanes], coef[kLanes];
  int32_t valid[kLanes], drawn[kLanes];  // 0 or 1
  int32_t changed[kLanes];               // a correction changed its gradient
  int32_t bin[kLanes];                   // of its ratio
};

struct Tile {
  Group *begin, *end;
};

// Sums over the rows of a block.
struct Totals {
  double student_mass = 0.0, teacher_mass = 0.0, effective_entries = 0.0, coef_sum = 0.0, ratio_sum = 0.0;
  int64_t rows = 0, rows_without_certain = 0;  // rows that have entries
  int64_t entries = 0, certain = 0, drawn = 0, changed = 0;

  void add(const Totals& other) {
    student_mass += other.student_mass;
    teacher_mass += other.teacher_mass;
    effective_entries += other.effective_entries;
    coef_sum += other.coef_sum;
    ratio_sum += other.ratio_sum;
    rows += other.rows;
    rows_without_certain += other.rows_without_certain;
    entries += other.entries;
    certain += other.certain;
    drawn += other.drawn;
    changed += other.changed;
  }
};

// Two histograms of ratios, or the counts and the sums of second moments. Half a megabyte that only exists where it is
// used: ratios lie within a few octaves, and zeros for all of them would take longer than a small batch.
class Histogram {
 public:
  // Bins low .. high of both count from now on.
  void cover(int64_t low, int64_t high) {
    if (low < begin_ || high >= end_) grow(low, high);
  }

  int64_t* of(int64_t which) { return bins_.get() + which * kBins; }
  int64_t at(int64_t which, int64_t bin) const {
    return bin < begin_ || bin >= end_ ? 0 : bins_.get()[which * kBins + bin];
  }
  int64_t end() const { return end_; }

 private:
  void grow(int64_t low, int64_t high) {
    constexpr int64_t kOctave = 128;
    low = low / kOctave * kOctave;
    high = (high / kOctave + 1) * kOctave;
    if (bins_ == nullptr) {
      bins_.reset(new int64_t[2 * kBins]);
      begin_ = end_ = low;
    }
    const int64_t begin = std::min(begin_, low), end = std::max(end_, high);
    for (int64_t which = 0; which < 2; ++which) {
      std::fill(of(which) + begin, of(which) + begin_, 0);
      std::fill(of(which) + end_, of(which) + end, 0);
    }
    begin_ = begin;
    end_ = end;
  }

  std::unique_ptr<int64_t[]> bins_;
  int64_t begin_ = 0, end_ = 0;
};

using RowsFunction = void (*)(const Problem&, const Tile&, Histogram&, int64_t begin, int64_t end, Totals&);

#define ASYNCOPD_KERNEL "kl.inl"
#include "each_isa.h"

// What threads work in. A thread takes one and gives it back; integers are summed over all of them at the end, so it
// does not matter which.
class Scratches {
 public:
  struct Scratch {
    std::unique_ptr<Group[]> groups;
    Histogram histogram;
  };

  explicit Scratches(int64_t groups) : groups_(groups) {}

  std::unique_ptr<Scratch> take() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<Scratch> scratch = std::move(idle_.back());
        idle_.pop_back();
        return scratch;
      }
    }
    std::unique_ptr<Scratch> scratch(new Scratch);
    scratch->groups.reset(new Group[groups_]);
    return scratch;
  }

  void give_back(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(scratch));
  }

  // One bin of one of the two histograms, over all threads.
  int64_t bin(int64_t which, int64_t index) const {
    int64_t sum = 0;
    for (const auto& scratch : idle_) sum += scratch->histogram.at(which, index);
    return sum;
  }

  // Behind the last bin that counts anything.
  int64_t end() const {
    int64_t last = 0;
    for (const auto& scratch : idle_) last = std::max(last, scratch->histogram.end());
    return last;
  }

 private:
  const int64_t groups_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> idle_;
};

struct Launch {
  RowsFunction function;
  int64_t rows, num_ids;
  bool short_rows;
  int threads;
};

// Runs the kernel over all rows. Blocks of rows do not depend on the threads, and their sums are added in order.
Totals run(const Launch& launch, const Problem& problem, Scratches& scratches) {
  constexpr int64_t kBlockEntries = 4096;
  const int64_t width = std::max<int64_t>(1, launch.num_ids);
  const int64_t block = (std::max<int64_t>(1, kBlockEntries / width) + kLanes - 1) / kLanes * kLanes;
  const int64_t blocks = (launch.rows + block - 1) / block;
  const int64_t groups = launch.short_rows ? launch.num_ids : (width + kLanes - 1) / kLanes;
  std::vector<Totals> totals(static_cast<size_t>(blocks));
  // An entry costs about as much as reading five floats.
  parallel_rows(blocks, 5 * block * width, launch.threads, [&](int64_t begin, int64_t end) {
    std::unique_ptr<Scratches::Scratch> scratch = scratches.take();
    const Tile tile{scratch->groups.get(), scratch->groups.get() + groups};
    for (int64_t b = begin; b < end; ++b) {
      launch.function(problem, tile, scratch->histogram, b * block, std::min(launch.rows, (b + 1) * block),
                      totals[static_cast<size_t>(b)]);
    }
    scratches.give_back(std::move(scratch));
  });
  Totals sum;
  for (const Totals& part : totals) sum.add(part);
  return sum;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// tau^2 with sum over the bindable d of min(d, tau^2) = budget times their number; infinity where all of them are
// within the budget. The sum is increasing in tau^2: the bin of the root is found from the first pass's histogram, then
// the root among that bin's values by a histogram of their lower 16 bits. Integers until the end: sums have no order.
double second_moment_threshold(const Scratches& scratches, const float* d, int64_t size, double budget, int threads) {
  int64_t count = 0;
  for (int64_t b = 0; b < kBins; ++b) count += scratches.bin(0, b);
  const double spent = static_cast<double>(count) * budget;
  double below = 0.0;     // sum of the values below
  int64_t above = count;  // number of the others
  for (int64_t b = 0; b < kBins; ++b) {
    const int64_t inside = scratches.bin(0, b);
    const double low = float_of(static_cast<uint32_t>(b) << 16);
    if (std::isinf(low)) break;
    const double next = b + 1 == kBins ? low : float_of(static_cast<uint32_t>(b + 1) << 16);
    const double ulp = float_of((static_cast<uint32_t>(b) << 16) + 1) - low;
    const double sum = static_cast<double>(inside) * low + static_cast<double>(scratches.bin(1, b)) * ulp;
    const double after = below + sum;
    const int64_t left = above - inside;
    // The root is at or below `next`.
    if (after + (left == 0 ? 0.0 : static_cast<double>(left) * next) >= spent && above > 0) {
      if (inside == 0) return (spent - below) / static_cast<double>(above);
      std::vector<std::atomic<int64_t>> values(1 << 16);
      parallel_rows(size, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const uint32_t bits = bits_of(d[i]);
          if (static_cast<int64_t>(bits >> 16) == b) values[bits & 0xffffu].fetch_add(1, std::memory_order_relaxed);
        }
      });
      for (uint32_t v = 0; v < 1 << 16 && above > 0; ++v) {
        const double value = float_of((static_cast<uint32_t>(b) << 16) + v);
        const double root = (spent - below) / static_cast<double>(above);
        if (root <= value) return root;
        const int64_t here = values[v].load();
        below += static_cast<double>(here) * value;
        above -= here;
      }
      if (above > 0) return (spent - below) / static_cast<double>(above);
      return kInf;
    }
    below = after;
    above = left;
  }
  // Infinite ones alone are left, or nothing.
  return above > 0 ? (spent - below) / static_cast<double>(above) : kInf;
}

// The smallest ratio that 99 % do not exceed, as the middle of its bin.
float percentile_99(const Scratches& scratches, int64_t drawn) {
  const int64_t rank = drawn - drawn / 100;
  int64_t seen = drawn;  // from the top, because there are few
  for (int64_t b = scratches.end() - 1; b > 0; --b) {
    seen -= scratches.bin(0, b) + scratches.bin(1, b);
    if (seen < rank) {
      const uint32_t low = static_cast<uint32_t>(b) << 16;
      return low >= 0x7f800000u ? (low == 0x7f800000u ? kInf : std::numeric_limits<float>::quiet_NaN())
                                : float_of(low + 0x8000u);
    }
  }
  return 0.0f;
}

void write_metrics(const Totals& totals, const Scratches& scratches, float* metrics) {
  const double rows = static_cast<double>(std::max<int64_t>(1, totals.rows));
  const double drawn = static_cast<double>(std::max<int64_t>(1, totals.drawn));
  metrics[0] = static_cast<float>(totals.student_mass / rows);
  metrics[1] = static_cast<float>(totals.teacher_mass / rows);
  metrics[2] = static_cast<float>(totals.effective_entries / rows);
  metrics[3] = static_cast<float>(totals.coef_sum / rows);
  metrics[4] = static_cast<float>(totals.ratio_sum / drawn);
  metrics[5] = totals.drawn == 0 ? 0.0f : percentile_99(scratches, totals.drawn);
  metrics[6] = static_cast<float>(static_cast<double>(totals.changed) / drawn);
}

int refusal(const Totals& totals, const KlOptions& options) {
  if (options.tail != kDrop && totals.certain != totals.entries) return kSampledSupport;
  const bool all_certain = totals.rows > 0 && totals.rows_without_certain == 0;
  return options.needs_policy && options.head_is_certain && all_certain ? kNoPolicy : kOk;
}

float log_or_infinity(double x) { return std::isnan(x) ? kInf : static_cast<float>(std::log(x)); }

}  // namespace
}  // namespace asyncopd

using namespace asyncopd;

int asyncopd_cpu_kl_rows(const float* student, const float* teacher, const float* log_weights, const void* ids,
                         int id_type, const uint8_t* mask, const float* proximal, int64_t rows, int64_t num_ids,
                         const KlOptions* options, float* losses, float* coef, float* metrics, int threads, int isa) {
  isa = resolve_isa(isa);
  // A lane counts its entries in 32 bits.
  if (isa < 0 || (id_type != kInt32 && id_type != kInt64) || num_ids > INT32_MAX) return kBadArgument;
  const bool clipped = !std::isnan(options->clip_eps), budgeted = !std::isnan(options->m2_budget);
  const bool capped = !std::isnan(options->ratio_cap);
  const bool corrects = clipped || budgeted || capped || proximal != nullptr || options->behaviour;
  const bool scored = options->divergence == kReverse && options->tail == kDrop;
  if (corrects && !(scored && options->needs_policy)) return kBadArgument;

  Problem problem{};
  problem.student = student;
  problem.teacher = teacher;
  problem.log_w = log_weights;
  problem.ids = ids;
  problem.mask = mask;
  problem.proximal = proximal;
  problem.num_ids = num_ids;
  problem.options = *options;
  problem.certain_mask = options->head_is_certain ? 1 : 0;
  problem.has_cap = !std::isnan(options->ratio_cap);
  problem.log_cap = log_or_infinity(options->ratio_cap);
  problem.log_proximal_cap = log_or_infinity(options->proximal_cap);
  problem.measures = metrics != nullptr;
  problem.losses = losses;
  problem.coef = coef;

  const bool short_rows = num_ids < kLanes;
  const Launch launch{kSelect[isa](id_type, short_rows), rows, num_ids, short_rows, threads};
  const int64_t groups = std::max<int64_t>(1, short_rows ? num_ids : (num_ids + kLanes - 1) / kLanes);
  if (budgeted) {
    problem.seeks_threshold = true;
    Scratches moments(groups);
    const Totals totals = run(launch, problem, moments);
    if (const int status = refusal(totals, *options)) return status;
    const double squared = second_moment_threshold(moments, coef, rows * num_ids, options->m2_budget, threads);
    problem.seeks_threshold = false;
    problem.log_high = static_cast<float>(std::sqrt(std::max(0.0, squared)));
    problem.log_low = -problem.log_high;
  } else if (clipped) {
    problem.log_high = static_cast<float>(std::log1p(options->clip_eps));
    problem.log_low = options->clip_eps < 1.0 ? static_cast<float>(std::log1p(-options->clip_eps)) : -kInf;
  }
  problem.clips = clipped || budgeted;
  Scratches scratches(groups);
  const Totals totals = run(launch, problem, scratches);
  if (const int status = refusal(totals, *options)) return status;
  if (metrics != nullptr) write_metrics(totals, scratches, metrics);
  return kOk;
}
