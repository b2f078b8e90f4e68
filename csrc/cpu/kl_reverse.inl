// Reverse KL as a score function, tail "drop": c = omega (A - b), omega = w p or its corrected form. Each correction
// is a pass of its own over a tile in cache; the usual loss makes two.

// weight = omega = w p, signal = A under the current student and, for the metrics, teacher = w q.
template <int kRows>
void weigh(const Problem& problem, const Tile& t) {
  if (problem.options.sampled) {
    for (Group* g = t.begin; g < t.end; ++g) {
      for (int l = 0; l < kLanes; ++l) g->weight[l] = g->log_w[l] + g->log_p[l];
    }
    subtract<kRows, &Group::log_p>(t, log_mass<kRows, &Group::weight>(t));
  }
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const float weight = exp_float(g->log_w[l] + g->log_p[l]);
      g->weight[l] = weight;
      g->omega[l] = weight;
      const float signal = log_ratio(g->log_p[l], g->log_q[l]);
      g->signal[l] = signal;
      g->centred[l] = signal == kInf ? 0.0f : signal;
      g->changed[l] = 0;
    }
  }
  if (!problem.measures) return;
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) g->teacher[l] = exp_float(g->log_w[l] + g->log_q[l]);
  }
}

// log mu = -log M - log w, and what depends on it: the behaviour's advantage, the cap, the drop.
template <int kRows>
void apply_policy(const Problem& problem, const Tile& t, const int64_t* entries) {
  PerRow<kRows> log_count;
  for (int r = 0; r < kRows; ++r) log_count.at[r] = std::log(static_cast<double>(entries[r]));
  float log_m[kLanes];
  spread(log_count, log_m);
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) g->log_mu[l] = g->valid[l] ? -log_m[l] - g->log_w[l] : 0.0f;
  }
  if (problem.options.behaviour) {
    for (Group* g = t.begin; g < t.end; ++g) {
      for (int l = 0; l < kLanes; ++l) g->signal[l] = g->valid[l] ? log_ratio(g->log_mu[l], g->log_q[l]) : 0.0f;
    }
  }
  if (problem.has_cap) {
    for (Group* g = t.begin; g < t.end; ++g) {
      for (int l = 0; l < kLanes; ++l) {
        const float log_weight = g->log_w[l] + g->log_p[l];
        const float limit = problem.log_cap + g->log_w[l] + g->log_mu[l];
        // The smaller one; NaN if either is.
        const bool keeps = (log_weight <= limit) | (log_weight != log_weight);
        g->omega[l] = keeps ? g->weight[l] : exp_float(limit);
        g->changed[l] = log_weight > limit;
      }
    }
  }
  if (problem.proximal != nullptr) {
    for (Group* g = t.begin; g < t.end; ++g) {
      for (int l = 0; l < kLanes; ++l) {
        const bool dropped = g->proximal[l] - g->log_mu[l] > problem.log_proximal_cap;
        g->changed[l] |= static_cast<int32_t>(dropped & (g->log_w[l] + g->log_p[l] != -kInf));
        g->omega[l] = dropped ? 0.0f : g->omega[l];
      }
    }
  }
}

// centred = A - b, or 0 where the divergence is infinite: its value says so, its gradient leaves the term out.
template <int kRows>
void centre(const Problem& problem, const Tile& t, const int64_t* drawn) {
  const int kind = problem.options.baseline;
  if (kind == kNoBaseline) {
    for (Group* g = t.begin; g < t.end; ++g) {
      for (int l = 0; l < kLanes; ++l) {
        const bool infinite = g->signal[l] == kInf;
        g->centred[l] = infinite ? 0.0f : g->signal[l];
        g->changed[l] = infinite ? 0 : g->changed[l];
      }
    }
    return;
  }
  float mass[kLanes] = {}, terms[kLanes] = {}, drawn_terms[kLanes] = {}, certain_terms[kLanes] = {};
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const bool infinite = g->signal[l] == kInf;
      const float omega = infinite ? 0.0f : g->omega[l];
      const float term = omega * (infinite ? 0.0f : g->signal[l]);
      const float is_drawn = static_cast<float>(g->drawn[l]);
      mass[l] += omega;
      terms[l] += term;
      // Products, so that a term that is no number spoils both sums, as it should.
      drawn_terms[l] += term * is_drawn;
      certain_terms[l] += term * (1.0f - is_drawn);
    }
  }
  // "mean": every b is `all`. "loo": that of a drawn entry is certain + factor (sampled - its term).
  const PerRow<kRows> total = by_row<kRows>(mass), sum = by_row<kRows>(terms);
  const PerRow<kRows> sampled = by_row<kRows>(drawn_terms), certain = by_row<kRows>(certain_terms);
  PerRow<kRows> all, factor, single;
  for (int r = 0; r < kRows; ++r) {
    const double mean = total.at[r] > 0.0 ? sum.at[r] / total.at[r] : 0.0;
    all.at[r] = kind == kLeaveOneOut ? sum.at[r] : mean;
    const double count = static_cast<double>(drawn[r]);
    factor.at[r] = count > 1.0 ? count / (count - 1.0) : 1.0;
    // A single draw has no others to estimate from.
    single.at[r] = kind == kLeaveOneOut && drawn[r] == 1 ? 1.0 : 0.0;
  }
  float all_b[kLanes], certain_b[kLanes], others[kLanes], scale[kLanes], none[kLanes];
  spread(all, all_b);
  spread(certain, certain_b);
  spread(sampled, others);
  spread(factor, scale);
  spread(single, none);
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const bool infinite = g->signal[l] == kInf;
      const float signal = infinite ? 0.0f : g->signal[l];
      const float term = (infinite ? 0.0f : g->omega[l]) * signal;
      const float left_out = certain_b[l] + scale[l] * (others[l] - term);
      float b = (kind == kLeaveOneOut) & (g->drawn[l] != 0) ? left_out : all_b[l];
      b = none[l] != 0.0f ? 0.0f : b;
      g->centred[l] = infinite ? 0.0f : signal - b;
      g->changed[l] = infinite ? 0 : g->changed[l];
    }
  }
}

// Of the entries that are there; the anchor is the proximal policy where there is one.
ASYNCOPD_INLINE float anchored_ratio(const Group& g, int l, bool decoupled) {
  return g.valid[l] ? log_ratio(g.log_p[l], decoupled ? g.proximal[l] : g.log_mu[l]) : 0.0f;
}

// log^2 ratio of the entries that a clip could bind, -1 for the others, in place of the coefficients.
void second_moments(const Problem& problem, const Tile& t) {
  const bool decoupled = problem.proximal != nullptr;
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const float ratio = anchored_ratio(*g, l, decoupled);
      const float centred = g->centred[l];
      const bool bindable = ((centred < 0.0f) & (ratio > 0.0f)) | ((centred > 0.0f) & (ratio < 0.0f));
      g->coef[l] = bindable & (g->valid[l] != 0) ? ratio * ratio : -1.0f;
    }
  }
}

// Where the ratio has left [low, high] in the direction of its advantage: no gradient, the clipped ratio's value.
void clip(const Problem& problem, const Tile& t) {
  const bool decoupled = problem.proximal != nullptr;
  const float low = problem.log_low, high = problem.log_high;
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const float ratio = anchored_ratio(*g, l, decoupled);
      const bool binds = ((g->centred[l] < 0.0f) & (ratio > high)) | ((g->centred[l] > 0.0f) & (ratio < low));
      const float bound = ratio > high ? high : low;
      g->value[l] = binds ? g->omega[l] * exp_float(bound - ratio) : g->omega[l];
      g->omega[l] = binds ? 0.0f : g->omega[l];
      g->changed[l] |= static_cast<int32_t>(binds);
    }
  }
}

template <int kRows>
PerRow<kRows> score_function(const Problem& problem, const Tile& t) {
  float loss[kLanes] = {}, total[kLanes] = {};
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const float coef = g->valid[l] ? g->omega[l] * g->centred[l] : 0.0f;
      const float value = problem.clips ? g->value[l] : g->omega[l];
      loss[l] += value == 0.0f ? 0.0f : value * g->signal[l];
      total[l] += coef;
      g->coef[l] = coef;
    }
  }
  if (problem.options.sampled) {
    // The normaliser is a function of the same logits: d log p_i = dz_i - sum_j w_j p_j dz_j.
    float all[kLanes];
    spread(by_row<kRows>(total), all);
    for (Group* g = t.begin; g < t.end; ++g) {
      for (int l = 0; l < kLanes; ++l) {
        g->coef[l] = g->valid[l] ? g->coef[l] - all[l] * g->weight[l] : 0.0f;
      }
    }
  }
  return by_row<kRows>(loss);
}

// Losses of the rows of a tile; or, while M2PO's threshold is being sought, second moments in place of coefficients.
template <int kRows>
PerRow<kRows> reverse_rows(const Problem& problem, const Tile& t, const int64_t* entries, const int64_t* drawn) {
  weigh<kRows>(problem, t);
  if (problem.options.needs_policy) apply_policy<kRows>(problem, t, entries);
  // Without either, A is centred already.
  if (problem.options.needs_policy || problem.options.baseline != kNoBaseline) centre<kRows>(problem, t, drawn);
  if (problem.seeks_threshold) {
    second_moments(problem, t);
    return PerRow<kRows>{};
  }
  if (problem.clips) clip(problem, t);
  return score_function<kRows>(problem, t);
}
