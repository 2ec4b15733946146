#pragma once
#include <cstdint>

#include "philox.h"

namespace sparse_moon {

// One tensor and its running mean, `size` elements each.
template <class T>
struct AveragePair {
    T* average;
    const T* value;
    int64_t size;
};

// average <- average + weight (Z value - average), for weight = 1 / (n + 1) the mean of n + 1 values.
// Z is 1 where the element's random word lies below `threshold` and 0 elsewhere; it is made on the fly and not stored.
// Each element is read twice (average and value) and written once. T is float or double.
//   weight     in (0, 1]
//   threshold  round(keep * 2^32); 2^32 means Z = 1
//   stream     of the random words, see bernoulli_mask.h
template <class T>
void average(const AveragePair<T>& pair, T weight, uint64_t threshold, const PhiloxStream& stream);

extern template void average(const AveragePair<float>&, float, uint64_t, const PhiloxStream&);
extern template void average(const AveragePair<double>&, double, uint64_t, const PhiloxStream&);

}  // namespace sparse_moon
