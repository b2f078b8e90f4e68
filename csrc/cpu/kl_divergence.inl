// The true divergences: forward KL, and reverse KL over a truncated support with its tail (see the reference's kl.py).

// log(1 - mass), with the floor that the reference explains: 8 eps of fp32.
template <int kRows, Field x>
PerRow<kRows> log_rest(const Tile& t) {
  PerRow<kRows> rest = log_mass<kRows, x>(t);
  for (int r = 0; r < kRows; ++r) {
    const double left = -std::expm1(rest.at[r]);
    rest.at[r] = std::log(left < kRestFloor ? kRestFloor : left);
  }
  return rest;
}

// The coefficients' last step and the rows without entries, which have no loss.
template <int kRows>
PerRow<kRows> finished(const float* loss, const PerRow<kRows>& rest, const int64_t* entries) {
  PerRow<kRows> out = by_row<kRows>(loss);
  for (int r = 0; r < kRows; ++r) out.at[r] = entries[r] == 0 ? 0.0 : out.at[r] + rest.at[r];
  return out;
}

ASYNCOPD_INLINE double at_least_tiny(double x) { return x < kTiny ? kTiny : x; }

// What the masses weigh for the metrics, which know of no tail.
inline void weigh_plainly(const Tile& t) {
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      g->weight[l] = exp_float(g->log_w[l] + g->log_p[l]);
      g->teacher[l] = exp_float(g->log_w[l] + g->log_q[l]);
      g->changed[l] = 0;
      g->signal[l] = g->log_p[l];  // as it was given
      // From here on the teacher has no mass where there is no entry.
      g->log_q[l] = g->valid[l] ? g->log_q[l] : -kInf;
    }
  }
}

template <int kRows>
PerRow<kRows> true_reverse_rows(const Problem& problem, const Tile& t, const int64_t* entries) {
  weigh_plainly(t);
  PerRow<kRows> rest{}, pull{}, shift{};
  PerRow<kRows> log_z{};
  const bool bucket = problem.options.tail == kBucket;
  if (bucket) {
    const PerRow<kRows> rest_p = log_rest<kRows, &Group::log_p>(t), rest_q = log_rest<kRows, &Group::log_q>(t);
    for (int r = 0; r < kRows; ++r) {
      pull.at[r] = rest_p.at[r] - rest_q.at[r];
      rest.at[r] = std::exp(rest_p.at[r]) * pull.at[r];
    }
  } else {
    log_z = log_mass<kRows, &Group::log_p>(t);
    const PerRow<kRows> log_z_q = log_mass<kRows, &Group::log_q>(t);
    for (int r = 0; r < kRows; ++r) shift.at[r] = log_z.at[r] - log_z_q.at[r];
  }
  float away[kLanes], z_hi[kLanes], z_lo[kLanes], loss[kLanes] = {}, kept[kLanes] = {}, kept_terms[kLanes] = {};
  spread(shift, away);
  spread_split(log_z, z_hi, z_lo);
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const float log_p = g->log_p[l];
      const float p = log_p == -kInf ? 0.0f : exp_float((log_p - z_hi[l]) - z_lo[l]);
      const float signal = log_ratio(log_p, g->log_q[l]) - away[l];
      const float term = p == 0.0f ? 0.0f : p * signal;
      const bool infinite = signal == kInf;
      loss[l] += term;
      kept[l] += infinite ? 0.0f : p;
      kept_terms[l] += infinite ? 0.0f : term;
      g->omega[l] = p;
      g->signal[l] = signal;
    }
  }
  if (!bucket) {
    // Over what has a gradient, so that the coefficients sum to 0 whatever is left out.
    const PerRow<kRows> mass = by_row<kRows>(kept), terms = by_row<kRows>(kept_terms);
    for (int r = 0; r < kRows; ++r) pull.at[r] = terms.at[r] / at_least_tiny(mass.at[r]);
  }
  float pulls[kLanes];
  spread(pull, pulls);
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const float p = g->omega[l], signal = g->signal[l];
      const bool none = (p == 0.0f) | (g->valid[l] == 0) | (signal == kInf);
      g->coef[l] = none ? 0.0f : p * (signal - pulls[l]);
    }
  }
  return finished<kRows>(loss, rest, entries);
}

// coef = factor exp(log_p) - slope omega: (0, 1) with "drop", (Q'/P', 1) with "bucket", (1, 1 / kept mass)
// renormalised.
template <int kRows>
PerRow<kRows> forward_rows(const Problem& problem, const Tile& t, const int64_t* entries) {
  weigh_plainly(t);
  const int tail = problem.options.tail;
  PerRow<kRows> rest{}, log_factor{}, slope;
  for (int r = 0; r < kRows; ++r) slope.at[r] = 1.0;
  if (tail == kBucket) {
    const PerRow<kRows> rest_p = log_rest<kRows, &Group::log_p>(t), rest_q = log_rest<kRows, &Group::log_q>(t);
    for (int r = 0; r < kRows; ++r) {
      log_factor.at[r] = rest_q.at[r] - rest_p.at[r];
      rest.at[r] = std::exp(rest_q.at[r]) * log_factor.at[r];
    }
  } else if (tail == kRenormalize) {
    subtract<kRows, &Group::log_p>(t, log_mass<kRows, &Group::log_p>(t));
    subtract<kRows, &Group::log_q>(t, log_mass<kRows, &Group::log_q>(t));
  }
  float loss[kLanes] = {}, kept[kLanes] = {};
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const float log_q = g->log_q[l], log_p = g->log_p[l];
      // The weights of a tail's entries are 1.
      const float omega = tail == kDrop ? g->teacher[l] : exp_float(log_q);
      loss[l] += omega == 0.0f ? 0.0f : omega * log_ratio(log_q, log_p);
      const float reachable = log_p == -kInf ? 0.0f : omega;
      kept[l] += reachable;
      g->omega[l] = reachable;
    }
  }
  if (tail == kRenormalize) {
    // The teacher's share of what the student can reach: the coefficients sum to 0 whatever is left out.
    const PerRow<kRows> mass = by_row<kRows>(kept);
    for (int r = 0; r < kRows; ++r) slope.at[r] = 1.0 / at_least_tiny(mass.at[r]);
  }
  float log_factors[kLanes], slopes[kLanes];
  spread(log_factor, log_factors);
  spread(slope, slopes);
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      const float pushed = tail == kDrop ? 0.0f : exp_float(g->log_p[l] + log_factors[l]);
      // A probability of 0 has no gradient to follow; pads and masked rows have it too.
      g->coef[l] = g->signal[l] == -kInf ? 0.0f : pushed - g->omega[l] * slopes[l];
    }
  }
  return finished<kRows>(loss, rest, entries);
}
