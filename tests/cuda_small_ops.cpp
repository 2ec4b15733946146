// Runs the CUDA kernels of the small operators on the host, as blocks of threads (cuda_block.h) under the sanitizers, and
// compares them with independent versions by sorting. No CUDA headers are needed: what the kernels use of them is here.
// Built and started by test_cuda_small_ops.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_block.h"

using cuda_on_host::expect;
using cuda_on_host::generator;
using cuda_on_host::some_order;

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static

struct dim3 {
    uint32_t x;
    explicit dim3(uint32_t x = 0) : x(x) {}
};

dim3 gridDim;

void __threadfence() {}

uint32_t atomicAdd(uint32_t* address, uint32_t value) {
    const uint32_t old = *address;
    *address += value;
    return old;
}

void atomicOr(uint32_t* address, uint32_t value) { *address |= value; }

template <class T>
T __ldcg(const T* address) {
    return *address;
}

uint32_t min(uint32_t a, uint32_t b) { return std::min(a, b); }

float __fmul_rn(float a, float b) { return a * b; }
float __fadd_rn(float a, float b) { return a + b; }
double __dmul_rn(double a, double b) { return a * b; }
double __dadd_rn(double a, double b) { return a + b; }

#include "cuda/common.h"

namespace sparse_moon::cuda {

bool cudaMemsetAsync(void* address, int byte, size_t size, cudaStream_t) {
    std::memset(address, byte, size);
    return true;
}

void check(bool success, const char* op) { expect(success, op); }

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, uint32_t threads, size_t, cudaStream_t,
            Arguments... arguments) {
    gridDim = grid;
    for (const uint32_t b : some_order(grid.x)) {
        blockIdx.x = b;
        cuda_on_host::block.run(threads, [&] { kernel(arguments...); });
    }
}

}  // namespace sparse_moon::cuda

#include "cuda/average.cu"
#include "cuda/bernoulli_mask.cu"
#include "cuda/drop_and_grow.cu"
#include "cuda/transpose_index.cu"

using namespace sparse_moon;
using namespace sparse_moon::cuda;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kScores[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 1.1754942e-38f, 1.1754944e-38f, 1.0f,
                             1.0000001f, -1.0f, 3.4028235e38f, kInf, kNan};

// n elements on the heap, so that one element too far is seen (a vector may keep spare capacity).
template <class T>
std::unique_ptr<T[]> exactly(const std::vector<T>& values) {
    std::unique_ptr<T[]> copy(new T[values.size()]);
    std::copy(values.begin(), values.end(), copy.get());
    return copy;
}

template <class T>
std::unique_ptr<T[]> garbage(size_t size) {
    std::unique_ptr<T[]> memory(new T[size]);
    std::memset(static_cast<void*>(memory.get()), 0xA5, size * sizeof(T));
    return memory;
}

// As torch sorts: NaN is the largest.
bool less(float a, float b) { return std::isnan(b) ? !std::isnan(a) : a < b; }

// The k smallest of `keys`, found digit by digit as the kernels do.
std::vector<size_t> radix_selected(const std::vector<uint32_t>& keys, uint32_t wanted) {
    uint32_t known = 0;
    for (int pass = 0; pass < kPasses && wanted; ++pass) {
        std::vector<uint32_t> counts(num_digits(pass));
        for (const uint32_t key : keys) counts[digit_of(key, pass)] += compare_known(key, known, pass) == 0;
        uint32_t digit = 0;
        while (counts[digit] < wanted) wanted -= counts[digit++];
        known |= digit << digit_shift(pass);
    }
    std::vector<size_t> selected;
    uint32_t ties = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
        const int order = compare_known(keys[i], known, kPasses);
        if (order < 0 || (order == 0 && ties_taken(wanted, ties++, 1))) selected.push_back(i);
    }
    return selected;
}

void check_selection() {
    for (const float a : kScores) {
        for (const float b : kScores) {
            expect((key_of(a) < key_of(b)) == less(a, b), "order of keys");
            expect((descending_key_of(a) < descending_key_of(b)) == less(b, a), "order of descending keys");
        }
    }
    constexpr size_t kAlphabet = std::size(kScores), kLength = 3;
    for (size_t pattern = 0; pattern < std::pow(kAlphabet, kLength); ++pattern) {
        std::vector<float> scores;
        for (size_t rest = pattern; scores.size() < kLength; rest /= kAlphabet) {
            scores.push_back(kScores[rest % kAlphabet]);
        }
        for (const bool descending : {false, true}) {
            std::vector<size_t> order(kLength);
            std::iota(order.begin(), order.end(), size_t{0});
            std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
                return descending ? less(scores[b], scores[a]) : less(scores[a], scores[b]);
            });
            std::vector<uint32_t> keys;
            for (const float score : scores) keys.push_back(descending ? descending_key_of(score) : key_of(score));
            for (size_t count = 0; count <= kLength; ++count) {
                std::vector<size_t> expected(order.begin(), order.begin() + count);
                std::sort(expected.begin(), expected.end());
                expect(radix_selected(keys, static_cast<uint32_t>(count)) == expected, "radix selection");
            }
        }
    }
}

void check_bits() {
    for (uint32_t i = 0; i < 1 << 16; ++i) {
        const uint32_t word = i * 0x00010001u ^ (i & 1 ? 0x80000000u : 0);
        uint32_t rank = 0, lowest = 0;
        expect(lowest_bits(word, 0) == 0, "no bits");
        for (uint32_t bit = 0; bit < 32; ++bit) {
            if (!(word >> bit & 1)) continue;
            expect(nth_bit(word, rank) == bit && popcount(word & below(bit)) == rank, "place of a bit");
            lowest |= 1u << bit;
            expect(lowest_bits(word, ++rank) == lowest, "lowest bits");
        }
    }
    const std::vector<int32_t> first{0, 0, 3, 3, 3, 7};
    for (uint32_t x = 0; x < 9; ++x) {
        expect(piece_of(first.data(), 0, 5, x) == (x < 3 ? 1 : x < 7 ? 4 : 5), "piece");
        expect(cuda::lower_bound(first.data(), 0, 6, x) == (x < 1 ? 0 : x < 4 ? 2 : x < 8 ? 5 : 6), "bound");
    }
}

struct Grid {
    uint32_t rows, cols;
    std::vector<int32_t> row_ptr{0}, col, row;

    template <class Exists>
    Grid(uint32_t rows, uint32_t cols, Exists exists) : rows(rows), cols(cols) {
        for (uint32_t r = 0; r < rows; ++r) {
            for (uint32_t c = 0; c < cols; ++c) {
                if (!exists(r, c)) continue;
                col.push_back(static_cast<int32_t>(c));
                row.push_back(static_cast<int32_t>(r));
            }
            row_ptr.push_back(static_cast<int32_t>(col.size()));
        }
    }

    size_t positions() const { return size_t{rows} * cols; }
    size_t position(size_t entry) const { return size_t(row[entry]) * cols + col[entry]; }
};

Grid random_grid(uint32_t rows, uint32_t cols, uint32_t percent) {
    return Grid(rows, cols, [=](uint32_t, uint32_t) { return generator() % 100 < percent; });
}

// An update with its inputs and outputs in memory of exactly their size.
struct Update {
    Grid grid;
    std::vector<float> drop_scores, grow_scores;
    size_t drop, grow, size;
    std::unique_ptr<float[]> drop_score, grow_score;
    std::unique_ptr<int32_t[]> row_ptr, col, new_row_ptr, new_col, t_ptr, t_row, t_perm, source;

    Update(Grid g, std::vector<float> d, std::vector<float> s, size_t drop, size_t grow)
        : grid(std::move(g)), drop_scores(std::move(d)), grow_scores(std::move(s)), drop(drop), grow(grow) {
        size = grid.col.size() - drop + grow;
        drop_score = exactly(drop_scores);
        grow_score = exactly(grow_scores);
        row_ptr = exactly(grid.row_ptr);
        col = exactly(grid.col);
        new_row_ptr = garbage<int32_t>(grid.rows + 1);
        t_ptr = garbage<int32_t>(grid.cols + 1);
        for (auto* entries : {&new_col, &t_row, &t_perm, &source}) *entries = garbage<int32_t>(size);
    }

    DropAndGrow layer() const {
        return {drop_score.get(), grow ? grow_score.get() : nullptr, row_ptr.get(), col.get(), new_row_ptr.get(),
                new_col.get(), t_ptr.get(), t_row.get(), t_perm.get(), source.get(), grid.rows, grid.cols,
                static_cast<int64_t>(grid.col.size()), static_cast<int64_t>(drop), static_cast<int64_t>(grow)};
    }

    void check_rows() const {
        const size_t n = grid.col.size();
        std::vector<size_t> order(n), candidates;
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return less(drop_scores[a], drop_scores[b]); });
        std::vector<char> present(grid.positions());
        for (size_t i = drop; i < n; ++i) present[grid.position(order[i])] = 1;
        for (size_t p = 0; p < grid.positions(); ++p) {
            if (!present[p]) candidates.push_back(p);
        }
        std::stable_sort(candidates.begin(), candidates.end(),
                         [&](size_t a, size_t b) { return less(grow_scores[b], grow_scores[a]); });
        for (size_t i = 0; i < grow; ++i) present[candidates[i]] = 1;
        std::vector<int32_t> place(grid.positions(), -1);
        for (size_t i = 0; i < n; ++i) place[grid.position(i)] = static_cast<int32_t>(i);
        int32_t i = 0;
        for (uint32_t r = 0; r < grid.rows; ++r) {
            expect(new_row_ptr[r] == i, "row pointer");
            for (uint32_t c = 0; c < grid.cols; ++c) {
                const size_t p = size_t{r} * grid.cols + c;
                if (!present[p]) continue;
                expect(new_col[i] == static_cast<int32_t>(c), "column");
                expect(source[i++] == place[p], "source");
            }
        }
        expect(new_row_ptr[grid.rows] == i && i == static_cast<int32_t>(size), "number of entries");
    }
};

void check_transpose(const Grid& grid, const int32_t* t_ptr, const int32_t* t_row, const int32_t* t_perm) {
    std::vector<size_t> order(grid.col.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return grid.col[a] < grid.col[b]; });
    for (size_t i = 0; i < order.size(); ++i) {
        expect(t_perm[i] == static_cast<int32_t>(order[i]) && t_row[i] == grid.row[order[i]], "transposed entry");
    }
    int32_t begin = 0;
    for (uint32_t c = 0; c <= grid.cols; ++c) {
        expect(t_ptr[c] == begin, "column pointer");
        begin += static_cast<int32_t>(std::count(grid.col.begin(), grid.col.end(), static_cast<int32_t>(c)));
    }
}

template <int kThreads>
void check_updates(const std::vector<Update>& updates) {
    std::vector<DropAndGrow> layers;
    for (const Update& update : updates) layers.push_back(update.layer());
    const int64_t bytes = update_rows_workspace<kThreads>(layers.data(), layers.size());
    const auto workspace = garbage<uint32_t>(bytes / 4);
    const uint32_t* rest = update_rows<kThreads>(layers.data(), layers.size(), workspace.get(), nullptr);
    expect(rest == workspace.get() + bytes / 4, "size of the workspace");
    for (const Update& update : updates) update.check_rows();
}

// All of drop_and_grow with the blocks that are launched on a GPU.
void check_whole(const std::vector<Update>& updates) {
    std::vector<DropAndGrow> layers;
    for (const Update& update : updates) layers.push_back(update.layer());
    const auto workspace = garbage<uint32_t>(drop_and_grow_workspace(layers.data(), layers.size()) / 4);
    drop_and_grow(layers.data(), layers.size(), workspace.get(), nullptr);
    for (const Update& update : updates) {
        update.check_rows();
        Grid after(update.grid.rows, update.grid.cols, [&](uint32_t r, uint32_t c) {
            const int32_t* col = update.new_col.get();
            return std::binary_search(col + update.new_row_ptr[r], col + update.new_row_ptr[r + 1],
                                      static_cast<int32_t>(c));
        });
        check_transpose(after, update.t_ptr.get(), update.t_row.get(), update.t_perm.get());
    }
}

enum class Kind { kAny, kUniform, kFew, kEqual };

std::vector<float> scores_of(size_t size, Kind kind) {
    std::uniform_real_distribution<float> uniform;
    std::vector<float> scores(size);
    for (float& score : scores) {
        score = kind == Kind::kAny ? kScores[generator() % std::size(kScores)]
                : kind == Kind::kFew ? static_cast<float>(generator() % 3)
                : kind == Kind::kEqual ? 1.0f : uniform(generator);
    }
    return scores;
}

Update random_update(uint32_t rows, uint32_t cols, uint32_t percent, Kind kind, uint32_t share) {
    Grid grid = random_grid(rows, cols, percent);
    const size_t n = grid.col.size(), drop = n * share / 4, room = grid.positions() - n + drop;
    const size_t grow = std::min(room, std::array<size_t, 4>{drop, 0, room, grid.positions() / 7}[generator() % 4]);
    return Update(grid, scores_of(n, kind), scores_of(grid.positions(), kind), drop, grow);
}

// Every mask, score and count of grids of up to three positions.
void check_small_grids(size_t alphabet) {
    std::vector<Update> updates;
    const auto flush = [&] {
        check_updates<32>(updates);
        updates.clear();
    };
    for (const auto& [rows, cols] : {std::pair{1u, 1u}, {2u, 1u}, {1u, 3u}}) {
        const uint32_t positions = rows * cols;
        for (uint32_t mask = 0; mask < 1u << positions; ++mask) {
            const auto exists = [mask, width = cols](uint32_t r, uint32_t c) { return mask >> (r * width + c) & 1; };
            const Grid grid(rows, cols, exists);
            const size_t n = grid.col.size();
            for (size_t pattern = 0; pattern < std::pow(alphabet, n + positions); ++pattern) {
                std::vector<float> scores;
                for (size_t i = 0, rest = pattern; i < n + positions; ++i, rest /= alphabet) {
                    scores.push_back(std::array{-0.0f, 0.0f, 1e-45f}[rest % alphabet]);
                }
                const std::vector<float> drops(scores.begin(), scores.begin() + n);
                const std::vector<float> grows(scores.begin() + n, scores.end());
                for (size_t drop = 0; drop <= n; ++drop) {
                    for (size_t grow = 0; grow <= positions - n + drop; ++grow) {
                        updates.emplace_back(grid, drops, grows, drop, grow);
                        if (updates.size() == kMaxLayers) flush();
                    }
                }
            }
        }
    }
    flush();
}

void check_random_grids() {
    std::vector<Update> updates;
    for (const auto& [rows, cols] : {std::pair{3u, 64u}, {5u, 65u}, {97u, 33u}, {1u, 3000u}, {3000u, 1u}, {1024u, 1u},
                                     {31u, 1000u}, {64u, 32u}}) {
        for (const uint32_t percent : {0u, 3u, 50u, 100u}) {
            for (const Kind kind : {Kind::kAny, Kind::kUniform, Kind::kFew, Kind::kEqual}) {
                updates.push_back(random_update(rows, cols, percent, kind, generator() % 5));
            }
        }
    }
    check_updates<32>(updates);
    std::shuffle(updates.begin(), updates.end(), generator);
    check_updates<64>(updates);

    const Grid uneven(200, 190, [](uint32_t r, uint32_t c) {
        return r % 3 == 0 || c == 5 || (r % 7 != 1 && generator() % 10 == 0);
    });
    const size_t n = uneven.col.size();
    updates.clear();
    updates.emplace_back(uneven, scores_of(n, Kind::kUniform), scores_of(200 * 190, Kind::kUniform), n / 3, n / 3);
    updates.push_back(random_update(90, 400, 10, Kind::kUniform, 1));
    updates.push_back(random_update(7, 9, 30, Kind::kAny, 2));
    updates.push_back(random_update(150, 300, 20, Kind::kFew, 3));
    check_whole(updates);
}

void check_transposes() {
    std::vector<Grid> grids;
    for (const auto& [rows, cols] : {std::pair{1u, 1u}, {1u, 700u}, {700u, 1u}, {128u, 512u}, {129u, 513u},
                                     {300u, 1100u}}) {
        for (const uint32_t percent : {0u, 7u, 100u}) grids.push_back(random_grid(rows, cols, percent));
    }
    for (int i = 0; i < 60; ++i) grids.push_back(random_grid(1 + generator() % 40, 1 + generator() % 40, 30));
    std::vector<TransposeTask> tasks;
    std::vector<std::unique_ptr<int32_t[]>> memory;
    const auto keep = [&](std::unique_ptr<int32_t[]> array) { return memory.emplace_back(std::move(array)).get(); };
    for (const Grid& g : grids) {
        const size_t n = g.col.size();
        tasks.push_back({keep(exactly(g.row_ptr)), keep(exactly(g.col)), keep(garbage<int32_t>(g.cols + 1)),
                         keep(garbage<int32_t>(n)), keep(garbage<int32_t>(n)), g.rows, g.cols});
    }
    const auto workspace = garbage<uint32_t>(transpose_index_workspace(tasks.data(), tasks.size()) / 4);
    run_transpose_index<64>(tasks.data(), tasks.size(), workspace.get(), nullptr);
    for (size_t i = 0; i < grids.size(); ++i) {
        check_transpose(grids[i], tasks[i].t_ptr, tasks[i].t_row, tasks[i].t_perm);
    }
}

struct Aligned {
    void operator()(void* memory) const { std::free(memory); }
};

// `size` elements on the heap that begin at a multiple of 16 bytes.
template <class T>
std::unique_ptr<T[], Aligned> aligned(size_t size) {
    return std::unique_ptr<T[], Aligned>(static_cast<T*>(std::aligned_alloc(16, (size * sizeof(T) + 15) / 16 * 16)));
}

void check_words() {
    const int64_t step = (int64_t{5} << 32) + 9;
    const RandomWords words{0xA4093822299F31D0u, 0x80000001u, &step};
    const PhiloxStream stream{words.seed, words.stream, static_cast<uint64_t>(step)};
    for (const int64_t size : {0, 1, 3, 4, 15, 16, 17, 4095, 4096, 4097, 9001}) {
        for (const uint64_t threshold : {uint64_t{0}, uint64_t{1} << 31, uint64_t{1} << 32}) {
            const auto mask = aligned<uint8_t>(size);
            bernoulli_mask(words, threshold, size, mask.get(), nullptr);
            const auto scores = aligned<float>(size);
            random_scores(words, size, scores.get(), nullptr);
            for (int64_t i = 0; i < size; ++i) {
                const uint32_t word = philox(stream, static_cast<uint32_t>(i / 4)).word[i % 4];
                expect(mask[i] == (word < threshold), "mask");
                expect(scores[i] == static_cast<float>(word), "random scores");
            }
        }
    }
}

template <class T>
void check_average() {
    const int64_t step = -3;
    for (const uint64_t threshold : {uint64_t{1} << 31, uint64_t{1} << 32}) {
        for (const int64_t count : {0, 1, 6}) {
            std::vector<std::vector<T>> averages, values;
            std::vector<AverageTask<T>> tasks;
            for (uint32_t i = 0; i < 100; ++i) {  // more than one launch holds
                const size_t size = std::array{0, 1, 5, 1030, 4096, 4099}[i % 6] + (i == 98 ? 4096 : 0) + 1;
                averages.emplace_back(size, T{0});
                values.emplace_back(size, T{0});
                for (T& x : averages.back()) x = static_cast<T>(generator()) / 3;
                for (T& x : values.back()) x = static_cast<T>(generator()) / 7;
            }
            const auto before = averages;
            for (uint32_t i = 0; i < 100; ++i) {  // every other one is not aligned
                const size_t skip = i % 2;
                tasks.push_back({averages[i].data() + skip, values[i].data() + skip,
                                 static_cast<int64_t>(averages[i].size() - skip), i});
            }
            average(tasks.data(), tasks.size(), threshold, 7, &count, &step, nullptr);
            const T weight = static_cast<T>(1.0 / (static_cast<double>(count) + 1));
            for (uint32_t i = 0; i < 100; ++i) {
                const size_t skip = i % 2;
                for (size_t e = 0; e < averages[i].size(); ++e) {
                    const T from = before[i][e];
                    if (e < skip) {
                        expect(averages[i][e] == from, "not written in front");
                        continue;
                    }
                    const size_t element = e - skip;
                    const PhiloxStream stream{7, i, static_cast<uint64_t>(step)};
                    const bool kept = philox(stream, static_cast<uint32_t>(element / 4)).word[element % 4] < threshold;
                    const T to = kept ? values[i][e] : T{0};
                    const T way = to - from;
                    const T expected = weight < T{0.5} ? from + weight * way : to - way * (1 - weight);
                    expect(averages[i][e] == expected, "average");
                }
            }
        }
    }
}

}  // namespace

int main() {
    check_selection();
    check_bits();
    check_small_grids(2);
    check_random_grids();
    check_transposes();
    check_words();
    check_average<float>();
    check_average<double>();
    std::puts("passed");
}
