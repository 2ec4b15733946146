// Runs the kernels behind the small operators on buffers of exactly their size, for the sanitizers, and compares them
// with independent versions by sorting or in long double. Built and started by test_cpu_small_ops.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cpu/average.h"
#include "cpu/bernoulli_mask.cpp"  // the source: its variants for other instruction sets are not in the header
#include "cpu/drop_and_grow.h"
#include "cpu/masked_dense.h"
#include "cpu/unknown_aware_loss.h"

using namespace sparse_moon;

namespace {

constexpr bool equal(const PhiloxBlock& a, const PhiloxBlock& b) {
    return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] && a.word[3] == b.word[3];
}

// Random123's known answers for philox4x32-10.
static_assert(equal(philox(0, 0, 0, 0, 0, 0), {{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}}), "zeros");
static_assert(equal(philox(~0u, ~0u, ~0u, ~0u, ~0u, ~0u), {{0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}}), "ones");
static_assert(equal(philox(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
                    {{0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}}),
              "pi");

void check(bool condition, const char* what) {
    if (condition) return;
    std::printf("failed: %s\n", what);
    std::exit(1);
}

// n elements on the heap, so that one element too far is seen (a vector may keep spare capacity).
template <class T>
std::unique_ptr<T[]> exactly(const std::vector<T>& values) {
    std::unique_ptr<T[]> copy(new T[values.size()]);
    std::copy(values.begin(), values.end(), copy.get());
    return copy;
}

std::mt19937 generator(1);

float any_score() {
    constexpr float kScores[] = {0.0f, -0.0f, 1e-45f, 1.1754944e-38f, 1.0f, 1.0f, 3.4e38f,
                                 std::numeric_limits<float>::infinity(), -1.0f};
    return kScores[generator() % 9];
}

void check_drop_and_grow(int64_t rows, int64_t cols, unsigned density_percent, bool ties) {
    std::vector<int32_t> row_ptr{0}, col, row;
    for (int32_t r = 0; r < rows; ++r) {
        for (int32_t c = 0; c < cols; ++c) {
            if (generator() % 100 < density_percent) {
                col.push_back(c);
                row.push_back(r);
            }
        }
        row_ptr.push_back(static_cast<int32_t>(col.size()));
    }
    const size_t n = col.size(), positions = rows * cols;
    std::uniform_real_distribution<float> uniform;
    std::vector<float> drop(n), grow(positions);
    for (float& x : drop) x = ties ? any_score() : uniform(generator);
    for (float& x : grow) x = ties ? any_score() : uniform(generator);

    // as many as go, none, all there is room for, and one number that goes with no other
    const size_t shares = positions < 200 ? n : 4;
    for (size_t trial = 0; trial < 4 * (shares + 1); ++trial) {
        const size_t drop_count = shares ? n * (trial / 4) / shares : 0, room = positions - n + drop_count;
        const size_t grow_count = std::min(room, std::array<size_t, 4>{drop_count, 0, room, positions / 7}[trial % 4]);
        const size_t new_n = n - drop_count + grow_count;
        std::vector<size_t> order(n);
        for (size_t i = 0; i < n; ++i) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return drop[a] < drop[b]; });
        std::vector<char> present(positions);
        for (size_t i = drop_count; i < n; ++i) present[row[order[i]] * cols + col[order[i]]] = 1;
        std::vector<size_t> candidates;
        for (size_t p = 0; p < positions; ++p) {
            if (!present[p]) candidates.push_back(p);
        }
        std::stable_sort(candidates.begin(), candidates.end(), [&](size_t a, size_t b) { return grow[a] > grow[b]; });
        for (size_t i = 0; i < grow_count; ++i) present[candidates[i]] = 1;

        std::vector<int32_t> place(positions, -1), expected_col, expected_source;
        for (size_t i = 0; i < n; ++i) place[row[i] * cols + col[i]] = static_cast<int32_t>(i);
        for (size_t p = 0; p < positions; ++p) {
            if (!present[p]) continue;
            expected_col.push_back(static_cast<int32_t>(p % cols));
            expected_source.push_back(place[p]);
        }

        const auto in_drop = exactly(drop), in_grow = exactly(grow);
        const auto in_ptr = exactly(row_ptr), in_col = exactly(col);
        const std::vector<int32_t> entries(new_n, -7);
        const auto new_ptr = exactly(row_ptr), t_ptr = exactly(std::vector<int32_t>(cols + 1, -7));
        const auto new_col = exactly(entries), t_row = exactly(entries), t_perm = exactly(entries);
        const auto source = exactly(entries);
        drop_and_grow(in_drop.get(), grow_count ? in_grow.get() : nullptr, in_ptr.get(), in_col.get(), rows, cols,
                      drop_count, grow_count, new_ptr.get(), new_col.get(), t_ptr.get(), t_row.get(), t_perm.get(),
                      source.get());
        check(new_ptr[0] == 0 && new_ptr[rows] == static_cast<int32_t>(new_n), "number of entries");
        check(std::equal(expected_col.begin(), expected_col.end(), new_col.get()), "columns");
        check(std::equal(expected_source.begin(), expected_source.end(), source.get()), "source");
        for (int64_t c = 0; c < cols; ++c) {
            for (int32_t slot = t_ptr[c]; slot < t_ptr[c + 1]; ++slot) {
                const int32_t i = t_perm[slot], r = t_row[slot];
                check(new_col[i] == c && new_ptr[r] <= i && i < new_ptr[r + 1], "transpose index");
            }
        }
    }
}

void check_words(int64_t size) {
    const PhiloxStream stream{0xA4093822299F31D0u, 0x80000001u, (uint64_t{5} << 32) + 9};
    std::vector<uint32_t> expected;
    for (uint32_t b = 0; 4 * int64_t{b} < size; ++b) {
        const PhiloxBlock block = philox(stream, b + 3);
        expected.insert(expected.end(), block.word, block.word + 4);
    }
    using Fill = void (*)(const PhiloxStream&, int64_t, int64_t, uint32_t*);
    std::vector<Fill> fills{fill_generic, philox_words};
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) fills.push_back(fill_avx2);
    if (__builtin_cpu_supports("avx512f")) fills.push_back(fill_avx512);
#endif
    for (const Fill fill : fills) {
        const auto words = exactly(std::vector<uint32_t>(expected.size()));
        fill(stream, 3, static_cast<int64_t>(expected.size() / 4), words.get());
        check(std::equal(expected.begin(), expected.end(), words.get()), "random words");
    }

    for (const uint64_t threshold : {uint64_t{0}, uint64_t{1} << 31, uint64_t{1} << 32}) {
        const auto mask = exactly(std::vector<uint8_t>(size, 7));
        bernoulli_mask(stream, threshold, size, mask.get());
        const auto scores = exactly(std::vector<float>(size));
        random_scores(stream, size, scores.get());
        for (int64_t i = 0; i < size; ++i) {
            const uint32_t word = philox(stream, static_cast<uint32_t>(i / 4)).word[i % 4];
            check(mask[i] == (word < threshold), "mask");
            check(scores[i] == static_cast<float>(word), "random scores");
        }

        const auto average_of = exactly(std::vector<double>(size, 3.0));
        const auto value = exactly(std::vector<double>(size, 5.0));
        average<double>({{average_of.get(), value.get(), size, stream.stream}}, 0.25, threshold, stream,
                        1 + static_cast<int>(size % 2));
        for (int64_t i = 0; i < size; ++i) check(average_of[i] == (mask[i] ? 3.5 : 2.25), "average");
    }
}

template <class T>
void check_loss(int64_t batch, int64_t classes, double w, double spread) {
    std::normal_distribution<double> normal(0.0, spread);
    std::vector<T> logits(batch * classes);
    for (T& z : logits) z = static_cast<T>(normal(generator));
    std::vector<int64_t> target(batch);
    for (int64_t& y : target) y = static_cast<int64_t>(generator() % (classes - 1));

    long double loss = 0, beta = 0, mean_u = 0, errors = 0;
    std::vector<long double> grad(batch * classes);
    for (int64_t i = 0; i < batch; ++i) {
        const T* z = logits.data() + i * classes;
        const int64_t best = std::max_element(z, z + classes) - z, y = target[i];
        long double sum = 0;
        for (int64_t k = 0; k < classes; ++k) sum += std::exp(static_cast<long double>(z[k]) - z[best]);
        const long double ce = std::log(sum) - (static_cast<long double>(z[y]) - z[best]);
        const long double u = std::exp(static_cast<long double>(z[classes - 1]) - z[best]) / sum;
        const long double extra = best == y ? 0 : w / (1 + w * u);
        for (int64_t k = 0; k < classes; ++k) {
            const long double p = std::exp(static_cast<long double>(z[k]) - z[best]) / sum;
            const long double du = u * ((k == classes - 1) - p);
            grad[i * classes + k] = ((1 + extra) * (p - (k == y)) - ce * extra * extra * du) / batch;
        }
        loss += ce * (1 + extra) / batch;
        beta += (1 - u) * ce / batch;
        mean_u += u / batch;
        errors += best != y;
    }

    const auto z = exactly(logits), g = exactly(std::vector<T>(logits.size()));
    const auto y = exactly(target);
    const auto value = exactly(std::vector<T>(1)), statistics = exactly(std::vector<T>(3));
    const auto bad_row = [&] {
        return unknown_aware_loss(z.get(), y.get(), w, batch, classes, value.get(), g.get(), statistics.get(),
                                  1 + static_cast<int>(batch % 2));
    };
    check(bad_row() == -1, "target");
    const auto close = [](T x, long double exact, long double scale) {
        return std::abs(x - exact) <= 16 * std::numeric_limits<T>::epsilon() * (std::abs(exact) + scale);
    };
    check(close(value[0], loss, spread), "loss");
    check(close(statistics[0], beta, spread) && close(statistics[1], mean_u, 0.1), "means");
    check(statistics[2] == errors, "errors");
    for (size_t k = 0; k < grad.size(); ++k) check(close(g[k], grad[k], (2 + w) / batch), "gradient");

    y[batch - 1] = classes - 1;
    check(bad_row() == batch - 1, "target too large");
    y[0] = -1;
    check(bad_row() == 0, "target below 0");
}

// A dense weight from its values and back, with strides of both memory layouts; what lies between stays zero.
template <class T>
void check_masked_dense(int64_t bh, int64_t bw, int64_t channel_blocks, int64_t taps, bool channels_last) {
    const int64_t grid_rows = 3, grid_cols = channel_blocks * taps, channels = channel_blocks * bw;
    std::vector<int32_t> row_ptr(grid_rows + 1), col;
    for (int64_t row = 0; row < grid_rows; ++row) {  // the second row stays empty
        for (int64_t c = 0; c < grid_cols; ++c) {
            if (row != 1 && (c * 7 + row) % 3 != 1) col.push_back(static_cast<int32_t>(c));
        }
        row_ptr[row + 1] = static_cast<int32_t>(col.size());
    }
    MaskedDense layout{grid_rows, bh, bw, channels * taps, taps, taps, 1, nullptr, nullptr, 2};
    if (channels_last) layout.stride_channel = 1, layout.stride_tap = channels;
    std::vector<T> values(col.size() * bh * bw);
    for (size_t k = 0; k < values.size(); ++k) values[k] = static_cast<T>(k + 1);
    const size_t size = grid_rows * bh * channels * taps;
    const auto given = exactly(values), dense = exactly(std::vector<T>(size, 77));
    const auto back = exactly(std::vector<T>(values.size()));
    const auto rows = exactly(row_ptr), cols = exactly(col);
    layout.row_ptr = rows.get(), layout.col = cols.get();
    scatter_values(layout, sizeof(T), given.get(), dense.get());
    gather_values(layout, sizeof(T), dense.get(), back.get());
    check(std::equal(values.begin(), values.end(), back.get()), "values from their own dense weight");
    check(std::count(dense.get(), dense.get() + size, T{0}) == int64_t(size - values.size()), "zeros between the values");
}

}  // namespace

int main() {
    for (const int64_t rows : {1, 2, 5}) {
        for (const int64_t cols : {1, 3, 63, 64, 65, 130}) {
            for (const unsigned density : {0u, 30u, 100u}) check_drop_and_grow(rows, cols, density, cols % 2);
        }
    }
    for (const bool ties : {false, true}) check_drop_and_grow(331, 257, 20, ties);  // enough for a guessed bound
    for (const int64_t size : {0, 1, 3, 4, 5, 31, 33, 2047, 2048, 2049, 6000, 200001}) {
        check_words(size);
    }
    for (const int64_t batch : {1, 5}) {
        for (const int64_t classes : {2, 3, 4, 7, 16, 17, 101}) {
            for (const double spread : {1.0, 30.0}) {
                check_loss<float>(batch, classes, 1.5, spread);
                check_loss<double>(batch, classes, 1.5, spread);
            }
        }
    }
    check_loss<float>(37, 1001, 1.5, 3.0);  // enough for two threads
    for (const int64_t taps : {1, 9}) {
        for (const bool channels_last : {false, true}) {
            check_masked_dense<uint16_t>(1, 1, 5, taps, channels_last);
            check_masked_dense<uint32_t>(2, 2, 3, taps, channels_last);
            check_masked_dense<uint64_t>(4, 1, 3, taps, channels_last);
        }
    }
    std::puts("passed");
}
