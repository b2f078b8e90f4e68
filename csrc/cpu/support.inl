// Top-K log-probabilities and sampled supports of rows, from the row summary. Included once per instruction set; see
// isa.h.
//
// Draws. With the head taken out, the group masses, measured from the largest logit that is left, have a cumulative
// sum; a uniform number picks a group in it, and its rest a column in the group's own cumulative sum, made from its
// logits. Exponentials are fp32, sums fp64. A group that loses columns to the head is summed again without them:
// subtracting would leave the rounding of what is taken away. Probabilities are right to the rounding of a group's fp32
// sum, about 1e-7 of that group's mass.

#include "topk.inl"

static_assert(kCacheWidth == kGroup, "");

// u[i], i < count rounded up to 16: see asyncopd/backends/reference/philox.py. Eight counters at a time.
inline void philox_uniforms(uint64_t stream, uint64_t row, int64_t count, double* u) {
  constexpr int kBlocks = 8;
  for (int64_t first = 0; 2 * first < count; first += kBlocks) {
    uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      c0[b] = static_cast<uint32_t>(first + b);
      c1[b] = 0;
      c2[b] = static_cast<uint32_t>(row);
      c3[b] = static_cast<uint32_t>(row >> 32);
    }
    uint32_t k0 = static_cast<uint32_t>(stream), k1 = static_cast<uint32_t>(stream >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int b = 0; b < kBlocks; ++b) {
        const uint64_t p0 = static_cast<uint64_t>(c0[b]) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2[b]) * 0xCD9E8D57u;
        c0[b] = static_cast<uint32_t>(p1 >> 32) ^ c1[b] ^ k0;
        c1[b] = static_cast<uint32_t>(p1);
        c2[b] = static_cast<uint32_t>(p0 >> 32) ^ c3[b] ^ k1;
        c3[b] = static_cast<uint32_t>(p0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t even = static_cast<int64_t>(static_cast<uint64_t>(c0[b] >> 6) << 26 | c1[b] >> 6);
      const int64_t odd = static_cast<int64_t>(static_cast<uint64_t>(c2[b] >> 6) << 26 | c3[b] >> 6);
      u[2 * (first + b)] = (static_cast<double>(even) + 0.5) * 0x1p-52;
      u[2 * (first + b) + 1] = (static_cast<double>(odd) + 0.5) * 0x1p-52;
    }
  }
}

// Cumulative sums of n masses, non-decreasing; returns the total. Runs of eight, then where each begins: one chain of
// additions would wait n times. Overwrites mass, which cdf may be.
ASYNCOPD_INLINE double cumulate(double* mass, int64_t n, double* cdf) {
  constexpr int kRun = 8;
  const int64_t whole = n / kRun * kRun;
  for (int64_t j = 0; j < whole; j += kRun) {
    for (int i = 1; i < kRun; ++i) mass[j + i] += mass[j + i - 1];
  }
  double before = 0.0;
  for (int64_t j = 0; j < whole; j += kRun) {
    const double after = before + mass[j + kRun - 1];
    for (int i = 0; i < kRun; ++i) cdf[j + i] = before + mass[j + i];
    before = after;
  }
  for (int64_t j = whole; j < n; ++j) cdf[j] = before += mass[j];
  return before;
}

// First index of a non-decreasing cdf [n] whose value is above target, or n. Counting, not bisecting, which would wait
// for a load, or for a branch mispredicted, at every step.
ASYNCOPD_INLINE int64_t first_above(const double* cdf, int64_t n, double target) {
  int64_t index = 0;
  for (int64_t last = kGroup - 1; last < n; last += kGroup) index += cdf[last] <= target ? kGroup : 0;
  const int64_t end = index + kGroup < n ? index + kGroup : n;
  int64_t below = 0;
  for (int64_t i = index; i < end; ++i) below += cdf[i] <= target;
  return index + below;
}

ASYNCOPD_INLINE int64_t first_at_least(const uint64_t* ascending, int64_t n, uint64_t value) {
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    if (ascending[low + half] < value) {
      low += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return low;
}

// What is left of one row when its head is taken away.
template <typename Type>
struct Rest {
  const typename Type::Storage* row;
  int64_t vocab;
  const Scale& scale;
  Workspace work;  // a copy: `cached` is this row's
  int64_t head;

  // Cumulative sums of group g in cdf [kGroup], measured from its largest logit left, which is returned. That logit
  // is neither NaN nor +inf.
  float group_cdf(int64_t g, double* cdf) const {
    alignas(64) float z[kGroup];
    const int64_t start = g * kGroup;
    if (vocab - start >= kGroup) {
      for (int j = 0; j < kGroup; ++j) z[j] = Type::load(row[start + j]);
    } else {
      load_block<Type>(row + start, static_cast<int>(vocab - start), -kInf, z);
    }
    for (int64_t i = first_at_least(work.taken, head, start); i < head; ++i) {
      const int64_t j = static_cast<int64_t>(work.taken[i]) - start;
      if (j >= kGroup) break;
      z[j] = -kInf;
    }
    const float peak = largest(z, kGroup);
    const float origin = peak == -kInf ? 0.0f : peak;
    alignas(64) double mass[kGroup];
    for (int j = 0; j < kGroup; ++j) mass[j] = exp_scaled(z[j] - origin, scale);
    cumulate(mass, kGroup, cdf);
    return peak;
  }

  double* slot(int64_t g) const { return work.cache + g % kCacheSlots * kGroup; }

  // Sums the groups of the head again. Returns how many.
  int64_t take_head_out() {
    int64_t n = 0;
    for (int64_t i = 0; i < head; ++i) {
      const int64_t g = static_cast<int64_t>(work.taken[i]) / kGroup;
      if (n > 0 && work.touched[n - 1] == g) continue;
      work.peaks[g] = group_cdf(g, slot(g));
      work.cached[g % kCacheSlots] = g;
      work.touched[n] = g;
      work.touched_sums[n++] = slot(g)[kGroup - 1];
      work.sums[g] = 0.0f;
    }
    return n;
  }

  int64_t draw(double target, int64_t groups) {
    const int64_t g = first_above(work.cdf, groups, target);
    const double before = g == 0 ? 0.0 : work.cdf[g - 1];
    double* cdf = slot(g);
    if (work.cached[g % kCacheSlots] != g) {
      group_cdf(g, cdf);
      work.cached[g % kCacheSlots] = g;
    }
    // The same place in the group's own sums. Below their total, so the search stops at the last column with mass.
    const double total = cdf[kGroup - 1];
    double within = (target - before) / (work.cdf[g] - before) * total;
    within = within < total ? within : std::nextafter(total, 0.0);
    int64_t j = 0;
    for (int i = 0; i < kGroup; ++i) j += cdf[i] <= within;
    return g * kGroup + j;
  }
};

template <typename Type>
double full_lse(const Workspace& work, int64_t groups, float peak, const Irregular& irregular, const Scale& scale) {
  if (irregular.nan > 0) return std::numeric_limits<double>::quiet_NaN();
  if (irregular.inf > 0 || peak == -kInf) return peak;
  group_masses(work.peaks, work.sums, groups, peak, scale, work.cdf);
  return peak * scale.inv_temperature + std::log(sum_of(work.cdf, groups));
}

// The draws of row n in ids, log_weights [num_samples]; returns the LSE of the whole row.
template <typename Type>
double sample_row(const Problem& problem, const Workspace& shared, const typename Type::Storage* row, int64_t n,
                  int64_t groups, float peak, const Irregular& irregular, const Scale& scale, const int64_t* head_ids,
                  int64_t* ids, float* log_weights) {
  const int64_t head = problem.head, vocab = problem.vocab, count = problem.num_samples;
  const double t = scale.inv_temperature;
  Rest<Type> rest{row, vocab, scale, shared, head};
  Workspace& work = rest.work;
  for (int s = 0; s < kCacheSlots; ++s) work.cached[s] = -1;
  for (int64_t i = 0; i < head; ++i) work.taken[i] = static_cast<uint64_t>(head_ids[i]);
  sort_ascending(work.taken, head);

  // The head takes NaN first, then +inf. If some are left, probabilities mean nothing and ids are drawn uniformly.
  const bool nan_left = irregular.nan > head, inf_left = irregular.nan + irregular.inf > head;
  const bool uniform = nan_left || inf_left;
  double rest_lse, total, lse;
  if (uniform) {
    total = static_cast<double>(vocab);
    rest_lse = nan_left ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(kInf);
    lse = irregular.nan > 0 ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(kInf);
  } else {
    const int64_t touched = rest.take_head_out();
    const float rest_peak = head > 0 ? largest(work.peaks, groups) : peak;
    const float origin = rest_peak == -kInf ? 0.0f : rest_peak;
    group_masses(work.peaks, work.sums, groups, origin, scale, work.cdf);
    for (int64_t i = 0; i < touched; ++i) {
      const int64_t g = work.touched[i];
      work.cdf[g] = work.touched_sums[i] * exp_scaled(work.peaks[g] - origin, scale);
    }
    total = cumulate(work.cdf, groups, work.cdf);
    rest_lse = rest_peak == -kInf ? -static_cast<double>(kInf) : static_cast<double>(origin) * t + std::log(total);

    if (irregular.nan > 0) {
      lse = std::numeric_limits<double>::quiet_NaN();
    } else if (irregular.inf > 0 || peak == -kInf) {
      lse = peak;
    } else {
      double sum = rest_peak == -kInf ? 0.0 : total * exp_double((static_cast<double>(origin) - peak) * t);
      for (int64_t i = 0; i < head; ++i) {
        sum += exp_double((Type::load(row[head_ids[i]]) - static_cast<double>(peak)) * t);
      }
      lse = peak * t + std::log(sum);
    }
  }

  const bool empty = rest_lse == -static_cast<double>(kInf);
  if (!empty) {
    const uint64_t stream = static_cast<uint64_t>(problem.streams ? problem.streams[n] : problem.seed);
    philox_uniforms(stream, problem.streams ? 0 : static_cast<uint64_t>(n), count, work.uniforms);
    const double last = std::nextafter(total, 0.0);
    for (int64_t i = 0; i < count; ++i) {
      const double target = work.uniforms[i] * total < last ? work.uniforms[i] * total : last;
      ids[i] = uniform ? static_cast<int64_t>(target) : rest.draw(target, groups);
    }
    if (problem.sampled_ids) {
      const uint64_t token = static_cast<uint64_t>(problem.sampled_ids[n]);
      const int64_t at = first_at_least(work.taken, head, token);
      if (at == head || work.taken[at] != token) ids[0] = problem.sampled_ids[n];
    }
  }
  const double shift = rest_lse - std::log(static_cast<double>(count));
  for (int64_t i = 0; i < count; ++i) {
    if (empty) ids[i] = -1;
    const float weight = empty ? -kInf : static_cast<float>(shift - Type::load(row[ids[i]]) * t);
    // Exactly 0 marks what was not drawn.
    log_weights[i] = weight == 0.0f ? std::numeric_limits<float>::min() : weight;
  }
  return lse;
}

template <typename Type>
bool is_possible(const typename Type::Storage* row, int64_t vocab, int64_t token) {
  return token >= 0 && token < vocab && Type::load(row[token]) != -kInf;
}

template <typename Type>
bool support_rows(const Problem& problem, const Workspace& work, int64_t begin, int64_t end) {
  const auto* logits = static_cast<const typename Type::Storage*>(problem.logits);
  const Scale scale = make_scale(problem.inv_temperature);
  const int64_t vocab = problem.vocab, head = problem.head, k = head + problem.num_samples;
  const int64_t groups = (vocab + kGroup - 1) / kGroup;
  for (int64_t n = begin; n < end; ++n) {
    const auto* row = logits + n * problem.row_stride;
    if (problem.sampled_ids && problem.num_samples > 0 && !is_possible<Type>(row, vocab, problem.sampled_ids[n])) {
      return false;
    }
    int64_t* ids = problem.ids + n * k;
    summarize<Type>(row, vocab, scale, work.peaks, work.sums);
    const float peak = largest(work.peaks, groups);
    Irregular irregular;
    if (any_nan(work.sums, groups)) irregular = count_irregular<Type>(row, vocab, work.sums, groups);
    select_top<Type>(row, vocab, work.peaks, groups, head, irregular.nan, work.selection, ids);
    double lse;
    if (problem.num_samples > 0) {
      lse = sample_row<Type>(problem, work, row, n, groups, peak, irregular, scale, ids, ids + head,
                             problem.log_weights + n * k + head);
    } else {
      lse = full_lse<Type>(work, groups, peak, irregular, scale);
    }
    problem.lse[n] = static_cast<float>(lse);
    for (int64_t i = 0; i < k; ++i) {
      problem.logprobs[n * k + i] = ids[i] < 0 ? -kInf : normalized(Type::load(row[ids[i]]), lse, scale);
    }
    if (problem.log_weights) {
      for (int64_t i = 0; i < head; ++i) problem.log_weights[n * k + i] = 0.0f;
    }
  }
  return true;
}

inline RowsFunction select(int dtype) {
  switch (dtype) {
    case kFloat32: return support_rows<Float32>;
    case kBFloat16: return support_rows<BFloat16>;
    case kFloat16: return support_rows<Float16>;
    default: return nullptr;
  }
}
