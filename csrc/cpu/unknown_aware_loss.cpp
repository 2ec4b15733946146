#include "unknown_aware_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace sparse_moon {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

inline Floats power_of_two(Ints n) { return (Floats)((Words)(n + 127) << 23); }

// exp(x) for x <= 0 within 2 ulp (Cephes' polynomial), denormal results included; NaN stays NaN. With std::exp, rows of
// 1001 logits took longer than in PyTorch.
inline Floats exp_nonpositive(Floats x) {
    constexpr float kShift = 12582912.0f;             // 1.5 * 2^23: adding it rounds; the integer is in the low bits
    x = x < -104.0f ? Floats{} - 104.0f : x;          // exp(-104) rounds to 0
    const Floats shifted = x * 1.44269504f + kShift;  // x / log 2
    const Floats whole = shifted - kShift;
    const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // log 2 in two parts
    Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors, because it may be denormal; n from nine low bits, so that NaN makes no shift overflow
    const Ints n = (Ints)((Words)shifted << 23) >> 23;
    const Ints half = n >> 1;
    return p * power_of_two(half) * power_of_two(n - half);
}

// y_k = exp(z_k - top), where no z_k is above top.
void exp_row(const float* z, float top, int64_t size, float* y) {
    constexpr int64_t kWidth = sizeof(Floats) / sizeof(float);
    int64_t k = 0;
    for (; k + kWidth <= size; k += kWidth) {
        Floats part;
        std::memcpy(&part, z + k, sizeof(part));
        part = exp_nonpositive(part - top);
        std::memcpy(y + k, &part, sizeof(part));
    }
    for (; k < size; ++k) y[k] = exp_nonpositive(Floats{} + (z[k] - top))[0];
}

void exp_row(const double* z, double top, int64_t size, double* y) {
    for (int64_t k = 0; k < size; ++k) y[k] = std::exp(z[k] - top);
}

// Combines x[0], ..., x[size - 1] in a fixed order: four vectors side by side, then those with each other.
template <class T, class Combine>
T reduce(const T* x, int64_t size, T start, Combine combine) {
    typedef T Vector __attribute__((vector_size(16)));
    constexpr int64_t kWidth = sizeof(Vector) / sizeof(T), kVectors = 4;
    Vector sums[kVectors];
    for (Vector& sum : sums) sum = Vector{} + start;
    int64_t k = 0;
    for (; k + kVectors * kWidth <= size; k += kVectors * kWidth) {
        for (int64_t v = 0; v < kVectors; ++v) {
            Vector part;
            std::memcpy(&part, x + k + v * kWidth, sizeof(part));
            sums[v] = combine(sums[v], part);
        }
    }
    const Vector all = combine(combine(sums[0], sums[1]), combine(sums[2], sums[3]));
    T result = all[0];
    for (int64_t lane = 1; lane < kWidth; ++lane) result = combine(result, all[lane]);
    for (; k < size; ++k) result = combine(result, x[k]);
    return result;
}

// What a row adds to the sums over the batch.
struct RowTerms {
    double loss, beta, u;
    bool wrong;
};

// Loss and statistics of one row; `g` receives its gradient, times `share`.
template <class T>
RowTerms row_loss(const T* z, int64_t y, T weight, int64_t classes, T share, T* g) {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    const T top = reduce(z, classes, kLowest, [](auto a, auto b) { return b > a ? b : a; });  // passes over NaN
    exp_row(z, top, classes, g);
    const T sum = reduce(g, classes, T{0}, [](auto a, auto b) { return a + b; });
    const T* best = std::find(z, z + classes, top);
    if (std::isnan(sum)) {  // a NaN logit is the prediction, as in torch.argmax
        const T* nan = std::find_if(z, z + classes, [](T x) { return std::isnan(x); });
        if (nan != z + classes) best = nan;
    }
    const bool wrong = best != z + y;
    const T ce = std::log(sum) - (z[y] - top);
    const T u = g[classes - 1] / sum;
    const T extra = wrong ? weight / (1 + weight * u) : T{0};
    const T slope = ce * extra * extra * u;  // -ce d extra / dz_u, up to the factor 1 - u

    const T total = 1 + extra + slope;
    const auto special = [&](int64_t k) {  // terms nearly cancel, so nothing is rounded before the difference
        return (total * (g[k] / sum) - (k == y ? 1 + extra : 0) - (k == classes - 1 ? slope : 0)) * share;
    };
    const T grad_y = special(y), grad_u = special(classes - 1), scale = total / sum * share;
    for (int64_t k = 0; k < classes; ++k) g[k] *= scale;
    g[y] = grad_y;
    g[classes - 1] = grad_u;
    return {static_cast<double>(ce * (1 + extra)), static_cast<double>((1 - u) * ce), static_cast<double>(u), wrong};
}

}  // namespace

template <class T>
int64_t unknown_aware_loss(const T* logits, const int64_t* target, double w, int64_t batch, int64_t classes, T* loss,
                           T* grad, T* statistics, int threads) {
    static_assert(std::is_floating_point_v<T>, "16-bit logits are computed in float");
    for (int64_t row = 0; row < batch; ++row) {
        if (target[row] < 0 || target[row] >= classes - 1) return row;
    }
    const T weight = static_cast<T>(w), share = T{1} / static_cast<T>(batch);
    std::vector<RowTerms> terms(batch);
    // a team costs some microseconds, as much as about this many logits
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && batch * classes > 1 << 14)
    for (int64_t row = 0; row < batch; ++row) {
        terms[row] = row_loss(logits + row * classes, target[row], weight, classes, share, grad + row * classes);
    }
    double loss_sum = 0, beta_sum = 0, u_sum = 0;
    int64_t wrong_rows = 0;
    for (const RowTerms& row : terms) {
        loss_sum += row.loss;
        beta_sum += row.beta;
        u_sum += row.u;
        wrong_rows += row.wrong;
    }
    const double rows = static_cast<double>(batch);
    *loss = static_cast<T>(loss_sum / rows);
    statistics[0] = static_cast<T>(beta_sum / rows);
    statistics[1] = static_cast<T>(u_sum / rows);
    statistics[2] = static_cast<T>(wrong_rows);
    return -1;
}

template int64_t unknown_aware_loss(const float*, const int64_t*, double, int64_t, int64_t, float*, float*, float*,
                                    int);
template int64_t unknown_aware_loss(const double*, const int64_t*, double, int64_t, int64_t, double*, double*, double*,
                                    int);

}  // namespace sparse_moon
