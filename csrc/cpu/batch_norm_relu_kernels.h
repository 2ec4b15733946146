// Batch norm, residual sum and activation in one pass forward, and in two passes backward; see batch_norm_relu.h.
#pragma once
#include "batch_norm_relu_sums.h"
#include "jobs.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {
namespace batch_norm {

// Channels of contiguous planes that are treated together, and the bytes of neighbouring memory that they should fill.
constexpr int kMaxChannels = 32;
constexpr int64_t kRunBytes = 4096;

// Whether a result is written past the caches, and not read into them first: results of more than a core's own caches,
// which few will find again. With AVX-512 it has not been measured.
constexpr int64_t kPastCachesBytes = int64_t{2} << 20;
template <class T>
SPARSE_MOON_INLINE bool past_caches(const BatchNormReLU& job, const T* result) {
    const int64_t size = sizeof(T), run = (job.channels_last ? job.channels : job.plane) * size;
    const bool lines = run % 64 == 0 && reinterpret_cast<uintptr_t>(result) % 64 == 0;
    return kVecBytes == 32 && lines && job.images * job.channels * job.plane * size >= kPastCachesBytes;
}

// ---- contiguous planes

// Channels a thread treats together: where planes are small, enough that each image gives it a run of memory.
SPARSE_MOON_INLINE int64_t channels_together(const BatchNormReLU& job) {
    const int64_t run = kRunBytes / (job.plane * number_bytes(job.bfloat16));
    return larger(1, smaller(smaller(run, kMaxChannels), job.channels / job.threads));
}

// Mean and variance of channels [first, first + n).
template <class T>
void plane_statistics(const BatchNormReLU& job, int64_t first, int n) {
    Sums sums[kMaxChannels], squares[kMaxChannels];
    const T* begin = static_cast<const T*>(job.input) + first * job.plane;
    for (int64_t image = 0; image < job.images; ++image) {
        for (int c = 0; c < n; ++c) {
            const T* x = begin + (image * job.channels + c) * job.plane;
            const Vec shift = broadcast(as_float(begin[c * job.plane]));
            Sums sum = sums[c], square = squares[c];
            for_runs(job.plane, [&](int64_t i, auto part, auto count) {
                add_distances<decltype(count)::value>(x + i, kLanes, part, shift, sum, square);
            });
            sums[c] = sum;
            squares[c] = square;
        }
    }
    for (int c = 0; c < n; ++c) {
        store_statistics(job, first + c, as_float(begin[c * job.plane]), sums[c].total(), squares[c].total());
    }
}

template <class T, Activation kActivation, bool kResidual>
void forward_planes(const BatchNormReLUForward& job) {
    const auto *input = static_cast<const T*>(job.input), *residual = static_cast<const T*>(job.residual);
    T* output = static_cast<T*>(job.output);
    const bool past = past_caches(job, output);
    const int64_t together = channels_together(job);
#pragma omp parallel for schedule(static) num_threads(job.threads)
    for (int64_t first = 0; first < job.channels; first += together) {
        const int n = static_cast<int>(smaller(together, job.channels - first));
        if (job.batch_statistics) plane_statistics<T>(job, first, n);
        float scales[kMaxChannels];
        for (int c = 0; c < n; ++c) scales[c] = scale(job, first + c);
        // Backwards: the last planes were read last, the cache still has them.
        for (int64_t image = job.images - 1; image >= 0; --image) {
            for (int c = 0; c < n; ++c) {
                const Vec m = broadcast(job.mean[first + c]), s = broadcast(scales[c]);
                const Vec b = broadcast(bias(job, first + c));
                const int64_t offset = (image * job.channels + first + c) * job.plane;
                const T *x = input + offset, *r = kResidual ? residual + offset : nullptr;
                T* y = output + offset;
                for_vectors(job.plane, [&](int64_t i, auto part) {
                    Vec v = normalise(get(x + i, part), m, s, b);
                    if (kResidual) v += get(r + i, part);
                    put_result(y + i, activate<kActivation>(v), part, past);
                });
            }
        }
        stream_fence();
    }
}

template <class T, Activation kActivation, From kFrom>
void backward_planes(const BatchNormReLUBackward& job) {
    const Gradients<T> all(job);
    const bool past = past_caches(job, all.input_grad);
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
                const T *dy = all.grad + offset, *x = all.input + offset;
                const T* y = kFrom == From::kOutput ? all.output + offset : nullptr;
                T* dr = kFrom == From::kOutput ? all.residual_grad + offset : nullptr;
                Sums sum = sums[c], product = products[c];
                for_runs(job.plane, [&](int64_t first_number, auto part, auto count) {
                    GradSums<T> run{sum, product};
#pragma GCC unroll 4
                    for (int k = 0; k < decltype(count)::value; ++k) {
                        const int64_t i = first_number + k * kLanes;
                        const Vec v = get(x + i, part);
                        Vec g = get(dy + i, part);
                        if (kFrom == From::kInput) g = activate_grad<kActivation>(g, normalise(v, m, s, b));
                        if (kFrom == From::kOutput) {
                            g = activate_grad<kActivation>(g, get(y + i, part));
                            put(dr + i, g, part);
                        }
                        run.add(g, v - m);
                    }
                    run.close();
                    sum = run.sum;
                    product = run.product;
                });
                sums[c] = sum;
                products[c] = product;
            }
        }
        GradTerms terms[kMaxChannels];
        for (int c = 0; c < n; ++c) terms[c] = close_sums(job, first + c, sums[c].total(), products[c].total());
        const T* grad = kFrom == From::kOutput ? all.residual_grad : all.grad;
        for (int64_t image = job.images - 1; image >= 0; --image) {
            for (int c = 0; c < n; ++c) {
                const Vec m = broadcast(job.mean[first + c]), s = broadcast(scales[c]), b = broadcast(biases[c]);
                const Vec offset_term = broadcast(terms[c].offset), slope = broadcast(terms[c].slope);
                const int64_t offset = (image * job.channels + first + c) * job.plane;
                const T *dy = grad + offset, *x = all.input + offset;
                T* dx = all.input_grad + offset;
                for_vectors(job.plane, [&](int64_t i, auto part) {
                    const Vec v = get(x + i, part);
                    Vec g = get(dy + i, part);
                    if (kFrom == From::kInput) g = activate_grad<kActivation>(g, normalise(v, m, s, b));
                    put_result(dx + i, (g * s + offset_term) + (v - m) * slope, part, past);
                });
            }
        }
        stream_fence();
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
template <class T, class Body>
SPARSE_MOON_INLINE void for_rows_back(const Share& share, int64_t channels, Body body) {
    const int64_t run = larger(1, 8 * kRunBytes / (channels * static_cast<int64_t>(sizeof(T))));
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

template <class T>
void row_statistics(const BatchNormReLU& job, const Share& share) {
    const T* input = static_cast<const T*>(job.input);
    clear_sums(job, share);
    for_rows(share, [&](int64_t row, auto rows) {
        constexpr int kRows = decltype(rows)::value;
        const T* x = input + row * job.channels;
        for_vectors(job.channels, [&](int64_t c, auto part) {
            const Vec shift = get(input + c, part);
            Sums sum = Sums::at(share.sums + c), square = Sums::at(share.products + c);
            add_distances<kRows>(x + c, job.channels, part, shift, sum, square);
            sum.store(share.sums + c);
            square.store(share.products + c);
        });
    });
}

template <class T, Activation kActivation, bool kResidual>
void forward_rows(const BatchNormReLUForward& job) {
    const auto *input = static_cast<const T*>(job.input), *residual = static_cast<const T*>(job.residual);
    T* output = static_cast<T*>(job.output);
    const bool past = past_caches(job, output);
    const int64_t channels = job.channels;
    float *means = coefficients(job, 0), *scales = coefficients(job, 1), *biases = coefficients(job, 2);
#pragma omp parallel num_threads(job.threads)
    {
        const int team = team_size();
        const Share share = share_of(job, thread_number(), team);
        if (job.batch_statistics) row_statistics<T>(job, share);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            if (job.batch_statistics) {
                const Totals sums = totals(job, c, team);
                store_statistics(job, c, as_float(input[c]), sums.sum, sums.product);
            }
            means[c] = job.mean[c];
            scales[c] = scale(job, c);
            biases[c] = bias(job, c);
        }
        for_rows_back<T>(share, channels, [&](int64_t row) {
            const T *x = input + row * channels, *r = kResidual ? residual + row * channels : nullptr;
            T* y = output + row * channels;
            for_vectors(channels, [&](int64_t c, auto part) {
                Vec v = normalise(get(x + c, part), load(means + c), load(scales + c), load(biases + c));
                if (kResidual) v += get(r + c, part);
                put_result(y + c, activate<kActivation>(v), part, past);
            });
        });
        stream_fence();
    }
}

template <class T, Activation kActivation, From kFrom>
void row_sums(const BatchNormReLUBackward& job, const Share& share) {
    const Gradients<T> all(job);
    const int64_t channels = job.channels;
    const float *means = coefficients(job, 0), *scales = coefficients(job, 1), *biases = coefficients(job, 2);
    clear_sums(job, share);
    for_rows(share, [&](int64_t row, auto rows) {
        constexpr int kRows = decltype(rows)::value;
        for_vectors(channels, [&](int64_t c, auto part) {
            const Vec m = load(means + c), s = load(scales + c), b = load(biases + c);
            GradSums<T> run{Sums::at(share.sums + c), Sums::at(share.products + c)};
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const int64_t i = (row + r) * channels + c;
                const Vec v = get(all.input + i, part);
                Vec g = get(all.grad + i, part);
                if (kFrom == From::kInput) g = activate_grad<kActivation>(g, normalise(v, m, s, b));
                if (kFrom == From::kOutput) {
                    g = activate_grad<kActivation>(g, get(all.output + i, part));
                    put(all.residual_grad + i, g, part);
                }
                run.add(g, v - m);
            }
            run.close();
            run.sum.store(share.sums + c);
            run.product.store(share.products + c);
        });
    });
}

template <class T, Activation kActivation, From kFrom>
void backward_rows(const BatchNormReLUBackward& job) {
    const Gradients<T> all(job);
    const bool past = past_caches(job, all.input_grad);
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
        row_sums<T, kActivation, kFrom>(job, share);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            const Totals sums = totals(job, c, team);
            const GradTerms terms = close_sums(job, c, sums.sum, sums.product);
            offsets[c] = terms.offset;
            slopes[c] = terms.slope;
        }
        const T* grad = kFrom == From::kOutput ? all.residual_grad : all.grad;
        for_rows_back<T>(share, channels, [&](int64_t row) {
            const T *dy = grad + row * channels, *x = all.input + row * channels;
            T* dx = all.input_grad + row * channels;
            for_vectors(channels, [&](int64_t c, auto part) {
                const Vec v = get(x + c, part), m = load(means + c), s = load(scales + c);
                Vec g = get(dy + c, part);
                if (kFrom == From::kInput) g = activate_grad<kActivation>(g, normalise(v, m, s, load(biases + c)));
                put_result(dx + c, (g * s + load(offsets + c)) + (v - m) * load(slopes + c), part, past);
            });
        });
        stream_fence();
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
            with_number_type(job.bfloat16, [&](auto number) {
                using T = decltype(number);
                job.channels_last ? forward_rows<T, kActivation, kResidual>(job)
                                  : forward_planes<T, kActivation, kResidual>(job);
            });
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
            with_number_type(job.bfloat16, [&](auto number) {
                using T = decltype(number);
                job.channels_last ? backward_rows<T, kActivation, kFrom>(job)
                                  : backward_planes<T, kActivation, kFrom>(job);
            });
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
