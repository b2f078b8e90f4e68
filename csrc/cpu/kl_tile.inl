// What the loss kernel works on: a tile that holds one row, or kLanes short rows side by side.
//
// With kRows = 1 entry k is in lane k % kLanes of group k / kLanes, and the lanes of a sum are folded; with
// kRows = kLanes entry k of row r is in lane r of group k, and each lane of a sum is a row's. Everything between a sum
// and a spread is the same code for both,
// and K = 1 fills the lanes as well as K = 64 does. Padding is not valid.

using Field = float (Group::*)[kLanes];

// One number for each row of a tile.
template <int kRows>
struct PerRow {
  double at[kRows];
};

// Lanes -> rows.
template <int kRows>
ASYNCOPD_INLINE PerRow<kRows> by_row(const float* lanes) {
  PerRow<kRows> rows;
  if (kRows == kLanes) {
    for (int l = 0; l < kRows; ++l) rows.at[l] = lanes[l];
    return rows;
  }
  double sum[kLanes / 2];
  for (int l = 0; l < kLanes / 2; ++l) sum[l] = static_cast<double>(lanes[l]) + lanes[l + kLanes / 2];
  for (int l = 0; l < kLanes / 4; ++l) sum[l] += sum[l + kLanes / 4];
  for (int l = 0; l < kLanes / 8; ++l) sum[l] += sum[l + kLanes / 8];
  rows.at[0] = sum[0] + sum[1];
  return rows;
}

template <int kRows>
ASYNCOPD_INLINE void count_by_row(const int32_t* lanes, int64_t* rows) {
  if (kRows == kLanes) {
    for (int l = 0; l < kRows; ++l) rows[l] = lanes[l];
  } else {
    int32_t sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += lanes[l];
    rows[0] = sum;
  }
}

// Rows -> lanes.
template <int kRows>
ASYNCOPD_INLINE void spread(const PerRow<kRows>& rows, float* lanes) {
  for (int l = 0; l < kLanes; ++l) lanes[l] = static_cast<float>(rows.at[kRows == 1 ? 0 : l]);
}

// The double as a sum of two floats, so that x - hi - lo loses nothing; an infinity has no second part.
template <int kRows>
ASYNCOPD_INLINE void spread_split(const PerRow<kRows>& rows, float* hi, float* lo) {
  spread(rows, hi);
  for (int l = 0; l < kLanes; ++l) {
    lo[l] = std::isinf(hi[l]) ? 0.0f : static_cast<float>(rows.at[kRows == 1 ? 0 : l] - hi[l]);
  }
}

// log sum exp of each row of x; -inf for a row without mass.
template <int kRows, Field x>
PerRow<kRows> log_mass(const Tile& t) {
  float top[kLanes], sum[kLanes];
  for (int l = 0; l < kLanes; ++l) top[l] = -kInf;
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) top[l] = (g->*x)[l] > top[l] ? (g->*x)[l] : top[l];
  }
  if (kRows == 1) {
    float highest = -kInf;
    for (int l = 0; l < kLanes; ++l) highest = top[l] > highest ? top[l] : highest;
    for (int l = 0; l < kLanes; ++l) top[l] = highest;
  }
  for (int l = 0; l < kLanes; ++l) {
    top[l] = std::isinf(top[l]) ? 0.0f : top[l];
    sum[l] = 0.0f;
  }
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) sum[l] += exp_float((g->*x)[l] - top[l]);
  }
  PerRow<kRows> mass = by_row<kRows>(sum);
  for (int r = 0; r < kRows; ++r) mass.at[r] = std::log(mass.at[r]) + top[r];
  return mass;
}

// x - log_z in place; -inf stays -inf whatever log_z is.
template <int kRows, Field x>
void subtract(const Tile& t, const PerRow<kRows>& log_z) {
  float hi[kLanes], lo[kLanes];
  spread_split(log_z, hi, lo);
  for (Group* g = t.begin; g < t.end; ++g) {
    for (int l = 0; l < kLanes; ++l) (g->*x)[l] = (g->*x)[l] == -kInf ? -kInf : ((g->*x)[l] - hi[l]) - lo[l];
  }
}

// log a - log b, 0 where a has no mass.
ASYNCOPD_INLINE float log_ratio(float log_a, float log_b) { return log_a == -kInf ? 0.0f : log_a - log_b; }
