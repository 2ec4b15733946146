// Batch norm, residual sum and activation in one pass forward, and in two passes backward; see batch_norm_relu.h.
#pragma once
#include "activation_kernels.h"
#include "batch_norm_relu.h"
#include "jobs.h"
#include "simd.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {
namespace batch_norm {

// Channels of contiguous planes that are treated together, and the bytes of neighbouring memory that they should fill.
constexpr int kMaxChannels = 32;
constexpr int64_t kRunBytes = 4096;

// A whole vector, or the first lanes of one.
struct Whole {};
struct First {
    int lanes;
};
SPARSE_MOON_INLINE Vec get(const float* p, Whole) { return load_unaligned(p); }
SPARSE_MOON_INLINE Vec get(const float* p, First part) { return load_range(p, 0, part.lanes); }
SPARSE_MOON_INLINE void put(float* p, Vec v, Whole) { store_unaligned(p, v); }
SPARSE_MOON_INLINE void put(float* p, Vec v, First part) { store_first(p, v, part.lanes); }

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
template <int... I>
SPARSE_MOON_INLINE Lanes lane_numbers(std::integer_sequence<int, I...>) {
    return Lanes{I...};
}

SPARSE_MOON_INLINE Vec keep(Vec v, Whole) { return v; }
SPARSE_MOON_INLINE Vec keep(Vec v, First part) {
    return lane_numbers(std::make_integer_sequence<int, kLanes>{}) < part.lanes ? v : Vec{};
}

template <class Body>
SPARSE_MOON_INLINE void for_vectors(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, First{static_cast<int>(n - i)});
}

// A float64 sum for every lane: terms cancel, in the gradients above all, and memory is slower than the conversion.
typedef double HalfOfDoubles __attribute__((vector_size(4 * kLanes), may_alias));
typedef float HalfOfFloats __attribute__((vector_size(2 * kLanes), may_alias));
struct Sums {
    HalfOfDoubles low{}, high{};

    SPARSE_MOON_INLINE void add(Vec v) {
        low += half<0>(v);
        high += half<1>(v);
    }
    SPARSE_MOON_INLINE void add_product(Vec v, Vec w) {
        low += half<0>(v) * half<0>(w);
        high += half<1>(v) * half<1>(w);
    }
    SPARSE_MOON_INLINE double total() const {
        double sum = 0;
        for (int i = 0; i < kLanes / 2; ++i) sum += low[i] + high[i];
        return sum;
    }
    static SPARSE_MOON_INLINE Sums at(const double* p) {
        Sums sums;
        __builtin_memcpy(&sums.low, p, sizeof(HalfOfDoubles));
        __builtin_memcpy(&sums.high, p + kLanes / 2, sizeof(HalfOfDoubles));
        return sums;
    }
    SPARSE_MOON_INLINE void store(double* p) const {
        __builtin_memcpy(p, &low, sizeof(HalfOfDoubles));
        __builtin_memcpy(p + kLanes / 2, &high, sizeof(HalfOfDoubles));
    }
    template <int kHalf>
    static SPARSE_MOON_INLINE HalfOfDoubles half(Vec v) {
        HalfOfFloats floats;
        __builtin_memcpy(&floats, reinterpret_cast<const char*>(&v) + kHalf * sizeof(floats), sizeof(floats));
        return __builtin_convertvector(floats, HalfOfDoubles);
    }
};

SPARSE_MOON_INLINE Vec normalise(Vec x, Vec mean, Vec scale, Vec bias) { return (x - mean) * scale + bias; }

SPARSE_MOON_INLINE double rstd(const BatchNormReLU& job, int64_t c) {
    return 1.0 / __builtin_sqrt(static_cast<double>(job.var[c]) + job.eps);
}
SPARSE_MOON_INLINE float scale(const BatchNormReLU& job, int64_t c) {
    return static_cast<float>((job.weight ? job.weight[c] : 1.0) * rstd(job, c));
}
SPARSE_MOON_INLINE float bias(const BatchNormReLU& job, int64_t c) { return job.bias ? job.bias[c] : 0.0f; }

// From the sums over a channel of d and d^2, d the distance from `shift`. With any number of the channel as the shift,
// what is lost to rounding is small against the variance, wherever the mean lies.
SPARSE_MOON_INLINE void store_statistics(const BatchNormReLU& job, int64_t c, float shift, double sum, double squares) {
    const double count = static_cast<double>(job.images * job.plane), distance = sum / count;
    const double var = squares / count - distance * distance;
    job.mean[c] = static_cast<float>(shift + distance);
    job.var[c] = static_cast<float>(var < 0 ? 0.0 : var);
}

// What multiplies the terms of the input's gradient: scale g + offset + slope (x - mean).
struct GradTerms {
    float scale, offset, slope;
};

// Closes the sums of g and of g (x - mean) over a channel.
SPARSE_MOON_INLINE GradTerms close_sums(const BatchNormReLUBackward& job, int64_t c, double sum, double product) {
    const double r = rstd(job, c), s = (job.weight ? job.weight[c] : 1.0) * r;
    job.bias_grad[c] = static_cast<float>(sum);
    job.weight_grad[c] = static_cast<float>(product * r);
    if (!job.batch_statistics) return {static_cast<float>(s), 0, 0};
    const double count = static_cast<double>(job.images * job.plane);
    return {static_cast<float>(s), static_cast<float>(-s * (sum / count)),
            static_cast<float>(-s * (product / count) * r * r)};
}

// What the activation's derivative is computed from.
enum class From { kNothing, kInput, kOutput };

// ---- contiguous planes

// Channels a thread treats together: where planes are small, enough that each image gives it a run of memory.
SPARSE_MOON_INLINE int64_t channels_together(const BatchNormReLU& job) {
    const int64_t run = kRunBytes / (job.plane * static_cast<int64_t>(sizeof(float)));
    return larger(1, smaller(smaller(run, kMaxChannels), job.channels / job.threads));
}

// Adds the distances from `shift` of some vectors, and their squares. Unlike in the gradients nothing cancels here, so
// that the first sums may be float32.
template <int kCount, class Part>
SPARSE_MOON_INLINE void add_distances(const float* x, int64_t stride, Part part, Vec shift, Sums& sum, Sums& square) {
    Vec d{}, q{};
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
        const Vec distance = keep(get(x + i * stride, part) - shift, part);
        d += distance;
        q += distance * distance;
    }
    sum.add(d);
    square.add(q);
}

// Mean and variance of channels [first, first + n).
static void plane_statistics(const BatchNormReLU& job, int64_t first, int n) {
    Sums sums[kMaxChannels], squares[kMaxChannels];
    const float* begin = job.input + first * job.plane;
    for (int64_t image = 0; image < job.images; ++image) {
        for (int c = 0; c < n; ++c) {
            const float* x = begin + (image * job.channels + c) * job.plane;
            const Vec shift = broadcast(begin[c * job.plane]);
            Sums sum = sums[c], square = squares[c];
            int64_t i = 0;
            for (; i + 4 * kLanes <= job.plane; i += 4 * kLanes) {
                add_distances<4>(x + i, kLanes, Whole{}, shift, sum, square);
            }
            for_vectors(job.plane - i, [&](int64_t j, auto part) {
                add_distances<1>(x + i + j, 0, part, shift, sum, square);
            });
            sums[c] = sum;
            squares[c] = square;
        }
    }
    for (int c = 0; c < n; ++c) {
        store_statistics(job, first + c, begin[c * job.plane], sums[c].total(), squares[c].total());
    }
}

template <Activation kActivation, bool kResidual>
static void forward_planes(const BatchNormReLUForward& job) {
    const int64_t together = channels_together(job);
#pragma omp parallel for schedule(static) num_threads(job.threads)
    for (int64_t first = 0; first < job.channels; first += together) {
        const int n = static_cast<int>(smaller(together, job.channels - first));
        if (job.batch_statistics) plane_statistics(job, first, n);
        float scales[kMaxChannels];
        for (int c = 0; c < n; ++c) scales[c] = scale(job, first + c);
        // Backwards: the last planes were read last, the cache still has them.
        for (int64_t image = job.images - 1; image >= 0; --image) {
            for (int c = 0; c < n; ++c) {
                const Vec m = broadcast(job.mean[first + c]), s = broadcast(scales[c]);
                const Vec b = broadcast(bias(job, first + c));
                const int64_t offset = (image * job.channels + first + c) * job.plane;
                const float* x = job.input + offset;
                const float* r = kResidual ? job.residual + offset : nullptr;
                float* y = job.output + offset;
                for_vectors(job.plane, [&](int64_t i, auto part) {
                    Vec v = normalise(get(x + i, part), m, s, b);
                    if (kResidual) v += get(r + i, part);
                    put(y + i, activate<kActivation>(v), part);
                });
            }
        }
    }
}

template <Activation kActivation, From kFrom>
static void backward_planes(const BatchNormReLUBackward& job) {
    const int64_t together = channels_together(job);
#pragma omp parallel for schedule(static) num_threads(job.threads)
    for (int64_t first = 0; first < job.channels; first += together) {
        const int n = static_cast<int>(smaller(together, job.channels - first));
        float scales[kMaxChannels], biases[kMaxChannels];
        Sums sums[kMaxChannels], products[kMaxChannels];
        for (int c = 0; c < n; ++c) {
            scales[c] = scale(job, first + c);
            biases[c] = bias(job, first + c);
        }
        for (int64_t image = 0; image < job.images; ++image) {
            for (int c = 0; c < n; ++c) {
                const Vec m = broadcast(job.mean[first + c]), s = broadcast(scales[c]), b = broadcast(biases[c]);
                const int64_t offset = (image * job.channels + first + c) * job.plane;
                const float *dy = job.grad + offset, *x = job.input + offset;
                const float* y = kFrom == From::kOutput ? job.output + offset : nullptr;
                float* dr = kFrom == From::kOutput ? job.residual_grad + offset : nullptr;
                Sums sum = sums[c], product = products[c];
                for_vectors(job.plane, [&](int64_t i, auto part) {
                    const Vec v = get(x + i, part);
                    Vec g = get(dy + i, part);
                    if (kFrom == From::kInput) g = activate_grad<kActivation>(g, normalise(v, m, s, b));
                    if (kFrom == From::kOutput) {
                        g = activate_grad<kActivation>(g, get(y + i, part));
                        put(dr + i, g, part);
                    }
                    sum.add(g);
                    product.add_product(g, v - m);
                });
                sums[c] = sum;
                products[c] = product;
            }
        }
        GradTerms terms[kMaxChannels];
        for (int c = 0; c < n; ++c) terms[c] = close_sums(job, first + c, sums[c].total(), products[c].total());
        const float* grad = kFrom == From::kOutput ? job.residual_grad : job.grad;
        for (int64_t image = job.images - 1; image >= 0; --image) {
            for (int c = 0; c < n; ++c) {
                const Vec m = broadcast(job.mean[first + c]), s = broadcast(scales[c]), b = broadcast(biases[c]);
                const Vec offset_term = broadcast(terms[c].offset), slope = broadcast(terms[c].slope);
                const int64_t offset = (image * job.channels + first + c) * job.plane;
                const float *dy = grad + offset, *x = job.input + offset;
                float* dx = job.input_grad + offset;
                for_vectors(job.plane, [&](int64_t i, auto part) {
                    const Vec v = get(x + i, part);
                    Vec g = get(dy + i, part);
                    if (kFrom == From::kInput) g = activate_grad<kActivation>(g, normalise(v, m, s, b));
                    put(dx + i, (g * s + offset_term) + (v - m) * slope, part);
                });
            }
        }
    }
}

// ---- channels_last

// Memory of a call: arrays of whole_cache_lines(channels) coefficients for all threads, then what each thread has for
// itself.
constexpr int kCoefficients = 5;
SPARSE_MOON_INLINE float* coefficients(const BatchNormReLU& job, int which) {
    return reinterpret_cast<float*>(job.scratch) + which * whole_cache_lines(job.channels);
}

// One thread's share of the rows, and its two sums for each channel.
struct Share {
    int64_t begin, end;
    double *sums, *products;
};
constexpr int64_t kShareBytes = 2 * sizeof(double);  // a channel

SPARSE_MOON_INLINE Share share_of(const BatchNormReLU& job, int thread, int team) {
    const int64_t rows = job.images * job.plane, width = whole_cache_lines(job.channels);
    char* memory = job.scratch + width * (kCoefficients * static_cast<int64_t>(sizeof(float)) + thread * kShareBytes);
    double* sums = reinterpret_cast<double*>(memory);
    return {rows * thread / team, rows * (thread + 1) / team, sums, sums + width};
}

// Calls add(first row, number of rows as a constant) for all rows of the share: four at once, so that the sums are
// loaded and stored less often.
template <class Add>
SPARSE_MOON_INLINE void for_rows(const Share& share, Add add) {
    int64_t row = share.begin;
    for (; row + 4 <= share.end; row += 4) add(row, std::integral_constant<int, 4>{});
    for (; row < share.end; ++row) add(row, std::integral_constant<int, 1>{});
}

// Calls body(row) for all rows of the share, from the last run of memory to the first, because the cache still has the
// last ones; within a run upwards, as the prefetcher wants it.
template <class Body>
SPARSE_MOON_INLINE void for_rows_back(const Share& share, int64_t channels, Body body) {
    const int64_t run = larger(1, 8 * kRunBytes / (channels * static_cast<int64_t>(sizeof(float))));
    for (int64_t end = share.end; end > share.begin; end -= run) {
        for (int64_t row = larger(share.begin, end - run); row < end; ++row) body(row);
    }
}

SPARSE_MOON_INLINE void clear_sums(const BatchNormReLU& job, const Share& share) {
    for (int64_t c = 0; c < whole_cache_lines(job.channels); ++c) share.sums[c] = share.products[c] = 0;
}

// The sums of channel c over all threads.
struct Totals {
    double sum, product;
};
SPARSE_MOON_INLINE Totals totals(const BatchNormReLU& job, int64_t c, int team) {
    Totals totals{0, 0};
    for (int t = 0; t < team; ++t) {
        const Share share = share_of(job, t, team);
        totals.sum += share.sums[c];
        totals.product += share.products[c];
    }
    return totals;
}

static void row_statistics(const BatchNormReLU& job, const Share& share) {
    clear_sums(job, share);
    for_rows(share, [&](int64_t row, auto rows) {
        constexpr int kRows = decltype(rows)::value;
        const float* x = job.input + row * job.channels;
        for_vectors(job.channels, [&](int64_t c, auto part) {
            const Vec shift = get(job.input + c, part);
            Sums sum = Sums::at(share.sums + c), square = Sums::at(share.products + c);
            add_distances<kRows>(x + c, job.channels, part, shift, sum, square);
            sum.store(share.sums + c);
            square.store(share.products + c);
        });
    });
}

template <Activation kActivation, bool kResidual>
static void forward_rows(const BatchNormReLUForward& job) {
    const int64_t channels = job.channels;
    float *means = coefficients(job, 0), *scales = coefficients(job, 1), *biases = coefficients(job, 2);
#pragma omp parallel num_threads(job.threads)
    {
        const int team = team_size();
        const Share share = share_of(job, thread_number(), team);
        if (job.batch_statistics) row_statistics(job, share);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            if (job.batch_statistics) {
                const Totals sums = totals(job, c, team);
                store_statistics(job, c, job.input[c], sums.sum, sums.product);
            }
            means[c] = job.mean[c];
            scales[c] = scale(job, c);
            biases[c] = bias(job, c);
        }
        for_rows_back(share, channels, [&](int64_t row) {
            const float* x = job.input + row * channels;
            const float* r = kResidual ? job.residual + row * channels : nullptr;
            float* y = job.output + row * channels;
            for_vectors(channels, [&](int64_t c, auto part) {
                Vec v = normalise(get(x + c, part), load(means + c), load(scales + c), load(biases + c));
                if (kResidual) v += get(r + c, part);
                put(y + c, activate<kActivation>(v), part);
            });
        });
    }
}

template <Activation kActivation, From kFrom>
static void row_sums(const BatchNormReLUBackward& job, const Share& share) {
    const int64_t channels = job.channels;
    const float *means = coefficients(job, 0), *scales = coefficients(job, 1), *biases = coefficients(job, 2);
    clear_sums(job, share);
    for_rows(share, [&](int64_t row, auto rows) {
        constexpr int kRows = decltype(rows)::value;
        for_vectors(channels, [&](int64_t c, auto part) {
            const Vec m = load(means + c), s = load(scales + c), b = load(biases + c);
            Sums sum = Sums::at(share.sums + c), product = Sums::at(share.products + c);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const int64_t i = (row + r) * channels + c;
                const Vec v = get(job.input + i, part);
                Vec g = get(job.grad + i, part);
                if (kFrom == From::kInput) g = activate_grad<kActivation>(g, normalise(v, m, s, b));
                if (kFrom == From::kOutput) {
                    g = activate_grad<kActivation>(g, get(job.output + i, part));
                    put(job.residual_grad + i, g, part);
                }
                sum.add(g);
                product.add_product(g, v - m);
            }
            sum.store(share.sums + c);
            product.store(share.products + c);
        });
    });
}

template <Activation kActivation, From kFrom>
static void backward_rows(const BatchNormReLUBackward& job) {
    const int64_t channels = job.channels;
    float *means = coefficients(job, 0), *scales = coefficients(job, 1), *biases = coefficients(job, 2);
    float *offsets = coefficients(job, 3), *slopes = coefficients(job, 4);
    for (int64_t c = 0; c < channels; ++c) {
        means[c] = job.mean[c];
        scales[c] = scale(job, c);
        biases[c] = bias(job, c);
    }
#pragma omp parallel num_threads(job.threads)
    {
        const int team = team_size();
        const Share share = share_of(job, thread_number(), team);
        row_sums<kActivation, kFrom>(job, share);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            const Totals sums = totals(job, c, team);
            const GradTerms terms = close_sums(job, c, sums.sum, sums.product);
            offsets[c] = terms.offset;
            slopes[c] = terms.slope;
        }
        const float* grad = kFrom == From::kOutput ? job.residual_grad : job.grad;
        for_rows_back(share, channels, [&](int64_t row) {
            const float *dy = grad + row * channels, *x = job.input + row * channels;
            float* dx = job.input_grad + row * channels;
            for_vectors(channels, [&](int64_t c, auto part) {
                const Vec v = get(x + c, part), m = load(means + c), s = load(scales + c);
                Vec g = get(dy + c, part);
                if (kFrom == From::kInput) g = activate_grad<kActivation>(g, normalise(v, m, s, load(biases + c)));
                put(dx + c, (g * s + load(offsets + c)) + (v - m) * load(slopes + c), part);
            });
        });
    }
}

}  // namespace batch_norm

static int64_t batch_norm_relu_scratch(const BatchNormReLU& job) {
    using namespace batch_norm;
    if (!job.channels_last) return 0;
    const int64_t bytes = kCoefficients * static_cast<int64_t>(sizeof(float)) + job.threads * kShareBytes;
    return whole_cache_lines(job.channels) * bytes;
}

// Calls run(the activation as a constant).
template <class Run>
SPARSE_MOON_INLINE void with_activation(Activation activation, Run run) {
    switch (activation) {
        case Activation::kNone: return run(std::integral_constant<Activation, Activation::kNone>{});
        case Activation::kReLU: return run(std::integral_constant<Activation, Activation::kReLU>{});
        case Activation::kReLU6: return run(std::integral_constant<Activation, Activation::kReLU6>{});
        case Activation::kSiLU: return run(std::integral_constant<Activation, Activation::kSiLU>{});
        case Activation::kHardswish: return run(std::integral_constant<Activation, Activation::kHardswish>{});
    }
}

static void batch_norm_relu(const BatchNormReLUForward& job) {
    using namespace batch_norm;
    with_activation(job.activation, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        const auto run = [&](auto residual) {
            constexpr bool kResidual = decltype(residual)::value;
            job.channels_last ? forward_rows<kActivation, kResidual>(job) : forward_planes<kActivation, kResidual>(job);
        };
        if constexpr (kActivation <= Activation::kReLU6) {
            if (job.residual) return run(std::true_type{});
        }
        run(std::false_type{});
    });
}

static void batch_norm_relu_backward(const BatchNormReLUBackward& job) {
    using namespace batch_norm;
    with_activation(job.activation, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        const auto run = [&](auto from) {
            constexpr From kFrom = decltype(from)::value;
            job.channels_last ? backward_rows<kActivation, kFrom>(job) : backward_planes<kActivation, kFrom>(job);
        };
        if constexpr (kActivation == Activation::kNone) {
            run(std::integral_constant<From, From::kNothing>{});
        } else {
            if constexpr (kActivation <= Activation::kReLU6) {
                if (job.output) return run(std::integral_constant<From, From::kOutput>{});
            }
            run(std::integral_constant<From, From::kInput>{});
        }
    });
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
