#pragma once
#include <cstdint>

namespace sparse_moon {

// MOON's (K+1)-way loss (arXiv 2403.20047, Eq. 1), its gradient and its statistics. With p = softmax(z),
// u = p_{K+1}, ce = -log p_y, extra = w / (1 + w u) where argmax z != y (first on ties) and 0 elsewhere:
//   loss         = mean_i ce_i (1 + extra_i)
//   d loss / dz  = ((1 + extra) (p - onehot(y)) + ce extra^2 u (p - onehot(K+1))) / B
// Each row is read from memory once and stays in L1 for the loops over it. T is float or double; sums over rows are
// double, in order of the rows whatever the number of threads.
//
//   logits  [batch * classes]   B rows of K + 1, the last is the unknown unit
//   target  [batch]             in [0, K): "unknown" is no label
//   w                           weight, at least 0
//   loss    [1]                 out
//   grad    [batch * classes]   out
//   statistics [3]              out: mean (1 - u) ce, mean u, number of wrong rows
//
// Returns the first row whose target is out of range (the outputs are then not to be used), or -1.
template <class T>
int64_t unknown_aware_loss(const T* logits, const int64_t* target, double w, int64_t batch, int64_t classes, T* loss,
                           T* grad, T* statistics, int threads);

extern template int64_t unknown_aware_loss(const float*, const int64_t*, double, int64_t, int64_t, float*, float*,
                                           float*, int);
extern template int64_t unknown_aware_loss(const double*, const int64_t*, double, int64_t, int64_t, double*, double*,
                                           double*, int);

}  // namespace sparse_moon
