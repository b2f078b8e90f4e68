// The usual loss: reverse KL without tail, baseline, correction or metrics, on rows of at least kLanes entries. Nothing
// of an entry is needed twice, so it stays in registers from its load to its store. The arithmetic is that of
// kl_reverse.inl, operation by operation: the results are the same bits.

template <typename Id>
ASYNCOPD_INLINE void usual_group(const float* __restrict log_p, const float* __restrict log_q,
                                 const float* __restrict log_w, const Id* __restrict ids, float scale,
                                 float* __restrict coef, float* __restrict loss) {
  for (int l = 0; l < kLanes; ++l) {
    const bool valid = ids[l] >= 0;
    const float p = valid ? log_p[l] : -kInf;
    const float weight = exp_float((valid ? log_w[l] : -kInf) + p);
    const float signal = log_ratio(p, valid ? log_q[l] : 0.0f);
    const float centred = signal == kInf ? 0.0f : signal;
    loss[l] += weight == 0.0f ? 0.0f : weight * signal;
    coef[l] = (valid ? weight * centred : 0.0f) * scale;
  }
}

// The last entries of a row.
template <typename Id>
ASYNCOPD_INLINE void usual_rest(const Source<Id>& in, int count, float scale, float* coef, float* loss) {
  float log_p[kLanes] = {}, log_q[kLanes] = {}, log_w[kLanes] = {}, out[kLanes];
  Id ids[kLanes];
  for (int l = 0; l < kLanes; ++l) ids[l] = -1;
  for (int l = 0; l < count; ++l) {
    log_p[l] = in.log_p[l];
    log_q[l] = in.log_q[l];
    log_w[l] = in.log_w[l];
    ids[l] = in.ids[l];
  }
  usual_group(log_p, log_q, log_w, ids, scale, out, loss);
  for (int l = 0; l < count; ++l) coef[l] = out[l];
}

template <typename Id>
void usual_rows(const Problem& problem, const Tile&, Histogram&, int64_t begin, int64_t end, Totals& totals) {
  const int64_t width = problem.num_ids;
  for (int64_t n = begin; n < end; ++n) {
    if (!counts(problem, n)) {
      store_masked_row(problem, n, 0.0f);
      continue;
    }
    float loss[kLanes] = {};
    int64_t from = n * width;
    for (; from + kLanes <= (n + 1) * width; from += kLanes) {
      const Source<Id> in = source<Id>(problem, from);
      usual_group(in.log_p, in.log_q, in.log_w, in.ids, problem.scale, problem.coef + from, loss);
    }
    if (from < (n + 1) * width) {
      usual_rest(source<Id>(problem, from), static_cast<int>((n + 1) * width - from), problem.scale,
                 problem.coef + from, loss);
    }
    const double sum = by_row<1>(loss).at[0];
    if (problem.losses != nullptr) problem.losses[n] = static_cast<float>(sum);
    totals.loss += sum;
  }
}
