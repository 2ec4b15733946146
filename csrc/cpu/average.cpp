#include "average.h"

#include <algorithm>
#include <type_traits>

#include "bernoulli_mask.h"

namespace sparse_moon {
namespace {

// As torch.lerp: from the nearer end, so that weight = 1 gives `to` exactly.
template <class T>
T lerp(T from, T to, T weight) {
    return weight < T{0.5} ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

}  // namespace

template <class T>
void average(const AveragePair<T>& pair, T weight, uint64_t threshold, const PhiloxStream& stream) {
    static_assert(std::is_floating_point_v<T>, "averages of 16-bit numbers lose what a late value adds");
    if (threshold >> 32) {
        for (int64_t i = 0; i < pair.size; ++i) pair.average[i] = lerp(pair.average[i], pair.value[i], weight);
        return;
    }
    const uint32_t limit = static_cast<uint32_t>(threshold);
    uint32_t words[kWordsAtOnce];
    for (int64_t first = 0; first < pair.size; first += kWordsAtOnce) {
        const int64_t length = std::min(kWordsAtOnce, pair.size - first);
        philox_words(stream, first / 4, (length + 3) / 4, words);
        T* average = pair.average + first;
        const T* value = pair.value + first;
        for (int64_t i = 0; i < length; ++i) {
            const T masked = value[i] * (words[i] < limit ? T{1} : T{0});  // a product, so that inf * 0 shows as NaN
            average[i] = lerp(average[i], masked, weight);
        }
    }
}

template void average(const AveragePair<float>&, float, uint64_t, const PhiloxStream&);
template void average(const AveragePair<double>&, double, uint64_t, const PhiloxStream&);

}  // namespace sparse_moon
