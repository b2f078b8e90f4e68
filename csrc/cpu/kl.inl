// The [N, K] loss kernel, one tile at a time: load, divergence, metrics, store. Included once per instruction set by
// kl.cpp; see isa.h for the rules.
//
// 20 bytes an entry are read (with int64 ids) and 4 written, once; everything in between is in a tile of a few KiB.

#include "numeric.inl"
// The order of these matters: each uses the one before.
#include "kl_tile.inl"
#include "kl_reverse.inl"
#include "kl_divergence.inl"

// Lanes of counts, taken while an entry is in registers.
struct Tally {
  int32_t valid[kLanes], certain[kLanes];
};

// The inputs from some entry on.
template <typename Id>
struct Source {
  const float *__restrict log_p, *__restrict log_q, *__restrict log_w;
  const Id* __restrict ids;
};

template <typename Id>
ASYNCOPD_INLINE Source<Id> source(const Problem& problem, int64_t from) {
  return Source<Id>{problem.student + from, problem.teacher + from, problem.log_w + from,
                    static_cast<const Id*>(problem.ids) + from};
}

template <typename Id>
ASYNCOPD_INLINE void load_entry(const Source<Id>& in, int64_t i, bool row_counts, int32_t certain_mask,
                                Group* __restrict g, int l, Tally* __restrict tally) {
  const bool valid = row_counts & (in.ids[i] >= 0);
  const float log_w = in.log_w[i], log_p = in.log_p[i], log_q = in.log_q[i];
  const int32_t there = valid;
  const int32_t certain = valid & (log_w == 0.0f);
  g->log_w[l] = valid ? log_w : -kInf;
  g->log_p[l] = valid ? log_p : -kInf;
  g->log_q[l] = valid ? log_q : 0.0f;
  g->valid[l] = there;
  g->drawn[l] = there & ~(certain & certain_mask);
  tally->valid[l] += there;
  tally->certain[l] += certain;
}

// Separate functions, because __restrict on parameters is what tells the compiler that nothing overlaps.
template <typename Id>
ASYNCOPD_INLINE void load_group(const float* __restrict log_p, const float* __restrict log_q,
                                const float* __restrict log_w, const Id* __restrict ids, int32_t certain_mask,
                                Group* __restrict g, Tally* __restrict tally) {
  const Source<Id> in{log_p, log_q, log_w, ids};
  for (int l = 0; l < kLanes; ++l) load_entry(in, l, true, certain_mask, g, l, tally);
}

ASYNCOPD_INLINE void load_nothing(Group& g, int l) {
  g.log_w[l] = g.log_p[l] = -kInf;
  g.log_q[l] = g.proximal[l] = 0.0f;
  g.valid[l] = g.drawn[l] = 0;
}

ASYNCOPD_INLINE bool counts(const Problem& problem, int64_t n) { return problem.mask == nullptr || problem.mask[n]; }

// Rows n .. n + kRows - 1, those from `rows` on as if masked.
template <int kRows, typename Id>
ASYNCOPD_INLINE void load(const Problem& problem, int64_t n, int64_t rows, const Tile& t, Tally& tally) {
  const int64_t width = problem.num_ids;
  const int32_t certain_mask = problem.certain_mask;
  if (kRows == 1) {
    int64_t from = n * width;
    Group* g = t.begin;
    for (; from + kLanes <= (n + 1) * width; from += kLanes, ++g) {
      const Source<Id> in = source<Id>(problem, from);
      load_group(in.log_p, in.log_q, in.log_w, in.ids, certain_mask, g, &tally);
      if (problem.proximal != nullptr) {
        for (int l = 0; l < kLanes; ++l) g->proximal[l] = problem.proximal[from + l];
      }
    }
    if (g == t.end) return;
    const int left = static_cast<int>((n + 1) * width - from);
    for (int l = 0; l < left; ++l) {
      load_entry(source<Id>(problem, from), l, true, certain_mask, g, l, &tally);
      g->proximal[l] = problem.proximal == nullptr ? 0.0f : problem.proximal[from + l];
    }
    for (int l = left; l < kLanes; ++l) load_nothing(*g, l);
    return;
  }
  for (int64_t k = 0; k < width; ++k) {
    Group& g = t.begin[k];
    for (int r = 0; r < kRows; ++r) {
      if (n + r >= rows) {
        load_nothing(g, r);
        continue;
      }
      const int64_t from = (n + r) * width + k;
      load_entry(source<Id>(problem, from), 0, counts(problem, n + r), certain_mask, &g, r, &tally);
      g.proximal[r] = problem.proximal == nullptr ? 0.0f : problem.proximal[from];
    }
  }
}

ASYNCOPD_INLINE void store_coefficients(const float* __restrict coef, float scale, int count, float* __restrict out) {
  if (count == kLanes) {
    for (int l = 0; l < kLanes; ++l) out[l] = coef[l] * scale;
  } else {
    for (int l = 0; l < count; ++l) out[l] = coef[l] * scale;
  }
}

template <int kRows>
void store(const Problem& problem, int64_t n, int64_t rows, const Tile& t, const PerRow<kRows>& losses) {
  const int64_t width = problem.num_ids;
  if (kRows == 1) {
    if (problem.losses != nullptr) problem.losses[n] = static_cast<float>(losses.at[0]);
    float* out = problem.coef + n * width;
    int64_t left = width;
    for (const Group* g = t.begin; g < t.end; ++g, out += kLanes, left -= kLanes) {
      store_coefficients(g->coef, problem.scale, left < kLanes ? static_cast<int>(left) : kLanes, out);
    }
    return;
  }
  for (int r = 0; r < kRows && n + r < rows; ++r) {
    if (problem.losses != nullptr) problem.losses[n + r] = static_cast<float>(losses.at[r]);
    for (int64_t k = 0; k < width; ++k) problem.coef[(n + r) * width + k] = t.begin[k].coef[r] * problem.scale;
  }
}

ASYNCOPD_INLINE void store_masked_row(const Problem& problem, int64_t n, float coef) {
  if (problem.losses != nullptr) problem.losses[n] = 0.0f;
  for (int64_t k = 0; k < problem.num_ids; ++k) problem.coef[n * problem.num_ids + k] = coef;
}

// How many entries of each row there are, and how many of them were drawn.
struct Counts {
  int64_t entries[kLanes], drawn[kLanes];
};

template <int kRows>
ASYNCOPD_INLINE Counts count(const Problem& problem, const Tally& tally, Totals& totals) {
  Counts out;
  int64_t certain[kLanes];
  count_by_row<kRows>(tally.valid, out.entries);
  count_by_row<kRows>(tally.certain, certain);
  for (int r = 0; r < kRows; ++r) {
    out.drawn[r] = out.entries[r] - (problem.options.head_is_certain ? certain[r] : 0);
    totals.rows += out.entries[r] > 0;
    totals.rows_without_certain += (out.entries[r] > 0) & (certain[r] == 0);
    totals.entries += out.entries[r];
    totals.certain += certain[r];
    totals.drawn += out.drawn[r];
  }
  return out;
}

// (sum w p)^2 / sum (w p)^2; the fp32 squares are only good where they neither vanish nor overflow.
template <int kRows>
double effective_entries(const Tile& t, int r, double mass, double squares) {
  if (mass == 0.0) return 0.0;
  if (!(squares > 1e-25 && squares < 1e25)) {
    mass = squares = 0.0;
    for (const Group* g = t.begin; g < t.end; ++g) {
      for (int l = kRows == 1 ? 0 : r; l < (kRows == 1 ? kLanes : r + 1); ++l) {
        const double weight = g->weight[l];
        mass += weight;
        squares += weight * weight;
      }
    }
  }
  return mass * mass / squares;
}

template <int kRows>
void measure(const Tile& t, const Counts& counts, Totals& totals, Histogram& histogram) {
  float mass[kLanes] = {}, squares[kLanes] = {}, teacher[kLanes] = {}, coef[kLanes] = {}, drawn[kLanes] = {};
  float entries[kLanes];
  int32_t changed[kLanes] = {}, low[kLanes], high[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    low[l] = INT32_MAX;
    high[l] = 0;
  }
  int64_t any_drawn = 0;
  PerRow<kRows> num_drawn;
  for (int r = 0; r < kRows; ++r) {
    num_drawn.at[r] = static_cast<double>(counts.drawn[r]);
    any_drawn |= counts.drawn[r];
  }
  spread(num_drawn, entries);
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const float weight = g->weight[l];
      mass[l] += weight;
      squares[l] += weight * weight;
      teacher[l] += g->teacher[l];
      coef[l] += g->coef[l];
      drawn[l] += g->drawn[l] ? weight : 0.0f;
      changed[l] += g->drawn[l] & g->changed[l];
      const auto bin = static_cast<int32_t>((to_bits(weight * entries[l]) & 0x7fffffffu) >> 16);
      g->bin[l] = bin;
      const bool is_drawn = g->drawn[l] != 0;
      low[l] = is_drawn & (bin < low[l]) ? bin : low[l];
      high[l] = is_drawn & (bin > high[l]) ? bin : high[l];
    }
  }
  const PerRow<kRows> masses = by_row<kRows>(mass), all_squares = by_row<kRows>(squares);
  const PerRow<kRows> teachers = by_row<kRows>(teacher), sums = by_row<kRows>(coef), of_drawn = by_row<kRows>(drawn);
  for (int r = 0; r < kRows; ++r) {
    totals.student_mass += masses.at[r];
    totals.teacher_mass += teachers.at[r];
    totals.effective_entries += effective_entries<kRows>(t, r, masses.at[r], all_squares.at[r]);
    totals.coef_sum += sums.at[r];
    if (counts.drawn[r] != 0) totals.ratio_sum += num_drawn.at[r] * of_drawn.at[r];
  }
  if (any_drawn == 0) return;
  for (int l = 0; l < kLanes; ++l) totals.changed += changed[l];
  for (int l = 1; l < kLanes; ++l) {
    low[0] = low[l] < low[0] ? low[l] : low[0];
    high[0] = high[l] > high[0] ? high[l] : high[0];
  }
  histogram.cover(low[0], high[0]);
  int64_t* ratios = histogram.of(0);
  for (const Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      // Two histograms, because ratios are alike and an increment waits for the one before it in the same bin.
      if (g->drawn[l]) ++ratios[(l & 1) * kBins + g->bin[l]];
    }
  }
}

// The histogram of M2PO's second moments: count and sum of the low 16 bits for each bin of the high ones.
inline void tally_moments(const Tile& t, Histogram& histogram) {
  histogram.cover(0, kBins - 1);
  int64_t* counts = histogram.of(0);
  for (const Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      if (!(g->coef[l] >= 0.0f)) continue;
      const uint32_t bits = to_bits(g->coef[l]);
      ++counts[bits >> 16];
      counts[kBins + (bits >> 16)] += bits & 0xffffu;
    }
  }
}

// Rows [begin, end) of `rows`.
template <int kRows, typename Id>
void kl_rows(const Problem& problem, const Tile& t, Histogram& histogram, int64_t begin, int64_t end, Totals& totals) {
  for (int64_t n = begin; n < end; n += kRows) {
    if (kRows == 1 && !counts(problem, n)) {
      // While the threshold is sought, an entry that cannot bind.
      store_masked_row(problem, n, problem.seeks_threshold ? -1.0f : 0.0f);
      continue;
    }
    Tally tally{};
    load<kRows, Id>(problem, n, end, t, tally);
    const Counts counts = count<kRows>(problem, tally, totals);
    PerRow<kRows> losses;
    if (problem.options.divergence == kForward) {
      losses = forward_rows<kRows>(problem, t, counts.entries);
    } else if (problem.options.tail != kDrop) {
      losses = true_reverse_rows<kRows>(problem, t, counts.entries);
    } else {
      losses = reverse_rows<kRows>(problem, t, counts.entries, counts.drawn);
    }
    if (problem.seeks_threshold) {
      tally_moments(t, histogram);
    } else if (problem.measures) {
      measure<kRows>(t, counts, totals, histogram);
    }
    for (int r = 0; r < kRows && n + r < end; ++r) totals.loss += losses.at[r];
    store<kRows>(problem, n, end, t, losses);
  }
}

#include "kl_usual.inl"

inline RowsFunction select(int id_type, bool short_rows, bool usual) {
  const bool wide = id_type == kInt64;
  if (usual) return wide ? usual_rows<int64_t> : usual_rows<int32_t>;
  if (short_rows) return wide ? kl_rows<kLanes, int64_t> : kl_rows<kLanes, int32_t>;
  return wide ? kl_rows<1, int64_t> : kl_rows<1, int32_t>;
}
